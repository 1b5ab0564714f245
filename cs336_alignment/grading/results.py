"""The list of grades of a class, and what happens after grading: `graded/ASSIGNMENT/grades.csv`, pages, report.

The list has a row for each student of the gradebook and a column for each exercise and written answer, to be read by
a person in a spreadsheet or by a program. What nobody has graded yet is empty, never 0.
"""

import contextlib
import csv
import io
import os
from dataclasses import dataclass
from pathlib import Path

from cs336_alignment.grading.folders import is_graded, only_one, submissions, unfinished
from cs336_alignment.grading.gradebook import assignment_names, configuration, late_days, open_gradebook
from cs336_alignment.grading.late import read_extensions, without_effect
from cs336_alignment.grading.records import Cell, Class, Mark, Record, read_class
from cs336_alignment.grading.rescue_files import shown

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # a spreadsheet would compute a cell that starts so
MOST_NAMES = 10  # in a sentence


def write_grades(root: Path, assignment: str) -> Path:
    """Writes the list of grades; returns its path. Raises: ValueError where nothing has been graded."""
    return write_grades_of(read_class(root, assignment))


def write_grades_of(found: Class) -> Path:
    head = ["student", "name", *(cell.name for cell in found.cells), "automatic", "manual", "waiting"]
    head += ["late penalty", "total", "maximum", "submitted at", "findings"]
    text = io.StringIO()
    lines = csv.writer(text)
    lines.writerow(map(harmless, head))
    lines.writerows(row(record, found.cells, found.maximum) for record in found.records)
    path = graded_folder(found.root, found.assignment) / "grades.csv"
    write_atomically(path, "\ufeff" + text.getvalue())  # the mark tells Excel that this is UTF-8
    return path


def row(record: Record, cells: list[Cell], maximum: float) -> list:
    """A student's line; without a submission there are no points, and the last column says so."""
    who = [harmless(record.student), harmless(record.name)]
    if not record.submitted:
        return [*who, *[""] * (len(cells) + 7), "nothing handed in"]
    marks = [record.marks.get(cell.name, Mark()) for cell in cells]
    return [
        *who,
        *(number(mark.score) for mark in marks),
        number(sum(mark.automatic or 0.0 for mark in marks if mark.manual is None)),
        number(sum((mark.manual or 0.0) + mark.extra for mark in marks)),
        len(record.waiting(cells)),
        number(record.penalty),
        number(record.total(cells)),
        number(maximum),
        f"{record.submitted_at:%Y-%m-%d %H:%M:%S} UTC" if record.submitted_at else "",
        harmless(short(findings(record))),
    ]


def findings(record: Record) -> list[str]:
    """Sentences on what was odd about a submission: the sanitiser's, and what crashed."""
    report = record.report
    crashes = report.get("crashes") or []
    return [str(x) for x in report.get("findings") or []] + [
        f"{c.get('cell', '?')}: {c.get('why', '')}" for c in crashes
    ]


def short(sentences: list[str], most: int = 200) -> str:
    text = "; ".join(" ".join(sentence.split()) for sentence in sentences)
    return text if len(text) <= most else text[: most - 1] + "…"


def number(value: float | None) -> str | float:
    """Points without floating-point dust; empty where there are none."""
    return "" if value is None else round(value, 4) + 0.0


def harmless(text: str) -> str:
    """Text that no spreadsheet takes for a formula: an apostrophe in front says that it is text."""
    text = text.replace("\0", "")
    return "'" + text if text.lstrip(" \ufeff\u200b").startswith(FORMULA) or text.startswith(FORMULA) else text


def graded_folder(root: Path, assignment: str) -> Path:
    return root / "graded" / assignment


def write_atomically(path: Path, text: str) -> None:
    """A reader finds the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8", errors="replace", newline="")  # JSON can hold half a character
    part.replace(path)


# ---------------------------------------------------------------------------------- after grading


@dataclass(frozen=True)
class After:
    """Where things are after grading."""

    grades: Path
    report: Path
    pages: list[Path]
    waiting: int  # answers that a person has to read
    alike: int  # pairs of submissions to look at
    notes: list[str]  # sentences on what may not be meant


def after_grading(root: Path, assignment: str) -> After:
    """Writes the list of grades, the feedback pages and the report on the class anew from what is graded.

    A page that would not change is left alone, so that it is cheap.
    Late penalties are brought up to date first, since points given by hand count in them.
    Raises: ValueError where nothing has been graded.
    """
    from cs336_alignment.grading.class_report import write_class_report_of
    from cs336_alignment.grading.feedback import write_feedback_of

    notes = settle_penalties(root)
    found = read_class(root, assignment)
    if new := newer(found):
        names = ", ".join([shown(student) for student in new[:MOST_NAMES]] + ["..."] * (len(new) > MOST_NAMES))
        notes.append(f"{len(new)} not graded yet, or newer than their grade: {names}; say `grade`")
    grades = write_grades_of(found)
    pages = write_feedback_of(found, notes)
    report, alike = write_class_report_of(found)
    waiting = sum(len(record.waiting(found.cells)) for record in found.records)
    return After(grades, report, pages, waiting, alike, notes)


def newer(found: Class) -> list[str]:
    """Students whose submission is not graded, or came after its grade. (What nbgrader graded itself cannot tell.)"""
    records, names = {record.student: record for record in found.records}, []
    for student in submissions(found.root, found.assignment):
        record = records.get(student)
        stopped = unfinished(found.root, found.assignment, student).exists()
        if record is None or not record.submitted or (stopped and not record.report):
            names.append(student)
        elif "digest" in record.report and not is_graded(found.root, found.assignment, student, record.report):
            names.append(student)
    return names


def settle_penalties(root: Path) -> list[str]:
    """Late days as nbgrader_config.py has them; without a percentage in it the gradebook stays as it is.

    Returns sentences on what has no effect. Nothing is written while a `grade` is running, which does this at its end.
    """
    late = late_days(root, configuration(root))
    if not late.percent_per_day or not (root / "gradebook.db").is_file():
        return []
    extensions = read_extensions(root / late.extensions_file)
    notes = []
    with contextlib.ExitStack() as opened:
        gradebook = opened.enter_context(open_gradebook(root))
        students = [student.id for student in gradebook.students]
        due = {assignment.name: assignment.duedate is not None for assignment in gradebook.assignments}
        gradebook.db.rollback()  # what was read is not kept locked
        try:
            opened.enter_context(only_one(root))
        except ValueError:
            notes.append("a `grade` is running: it brings the late penalties up to date when it ends")
        else:
            for student in students:
                late.settle(gradebook, student, extensions)
    lines = without_effect(extensions, students, due, assignment_names(root))
    return notes + [f"{late.extensions_file}: {line}" for line in lines]
