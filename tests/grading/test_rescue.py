"""The sanitiser: what mangled notebooks get, and that nothing stops it."""

import contextlib
import copy
import gzip
import json
import os
import random

import nbformat
import pytest
from mangled import ALL, ASSIGNMENT, FILE, RELEASE, ROWS, WRITTEN, cell, grade_id, release_of, save, solved, table, text
from nbgrader.nbgraderformat import MetadataValidator

from cs336_alignment.grading.rescue import rescue
from cs336_alignment.grading.rescue_names import bindings, strength
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


def assert_whole(result) -> None:
    """Valid for nbformat and nbgrader; each of the release's cells once, as released or with the student's source."""
    notebook = result.notebook
    nbformat.validate(notebook)
    MetadataValidator().validate_nb(notebook)
    text(notebook).encode("utf-8")
    json.dumps([result.file, result.digest, result.findings], ensure_ascii=False).encode("utf-8")
    assert notebook.metadata == RELEASE.metadata
    own = {grade_id(c): c for c in notebook.cells if grade_id(c)}
    assert sorted(own) == sorted(grade_id(c) for c in notebook.cells if grade_id(c))
    assert sorted(own) == sorted(grade_id(c) for c in RELEASE.cells if grade_id(c))
    for key, one in own.items():
        released = cell(RELEASE, key)
        assert (one.metadata, one.cell_type, one.id) == (released.metadata, released.cell_type, released.id)
        assert one.source == released.source or not one.metadata.nbgrader.locked
    for one in notebook.cells:
        assert one.metadata == {} or grade_id(one)
        assert one.get("outputs", []) == []


def marks(function) -> tuple | None:
    """What tells one definition from another without running it: the names and constants in its code."""
    code = getattr(function, "__code__", None)
    return code and (set(code.co_names), [c for c in code.co_consts if not hasattr(c, "co_code")])


def run(source: str, space: dict) -> None:
    with contextlib.suppress(Exception):  # a kernel goes on with the next cell
        exec(source, space)


@pytest.fixture(scope="module")
def right():
    space: dict = {}
    for one in solved().cells:
        if grade_id(one) == "setup" or grade_id(one).startswith("solution-"):
            run(one.source, space)
    return {name: marks(space[name]) for name in ALL}


def answered(notebook, right) -> frozenset[str]:
    """The exercises whose right function is there when the points cell runs; other cells run as in a kernel."""
    space: dict = {}
    found = set()
    for one in notebook.cells:
        key = grade_id(one)
        if key in right:
            function = space.get(key)
            if key == "dpo_loss" and "helper" in space:  # see mangled.helper_below
                function = space["helper"]
            found |= {key} if marks(function) == right[key] else set()
        elif one.cell_type == "code" and not key.startswith(("check-", "experiment-")):
            run(one.source, space)
    return frozenset(found)


@pytest.mark.parametrize("row", ROWS, ids=[row.what for row in ROWS])
def test_what_a_mangled_notebook_gets(row, folder, right):
    row.make(folder)
    result = rescued(folder)
    assert answered(result.notebook, right) == row.right, result.findings
    told = " ".join(result.findings)
    assert all(part in told for part in row.says), result.findings
    assert row.says or not result.findings, result.findings
    assert (cell(result.notebook, "written-likelihood").source == WRITTEN) == row.written


# ----------------------------------------------------------------------------------------- what holds of all of them


def test_an_ordinary_submission_comes_back_as_it_was(folder):
    notebook = solved()
    notebook.cells.insert(5, nbformat.v4.new_code_cell("mine = 1", id="mine"))
    notebook.cells.insert(9, nbformat.v4.new_markdown_cell("A note.", id="note"))
    save(folder, text(notebook))
    result = rescued(folder)
    assert result.notebook == notebook and result.findings == () and result.file == FILE


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


# ---------------------------------------------------------------------------------------------------------- fuzzing


def damaged_bytes(data: bytes, dice: random.Random) -> bytes:
    """A notebook's file after an accident."""
    kind = dice.choice(["flip", "cut", "drop", "double", "swap", "zero", "lines"])
    i, n = dice.randrange(len(data)), dice.randrange(1, 400)
    if kind == "flip":
        broken = bytearray(data)
        for _ in range(dice.randrange(1, 30)):
            broken[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        return bytes(broken)
    if kind == "cut":
        return data[:i] if dice.random() < 0.8 else data[i:]
    if kind == "lines":
        lines = data.split(b"\n")
        dice.shuffle(lines)
        return b"\n".join(lines)
    new = {"drop": b"", "double": data[i : i + n] * 2, "swap": data[i : i + n][::-1], "zero": b"\0" * n}[kind]
    return data[:i] + new + data[i + n :]


ODD = [None, True, -1, 1e400, float("nan"), "", "\ud800", "code", [], {}, [[]], {"a": {}}, ["x", 3, None], "x" * 300]


def damaged_json(value, dice: random.Random):
    """A notebook some of whose values were replaced, dropped, doubled or put elsewhere."""
    value = copy.deepcopy(value)
    for _ in range(dice.randrange(1, 20)):
        node = value
        while isinstance(node, dict | list) and node:
            key = dice.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if isinstance(node[key], dict | list) and node[key] and dice.random() < 0.9:
                node = node[key]
                continue
            what = dice.choice(["replace", "drop", "double"])
            if what == "replace":
                node[key] = copy.deepcopy(dice.choice(ODD))
            elif what == "drop":
                del node[key]
            elif isinstance(node, list):
                node.insert(dice.randrange(len(node) + 1), copy.deepcopy(node[key]))
            else:
                node[dice.choice(["metadata", "id", "source", "cells"])] = copy.deepcopy(node[key])
            break
    return value


@pytest.mark.parametrize("part", range(4))
def test_no_accident_stops_it_and_most_work_survives(folder, part):
    dice = random.Random(part)
    data, value = text(solved()).encode(), json.loads(text(solved()))
    survived = 0
    for _ in range(80):
        accident = damaged_bytes(data, dice) if part < 2 else json.dumps(damaged_json(value, dice)).encode()
        (folder / FILE).write_bytes(accident)
        result = rescue(folder, RELEASE, OTHERS)
        assert_whole(result)
        assert not any("look at it" in finding for finding in result.findings), result.findings
        survived += sum(strength(cell(result.notebook, f"solution-{name}").source, name) == 2 for name in ALL)
    assert survived > 0.5 * 80 * len(ALL)  # half of the accidents with bytes cut the file or shuffle its lines


def test_any_bytes_are_no_reason_to_stop(folder):
    dice = random.Random(0)
    for n in range(120):
        start = dice.choice([b"", b"PK\x03\x04", b"\x1f\x8b\x08\x00", b"\xff\xfe", b'{"cells": [', b"import x\n"])
        (folder / FILE).write_bytes(start + dice.randbytes(n * 10))
        assert_whole(rescue(folder, RELEASE, OTHERS))


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
