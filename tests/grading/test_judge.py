"""The judge: what becomes of a notebook, and what a kernel may say."""

import json
import os
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell
from submissions import ASSIGNMENT, AUTOMATIC, each_solution, release, solutions, solved

from cs336_alignment.grading.autograde import server_for
from cs336_alignment.grading.editions import is_public, kernel_edition, without_bodies
from cs336_alignment.grading.exercise import exercise, exercises, stripped_of
from cs336_alignment.grading.judge import (
    PICTURES_KEPT,
    course_secret,
    judge,
    kept_outputs,
    limit_pictures,
    probe,
    read_answers,
    report,
)
from cs336_alignment.grading.rescue_files import files_beside
from cs336_alignment.grading.sandbox import INTERRUPTED, Limits
from cs336_alignment.grading.score import ask_all, case_seeds, score
from cs336_alignment.paths import PACKAGE

GRADED = [e for e in exercises(ASSIGNMENT) if not e.optional]


@pytest.fixture(scope="module")
def server():
    with server_for(ASSIGNMENT, Limits(cell_seconds=3, notebook_seconds=60), unsafe=True) as server:
        yield server


def points(judged) -> dict[str, float]:
    return {name: result.points for name, result in judged.scores.items()}


def cell_of(notebook, name):
    return next(c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id") == name)


def with_cell_before(notebook, name, source):
    """The notebook with a student's own cell in front of another."""
    index = notebook.cells.index(cell_of(notebook, name))
    notebook.cells.insert(index, new_code_cell(source))
    return notebook


def judged(notebook, server, **options):
    return judge(notebook, GRADED, "ada", "secret", server, **options)


def test_solutions_get_everything_and_the_release_nothing(server):
    full = judged(solved(), server)
    assert sum(points(full).values()) == AUTOMATIC and full.crashes == []
    assert sum(points(judged(release(), server)).values()) == 0


def test_a_submission_leaves_nothing_to_the_next(server):
    spoil = "import torch, builtins\ntorch.log_softmax = None\nbuiltins.sum = None\nopen('left', 'w').write('x')"
    judged(with_cell_before(solved(), "solution-dpo_loss", spoil), server)
    look = "import os\nprint(os.listdir('.'))"
    notebook = with_cell_before(solved(), "solution-dpo_loss", look)
    assert sum(points(judged(notebook, server)).values()) == AUTOMATIC
    assert [c.outputs[0].text for c in notebook.cells if c.source == look] == ["[]\n"]


@pytest.mark.parametrize(
    "deadly", ["import os\nos._exit(0)", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
               "import ctypes\nctypes.string_at(0)"],
)  # fmt: skip
def test_a_dead_kernel_costs_the_cell_it_died_in_and_no_other(server, deadly):
    notebook = with_cell_before(solved(), "solution-dpo_loss", deadly)
    result = judged(notebook, server)
    assert sum(points(result).values()) == AUTOMATIC
    assert [crash["why"] for crash in result.crashes] == ["the kernel died"]
    assert "died" in next(c for c in notebook.cells if c.source == deadly).outputs[0].evalue


def test_a_function_that_kills_the_kernel_costs_its_own_points(server):
    notebook = solved()
    cell_of(
        notebook, "solution-recovered_reward"
    ).source = "def recovered_reward(*arguments):\n    import os\n    os._exit(0)"
    result = judged(notebook, server)
    of = {e.name: e.points for e in GRADED}
    assert points(result) == of | {"recovered_reward": 0}
    assert result.crashes == [{"cell": "recovered_reward", "why": "the kernel died"}]
    assert "died" in result.scores["recovered_reward"].problem


def test_a_cell_that_never_ends_is_interrupted_and_what_it_defined_stays(server):
    notebook = solved()
    cell_of(notebook, "solution-dpo_loss").source += "\nwhile True: pass"
    result = judged(notebook, server)
    assert sum(points(result).values()) == AUTOMATIC
    assert result.crashes == [{"cell": "solution-dpo_loss", "why": INTERRUPTED}]
    assert cell_of(notebook, "solution-dpo_loss").outputs[-1].ename == "TimeoutError"


def test_a_cell_that_cannot_be_interrupted_is_given_up(server):
    stubborn = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"
    notebook = with_cell_before(solved(), "solution-dpo_loss", stubborn)
    result = judged(notebook, server)
    assert sum(points(result).values()) == AUTOMATIC
    assert "could not be interrupted" in result.crashes[0]["why"]


def test_the_time_for_a_notebook_ends():
    with server_for(ASSIGNMENT, Limits(cell_seconds=1, notebook_seconds=2), unsafe=True) as server:
        notebook = solved()
        for number in range(5):
            notebook.cells.insert(2, new_code_cell(f"import time\ntime.sleep(30 + {number})"))
        result = judged(notebook, server)
    assert sum(points(result).values()) == 0
    assert "the time for the whole notebook was up" in {crash["why"] for crash in result.crashes}


def test_a_flood_of_output_is_cut_and_costs_nothing(server):
    flood = "for i in range(100_000): print('x' * 100)"
    notebook = with_cell_before(solved(), "solution-dpo_loss", flood)
    assert sum(points(judged(notebook, server)).values()) == AUTOMATIC
    text = "".join(o.text for o in next(c for c in notebook.cells if c.source == flood).outputs)
    assert len(text) < 30_000 and "left out" in text


def test_a_module_beside_the_notebook_can_be_imported_and_links_are_not_followed(server, tmp_path):
    (tmp_path / "mine.py").write_text("from math import log\nANSWER = 42\n")
    (tmp_path / "a4_dpo.ipynb").write_text("{}")
    (tmp_path / "link.py").symlink_to("/etc/passwd")
    files = files_beside(tmp_path, "a4_dpo.ipynb")
    assert list(files) == ["mine.py"]
    notebook = solved()
    notebook.cells.insert(2, new_code_cell("import mine\nmine.ANSWER"))
    judged(notebook, server, files=files)
    assert notebook.cells[2].outputs[0].data["text/plain"] == "42"


def test_what_a_notebook_shows_is_kept_as_text_errors_and_pictures():
    sources = [
        "print('one'); 6 * 7",
        "1 / 0",
        "from IPython.display import HTML, display\ndisplay(HTML('<script>alert(1)</script>'))",
        "%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]);",
        "import asyncio\nawait asyncio.sleep(0)\n'done'",
        "!echo hello",
        "exit()",
        "input()",
        "this is no python",
    ]
    notebook = release()
    notebook.cells[2:2] = [new_code_cell(source) for source in sources]
    with server_for(ASSIGNMENT, unsafe=True) as server:  # to import matplotlib takes seconds on a busy computer
        judged(notebook, server)
    value, error, shown, figure, waited, _, _, asked, syntax = (c.outputs for c in notebook.cells[2:11])
    assert value[0].text == "one\n" and value[1].data["text/plain"] == "42"
    assert error[0].ename == "ZeroDivisionError" and any("1 / 0" in line for line in error[0].traceback)
    assert "script" not in json.dumps([o.data for o in shown])
    assert any("image/png" in output.get("data", {}) for output in figure)
    assert waited[0].data["text/plain"] == "'done'"
    assert asked[0].output_type == "error" and syntax[0].ename == "SyntaxError"
    nbformat.validate(notebook)


def test_only_harmless_outputs_are_kept():
    says = [
        {"output_type": "display_data", "data": {"text/html": "<script>", "image/svg+xml": "<svg>", "text/plain": "t"}},
        {"output_type": "display_data", "data": {"image/png": '"><script>', "text/plain": "u"}},
        {"output_type": "stream", "name": "<b>", "text": "\ud800"},
        {"output_type": "error", "ename": 1, "evalue": None, "traceback": "x"},
        {"output_type": "evil"},
        {},
    ]
    kept = kept_outputs(says)
    assert [o.output_type for o in kept] == ["display_data", "display_data", "stream", "error"]
    assert set(kept[0].data) == set(kept[1].data) == {"text/plain"}
    assert kept[2].name == "stdout"
    json.dumps(kept).encode("utf-8")


def test_pictures_have_a_limit_for_the_notebook():
    notebook = nbformat.v4.new_notebook(cells=[new_code_cell("") for _ in range(3)])
    for cell in notebook.cells:
        picture = {"output_type": "display_data", "data": {"image/png": "A" * (PICTURES_KEPT // 2 - 1)}}
        cell.outputs = kept_outputs([picture])
    limit_pictures(notebook)
    assert ["image/png" in cell.outputs[0].data for cell in notebook.cells] == [True, True, False]


def test_a_wrong_answer_says_which_case_and_names_the_mistake(server):
    notebook = each_solution(
        release(), lambda name: solutions()[f"solution-{name}"].replace("h = beta * ", "h = ") if name else ""
    )
    result = judged(notebook, server)
    assert 0 < points(result)["dpo_loss"] < 15 and points(result)["log_partition"] == 10
    assert "beta is missing." in result.scores["dpo_loss"].hint


# ------------------------------------------------------------------------------------------ the parts


def test_a_probe_holds_inputs_and_nothing_else():
    of = exercise("dpo_loss")
    text = json.dumps(probe(ask_all(of, case_seeds(of, "secret", "ada"))))
    assert "expected" not in text and "tolerance" not in text and "logsigmoid" not in text


@pytest.mark.parametrize(
    "data",
    ["not json", [{}], [1], None, [{"value": {"tensor": "float32", "shape": [9], "bits": "AA=="}}],
     [{"value": {"tensor": "evil", "shape": [], "bits": ""}}], 7, {"a": 1}, [{"value": {"sgd": 1, "of": 0}}],
     [{"value": {"model": {"float": "0x1p0"}}, "changed": []}], [{"value": 1, "changed": []}] * 1000,
     [{"value": {"tensor": "float32", "shape": [10**12], "bits": "AAAAAAAA8D8="}}]],
)  # fmt: skip
def test_answers_that_cannot_be_read_earn_nothing_and_break_nothing(data):
    of = exercise("implicit_reward")
    result = score(of, read_answers([data]), case_seeds(of, "s", "ada"), "unreadable")
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
