"""Lectures run from fresh kernels, and their saved outputs are known to be those of today's code."""

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from cs336_alignment import lectures
from cs336_alignment.lectures import (
    STAMP,
    execute,
    imported_modules,
    lecture_paths,
    run_lectures,
    stale,
    stamp,
    syntax,
    tidy,
)


def written(path, *cells):
    nbformat.write(new_notebook(cells=[new_code_cell(cell) for cell in cells]), path)
    return path


@pytest.mark.parametrize("path", lecture_paths(), ids=lambda path: path.stem)
def test_the_outputs_of_a_lecture_are_those_of_todays_code(path):
    assert not stale([path]), f"run: python3 course.py lectures {path.stem}"


@pytest.mark.parametrize("path", lecture_paths(), ids=lambda path: path.stem)
def test_a_lecture_is_executed_in_order_without_error_or_machine_path(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    warnings = [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    assert not warnings
    assert str(lectures.course_root()) not in path.read_text(encoding="utf-8")
    for output in outputs:
        if "image/png" in output.get("data", {}):
            assert output.metadata["image/png"]["alt"].strip(), "a figure without alternative text"


def test_a_name_that_fits_no_lecture_is_an_error():
    with pytest.raises(ValueError, match="no lecture '99'"):
        lecture_paths(["99"])


def test_imports_are_followed_through_modules_and_into_functions():
    found = imported_modules("from cs336_alignment.dpo import dpo_loss\nimport cs336_alignment.report as r")
    assert {"dpo", "tokens", "report", "optimize"} <= found
    assert "pipeline" not in found and "cli" not in found
    assert "world_training" in imported_modules("def f():\n    from cs336_alignment import world_training")


def test_only_what_decides_outputs_makes_a_lecture_stale():
    same = 'def f(x):\n    """Says."""\n    # why\n    return x+1\n'
    assert syntax(same) == syntax("def f(x):\n    return (x + 1)\n")
    assert syntax(same) != syntax("def f(x):\n    return x + 2\n")
    assert syntax("x = 'a'") == syntax('x = "a"') != syntax("x = 'b'")

    notebook = new_notebook(cells=[new_code_cell("x = 1"), new_markdown_cell("words")])
    before = stamp(notebook)
    notebook.cells[1].source = "other words"
    assert stamp(notebook) == before
    notebook.cells[0].source = "x = 2"
    assert stamp(notebook) != before


def test_a_stamp_knows_modules_the_world_and_result_files(monkeypatch, tmp_path):
    notebook = new_notebook(
        cells=[new_code_cell("from cs336_alignment.world_training import load_base\n'corner.json'")]
    )
    package = tmp_path / "cs336_alignment"
    results = tmp_path / "benchmarks" / "results"
    (package / "assets").mkdir(parents=True)
    results.mkdir(parents=True)
    (package / "world_training.py").write_text("import cs336_alignment.world")
    (package / "world.py").write_text("a = 1")
    monkeypatch.setattr(lectures, "PACKAGE", package)
    monkeypatch.setattr(lectures, "course_root", lambda: tmp_path)
    seen = [stamp(notebook)]
    for path in (package / "world.py", package / "assets" / "base", results / "corner.json"):
        path.write_text("a = 2")
        seen.append(stamp(notebook))
    assert len(set(seen)) == 4
    (results / "other.json").write_text("{}")
    assert stamp(notebook) == seen[-1]


def test_full_mode_keeps_outputs_and_stamp_fast_mode_writes_nothing(tmp_path):
    path = written(tmp_path / "01_x.ipynb", "import os\nprint('fast' if os.environ['CS336_FAST'] else 'full')")
    before = path.read_bytes()
    execute(path, fast=True)
    assert path.read_bytes() == before and stale([path]) == [path]
    execute(path, fast=False)
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[0].outputs[0].text == "full\n"
    assert notebook.metadata[STAMP]["stamp"] == stamp(notebook) and not stale([path])
    notebook.cells[0].source += "\nx = 1"
    nbformat.write(notebook, path)
    assert stale([path]) == [path]


def test_a_lecture_that_fails_is_named_with_its_error_and_left_as_it_was(tmp_path, capfd):
    good, bad = written(tmp_path / "01_a.ipynb", "1"), written(tmp_path / "02_b.ipynb", "assert 1 == 2, 'no equation'")
    before = bad.read_bytes()
    with pytest.raises(CellExecutionError):
        execute(bad, fast=False)
    assert run_lectures([good, bad]) == 1
    said = capfd.readouterr().out
    assert "01_a: " in said and "02_b: failed" in said and "no equation" in said
    assert bad.read_bytes() == before


def test_of_a_progress_bar_the_last_state_is_kept():
    def stream(text, name="stderr"):
        return new_output("stream", name=name, text=text)

    bar = "\rSFT:   0%|  | 0/2\rSFT:  50%|# | 1/2\rSFT: 100%|##| 2/2\n"
    [output] = tidy([stream(bar[:20]), stream(bar[20:])])
    assert output.text == "SFT: 100%|##| 2/2\n" and output.name == "stdout"
    [output] = tidy([stream("UserWarning: look\n")])
    assert output.name == "stderr"  # a warning stays one
    assert tidy([stream("\n")]) == []
