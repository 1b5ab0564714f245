"""Plain nbgrader, without the judge: the same notebook, the same points for honest work."""

import contextlib
import io

import nbformat
import pytest
from nbformat.v4 import new_output
from nbgrader.utils import get_partial_grade

from cs336_alignment.grading.exercise import exercises
from cs336_alignment.grading.plain import grade
from cs336_alignment.grading.release import assignments, generate
from cs336_alignment.paths import course_root

each = pytest.mark.parametrize("assignment", assignments())


def definitions(notebook) -> dict:
    """What the notebook's own functions are: its setup and solution cells, run in order."""
    space: dict = {}
    for cell in notebook.cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        if cell.cell_type == "code" and (name == "setup" or name.startswith("solution-")):
            exec(compile(cell.source, name, "exec"), space)
    return space


def points(assignment, notebook) -> float:
    space = definitions(notebook)
    with contextlib.redirect_stdout(io.StringIO()):
        return sum(grade(e.name, space[e.name]) for e in exercises(assignment) if not e.optional)


@each
def test_the_solutions_get_full_marks_and_the_release_none(assignment):
    path = course_root() / "solutions" / assignment / f"{assignment}.ipynb"
    full = sum(exercise.points for exercise in exercises(assignment))
    assert points(assignment, nbformat.read(path, as_version=4)) == full
    assert points(assignment, generate(assignment)) == 0


def test_nbgrader_reads_the_points_whatever_the_function_does(capfd):
    """nbgrader gives 0 for anything on stderr, and full marks for a last value that is no number."""
    import sys
    import warnings

    def noisy(policy_log_probs, ref_log_probs, beta):
        warnings.warn("loud", stacklevel=1)
        print("louder", file=sys.stderr)
        return beta * (policy_log_probs - ref_log_probs)

    value = grade("implicit_reward", noisy)
    said = capfd.readouterr()
    assert said.err == "" and "implicit_reward: 5 of 5 points" in said.out
    assert type(value) is float
    output = new_output("execute_result", {"text/plain": repr(value)})
    assert get_partial_grade(output, 5.0) == 5.0
    assert grade("implicit_reward", lambda *_: float("nan")) == 0.0
