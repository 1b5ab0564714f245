"""Mangled notebooks through nbgrader's own `autograde` with our configuration: the same outcome as from `rescue`."""

import os
import shutil
import subprocess
import sys

import pytest
from mangled import ALL, ROWS
from mangles import ASSIGNMENT

from cs336_alignment.grading.exercise import exercise
from cs336_alignment.grading.nbgrader_hooks import add_right_name
from cs336_alignment.paths import course_root

CHOSEN = {
    "honest": "Nothing odd: answers typed in",
    "marks": "All of nbgrader's marks are lost",
    "twice": "A function's cell is there twice, the second does not parse",
    "below": "The function is written in a new cell, the stub is left below",
    "bytes": "A name that is no text",
    "named": "Named a4_dpo (1).ipynb",
    "cut": "The file ends in the middle of dpo_loss",
    "wide": "UTF-16, little-endian",
    "old": "nbformat 3",
    "other": "Another assignment's notebook",
    "empty": "An empty file",
    "linked": "A link to a notebook elsewhere",
    "pipe": "A pipe",
}
STUDENTS = {student: next(row for row in ROWS if row.what == what) for student, what in CHOSEN.items()}


def nbgrader(*arguments, cwd) -> str:
    environment = os.environ | {"PYTHONPATH": str(course_root()), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = os.pathsep.join([str(os.path.dirname(sys.executable)), environment["PATH"]])
    command = [sys.executable, "-m", "nbgrader", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """The course's folder and the log of the batch."""
    root = tmp_path_factory.mktemp("course")
    shutil.copy(course_root() / "nbgrader_config.py", root)
    shutil.copytree(course_root() / "solutions" / ASSIGNMENT, root / "solutions" / ASSIGNMENT)
    nbgrader("generate_assignment", ASSIGNMENT, cwd=root)
    shutil.copytree(course_root() / "assignments" / "a2_reward", root / "assignments" / "a2_reward")
    for student, row in STUDENTS.items():
        folder = root / "submitted" / student / ASSIGNMENT
        folder.mkdir(parents=True)
        row.make(folder)
    return root, nbgrader("autograde", ASSIGNMENT, "--JudgedExecute.unsafe=True", cwd=root)


@pytest.fixture(scope="module")
def points(batch):
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{batch[0]}/gradebook.db", "cs336_alignment") as gradebook:
        return {
            submission.student.id: {g.name: g.auto_score for notebook in submission.notebooks for g in notebook.grades}
            for submission in gradebook.assignment_submissions(ASSIGNMENT)
        }


@pytest.mark.parametrize("student", STUDENTS)
def test_nbgrader_gives_what_the_sanitiser_found(points, student):
    right = STUDENTS[student].right
    wanted = {name: exercise(name).points if name in right else 0 for name in ALL}
    assert {name: points[student][name] for name in ALL} == wanted


@pytest.mark.parametrize("student", STUDENTS)
def test_findings_are_in_the_log_with_the_students_name(batch, student):
    lines = [line for line in batch[1].splitlines() if f"{student}, {ASSIGNMENT}: " in line]
    assert bool(lines) == bool(STUDENTS[student].says)
    assert all(any(part in line for line in lines) for part in STUDENTS[student].says), lines


def test_what_was_submitted_is_as_it_was(batch):
    names = {path.name for path in (batch[0] / "submitted" / "named" / ASSIGNMENT).iterdir()}
    assert names == {"a4_dpo (1).ipynb"}
    assert (batch[0] / "submitted" / "empty" / ASSIGNMENT / "a4_dpo.ipynb").read_bytes() == b""


def test_one_notebook_of_a_submission_has_the_right_name(tmp_path):
    notebooks = [str(tmp_path / ASSIGNMENT / "final.ipynb")]
    add_right_name("a4_*", "*", notebooks)
    add_right_name("a4_*", "*", notebooks)
    assert notebooks[1:] == [str(tmp_path / ASSIGNMENT / f"{ASSIGNMENT}.ipynb")]
