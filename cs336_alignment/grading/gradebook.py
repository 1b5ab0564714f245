"""The one who writes to the gradebook: what nbgrader's own preprocessors would write, for a batch.

Only grades and comments are written that grading is responsible for: points and comments given by hand stay as they
are. A submission is written in one transaction: it is in the gradebook with all its points, or not at all.
"""

import os
import sys
import tempfile
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbgrader import utils
from nbgrader.api import Comment, Grade, Gradebook, MissingEntry, Student, SubmittedAssignment, SubmittedNotebook
from nbgrader.converters import GenerateAssignment
from nbgrader.converters.base import NbGraderException
from nbgrader.coursedir import CourseDirectory
from sqlalchemy.exc import DatabaseError, SAWarning
from traitlets import TraitError
from traitlets.config import Config
from traitlets.config.loader import PyFileConfigLoader

from cs336_alignment.grading.folders import only_one
from cs336_alignment.grading.late import LateDays, read_extensions
from cs336_alignment.paths import course_root, in_course

COURSE = "cs336_alignment"


def configuration(root: Path) -> Config:
    """nbgrader_config.py of a course folder, or the checkout's."""
    path = in_course(root, "nbgrader_config.py")
    try:
        config = PyFileConfigLoader(path.name, path=str(path.parent)).load_config()
    except Exception as error:  # it is a program
        raise ValueError(f"{path} cannot be run: {type(error).__name__}: {error}") from None
    config.CourseDirectory.root = str(root)
    return config


def late_days(root: Path, config: Config) -> LateDays:
    """The rule for what comes late. Raises: ValueError for one that makes no sense."""
    try:
        return LateDays(config=config)
    except TraitError as error:
        raise ValueError(f"{in_course(root, 'nbgrader_config.py')}: {error}") from None


def assignment_names(root: Path) -> list[str]:
    """The assignments of a course folder, and the checkout's."""
    return sorted({path.stem for folder in (root, course_root()) for path in folder.glob("assignments/*/*.ipynb")})


def open_gradebook(root: Path) -> Gradebook:
    """The gradebook of a course folder, a new one where there is none. Raises: ValueError if it cannot be opened."""
    # nbgrader calls a program of its own that lies beside Python, and SQLAlchemy complains of how it adds rows.
    programs = str(Path(sys.executable).parent)
    if programs not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", os.defpath)])
    warnings.filterwarnings("ignore", message="Object of type .* not in session", category=SAWarning)
    path = root / "gradebook.db"
    try:
        return Gradebook(f"sqlite:///{path}", COURSE)
    except DatabaseError as error:
        raise ValueError(
            f"{path} cannot be opened as a gradebook: {error.orig}; put a sound copy in its place, or move it away"
        ) from None


@dataclass(frozen=True)
class Person:
    """A student as the gradebook has them."""

    first_name: str = ""
    last_name: str = ""
    email: str = ""


def enrol(root: Path, students: Mapping[str, Person]) -> None:
    """Enters students in the gradebook, by id, with what is known of their names. Nothing there is made empty.

    Raises: ValueError while a `grade` is running, which enters students too.
    """
    root.mkdir(parents=True, exist_ok=True)
    with only_one(root), open_gradebook(root) as book:
        known = {student.id: student for student in book.students}
        for student, person in students.items():
            row = known.get(student) or Student(id=student)
            for name, value in asdict(person).items():
                if value:
                    setattr(row, name, value)
            book.db.add(row)
        book.db.commit()


class Writer:
    """An open gradebook. Use it as a context."""

    def __init__(self, root: Path, assignment: str):
        """Adds the assignment to the gradebook if it is not there. Raises: ValueError if it cannot be."""
        self.root, self.assignment, self.config = root, assignment, configuration(root)
        self.late = late_days(root, self.config)
        self.extensions = read_extensions(root / self.late.extensions_file)
        self.book = open_gradebook(root)
        try:
            if not self.is_current():
                self.add_assignment()
            self.read_assignment()
        except BaseException:
            self.book.close()
            raise

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error) -> None:
        self.book.close()

    def is_current(self) -> bool:
        """Whether the gradebook knows the assignment's cells as they are."""
        try:
            notebook = self.book.find_notebook(self.assignment, self.assignment)
        except MissingEntry:
            return False
        return {cell.name: cell.checksum for cell in notebook.source_cells} == self.checksums()

    def read_assignment(self) -> None:
        """What has to be known of the assignment for every submission, read once."""
        notebook = self.book.find_notebook(self.assignment, self.assignment)
        self.notebook_id, self.assignment_id = notebook.id, notebook.assignment.id
        self.graded = [cell.id for cell in [*notebook.grade_cells, *notebook.task_cells]]
        self.answered = [cell.id for cell in [*notebook.solution_cells, *notebook.task_cells]]
        kinds = (notebook.grade_cells, notebook.solution_cells, notebook.task_cells)
        self.cells = {cell.id: cell.name for cells in kinds for cell in cells}
        rows = self.book.db.query(SubmittedAssignment.student_id).filter_by(assignment_id=self.assignment_id)
        self.students = {student for (student,) in rows}
        self.book.db.rollback()  # what was read is not kept locked

    def checksums(self) -> dict[str, str]:
        """Of all cells, as nbgrader keeps them: with hidden tests where there are some, otherwise as released."""
        released, source = (
            nbformat.read(in_course(self.root, folder, self.assignment, f"{self.assignment}.ipynb"), as_version=4).cells
            for folder in ("assignments", "solutions")
        )
        marks = [cell.metadata.get("nbgrader", {}) for cell in released]
        found = {mark["grade_id"]: mark["checksum"] for mark in marks if "checksum" in mark}
        for cell in source:
            if utils.is_grade(cell) and not utils.is_solution(cell):
                found[cell.metadata.nbgrader.grade_id] = utils.compute_checksum(cell)
        return found

    def add_assignment(self) -> None:
        """What `nbgrader generate_assignment` does, but the release that it makes is thrown away."""
        with tempfile.TemporaryDirectory() as folder:
            config = self.config.copy()
            config.CourseDirectory.root = str(self.root)
            config.CourseDirectory.source_directory = str(in_course(self.root, "solutions", self.assignment).parent)
            config.CourseDirectory.release_directory = str(Path(folder).resolve())
            config.CourseDirectory.assignment_id = self.assignment
            config.GenerateAssignment.create_assignment = True
            try:
                GenerateAssignment(coursedir=CourseDirectory(config=config), config=config).start()
            except NbGraderException as error:
                raise ValueError(
                    f"the gradebook and solutions/{self.assignment} do not agree, and nbgrader cannot mend it: {error} "
                    "(Exercises cannot be added or taken away once submissions are graded.)"
                ) from None
        self.book.db.expire_all()

    def has(self, student: str) -> bool:
        """Whether a submission of the student is in the gradebook."""
        return student in self.students

    def write(
        self, student: str, notebook: NotebookNode, points: dict[str, float], timestamp: str | None,
        only: Collection[str] | None = None, changed: Collection[str] = (),
    ) -> list[str]:  # fmt: skip
        """Writes what a graded notebook earned; returns cells whose points by hand were given for something else.

        points: by exercise; points cells that are not in it get 0. only: the cells to write, if not all. changed:
        those with another answer than when they were graded before. Points by hand stay. Where the answer or the
        automatic points changed, a person has to look again. (nbgrader asks for that everywhere.)
        """
        again = []
        try:
            submitted = self.submitted(student, timestamp)
            grades = {self.cells[grade.cell_id]: grade for grade in submitted.grades}
            comments = {self.cells[comment.cell_id]: comment for comment in submitted.comments}
            for cell in notebook.cells:
                name = cell.metadata.get("nbgrader", {}).get("grade_id")
                if name is None or (only is not None and name not in only):
                    continue
                if utils.is_grade(cell):
                    by_hand = cell.cell_type != "code" or utils.is_solution(cell)
                    score = utils.determine_grade(cell)[0] if by_hand else points.get(name, 0.0)
                    grade = grades[name]
                    if grade.manual_score is None:
                        grade.needs_manual_grade = score is None
                    elif name in changed or grade.auto_score != score:
                        grade.needs_manual_grade = True
                        again.append(name)
                    grade.auto_score = score
                if utils.is_solution(cell) and name in comments:
                    same = cell.metadata.nbgrader.get("checksum") == utils.compute_checksum(cell)
                    comments[name].auto_comment = "No response." if same else None
            self.book.db.commit()
            self.students.add(student)
            self.settle(student, notebook, submitted)
            return again
        finally:
            self.book.db.rollback()  # of what was not committed: a full disk must not cost the next student
            self.book.db.expunge_all()  # so that a large class takes no more memory than a small one

    def submitted(self, student: str, timestamp: str | None) -> SubmittedNotebook:
        """The rows of a submission, made where they are not there. (nbgrader's own functions commit each step.)"""
        db = self.book.db
        if db.get(Student, student) is None:
            db.add(Student(id=student))
        found = db.query(SubmittedAssignment).filter_by(assignment_id=self.assignment_id, student_id=student).first()
        if found is None:
            notebook = SubmittedNotebook(
                notebook_id=self.notebook_id,
                grades=[Grade(cell_id=cell) for cell in self.graded],
                comments=[Comment(cell_id=cell) for cell in self.answered],
            )
            found = SubmittedAssignment(assignment_id=self.assignment_id, student_id=student, notebooks=[notebook])
            db.add(found)
        found.timestamp = utils.parse_utc(timestamp) if timestamp else None
        return next(notebook for notebook in found.notebooks if notebook.notebook_id == self.notebook_id)

    def settle(self, student: str, notebook: NotebookNode, submitted: SubmittedNotebook) -> None:
        """What being late costs: by our own rule or, where that is not configured, by nbgrader's."""
        if self.late.percent_per_day:
            self.late.settle(self.book, student, self.extensions)
        elif submitted.late_submission_penalty is not None or submitted.assignment.total_seconds_late > 0:
            identity = {"student": student, "assignment": self.assignment, "notebook": self.assignment}
            self.book.db.rollback()  # nbgrader opens the gradebook once more
            self.late.preprocess(notebook, {"nbgrader": identity | {"db_url": str(self.book.engine.url)}})
