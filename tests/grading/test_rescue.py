"""The sanitiser: what mangled notebooks get, and that nothing stops it."""

import copy
import gzip
import json
import os

import nbformat
import pytest
from mangled import ROWS, table
from mangles import ASSIGNMENT, FILE, RELEASE, WRITTEN, cell, release_of, save, solved, text
from rescued import answered, assert_whole

from cs336_alignment.grading.rescue import rescue
from cs336_alignment.grading.rescue_names import bindings
from cs336_alignment.paths import course_root

OTHERS = {name: release_of(name) for name in ("a1_sft", "a2_reward", "a3_ppo", ASSIGNMENT)}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "submitted" / "ada" / ASSIGNMENT
    path.mkdir(parents=True)
    return path


def rescued(folder):
    """Rescues, and checks what must hold of every result."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
    result = rescue(folder, RELEASE, OTHERS)
    assert_whole(result)
    assert before == {path: path.read_bytes() for path in before}
    return result


@pytest.mark.parametrize("row", ROWS, ids=[row.what for row in ROWS])
def test_what_a_mangled_notebook_gets(row, folder):
    row.make(folder)
    result = rescued(folder)
    assert answered(result.notebook) == row.right, result.findings
    told = " ".join(result.findings)
    assert all(part in told for part in row.says), result.findings
    assert row.says or not result.findings, result.findings
    assert (cell(result.notebook, "written-likelihood").source == WRITTEN) == row.written


# ----------------------------------------------------------------------------------------- what holds of all of them


@pytest.mark.parametrize("assignment", OTHERS)
def test_the_solutions_of_every_assignment_come_back_as_they_were(tmp_path, assignment):
    folder = tmp_path / assignment
    save(folder, text(solved(assignment)), f"{assignment}.ipynb")
    result = rescue(folder, OTHERS[assignment], OTHERS)
    assert result.notebook == solved(assignment) and result.findings == ()


def test_cells_of_ones_own_stay_where_they_are(folder):
    notebook = solved()
    notebook.cells.insert(5, nbformat.v4.new_code_cell("mine = 1", id="mine"))
    notebook.cells.insert(9, nbformat.v4.new_markdown_cell("A note.", id="note"))
    save(folder, text(notebook))
    result = rescued(folder)
    assert result.notebook == notebook and result.findings == () and result.file == FILE


def test_a_release_of_another_make_will_do(folder):
    """Cells without ids, as older programs write them; an experiment that students may edit."""
    release = copy.deepcopy(RELEASE)
    release.nbformat_minor = 4
    for one in release.cells:
        del one["id"]
    cell(release, "experiment-corner").metadata.nbgrader.locked = False
    notebook = solved()
    cell(notebook, "experiment-corner").source = "mine = 1"
    save(folder, text(notebook))
    result = rescue(folder, release)
    nbformat.validate(result.notebook)
    assert cell(result.notebook, "experiment-corner").source == "mine = 1" and result.findings == ()
    assert [c.source for c in result.notebook.cells] == [c.source for c in notebook.cells]


def test_a_missing_folder_and_a_linked_one_are_no_submissions(folder):
    assert rescued(folder / "no").findings == ("Nothing was handed in: there is no folder.",)
    save(folder, text(solved()))
    link = folder.parent / "link"
    link.symlink_to(folder)
    result = rescue(link, RELEASE)
    assert result.file is None and result.findings[0].endswith("is a link, and links are not followed.")


def test_the_digest_changes_with_the_submission_and_with_nothing_else(folder):
    empty = rescued(folder).digest
    save(folder, text(solved()))
    first = rescued(folder).digest
    os.utime(folder / FILE, (1, 1))
    save(folder, "2026-11-20 22:00:00 UTC", "timestamp.txt")
    assert rescued(folder).digest == first != empty
    save(folder, text(solved()), "second.ipynb")
    second = rescued(folder).digest
    (folder / "second.ipynb").rename(folder / "third.ipynb")
    third = rescued(folder).digest
    save(folder, text(RELEASE))
    assert len({empty, first, second, third, rescued(folder).digest}) == 5


def test_findings_are_short_single_lines_whatever_the_names_are(folder):
    for name in ("a\nb.ipynb", "\x1b[31m.ipynb", "n" * 240 + ".ipynb", "<b>.ipynb"):
        save(folder, "{}", name)
    findings = rescued(folder).findings
    assert findings and all(len(f) < 300 and f.isprintable() for f in findings)


def test_many_odd_cells_are_told_of_in_few_sentences(folder):
    notebook = solved()
    notebook.cells += [copy.deepcopy(c) for c in notebook.cells for _ in range(3)]
    for i, one in enumerate(notebook.cells):
        one.source += f"\n# {i}"
    save(folder, json.dumps(notebook))
    assert 5 < len(rescued(folder).findings) <= 40


def test_a_written_answer_keeps_a_pasted_picture_and_nothing_silly(folder):
    notebook = solved()
    one = cell(notebook, "written-likelihood")
    one["attachments"] = {"a.png": {"image/png": "AAAA"}, "b.png": 7}
    cell(notebook, "written-coverage")["attachments"] = {"big.png": {"image/png": "A" * 6_000_000}}
    save(folder, json.dumps(notebook))
    result = rescued(folder).notebook
    assert cell(result, "written-likelihood").attachments == {"a.png": {"image/png": "AAAA"}}
    assert "attachments" not in cell(result, "written-coverage")


@pytest.mark.parametrize(
    "content",
    [
        "[" * 1_000_000, '{"cells": ' * 200_000, "[[]," * 6_000_000, '{"a":"' * 100_000, "{" * 3_000_000,
        '{"cells": [' + '{"cell_type": "code", "source": "x = 1"},' * 100_000 + "]}",
        '{"cells": [{"cell_type": "code", "source": "' + "1+" * 90_000 + '1"}]}',
        '{"cells": [{"cell_type": "code", "source": "' + "(" * 90_000 + '"}]}',
        '{"cells": [{"cell_type": "code", "source": ' + "9" * 10_000 + "}]}",
        "<<<<<<< a\n" * 200_000 + ">>>>>>> b\n", "x = (" * 50_000,
    ],
    ids=["lists", "cells in cells", "many values", "open strings", "braces", "many cells", "a sum", "brackets",
         "a long number", "conflicts", "calls"],
)  # fmt: skip
def test_a_file_that_is_hard_to_read_is_read_or_given_up(folder, content):
    save(folder, content)
    assert rescued(folder).findings  # a quadratic reading would take minutes here


def test_too_large_a_file_is_not_read(folder, monkeypatch):
    monkeypatch.setattr("cs336_alignment.grading.rescue_files.LARGEST", 1000)
    save(folder, text(solved()))
    assert "is too large" in rescued(folder).findings[0]
    save(folder, gzip.compress(b" " * 100_000))
    assert "whose content is too large" in rescued(folder).findings[0]


# ---------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(x):\n    return x", {"f": True}),
        ('def f(x):\n    """Says."""\n    raise NotImplementedError("your code here")', {"f": False}),
        ('def f(x):\n    return x\n    raise NotImplementedError("your code here")', {"f": True}),
        ("def f(x): ...", {"f": False}),
        ("f = lambda x: x", {"f": True}),
        ("f = g = torch.compile(h)", {"f": True, "g": True}),
        ("f = f(1)", {"f": False}),
        ("f = 3", {"f": False}),
        ("from a import b as f, c", {"f": True, "c": True}),
        ("try:\n    import a\nexcept ImportError:\n    def f(): return 1", {"a": True, "f": True}),
        ("class A:\n    def f(self): return 1", {"A": True}),
        ("f(1)\nx.f = 2\nf[0] = 3", {}),
        ("%%time\ndef f(): return 1", {"f": True}),
        ("%%bash\nf=3", {}),
        ("%matplotlib inline\n!pip list\ndef f(): return 1", {"f": True}),
        ("def f(:", None),
        ("f\x00", None),
    ],
)
def test_what_a_cell_binds(source, found):
    assert bindings(source) == found


def test_the_instructors_page_has_the_table():
    assert table() in (course_root() / "book" / "instructors.md").read_text(encoding="utf-8")
