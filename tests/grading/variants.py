"""Honest solutions of an assignment that look different: from references and unusual right answers, other names."""

import ast
import inspect
import random
import textwrap

from cs336_alignment.grading.exercise import exercises

WORDS = (
    "alpha beta gain value score ratio delta shift term part total partial left right good bad first second ours "
    "row column width logs diff weight scale mass point level mean target source guess answer token base top low high"
).split()
REMARKS = (
    "the formula from the lecture", "careful with the sign here", "I checked this against the table on the board",
    "works for batches too", "see equation", "no exp here", "this is the part that took me an hour", "mean over pairs",
    "same trick as before", "shapes must agree", "not sure this is the shortest way", "simple version first",
    "follows from Bayes", "stay in log space", "sum over the last axis", "remember the reference model",
)  # fmt: skip


def renamed(source: str, rng: random.Random) -> str:
    """Other names for all local variables and arguments, and remarks between the lines."""
    tree = ast.parse(source)
    arguments = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names = {}
    for name in sorted(arguments | stored):
        names[name] = f"{rng.choice(WORDS)}_{rng.choice(WORDS)}" if rng.random() < 0.7 else name
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.arg = names.get(node.arg, node.arg)
        elif isinstance(node, ast.Name):
            node.id = names.get(node.id, node.id)
    lines = []
    for line in ast.unparse(tree).splitlines():
        if rng.random() < 0.3 and line.startswith(" "):
            lines.append(" " * (len(line) - len(line.lstrip())) + "# " + " ".join(rng.sample(REMARKS, 1)))
        lines.append(line)
    return "\n".join(lines)


class Otherwise(ast.NodeTransformer):
    """The same mathematics, written otherwise: operands change places, a step gets a line and a name of its own."""

    def __init__(self, rng: random.Random):
        self.rng, self.made = rng, 0

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.op, ast.Add | ast.Mult) and self.rng.random() < 0.5:
            node.left, node.right = node.right, node.left
        return node

    def visit_Return(self, node: ast.Return) -> list[ast.stmt] | ast.Return:
        self.generic_visit(node)
        return self.apart(node) if node.value is not None else node

    def visit_Assign(self, node: ast.Assign) -> list[ast.stmt]:
        self.generic_visit(node)
        return self.apart(node)

    def apart(self, node: ast.Return | ast.Assign) -> list[ast.stmt]:
        """Some of the statement's subexpressions on lines before it."""
        before = []
        for parent in ast.walk(node.value):
            for name in ("left", "right", "value"):
                part = getattr(parent, name, None)
                if isinstance(part, ast.BinOp | ast.Call) and not self.hidden(node.value) and self.rng.random() < 0.25:
                    self.made += 1
                    step = ast.Name(f"step{self.made}", ast.Store())
                    before.insert(0, ast.Assign([step], part))
                    setattr(parent, name, ast.Name(step.id, ast.Load()))
        if self.rng.random() < 0.4:
            self.made += 1
            before.append(ast.Assign([ast.Name(f"step{self.made}", ast.Store())], node.value))
            node.value = ast.Name(f"step{self.made}", ast.Load())
        return [*before, node]

    @staticmethod
    def hidden(expression: ast.AST) -> bool:
        """Whether names are bound inside an expression: its parts mean nothing outside."""
        return any(isinstance(n, ast.Lambda | ast.comprehension | ast.IfExp) for n in ast.walk(expression))


def otherwise(source: str, rng: random.Random) -> str:
    return ast.unparse(ast.fix_missing_locations(Otherwise(rng).visit(ast.parse(source))))


def definition(function, name: str) -> str | None:
    """The source of a function under another name; None for what is no plain `def`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    if not tree.body or not isinstance(tree.body[0], ast.FunctionDef):
        return None
    tree.body[0].name = name
    return ast.unparse(tree)


def choices(assignment: str, solutions: dict[str, str]) -> dict[str, list[str]]:
    """Right definitions by exercise: the solution's and the unusual ones that have a source of their own."""
    found = {}
    for exercise in (e for e in exercises(assignment) if not e.optional):
        unusual = filter(None, (definition(f, exercise.name) for f in exercise.unusual))
        found[exercise.name] = [ast.unparse(ast.parse(solutions[f"solution-{exercise.name}"])), *unusual]
    return found


def honest(options: dict[str, list[str]], rng: random.Random) -> dict[str, str]:
    """One student's definitions, by exercise."""
    return {name: renamed(otherwise(rng.choice(texts), rng), rng) for name, texts in options.items()}
