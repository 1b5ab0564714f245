"""A page for each student: `graded/ASSIGNMENT/feedback/STUDENT.html`. One small file, no network, no script.

It says what each exercise earned and why, with the student's own code, written answers and the grader's comments.
Hidden cases are there by name, with their points and with what was asked for, without an input or an expected number.
A student's function has seen the hidden inputs, and everything that runs after it may have: so what a cell printed
is taken from the notebook as submitted, and of errors raised when graded only known words are shown.
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

from cs336_alignment.grading.markup import code, code_style, cut, formula, plain, rich_text, sentence
from cs336_alignment.grading.records import (
    Cell,
    Class,
    Mark,
    Record,
    as_text,
    grade_id,
    judged,
    notebook_of,
    read_cells,
    read_class,
)
from cs336_alignment.grading.results import findings, graded_folder, write_atomically

TEMPLATES = Path(__file__).parent / "templates"
PRINTED = 1_200, 15  # characters and lines of what a cell printed
MESSAGE = 200  # characters of an error
STUB = "*Your answer here.*"  # what a written answer is in the release
STUB_CODE = 'raise NotImplementedError("your code here")'  # and a function
# The words of the errors that Python and torch raise. Others are shown only if they stand in the student's own code.
ERROR_WORDS = frozenset(
    """
    a all allocate an and arange are arg argument arguments at attribute b backward be because block boolean
    broadcast but by call called can cannot cell character class const constant convert could cpu created cuda
    def define defined definition device dict dictionary dim dimension dimensions division does dtype element
    elements else error expected expression f file first float for forgot found from function get given grad
    graph greater grad_fn has have if implicitly import in indented index indexing input int integer invalid is
    iterable item key keyword lambda len less line list literal local mat1 mat2 match maximum method missing
    module more multiplied multiple must name negative never no non non-singleton none NoneType not object of on
    one only operand operands operator or out outputs outside parameter perhaps positional raise raised range
    require required requires return returned same scalar second self sequence set shape shapes should shown
    singleton size sizes statement step str string subscriptable supported syntax take takes tensor tensors than
    that the this through time to too tuple type types unbound unexpected unindent unmatched unpack unsupported
    unterminated use used using value values variable was were when where which with within you zero Bool
    BoolTensor Byte Double Float Half Int Long Tensor The Expected Did you mean maybe meant it message
    """.split()
) | {name for name in dir(builtins) if name.endswith("Error")}


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


def write_feedback(root: Path, assignment: str, students: list[str] | None = None) -> list[Path]:
    """Writes the students' pages, of all who submitted or of some; returns their paths.

    A page whose contents would be the same stays as it is. Raises: ValueError where nothing has been graded.
    """
    return write_feedback_of(read_class(root, assignment), students)


def write_feedback_of(found: Class, students: list[str] | None = None) -> list[Path]:
    folder = graded_folder(found.root, found.assignment) / "feedback"
    records = [r for r in found.submitted() if students is None or r.student in students]
    pages = []
    for record in records:
        path = folder / page_name(record.student)
        state = digest(found, record)
        if state not in beginning(path):
            write_atomically(path, page(found, record, state))
        pages.append(path)
    if students is None:  # of students who are no longer there
        kept = {path.name for path in pages}
        for path in folder.glob("*.html") if folder.is_dir() else []:
            if path.name not in kept:
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
    state = hashlib.sha256(json.dumps([repr(record), repr(found.cells), str(found.due)]).encode())
    name = f"{found.assignment}.ipynb"
    files = [Path(__file__), Path(__file__).with_name("markup.py"), TEMPLATES / "feedback.html"]
    folders = found.autograded(record.student), found.root / "submitted" / record.student / found.assignment
    for path in [*files, *(folder / name for folder in folders)]:
        state.update(hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"-")
    return state.hexdigest()


def page(found: Class, record: Record, state: str = "") -> str:
    """A student's page as HTML."""
    cells = notebook_of(found, record.student)
    own = read_cells(found.root / "submitted" / record.student / found.assignment / f"{found.assignment}.ipynb")
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
    words = vocabulary(cells)
    verdict = verdicts.get(cell.name) or {}
    return Section(
        cell,
        record.marks.get(cell.name, Mark()),
        hint=sentence(str(verdict["hint"])) if verdict.get("hint") else None,
        problem=discreet_problem(str(verdict.get("problem") or ""), words),
        cases=[shown_case(case, words) for case in verdict.get("cases") or []],
        source=code(source) if (source := definition(cell.name, graded.get("source", ""), cells)) else None,
        printed=printed(submitted.get("outputs")),
        error=error(graded.get("outputs"), words),
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
    words, stopped = vocabulary(cells), []
    for cell in cells:
        if cell["cell_type"] == "code" and grade_id(cell) not in named:
            message = error(cell.get("outputs"), words)
            if message:
                stopped.append((code(cut(cell["source"], 2_000, 30)), message))
    return stopped[:10]


# ------------------------------------------------------------------------- what may be said of a run


def vocabulary(cells: list[dict]) -> frozenset[str]:
    """Words that an error may be shown with: those of the notebook's code, and those of errors everywhere."""
    words = set(ERROR_WORDS)
    for cell in cells:
        if cell["cell_type"] == "code":
            words.update(re.findall(r"[^\W\d]\w*", cell["source"]))
    return frozenset(words)


def discreet(text: str, words: frozenset[str]) -> str:
    """A message with dots in the place of numbers and of words that are not known."""
    text = " ".join(plain(text[:5_000]).split())
    digits = re.findall(r"\b\d\b", text)
    shown = words | set(digits) if len(digits) <= 4 else words  # "dimension 1" helps; a row of digits is a number
    text = re.sub(r"\w+(?:\.\d+)?", lambda word: word[0] if word[0] in shown else "…", text)
    return cut(re.sub(r"(?:…[^\w…]{0,3}){3,}", "… ", text), MESSAGE)


def discreet_problem(text: str, words: frozenset[str]) -> str:
    """Why there was nothing to judge; what the student's code said of itself in known words alone."""
    head, colon, tail = text.partition(": ")
    said = re.match(r"(.*\b(?:stopped with|raised)) (.*)$", head)
    if said:
        return f"{said[1]} {discreet(said[2], words)}{colon}{discreet(tail, words)}"
    return f"{plain(head)}{colon}{discreet(tail, words)}" if "not there" in head else plain(text)


def shown_case(case: dict, words: frozenset[str]) -> dict:
    """A case as the page has it: without what the student's function could have said of hidden inputs it has seen."""
    why = str(case.get("why") or "")
    if re.search(r"raised |the text |of type ", why):
        why, at, line = why.partition(", at `")
        known = line.rstrip("`").strip() and all(w in words for w in re.findall(r"[^\W\d]\w*", line))
        why = discreet(why, words) + (at + plain(line) if known and not re.search(r"\d{3}", line) else "")
    return {**case, "why": cut(plain(why), 400), "expects": sentence(str(case.get("expects") or ""))}


def error(outputs, words: frozenset[str]) -> str:
    """The error that stopped a cell when it was graded."""
    for output in outputs or []:
        if isinstance(output, dict) and output.get("output_type") == "error":
            name, message = (discreet(str(output.get(key) or ""), words) for key in ("ename", "evalue"))
            return f"{name or 'Error'}: {message}"
    return ""


def printed(outputs) -> str:
    """What a cell of the submitted notebook had printed, and the error it had stopped with."""
    parts = []
    for output in outputs or []:
        if not isinstance(output, dict):
            continue
        data = output.get("data") if isinstance(output.get("data"), dict) else {}
        if output.get("output_type") == "error":
            parts.append(f"{output.get('ename')}: {output.get('evalue')}\n")
        else:
            parts.append(as_text(output.get("text") or data.get("text/plain")))
    return cut(plain("".join(parts)[:200_000]).strip("\n"), *PRINTED)
