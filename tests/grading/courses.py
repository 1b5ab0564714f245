"""Course folders with submissions, and what grading made of them, for the tests of batches."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import nbformat
import psutil
from submissions import ASSIGNMENT, each_solution, hand_in, solutions, solved

from cs336_alignment.grading.folders import read_report
from cs336_alignment.grading.grade import grade_assignment
from cs336_alignment.paths import course_root

# Kept apart: what differs between two runs that did the same.
TIMES = ("graded_at", "seconds", "cpu_seconds")


def without_beta(notebook):
    """Solutions, but dpo_loss forgets beta."""
    return each_solution(
        notebook, lambda name: solutions()[f"solution-{name}"].replace("h = beta * ", "h = ") if name else ""
    )


def named(notebook, student: str):
    """The notebook with a written answer of the student's own."""
    for cell in notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("grade_id") == "written-likelihood":
            cell.source = f"Both fall, says {student}."
    return notebook


def make_class(root: Path, size: int) -> list[str]:
    """Hands in that many notebooks, every third of them with a mistake; returns the students."""
    students = [f"student{number:02d}" for number in range(size)]
    for number, student in enumerate(students):
        notebook = without_beta(solved()) if number % 3 == 2 else solved()
        hand_in(root, student, named(notebook, student) if number % 2 else notebook)
    return students


def graded(root: Path, *arguments, **options):
    """The batch, and the lines that were said."""
    lines = []
    options = {"unsafe": True, "jobs": 1} | options
    return grade_assignment(root, ASSIGNMENT, *arguments, say=lines.append, **options), lines


def book(root: Path):
    from nbgrader.api import Gradebook

    return Gradebook(f"sqlite:///{root}/gradebook.db", "cs336_alignment")


def contents(root: Path) -> dict:
    """All that a gradebook says of the submissions, without ids."""
    found = {}
    with book(root) as gradebook:
        for submission in gradebook.assignment_submissions(ASSIGNMENT):
            notebook = submission.notebooks[0]
            found[submission.student.id] = {
                "timestamp": str(submission.timestamp),
                "penalty": notebook.late_submission_penalty,
                "score": submission.score,
                "grades": {
                    g.name: (g.auto_score, g.manual_score, g.extra_credit, bool(g.needs_manual_grade))
                    for g in notebook.grades
                },
                "comments": {c.name: (c.auto_comment, c.manual_comment) for c in notebook.comments},
            }
    return found


def reports(root: Path) -> dict:
    """The reports of all, without the times."""
    found = {}
    for path in sorted((root / "autograded").iterdir()):
        report = read_report(root, ASSIGNMENT, path.name)
        found[path.name] = report and {key: value for key, value in report.items() if key not in TIMES}
    return found


def outputs(root: Path, student: str) -> dict:
    """Outputs of a graded notebook by the id of the cell."""
    path = root / "autograded" / student / ASSIGNMENT / f"{ASSIGNMENT}.ipynb"
    cells = nbformat.read(path, as_version=4).cells
    return {c.metadata.nbgrader.grade_id: c.outputs for c in cells if "outputs" in c and "nbgrader" in c.metadata}


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(course_root()), "OMP_NUM_THREADS": "1"}


def start_grading(root: Path, *arguments: str, **options) -> subprocess.Popen:
    """`course.py grade`, as a process that Ctrl-C reaches, also where the tests run in a shell's background."""
    command = [sys.executable, "-m", "cs336_alignment", "grade", ASSIGNMENT, "--course", str(root), *arguments]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | options
    listen = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command, env=environment(), cwd=root, preexec_fn=listen, **options)


def below(process: subprocess.Popen) -> list[psutil.Process]:
    """All processes that a process has started, and theirs."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def still_there(processes: list[psutil.Process], patience: float) -> list[psutil.Process]:
    """Those that live after so many seconds."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        alive = [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return []
        time.sleep(0.05)
    return alive


def wait_for(condition, patience: float = 90.0) -> None:
    """Returns once a condition holds. Raises: AssertionError if it does not in time."""
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def count_reports(root: Path) -> int:
    return len(list((root / "autograded").glob(f"*/{ASSIGNMENT}/report.json")))
