"""A page for each student: `graded/ASSIGNMENT/feedback/STUDENT.html`. One small file, no network, no script.

It says what each exercise earned and why, with the student's own code, written answers and the grader's comments.
Hidden cases are there by name, with their points and with what was asked for, without an input or an expected number.
A student's function has seen the hidden inputs, and everything that runs after it may have, so what it says could be
those inputs. What a cell printed is taken from the notebook as submitted. Of an error raised when graded the page has
its kind, the student's own line, and the message only if it is one of Python's or torch's commonest, with names from
that line and without numbers.
Of a wrong value of a hidden case it has what `compare.Difference.without_numbers` says. A visible case shows the number
that came out, as `check` does: a function that kept a hidden input can return it there, one number a case.
"""

import builtins
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cs336_alignment.grading.editions import NOT_HERE
from cs336_alignment.grading.markup import code, code_style, cut, formula, plain, rich_text, sentence
from cs336_alignment.grading.records import (
    Cell,
    Class,
    Mark,
    Record,
    as_text,
    dictionaries,
    exercises_of,
    grade_id,
    judged,
    notebook_of,
    read_cells,
    read_class,
)
from cs336_alignment.grading.rescue_files import shown
from cs336_alignment.grading.results import findings, graded_folder, write_atomically
from cs336_alignment.grading.sandbox import INTERRUPTED

TEMPLATES = Path(__file__).parent / "templates"
PRINTED = 1_200, 15  # characters and lines of what a cell printed
STUB = "*Your answer here.*"  # what a written answer is in the release
STUB_CODE = 'raise NotImplementedError("your code here")'  # and a function
# To choose among many is to spell: of code with more, no line and no name is shown. Ours have 250 in a notebook, 60.
MOST_LINES, MOST_NAMES = 2_000, 200  # of a notebook, of a cell
ERRORS = frozenset(
    {name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, BaseException)}
    | {"DeadKernelError", "JSONDecodeError", "LinAlgError", "OutOfMemoryError", "UnsupportedOperation"}
)
TYPES = frozenset("bool dict float function generator int list method NoneType set str Tensor tuple type".split())
# Messages that may be on a page, with … for what differs: numbers stay away, a name is shown if the notebook has it.
MESSAGES = frozenset(
    f"""
    {INTERRUPTED}
    your code here
    … is what this assignment asks you to write; {NOT_HERE}
    This cell got no further: the kernel died
    This cell got no further: it ran longer than … seconds and could not be interrupted
    This cell got no further: it took more than … GB of memory
    This cell got no further: it printed more than … MB
    This cell got no further: the time for the whole notebook was up
    name '…' is not defined
    cannot access local variable '…' where it is not associated with a value
    No module named '…'
    '…'
    '…' object is not callable
    '…' object is not iterable
    '…' object is not subscriptable
    '…' object does not support item assignment
    '…' object has no attribute '…'
    type object '…' has no attribute '…'
    module '…' has no attribute '…'
    object of type '…' has no len()
    cannot unpack non-iterable … object
    …() missing … required positional argument: '…'
    …() missing … required positional arguments: '…' and '…'
    …() got an unexpected keyword argument '…'
    …() takes … positional argument but … were given
    …() takes … positional arguments but … were given
    unsupported operand type(s) for +: '…' and '…'
    unsupported operand type(s) for -: '…' and '…'
    unsupported operand type(s) for *: '…' and '…'
    unsupported operand type(s) for /: '…' and '…'
    too many values to unpack (expected …)
    not enough values to unpack (expected …, got …)
    list index out of range
    tuple index out of range
    list indices must be integers or slices, not …
    string index out of range
    division by zero
    math domain error
    math range error
    maximum recursion depth exceeded
    invalid syntax
    invalid syntax. Perhaps you forgot a comma?
    unexpected indent
    unindent does not match any outer indentation level
    expected ':'
    '(' was never closed
    '[' was never closed
    '{{' was never closed
    unmatched ')'
    unterminated string literal (detected at line …)
    expected an indented block after function definition on line …
    '…' outside function
    The size of tensor a (…) must match the size of tensor b (…) at non-singleton dimension …
    mat1 and mat2 shapes cannot be multiplied (…x… and …x…)
    mat1 and mat2 must have the same dtype, but got Float and Double
    expected m1 and m2 to have the same dtype, but got: float != double
    expected m1 and m2 to have the same dtype, but got: double != float
    shape '[…]' is invalid for input of size …
    index … is out of bounds for dimension … with size …
    Dimension out of range (expected to be in range of […], but got …)
    index out of range in self
    too many indices for tensor of dimension …
    Index tensor must have the same number of dimensions as input tensor
    Sizes of tensors must match except in dimension …. Expected size … but got size … for tensor number … in the list
    stack expects each tensor to be equal size, but got […] at entry … and […] at entry …
    expected Tensor as element … in argument …, but got …
    …(): Expected dtype int64 for index
    …(): Expected dtype int32/int64 for index
    a Tensor with … elements cannot be converted to Scalar
    only one element tensors can be converted to Python scalars
    Boolean value of Tensor with more than one value is ambiguous
    element … of tensors does not require grad and does not have a grad_fn
    grad can be implicitly created only for scalar outputs
    a leaf Variable that requires grad is being used in an in-place operation
    Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead
    zero-dimensional tensor (at position …) cannot be concatenated
    """.replace("\n    ", "\n")
    .strip()
    .split("\n")
)


@dataclass
class Section:
    """An exercise or a written answer on the page."""

    cell: Cell
    mark: Mark
    hint: Markup | None = None
    problem: str = ""
    cases: list[dict] = field(default_factory=list)
    source: Markup | None = None  # the student's code, in colours
    printed: str = ""
    error: str = ""
    answer: Markup | None = None  # a written answer
    comments: list[Markup] = field(default_factory=list)

    @property
    def same(self) -> str:
        """What is wrong in every case, if that is one thing: "raised NotImplementedError: your code here"."""
        reasons = {"" if case.get("right") else case["why"] for case in self.cases}
        return reasons.pop() if len(reasons) == 1 and len(self.cases) > 1 else ""

    @property
    def state(self) -> str:
        """One of waiting, full, none, part."""
        score = self.mark.score
        if score is None:
            return "waiting"
        return "full" if score >= self.cell.of else "none" if score <= 0 else "part"


def write_feedback(root: Path, assignment: str) -> list[Path]:
    """Writes the pages of all who submitted; returns their paths.

    A page whose contents would be the same stays as it is. Raises: ValueError where nothing has been graded.
    """
    return write_feedback_of(read_class(root, assignment))


def write_feedback_of(found: Class, notes: list[str] | None = None) -> list[Path]:
    """The same; a page that cannot be made costs no other: a sentence on it is added to the notes."""
    folder = graded_folder(found.root, found.assignment) / "feedback"
    pages = []
    for record in found.submitted():
        path = folder / page_name(record.student)
        try:
            state = digest(found, record)
            if state not in beginning(path):
                write_atomically(path, page(found, record, state))
        except Exception as error:  # whatever a student made of a notebook
            if notes is not None:
                notes.append(f"no feedback page for {shown(record.student)}: {type(error).__name__}: {error!s:.200}")
            continue
        pages.append(path)
    kept = {path.name for path in pages}
    for path in folder.glob("*.html") if folder.is_dir() else []:
        if path.name not in kept:  # of a student who is no longer there, or of another grade
            path.unlink()
    return pages


def page_name(student: str) -> str:
    """A file name for any student id: what could be a path, or no name on some computer, is written in %XX."""
    name = quote(student, safe=" @+,=~")  # letters, digits and _.- too
    if not name.strip(". ") or re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name):
        name = "%" + name.encode().hex()
    if len(name) > 150:
        name = name[:100] + hashlib.sha256(student.encode("utf-8", "replace")).hexdigest()[:16]
    return name.replace(".", "%2E", 1) + ".html" if name.startswith(".") else name + ".html"


def beginning(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(600)
    except (OSError, UnicodeDecodeError):
        return ""


def digest(found: Class, record: Record) -> str:
    """Changes when anything changes from which a page is made, the code that makes it included."""
    cases = [e.cases for e in exercises_of(found.assignment).values()] if "exercises" not in record.report else []
    told = [[(c.name, c.points, c.visible, c.expects) for c in of] for of in cases]  # see records.from_text
    state = hashlib.sha256(json.dumps([repr(record), repr(found.cells), str(found.due), told]).encode())
    made_by = [Path(__file__).with_name(f"{name}.py") for name in ("feedback", "markup", "records", "results")]
    made_by += [TEMPLATES / "feedback.html", TEMPLATES / "style.css"]
    graded = found.autograded(record.student) / f"{found.assignment}.ipynb"
    for path in [*made_by, graded, submitted_file(found, record)]:
        state.update(hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"-")
    return state.hexdigest()


def submitted_file(found: Class, record: Record) -> Path:
    """The file that was graded: it may have come under another name."""
    folder = found.root / "submitted" / record.student / found.assignment
    return folder / str(record.report.get("file") or f"{found.assignment}.ipynb")


def page(found: Class, record: Record, state: str = "") -> str:
    """A student's page as HTML."""
    cells = notebook_of(found, record.student)
    own = read_cells(submitted_file(found, record))
    verdicts = judged(record, cells, found.assignment)
    sections = [
        written_section(cell, record, cells) if cell.written else exercise_section(cell, record, cells, own, verdicts)
        for cell in found.cells
    ]
    return (
        templates()
        .get_template("feedback.html")
        .render(
            state=state,
            assignment=found.assignment,
            record=record,
            sections=sections,
            total=record.total(found.cells),
            before=record.points(found.cells),
            maximum=found.maximum,
            waiting=sum(s.cell.of for s in sections if s.state == "waiting"),
            due=found.due,
            late=duration(record.late.total_seconds()),
            findings=[plain(text) for text in findings(record)],
            file=plain(str(record.report.get("file") or "")),
            others=other_code(cells, found),
            light=Markup(code_style(False)),
            dark=Markup(code_style(True)),
        )
    )


def duration(seconds: float) -> str:
    """How late, for a person: "3 hours", "1.5 days"; "" for not at all."""
    for size, name in ((86_400, "days"), (3_600, "hours"), (60, "minutes"), (1, "seconds")):
        if seconds >= size:
            return f"{seconds / size:.2g} {name if seconds / size >= 1.05 else name[:-1]}"
    return ""


def templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,  # whatever the file is called
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"points": lambda x: f"{round(x, 2) + 0.0:g}", "sentence": sentence, "formula": formula}
    return environment


def comments_on(name: str, record: Record) -> list[Markup]:
    """What the grader wrote at a cell, or at the function above it."""
    return [rich_text(record.comments[key]) for key in (f"solution-{name}", name) if key in record.comments]


def exercise_section(cell: Cell, record: Record, cells: list[dict], own: list[dict], verdicts: dict) -> Section:
    solution = f"solution-{cell.name}"
    graded = next((c for c in cells if grade_id(c) == solution), {})
    submitted = next((c for c in own if grade_id(c) == solution), {})
    lines = lines_of(cells)
    verdict = verdicts.get(cell.name) or {}
    return Section(
        cell,
        record.marks.get(cell.name, Mark()),
        hint=sentence(str(verdict["hint"])) if verdict.get("hint") else None,
        problem=discreet_problem(str(verdict.get("problem") or ""), cell.name),
        cases=[shown_case(case, lines) for case in verdict.get("cases") or []],
        source=code(source) if (source := definition(cell.name, graded.get("source", ""), cells)) else None,
        printed=printed(submitted.get("outputs")),
        error=error(graded),
        comments=comments_on(cell.name, record),
    )


def definition(name: str, source: str, cells: list[dict]) -> str:
    """The code that was graded: the function's own cell, or while that is the stub, the last cell that defines it."""
    begins = re.compile(rf"^(async )?def {re.escape(name)}\b|^{re.escape(name)}\s*=", re.MULTILINE)
    if begins.search(source) and STUB_CODE not in source:
        return source
    others = [c["source"] for c in cells if c["cell_type"] == "code" and not grade_id(c) and begins.search(c["source"])]
    return next((text for text in reversed(others) if STUB_CODE not in text), source)


def written_section(cell: Cell, record: Record, cells: list[dict]) -> Section:
    text = next((c["source"] for c in cells if grade_id(c) == cell.name), "").strip()
    answer = rich_text(text) if text and text != STUB else None
    return Section(cell, record.marks.get(cell.name, Mark()), answer=answer, comments=comments_on(cell.name, record))


def other_code(cells: list[dict], found: Class) -> list[tuple[Markup, str]]:
    """Cells that stopped and belong to no exercise: their code, and the error."""
    named = {f"solution-{cell.name}" for cell in found.cells} | {cell.name for cell in found.cells}
    stopped = []
    for cell in cells:
        if cell["cell_type"] == "code" and grade_id(cell) not in named:
            message = error(cell)
            if message:
                stopped.append((code(cut(cell["source"], 2_000, 30)), message))
    return stopped[:10]


# ------------------------------------------------------------------------- what may be said of a run


def lines_of(cells: list[dict]) -> frozenset[str]:
    """The lines of the notebook's code, as an error's line is kept. A line that is in no cell was made in the run."""
    code = "\n".join(cell["source"] for cell in cells if cell["cell_type"] == "code")
    lines = frozenset(line.strip()[:100] for line in code.split("\n") if line.strip())
    return lines if len(lines) <= MOST_LINES else frozenset()


def names_in(source: str) -> frozenset[str]:
    """Names that the message of an error in this code may be shown with."""
    names = frozenset(re.findall(r"[^\W\d]\w*", source))
    return names if len(names) <= MOST_NAMES else frozenset()


def known_message(text: str, names: frozenset[str]) -> str:
    """A message if it is a common one, without its numbers; "" for others. Words in any order could be a code."""
    text = " ".join(plain(text[:1_000]).split()).rstrip(".")
    text = re.sub(r" \([^()]+, line \d+\)$", "", text)  # where a cell's syntax is wrong: the file is no file
    form = re.sub(r"'\w+'", "'…'", re.sub(r"^[\w.<>]+(?=\(\)|(?: is what this assignment ))", "…", text))
    form = re.sub(r"-?(?<![a-wyz\d])\d+(?:\.\d+)?", "…", re.sub(r"\[[-\d, ]+\]", "[…]", form))
    form = re.sub(r"(?<=non-iterable )\w+(?= object)|(?<=slices, not )\w+|(?<=, but got )\w+$", "…", form)
    if form not in MESSAGES:
        return ""
    said = (name if name in names | TYPES else "…" for name in re.findall(r"'(\w+)'", text))
    return re.sub("'…'", lambda _: f"'{next(said, '…')}'", form)


def discreet(name: str, message: str, names: frozenset[str] = frozenset()) -> str:
    """An error as a page has it."""
    kind, message = name if name in ERRORS else "an error of its own kind", known_message(message, names)
    return f"{kind}: {message}" if message else kind


def discreet_problem(text: str, exercise: str) -> str:
    """Why there was nothing to judge. The judge's own sentences stay as they are; see `judge.what_went_wrong`."""
    stopped = re.match(r"(The function's cases stopped with) ([^:]*):? ?(.*)", text, re.DOTALL)
    if stopped:
        return f"{stopped[1]} {discreet(stopped[2], stopped[3])}"
    absent, colon, message = text.partition(" was not there when its cases ran: ")
    if colon:
        known = known_message(message, frozenset({exercise}))
        return f"{plain(absent)}{colon.rstrip(': ')}{': ' * bool(known)}{known}."
    return plain(text)


def shown_case(case: dict, lines: frozenset[str]) -> dict:
    """A case as the page has it: without what the student's function could have said of hidden inputs it has seen."""
    why = str(case.get("why") or "")
    if why.startswith("raised "):
        why = shown_error(why, lines)
    elif not case.get("visible") and re.search(r"\d{3}|shape \(|the text '|of type ", why):
        why = "the result is not as expected"  # a report from before compare.py left these out
    return {**case, "why": cut(plain(why), 400), "expects": sentence(str(case.get("expects") or ""))}


def shown_error(why: str, lines: frozenset[str]) -> str:
    """`compare.difference`'s text about an error: "raised ValueError: message, at `line`"."""
    wanted = re.fullmatch(r"raised (\w+); it should raise (\w+)", why)
    if wanted and wanted[2] in ERRORS:
        return f"raised {discreet(wanted[1], '')}; it should raise {wanted[2]}"
    begin, at, line = why.removeprefix("raised ").rpartition(", at `")
    name, _, message = (begin if at else line).partition(": ")
    own = line.removesuffix("`") if at and line.removesuffix("`") in lines else ""
    return f"raised {discreet(name, message, names_in(own))}" + (f", at `{own}`" if own else "")


def error(cell: dict) -> str:
    """The error that stopped a cell when it was graded."""
    found = next((o for o in dictionaries(cell.get("outputs")) if o.get("output_type") == "error"), None)
    return discreet(str(found.get("ename")), str(found.get("evalue")), names_in(cell["source"])) if found else ""


def printed(outputs) -> str:
    """What a cell of the submitted notebook had printed, and the error it had stopped with."""
    parts = []
    for output in dictionaries(outputs):
        data = output.get("data") if isinstance(output.get("data"), dict) else {}
        if output.get("output_type") == "error":
            parts.append(f"{output.get('ename')}: {output.get('evalue')}\n")
        else:
            parts.append(as_text(output.get("text") or data.get("text/plain")))
    return cut(plain("".join(parts)[:200_000]).strip("\n"), *PRINTED)
