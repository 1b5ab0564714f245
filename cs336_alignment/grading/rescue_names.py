"""Which names a cell's code binds, and whether to an answer or to the stub of the release.

Cells are parsed, never run. Python's parser stops by itself at code that is nested too deeply.
"""

import ast
import re
import threading
import warnings
from functools import lru_cache

STUB = 'raise NotImplementedError("your code here")'
LONGEST_PARSED = 200_000  # characters: syntax trees are large, and an honest cell has some thousand

# Cell magics under which the rest of the cell runs as ordinary code.
TRANSPARENT = re.compile(r"\s*%%(time|capture|prun)\b[^\n]*")
MAGIC = re.compile(r"^(\s*)[%!?].*$", re.MULTILINE)

QUIET = threading.Lock()  # warnings are turned off for all threads at once
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)


def parsed(source: str) -> list[ast.stmt] | None:
    """The statements of a cell, IPython's magics left out; None if it does not parse."""
    if source.lstrip().startswith("%%"):
        if not TRANSPARENT.match(source):
            return []  # a cell of another language binds nothing
        source = TRANSPARENT.sub("", source, count=1)
    for text in (source, MAGIC.sub(r"\1pass", source)):  # "%" may also begin a line of honest code
        try:
            with QUIET, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of strange escapes in strings
                return ast.parse(text).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return None


def raises_not_implemented(statement: ast.stmt) -> bool:
    raised = statement.exc if isinstance(statement, ast.Raise) else None
    raised = raised.func if isinstance(raised, ast.Call) else raised
    return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"


def is_stub(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a body is as released, or nothing at all: a docstring, `pass`, `...`, and the stub's raise."""
    for statement in function.body:
        if isinstance(statement, ast.Pass):
            continue
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue
        return raises_not_implemented(statement)
    return True


def is_definition(value: ast.expr | None, name: str) -> bool:
    """Whether an assigned value may be a function: `f = f(x)` and `f = 1` use a name up, they define nothing."""
    if isinstance(value, ast.Call):
        return not (isinstance(value.func, ast.Name) and value.func.id == name)
    return isinstance(value, ast.Lambda | ast.Name | ast.Attribute | ast.IfExp | ast.Subscript)


def bindings(source: str) -> dict[str, bool] | None:
    """The names that a cell binds at top level; True: to what may be an answer, False: to a stub or to a plain value.

    None if the cell does not parse. What is bound last counts. Inside `if`, `try`, `with` and loops is top level too.
    """
    return None if len(source) > LONGEST_PARSED else bound(source)


@lru_cache(maxsize=512)  # the same cell is asked about for every name
def bound(source: str) -> dict[str, bool] | None:
    """See `bindings`."""
    body = parsed(source)
    if body is None:
        return None
    found: dict[str, bool] = {}
    waiting = list(reversed(body))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.name] = not is_stub(node)
        elif isinstance(node, ast.ClassDef):
            found[node.name] = True
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0]: True for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if node.value else []
            for target in targets:
                for name in target.elts if isinstance(target, ast.Tuple | ast.List) else [target]:
                    if isinstance(name, ast.Name):
                        found[name.id] = is_definition(node.value, name.id)
        else:
            inner = [getattr(node, field, []) for field in ("body", "orelse", "finalbody")]
            inner += [handler.body for handler in getattr(node, "handlers", [])]
            inner += [case.body for case in getattr(node, "cases", [])]
            waiting += [statement for block in reversed(inner) for statement in reversed(block)]
    return found


@lru_cache(maxsize=512)
def used(source: str) -> frozenset[str]:
    """The names that a cell's code mentions."""
    body = (parsed(source) if len(source) <= LONGEST_PARSED else None) or []
    return frozenset(node.id for statement in body for node in ast.walk(statement) if isinstance(node, ast.Name))


def strength(source: str, name: str) -> int:
    """How well a cell defines a name: 2 for an answer, 1 for what looks like one but does not parse, else 0."""
    if name not in source:
        return 0
    found = bindings(source)
    if found is not None:
        return 2 if found.get(name) else 0
    looks = re.search(rf"^(async\s+def|def|class)\s+{re.escape(name)}\b|^{re.escape(name)}\s*=", source, re.MULTILINE)
    return 1 if looks and STUB not in source else 0


def spoils(source: str, name: str) -> bool:
    """Whether a cell takes a name away: binds it to a stub or to a plain value."""
    return name in source and (bindings(source) or {}).get(name) is False


def additions(edited: str, released: str, definitions_only: bool = False) -> str:
    """What a student wrote into a locked cell: its definitions, imports and assignments that are not in the release."""
    kinds = DEFINITIONS if definitions_only else (*DEFINITIONS, ast.Assign, ast.AnnAssign)
    if len(edited) > LONGEST_PARSED:
        return ""
    try:
        known = {ast.dump(statement) for statement in parsed(released) or []}
        new = [s for s in parsed(edited) or [] if isinstance(s, kinds) and ast.dump(s) not in known]
        new = [s for s in new if not (isinstance(s, ast.FunctionDef) and is_stub(s))]
        return "\n".join(ast.unparse(statement) for statement in new)
    except (RecursionError, MemoryError):
        return ""
