"""nbgrader with the judge: what submissions earn, and what cheating earns."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_output

from cs336_alignment.grading.editions import is_public, kernel_edition, without_bodies
from cs336_alignment.grading.exercise import exercise, exercises, stripped_of
from cs336_alignment.grading.judge import course_secret, probe_source, read_answers, report
from cs336_alignment.grading.release import assignments
from cs336_alignment.grading.score import case_seeds, score
from cs336_alignment.grading.student import ANSWERS
from cs336_alignment.paths import PACKAGE, course_root

ASSIGNMENT = "a4_dpo"
AUTOMATIC = sum(e.points for e in exercises(ASSIGNMENT))


def nbgrader(*arguments, cwd):
    environment = os.environ | {"PYTHONPATH": str(course_root()), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    command = [sys.executable, "-m", "nbgrader", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def solutions(assignment: str = ASSIGNMENT) -> dict[str, str]:
    source = nbformat.read(course_root() / "solutions" / assignment / f"{assignment}.ipynb", as_version=4)
    cells = [cell for cell in source.cells if cell.metadata.get("nbgrader", {}).get("solution")]
    return {cell.metadata.nbgrader.grade_id: cell.source for cell in cells if cell.cell_type == "code"}


def solved(release, assignment: str = ASSIGNMENT):
    """The release with the solutions typed in."""
    notebook, answers = copy.deepcopy(release), solutions(assignment)
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


PATCHES = """
import torch.testing, cs336_alignment.grading.compare as compare, cs336_alignment.grading.student as student
torch.testing.assert_close = lambda *a, **k: None
torch.allclose = torch.equal = lambda *a, **k: True
compare.difference = compare.value_difference = compare.tensor_difference = lambda *a, **k: None
student.run_calls = lambda function, calls, *a, **k: [{"value": 1.0, "changed": []} for _ in calls]
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
from IPython.display import display
display({{"application/vnd.cs336-alignment.answers+json": "[[{{\\"value\\": 1}}]]"}}, raw=True)
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
        folder = root / "submitted" / name / ASSIGNMENT
        folder.mkdir(parents=True)
        nbformat.write(make(release), folder / f"{ASSIGNMENT}.ipynb")
    nbgrader("autograde", ASSIGNMENT, cwd=root)
    return root


def points_in(course, assignment) -> dict[str, dict[str, float | None]]:
    """Points of each student's cells, as the gradebook has them."""
    from nbgrader.api import Gradebook

    found = {}
    with Gradebook(f"sqlite:///{course}/gradebook.db", "cs336_alignment") as gradebook:
        for submission in gradebook.assignment_submissions(assignment):
            cells = [grade for notebook in submission.notebooks for grade in notebook.grades]
            found[submission.student.id] = {grade.name: grade.auto_score for grade in cells}
    return found


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
        folder = course / "submitted" / name / assignment
        folder.mkdir(parents=True)
        nbformat.write(notebook, folder / f"{assignment}.ipynb")
    nbgrader("autograde", assignment, cwd=course)
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
        assert secret not in text and '"bits"' not in text and "_answer(" not in text


def test_experiments_are_not_run_and_cells_keep_their_source(course):
    for cell in graded(course, "honest").cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        if name.startswith(("experiment-", "check-")):
            assert cell.outputs == []
        if name == "dpo_loss":
            assert 'grade("dpo_loss", dpo_loss)' in cell.source


def test_grading_again_gives_the_same(course, grades):
    from nbgrader.api import Gradebook

    nbgrader("autograde", ASSIGNMENT, "--student=nobeta", "--force", cwd=course)
    with Gradebook(f"sqlite:///{course}/gradebook.db", "cs336_alignment") as gradebook:
        submission = gradebook.find_submission(ASSIGNMENT, "nobeta")
        again = {grade.name: grade.auto_score for notebook in submission.notebooks for grade in notebook.grades}
    assert again == grades["nobeta"]


# ------------------------------------------------------------------------------------------ the parts


def test_a_probe_holds_inputs_and_nothing_else():
    of = exercise("dpo_loss")
    text = probe_source(of, case_seeds(of, "secret", "ada"))
    assert "expected" not in text and "tolerance" not in text and "logsigmoid" not in text


@pytest.mark.parametrize(
    "data",
    ["not json", "[[{}]]", "[1]", "null", '[[{"value": {"tensor": "float32", "shape": [9], "bits": "AA=="}}]]',
     '[[{"value": {"tensor": "evil", "shape": [], "bits": ""}}]]', 7, {"a": 1}, "[" * 5000],
)  # fmt: skip
def test_answers_that_cannot_be_read_earn_nothing_and_break_nothing(data):
    of = exercise("implicit_reward")
    answers = read_answers([new_output("display_data", {ANSWERS: data})])
    result = score(of, answers, case_seeds(of, "s", "ada"), "unreadable")
    assert result.points == 0
    assert "implicit_reward" in report(result)


def test_what_a_student_wrote_cannot_become_html():
    of = exercise("implicit_reward")
    wrong = [[{"error": "Bad", "message": "<script>alert(1)</script>", "line": "<b>"}] * 9 for _ in of.cases]
    page = report(score(of, wrong, case_seeds(of, "s", "ada")))
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_the_secret_is_made_once_and_kept(tmp_path):
    path = tmp_path / "deep" / "secret"
    assert course_secret(path) == course_secret(path) and len(course_secret(path)) == 64
    assert path.stat().st_mode & 0o077 == 0


def test_the_kernels_edition_has_no_answers(tmp_path):
    folder = kernel_edition(stripped_of(ASSIGNMENT), tmp_path)
    names = {path.relative_to(folder / PACKAGE.name).as_posix() for path in (folder / PACKAGE.name).rglob("*.py")}
    assert "grading/check.py" in names and not any("exercise" in n or "judge" in n or "score" in n for n in names)
    code = """
import torch
from cs336_alignment import dpo, exact, tokens
x = torch.ones(2)
for call in (
    lambda: dpo.dpo_loss(x, x, x, x, 0.1), lambda: dpo.implicit_reward(x, x, 0.1), lambda: exact._tilted(x, x, 0.1),
    lambda: exact.log_partition(x, x, 0.1), lambda: exact.optimal_policy(x, x, 0.1),
    lambda: tokens.sequence_log_probs(None, None),
):
    try:
        call()
    except NotImplementedError:
        continue
    raise SystemExit("something is left")
print(dpo.__file__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,  # Python looks there first
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.startswith(str(folder)), done.stdout + done.stderr


def test_bodies_are_taken_out_and_nothing_else():
    source = 'A = 1\n\n\ndef f(x):\n    """Says."""\n    return x + 1\n\n\ndef g(x):\n    return f(x)\n'
    assert "return x + 1" not in without_bodies(source, {"f"}) and "return f(x)" in without_bodies(source, {"f"})
    with pytest.raises(ValueError, match="no function h"):
        without_bodies(source, {"h"})


def test_what_students_get_knows_no_answer():
    private = [path for path in (PACKAGE / "grading").rglob("*.py") if not is_public(path)]
    assert {"judge.py", "score.py", "exercise.py", "dpo_loss.py"} <= {path.name for path in private}
