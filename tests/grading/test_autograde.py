"""nbgrader's own commands with the judge: what submissions earn, and what cheating earns."""

import shutil

import nbformat
import pytest
from submissions import (
    ASSIGNMENT,
    AUTOMATIC,
    each_solution,
    edited,
    hand_in,
    nbgrader,
    points_in,
    solutions,
    solved,
    tagged,
    with_first_cell,
    without_points_cells,
)

from cs336_alignment.grading.exercise import exercises
from cs336_alignment.grading.judge import course_secret
from cs336_alignment.grading.release import assignments
from cs336_alignment.paths import course_root

UNSAFE = "--JudgedExecute.unsafe=True"  # tests run where there is no bubblewrap, too
PATCHES = """
import torch.testing, cs336_alignment.grading.compare as compare, cs336_alignment.grading.kernel as kernel
torch.testing.assert_close = lambda *a, **k: None
torch.allclose = torch.equal = lambda *a, **k: True
compare.difference = compare.value_difference = compare.tensor_difference = lambda *a, **k: None
kernel.run_calls = lambda function, calls, *a, **k: [{"value": 1.0, "changed": []} for _ in calls]
"""
TRANSFORMER = """
import ast
class Blind(ast.NodeTransformer):
    def visit_Assert(self, node):
        return ast.Pass()
    def visit_Raise(self, node):
        return ast.Return(ast.Constant(1.0))
get_ipython().ast_transformers.append(Blind())
get_ipython().run_code = lambda *a, **k: None
"""
FRAMES = """
def {name}(*arguments):
    import sys, gc
    frame = sys._getframe()
    while frame:
        for space in (frame.f_locals, frame.f_globals):
            for key in ("expected", "wanted", "reference", "answer", "EXERCISE"):
                if key in space:
                    return space[key]
        frame = frame.f_back
    for thing in gc.get_objects():
        if type(thing).__name__ == "Exercise":
            return thing.reference(*arguments)
    raise LookupError("nothing to steal")
"""
IMPORTS = """
def {name}(*arguments):
    import importlib
    for module in ("dpo", "exact", "tokens", "corner", "grading.exercises.{name}", "grading.plain", "grading.score"):
        try:
            return getattr(importlib.import_module("cs336_alignment." + module), "{name}")(*arguments)
        except (ImportError, AttributeError, NotImplementedError):
            pass
    raise LookupError("nothing to import")
"""
FORGED = """
import gc, json, socket
for thing in gc.get_objects():
    if isinstance(thing, socket.socket):
        thing.send(json.dumps({{"answer": [{{"value": 1, "changed": []}}], "end": True}}).encode() + b"\\n")
def {name}(*arguments):
    return arguments[0]
"""
# name: (the notebook made from the release, points it should get)
SUBMISSIONS = {
    "honest": (solved, AUTOMATIC),
    "empty": (lambda release: release, 0),
    "nobeta": (
        lambda release: each_solution(
            release, lambda name: solutions()[f"solution-{name}"].replace("h = beta * ", "h = ") if name else ""
        ),
        None,
    ),
    "deleted": (lambda release: without_points_cells(solved(release)), AUTOMATIC),
    "patches": (lambda release: with_first_cell(release, PATCHES), 0),
    "transformer": (lambda release: with_first_cell(release, TRANSFORMER), 0),
    "tags": (tagged, 0),
    "edited": (edited, 0),
    "frames": (lambda release: each_solution(release, lambda name: FRAMES.format(name=name)), 0),
    "imports": (lambda release: each_solution(release, lambda name: IMPORTS.format(name=name)), 0),
    "forged": (lambda release: each_solution(release, lambda name: FORGED.format(name=name)), 0),
}


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course folder in which every submission was graded in one batch with stock nbgrader commands."""
    root = tmp_path_factory.mktemp("course")
    shutil.copy(course_root() / "nbgrader_config.py", root)
    shutil.copytree(course_root() / "solutions" / ASSIGNMENT, root / "solutions" / ASSIGNMENT)
    nbgrader("generate_assignment", ASSIGNMENT, cwd=root)
    release = nbformat.read(root / "assignments" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb", as_version=4)
    for name, (make, _) in SUBMISSIONS.items():
        hand_in(root, name, make(release))
    nbgrader("autograde", ASSIGNMENT, UNSAFE, cwd=root)
    return root


@pytest.fixture(scope="module")
def grades(course):
    return points_in(course, ASSIGNMENT)


def graded(course, student):
    return nbformat.read(course / "autograded" / student / ASSIGNMENT / f"{ASSIGNMENT}.ipynb", as_version=4)


@pytest.mark.parametrize("student", [name for name, (_, points) in SUBMISSIONS.items() if points is not None])
def test_a_submission_earns_what_its_own_mathematics_earned(grades, student):
    scores = {name: points for name, points in grades[student].items() if not name.startswith("written-")}
    assert sum(points or 0 for points in scores.values()) == SUBMISSIONS[student][1], scores


@pytest.mark.parametrize("assignment", [name for name in assignments() if name != ASSIGNMENT])
def test_the_solutions_of_the_others_get_full_marks_too_and_their_releases_none(course, assignment):
    shutil.copytree(course_root() / "solutions" / assignment, course / "solutions" / assignment)
    nbgrader("generate_assignment", assignment, cwd=course)
    release = nbformat.read(course / "assignments" / assignment / f"{assignment}.ipynb", as_version=4)
    for name, notebook in {"honest": solved(release, assignment), "empty": release}.items():
        hand_in(course, name, notebook, assignment)
    nbgrader("autograde", assignment, UNSAFE, cwd=course)
    found = points_in(course, assignment)
    assert sum(points or 0 for points in found["honest"].values()) == sum(e.points for e in exercises(assignment))
    assert sum(points or 0 for points in found["empty"].values()) == 0


def test_written_answers_wait_for_a_person(grades):
    assert {grades["honest"][name] for name in grades["honest"] if name.startswith("written-")} <= {None, 0.0}


def test_partial_credit_has_a_reason_for_each_case_and_names_the_mistake(course, grades):
    assert 0 < grades["nobeta"]["dpo_loss"] < 15 and grades["nobeta"]["log_partition"] == 10
    cell = next(
        c for c in graded(course, "nobeta").cells if c.metadata.get("nbgrader", {}).get("grade_id") == "dpo_loss"
    )
    page = cell.outputs[0]["data"]["text/html"]
    assert "beta is missing." in page and page.count("&#10007;") + page.count("&#10003;") == 9
    assert "Expected:" in page and "(hidden)" in page
    assert float(cell.outputs[1]["data"]["text/plain"]) == grades["nobeta"]["dpo_loss"]


def test_hidden_cases_are_in_no_notebook_and_no_feedback(course):
    nbgrader("generate_feedback", ASSIGNMENT, "--student=nobeta", cwd=course)
    page = (course / "feedback" / "nobeta" / ASSIGNMENT / f"{ASSIGNMENT}.html").read_text(encoding="utf-8")
    release = (course / "assignments" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb").read_text(encoding="utf-8")
    notebook = (course / "autograded" / "nobeta" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb").read_text(encoding="utf-8")
    secret = course_secret(course / ".course" / "grading-secret")
    hidden = [c for e in exercises(ASSIGNMENT) for c in e.cases if not c.visible]
    assert len(hidden) > 20
    for text in (page, release, notebook):
        assert secret not in text and '"bits"' not in text and '"probe"' not in text


def test_experiments_are_not_run_and_cells_keep_their_source(course):
    for cell in graded(course, "honest").cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        if name.startswith(("experiment-", "check-")):
            assert cell.outputs == []
        if name == "dpo_loss":
            assert 'grade("dpo_loss", dpo_loss)' in cell.source


def test_grading_again_gives_the_same(course, grades):
    from nbgrader.api import Gradebook

    nbgrader("autograde", ASSIGNMENT, "--student=nobeta", "--force", UNSAFE, cwd=course)
    with Gradebook(f"sqlite:///{course}/gradebook.db", "cs336_alignment") as gradebook:
        submission = gradebook.find_submission(ASSIGNMENT, "nobeta")
        again = {grade.name: grade.auto_score for notebook in submission.notebooks for grade in notebook.grades}
    assert again == grades["nobeta"]
