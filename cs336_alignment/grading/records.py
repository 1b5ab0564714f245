"""What is known of a graded class, read once: the gradebook, the reports, the notebooks.

`results`, `feedback`, `class_report` and `alike` all start here. Nothing is written. The gradebook is read with a
handful of queries, however many students there are; a submission that was graded with stock `nbgrader autograde` has
no `report.json`, and what can be known of its cases is read from its notebook.
"""

import json
import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from nbgrader.api import (
    Assignment,
    BaseCell,
    Comment,
    Grade,
    GradeCell,
    Notebook,
    Student,
    SubmittedAssignment,
    SubmittedNotebook,
    TaskCell,
)
from sqlalchemy import create_engine, select
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session

from cs336_alignment.grading.exercise import Exercise, exercises
from cs336_alignment.grading.folders import autograded, read_report
from cs336_alignment.paths import in_course

LARGEST_NOTEBOOK = 50_000_000  # bytes; nothing larger is read


@dataclass(frozen=True)
class Cell:
    """Something that has points: an exercise, or a written answer."""

    name: str  # nbgrader's grade_id
    of: float  # its points
    written: bool  # graded by a person
    title: str  # as a reader knows it: "6. dpo_loss"


@dataclass(frozen=True)
class Mark:
    """What one student has for one cell."""

    automatic: float | None = None
    manual: float | None = None
    extra: float = 0.0
    look_again: bool = False  # nbgrader wants a person to look at it

    @property
    def score(self) -> float | None:
        """Points by hand win over automatic ones; None where nobody has graded yet."""
        base = self.manual if self.manual is not None else self.automatic
        return None if base is None else base + self.extra


@dataclass
class Record:
    """A student in an assignment."""

    student: str
    name: str = ""  # first and last, where the gradebook has them
    submitted: bool = False
    submitted_at: datetime | None = None  # UTC, without a zone, as nbgrader keeps it
    late: timedelta = timedelta(0)
    penalty: float = 0.0  # points
    marks: dict[str, Mark] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    report: dict = field(default_factory=dict)  # report.json, or {}

    def points(self, cells: list[Cell], written: bool | None = None) -> float:
        """The sum over cells: all, or the written ones, or the others; what waits counts 0. Without the penalty."""
        chosen = [cell for cell in cells if written is None or cell.written == written]
        return sum(self.marks.get(cell.name, Mark()).score or 0.0 for cell in chosen)

    def total(self, cells: list[Cell]) -> float:
        return max(0.0, self.points(cells) - self.penalty)

    def waiting(self, cells: list[Cell]) -> list[str]:
        """Cells that a person has to read: without points yet, or with points by hand for an older answer."""
        changed = self.report.get("changed", [])
        waits = {c.name: self.marks.get(c.name, Mark()) for c in cells if self.submitted}
        return [name for name, m in waits.items() if m.score is None or (m.look_again and name in changed)]


@dataclass
class Class:
    """An assignment with all its students, those without a submission included."""

    root: Path
    assignment: str
    due: datetime | None
    cells: list[Cell]
    records: list[Record]  # by student id

    @property
    def maximum(self) -> float:
        return sum(cell.of for cell in self.cells)

    def autograded(self, student: str) -> Path:
        return autograded(self.root, self.assignment, student)

    def submitted(self) -> list[Record]:
        return [record for record in self.records if record.submitted]


def read_class(root: Path, assignment: str) -> Class:
    """Reads everything but the notebooks. Raises: ValueError for a gradebook that is missing, broken, or does not have
    the assignment."""
    database = root / "gradebook.db"
    if not database.is_file():
        raise ValueError(f"there is no {database}: nothing has been graded here yet")
    engine = create_engine(f"sqlite:///{database}")
    try:
        with Session(engine) as session:
            found = read_gradebook(session, root, assignment)
    except DatabaseError as error:
        raise ValueError(
            f"{database} cannot be read as a gradebook ({error.orig}): put a sound copy in its place"
        ) from None
    finally:
        engine.dispose()
    for record in found.submitted():
        record.report = read_report(root, assignment, record.student)
    return found


def read_gradebook(session: Session, root: Path, assignment: str) -> Class:
    """The gradebook's part, in one query for each table."""
    row = session.execute(select(Assignment.id, Assignment.duedate).where(Assignment.name == assignment)).first()
    if row is None:
        known = sorted(session.execute(select(Assignment.name)).scalars())
        raise ValueError(f"{assignment} is not in the gradebook; there are {', '.join(known) or 'no assignments'}")
    key, due = row
    records = {
        student: Record(student, " ".join(filter(None, (first, last))))
        for student, first, last in session.execute(select(Student.id, Student.first_name, Student.last_name))
    }
    submissions = select(
        SubmittedAssignment.student_id, SubmittedAssignment.timestamp, SubmittedAssignment.extension
    ).where(SubmittedAssignment.assignment_id == key)
    for student, at, extension in session.execute(submissions):
        record = records[student]
        record.submitted, record.submitted_at = True, at
        if at and due:
            record.late = max(timedelta(0), at - due - (extension or timedelta(0)))
    ours = (
        select(SubmittedAssignment.student_id, SubmittedNotebook.late_submission_penalty)
        .join(SubmittedNotebook, SubmittedNotebook.assignment_id == SubmittedAssignment.id)
        .where(SubmittedAssignment.assignment_id == key)
    )
    for student, cost in session.execute(ours):
        records[student].penalty += cost or 0.0

    def joined(table, *columns):
        """Rows of grades or comments: student, the cell's name, columns."""
        return session.execute(
            select(SubmittedAssignment.student_id, BaseCell.name, *columns)
            .select_from(table)
            .join(BaseCell, BaseCell.id == table.cell_id)
            .join(SubmittedNotebook, SubmittedNotebook.id == table.notebook_id)
            .join(SubmittedAssignment, SubmittedAssignment.id == SubmittedNotebook.assignment_id)
            .where(SubmittedAssignment.assignment_id == key)
        )

    columns = (Grade.auto_score, Grade.manual_score, Grade.extra_credit, Grade.needs_manual_grade)
    for student, name, automatic, manual, extra, again in joined(Grade, *columns):
        records[student].marks[name] = Mark(automatic, manual, extra or 0.0, bool(again))
    for student, name, by_hand, automatic in joined(Comment, Comment.manual_comment, Comment.auto_comment):
        text = by_hand if by_hand is not None else automatic
        if text and text.strip():
            records[student].comments[name] = text
    cells = graded_cells(session, key, root, assignment)
    return Class(root, assignment, due, cells, sorted(records.values(), key=lambda record: record.student))


def graded_cells(session: Session, key: str, root: Path, assignment: str) -> list[Cell]:
    """The assignment's cells with points, in the notebook's order; `check` cells are worth nothing and left out."""
    rows = []
    for table, code in ((GradeCell, GradeCell.cell_type), (TaskCell, None)):
        columns = (BaseCell.name, table.max_score, code) if code is not None else (BaseCell.name, table.max_score)
        query = select(*columns).select_from(table).join(Notebook, Notebook.id == table.notebook_id)
        rows += [(*row, None)[:3] for row in session.execute(query.where(Notebook.assignment_id == key))]
    titles = cell_titles(root, assignment)
    order = {name: position for position, name in enumerate(titles)}
    cells = [Cell(name, of, kind != "code", titles.get(name) or name) for name, of, kind in rows if of]
    return sorted(cells, key=lambda cell: (order.get(cell.name, len(order)), cell.written, cell.name))


def cell_titles(root: Path, assignment: str) -> dict[str, str]:
    """The cells' ids in the notebook's order, each with the heading above it: "6. dpo_loss", "10a."."""
    titles, heading = {}, ""
    for folder in ("solutions", "assignments"):
        for cell in read_cells(in_course(root, folder, assignment, f"{assignment}.ipynb")):
            name = grade_id(cell)
            if cell["cell_type"] == "markdown" and not name:
                found = re.findall(r"^#{1,6}\s+(.+)$", cell["source"], re.MULTILINE)
                heading = re.sub(r"\s*\([^()]*\)\s*$|`", "", found[-1]).strip() if found else heading
            elif name:
                bare = heading.endswith(".")  # "10a.": a number alone
                titles.setdefault(name, f"{heading} {name.removeprefix('written-')}" if bare else heading)
        if titles:
            break
    return titles


# ------------------------------------------------------------------------------------------- files


def read_cells(path: Path) -> list[dict]:
    """The cells of a notebook, their source as text and their outputs a list; [] where there is none to be read."""
    try:
        if path.stat().st_size > LARGEST_NOTEBOOK:
            return []
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [
            {**c, "source": as_text(c.get("source")), "cell_type": str(c["cell_type"]),
             "outputs": dictionaries(c.get("outputs"))}
            for c in cells
        ]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def dictionaries(outputs) -> list[dict]:
    """A cell's outputs: what else stands in their place is left out."""
    return [output for output in outputs if isinstance(output, dict)] if isinstance(outputs, list) else []


def as_text(source) -> str:
    """A notebook keeps text as a list of lines, or in one."""
    return "".join(map(str, source)) if isinstance(source, list) else str(source or "")


def grade_id(cell: dict) -> str:
    """nbgrader's id of a cell, or ""."""
    metadata = cell.get("metadata")
    ours = metadata.get("nbgrader") if isinstance(metadata, dict) else None
    return str(ours.get("grade_id") or "") if isinstance(ours, dict) else ""


def notebook_of(found: Class, student: str) -> list[dict]:
    """The cells of a student's graded notebook."""
    return read_cells(found.autograded(student) / f"{found.assignment}.ipynb")


def exercises_of(assignment: str) -> dict[str, Exercise]:
    """The assignment's exercises by name; none for an assignment that is not of this kind."""
    try:
        return {exercise.name: exercise for exercise in exercises(assignment)}
    except ValueError:
        return {}


def judged(record: Record, cells: list[dict], assignment: str) -> dict[str, dict]:
    """What the judge found, by exercise, in report.json's form.

    Without a report: from the text that the judge left under the points cells of the notebook.
    """
    if isinstance(record.report.get("exercises"), dict):
        return record.report["exercises"]
    known = exercises_of(assignment)
    found = {}
    for cell in cells:
        exercise = known.get(grade_id(cell))
        text = exercise and judge_text(exercise, cell.get("outputs"))
        if text:
            found[exercise.name] = from_text(exercise, text)
    return found


def judge_text(exercise: Exercise, outputs) -> str:
    """`str(Score)` among the outputs of a points cell, or ""."""
    for output in dictionaries(outputs):
        data = output.get("data") if isinstance(output.get("data"), dict) else {}
        for text in (as_text(data.get("text/plain")), as_text(output.get("text"))):
            if text.startswith(f"{exercise.name}: ") and " points\n" in text + "\n":
                return text
    return ""


def from_text(exercise: Exercise, text: str) -> dict:
    """The inverse of `str(Score)`, with the points and sentences of the cases from the exercise itself."""
    hint, problem, cases, lines = None, None, [], text.splitlines()[1:]
    for line in lines:
        if line.startswith("Looks like a known mistake: "):
            hint = line.removeprefix("Looks like a known mistake: ")
        elif not line.startswith("  "):
            problem = f"{problem}\n{line}" if problem else line
    for case in exercise.cases:
        start = re.compile(rf"  (right|WRONG)  {re.escape(case.name)}(?:: (.*))?$")
        match = next(filter(None, map(start.match, lines)), None)
        right = bool(match) and match[1] == "right"
        cases.append(
            {"name": case.name, "points": case.points if right else 0.0, "of": case.points, "visible": case.visible,
             "right": right, "why": (match and match[2]) or "", "expects": case.expects}
        )  # fmt: skip
    points = sum(case["points"] for case in cases)
    return {"points": points, "of": exercise.points, "hint": hint, "problem": problem, "cases": cases}
