"""Late days: so many free ones for each student over the whole course, then a percentage for each further day.

`nbgrader_config.py` puts `LateDays` in the place of nbgrader's AssignLatePenalties, and in front of the feedback, so
that points given by hand count too. A student's assignments use up the free days in the order of their due dates,
whatever was graded first: regrading changes nothing. Extensions are lines of a small file, to be read and kept.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path

from nbgrader.api import Gradebook
from nbgrader.preprocessors import AssignLatePenalties
from traitlets import Float, Integer, List, Unicode

from cs336_alignment.grading.rescue_files import shown
from cs336_alignment.grading.spreadsheet import csv_lines, csv_text

DAY = 24 * 60 * 60  # seconds
FIELDS = ["student", "assignment", "days"]


def days_late(seconds: float, extension: int = 0, grace: float = 0) -> int:
    """Started days after the due date and the extension. grace: seconds that are forgiven, but do not move the days."""
    late = seconds - extension * DAY
    return 0 if late <= grace else math.ceil(late / DAY)


def days_to_pay(late: Iterable[int], free: int) -> list[int]:
    """What is left of late days, in the order of the due dates, when the free days are used up."""
    left = []
    for days in late:
        used = min(days, free)
        free -= used
        left.append(days - used)
    return left


def penalty(score: float, days: int, percent: float) -> float:
    """The points that so many days cost: percent of the score for each, and never more than the score."""
    return round(score * min(1.0, days * percent / 100), 2)


def read_extensions(path: Path) -> dict[tuple[str, str], int]:
    """Days by student and assignment; none if there is no file. Raises: ValueError for a line that makes no sense."""
    if not path.exists():
        return {}
    extensions: dict[tuple[str, str], int] = {}
    lines = csv_lines(path, csv_text(path))
    header = [word.strip() for word in next(lines, (0, []))[1]]
    if header != FIELDS:
        raise ValueError(f"{path}: the first line has to be {','.join(FIELDS)}; it is {','.join(header)[:80]!r}")
    for number, words in lines:
        words = [word.strip() for word in words]
        if not any(words):
            continue
        where = f"{path}, line {number}"
        if len(words) != len(FIELDS) or not all(words):
            raise ValueError(f"{where}: {','.join(words)[:80]!r} is not of the form {','.join(FIELDS)}")
        student, assignment, days = words
        if not (days.isascii() and days.isdigit() and len(days) < 5):
            raise ValueError(f"{where}: {days[:80]!r} is not a whole number of days")
        if (student, assignment) in extensions:
            raise ValueError(f"{where}: a second line for {student} and {assignment}; one line with all the days")
        extensions[student, assignment] = int(days)
    return extensions


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence on a name that is not known."""
    near = get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def without_effect(
    extensions: Collection[tuple[str, str]], students: list[str], due: dict[str, bool], to_come: list[str]
) -> list[str]:
    """Sentences on extensions that move no due date.

    students: of the gradebook. due: its assignments, and whether they have a due date. to_come: others that there are.
    """
    notes = []
    for student in sorted({student for student, _ in extensions} - set(students)):
        notes.append(f"the gradebook has no student {shown(student)}{nearest(student, students)}")
    for name in sorted({name for _, name in extensions}):
        if name not in due and name not in to_come:
            notes.append(f"there is no assignment {shown(name)}{nearest(name, {*due, *to_come})}")
        elif not due.get(name, True):
            notes.append(f"{shown(name)} has no due date in the gradebook: nobody is late, extension or not")
    return notes


@dataclass(frozen=True)
class Line:
    """What becomes of one submission."""

    assignment: str
    late: int  # started days, after the extension
    paid: int  # of them, those that no free day covers


class LateDays(AssignLatePenalties):
    """nbgrader's late penalties, counted in days over the course. Without a percentage it does what nbgrader does.

    It brings all of the student's submissions up to date, not only the one that is graded: an assignment that is graded
    late, or regraded, may take free days from later ones.
    """

    free_days = Integer(0, min=0, help="Late days that cost nothing, for each student over the whole course.").tag(
        config=True
    )
    percent_per_day = Float(
        0.0, min=0.0, max=100.0, help="What each further started day costs, in percent of the score; 0: nothing."
    ).tag(config=True)
    grace_minutes = Integer(0, min=0, help="A submission that is late by no more than this is not late.").tag(
        config=True
    )
    extensions_file = Unicode("extensions.csv", help="student,assignment,days; beside the gradebook.").tag(config=True)
    display_data_priority = List(help="Not used: set for all that makes feedback, with a warning where it is not.").tag(
        config=True
    )

    def preprocess(self, nb, resources):
        identity = resources["nbgrader"]
        extensions = read_extensions(beside_gradebook(identity["db_url"], self.extensions_file))
        if not self.percent_per_day:
            return super().preprocess(nb, resources)
        with Gradebook(identity["db_url"]) as gradebook:
            for line in self.settle(gradebook, identity["student"], extensions):
                if line.late:
                    free = line.late - line.paid
                    self.log.warning(
                        "%s, %s: %d day%s late, %d free, %d at %g %%", identity["student"], line.assignment,
                        line.late, "s" * (line.late > 1), free, line.paid, self.percent_per_day,
                    )  # fmt: skip
        return nb, resources

    def settle(self, gradebook: Gradebook, student: str, extensions: dict[tuple[str, str], int]) -> list[Line]:
        """Writes the penalties of all of a student's submissions into the gradebook: none without a due date."""
        submissions = list(gradebook.find_student(student).submissions)
        submissions.sort(key=lambda s: (s.assignment.duedate or datetime.max, s.name))
        late = [
            days_late(s.total_seconds_late, extensions.get((student, s.name), 0), 60 * self.grace_minutes)
            if s.assignment.duedate
            else 0
            for s in submissions
        ]
        paid = days_to_pay(late, self.free_days)
        for submission, days in zip(submissions, paid):
            for notebook in submission.notebooks:
                cost = penalty(notebook.score, days, self.percent_per_day)
                notebook.late_submission_penalty = cost or None
        gradebook.db.commit()
        return [Line(s.name, *days) for s, *days in zip(submissions, late, paid)]


def beside_gradebook(db_url: str, name: str) -> Path:
    """A file in the gradebook's folder; for a gradebook that is no file, in the current folder."""
    database = db_url.removeprefix("sqlite:///")
    return (Path(database).parent if database != db_url else Path.cwd()) / name
