"""Submissions made from the releases and the solutions, for the tests of grading."""

import copy
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell

from cs336_alignment.grading.exercise import exercises
from cs336_alignment.paths import course_root

ASSIGNMENT = "a4_dpo"
AUTOMATIC = sum(e.points for e in exercises(ASSIGNMENT))


def nbgrader(*arguments, cwd):
    environment = os.environ | {"PYTHONPATH": str(course_root()), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    command = [sys.executable, "-m", "nbgrader", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def release(assignment: str = ASSIGNMENT):
    path = course_root() / "assignments" / assignment / f"{assignment}.ipynb"
    return nbformat.read(path, as_version=4)


@cache
def solutions(assignment: str = ASSIGNMENT) -> dict[str, str]:
    source = nbformat.read(course_root() / "solutions" / assignment / f"{assignment}.ipynb", as_version=4)
    cells = [cell for cell in source.cells if cell.metadata.get("nbgrader", {}).get("solution")]
    return {cell.metadata.nbgrader.grade_id: cell.source for cell in cells if cell.cell_type == "code"}


def solved(notebook=None, assignment: str = ASSIGNMENT):
    """The release with the solutions typed in."""
    notebook, answers = copy.deepcopy(notebook or release(assignment)), solutions(assignment)
    for cell in notebook.cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id")
        cell.source = answers.get(name, cell.source)
    return notebook


def with_first_cell(notebook, source):
    notebook = copy.deepcopy(notebook)
    notebook.cells.insert(0, new_code_cell(source))
    return notebook


def each_solution(release, body):
    """The release with `body(name)` as every function's definition."""
    notebook = copy.deepcopy(release)
    for cell in notebook.cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        if name.startswith("solution-"):
            cell.source = body(name.removeprefix("solution-"))
    return notebook


def tagged(release):
    notebook = copy.deepcopy(release)
    for cell in notebook.cells:
        cell.metadata["tags"] = ["skip-execution", "raises-exception"]
    return notebook


def edited(release):
    """Points cells that say what they are worth themselves."""
    notebook = copy.deepcopy(release)
    for cell in notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("grade"):
            cell.metadata.nbgrader.points = 1000
            cell.source = "15.0"
    return notebook


def without_points_cells(notebook):
    notebook = copy.deepcopy(notebook)
    names = {e.name for e in exercises(ASSIGNMENT)}
    notebook.cells = [c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id") not in names]
    return notebook


def hand_in(root: Path, student: str, notebook, assignment: str = ASSIGNMENT) -> Path:
    """Puts a notebook where it is graded."""
    folder = root / "submitted" / student / assignment
    folder.mkdir(parents=True)
    nbformat.write(notebook, folder / f"{assignment}.ipynb")
    return folder


def points_in(root: Path, assignment: str = ASSIGNMENT) -> dict[str, dict[str, float | None]]:
    """Points of each student's cells, as the gradebook has them."""
    from nbgrader.api import Gradebook

    found = {}
    with Gradebook(f"sqlite:///{root}/gradebook.db", "cs336_alignment") as gradebook:
        for submission in gradebook.assignment_submissions(assignment):
            cells = [grade for notebook in submission.notebooks for grade in notebook.grades]
            found[submission.student.id] = {grade.name: grade.auto_score for grade in cells}
    return found
