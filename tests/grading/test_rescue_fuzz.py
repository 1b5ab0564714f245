"""The sanitiser under random accidents: it never stops, and what is there to be graded is graded."""

import copy
import json
import random

import pytest
from mangles import ASSIGNMENT, EXERCISES, FILE, RELEASE, cell, grade_id, release_of, save, solved, text
from nbformat.v4 import new_code_cell
from rescued import answered, assert_whole

from cs336_alignment.grading.rescue import rescue
from cs336_alignment.grading.rescue_names import strength
from cs336_alignment.grading.rescue_read import piece
from cs336_alignment.grading.rescue_rebuild import Plan

ALL = sorted(EXERCISES)
OTHERS = {name: release_of(name) for name in ("a1_sft", "a2_reward")}
PLAN = Plan(RELEASE)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / ASSIGNMENT
    path.mkdir()
    return path


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
            deeper = 0.99 if node is value else 0.9  # the list of all cells is seldom what is hit
            if isinstance(node[key], dict | list) and node[key] and dice.random() < deeper:
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
                node[dice.choice(["metadata", "id", "source"])] = copy.deepcopy(node[key])
            break
    return value


@pytest.mark.parametrize("part", range(4))
def test_no_accident_stops_it_and_most_work_survives(folder, part):
    dice = random.Random(part)
    data, value = text(solved()).encode(), json.loads(text(solved()))
    survived = 0
    for _ in range(70):
        accident = damaged_bytes(data, dice) if part < 2 else json.dumps(damaged_json(value, dice)).encode()
        (folder / FILE).write_bytes(accident)
        result = rescue(folder, RELEASE, OTHERS)
        assert_whole(result, quick=True)
        assert not any("look at it" in finding for finding in result.findings), result.findings
        survived += sum(strength(cell(result.notebook, f"solution-{name}").source, name) == 2 for name in ALL)
    assert survived > 0.5 * 70 * len(ALL)  # half of the accidents with bytes cut the file or shuffle its lines


def test_any_bytes_are_no_reason_to_stop(folder):
    dice = random.Random(0)
    for n in range(60):
        start = dice.choice([b"", b"PK\x03\x04", b"\x1f\x8b\x08\x00", b"\xff\xfe", b'{"cells": [', b"import x\n"])
        (folder / FILE).write_bytes(start + dice.randbytes(n * 10))
        assert_whole(rescue(folder, RELEASE, OTHERS), quick=True)


# ------------------------------------------------------------------------------------------------ what people do


def accident(cells: list, dice: random.Random) -> None:
    """One of the things that happen to cells in an editor."""
    i, j = dice.randrange(len(cells)), dice.randrange(len(cells))
    name, one = dice.choice(ALL), cells[i]
    match dice.choice("move delete copy unmark stub use again retype tag new-id lose broken into-locked".split()):
        case "move":
            cells.insert(j, cells.pop(i))
        case "delete":
            cells.pop(i)
        case "copy":
            cells.insert(j, copy.deepcopy(one))
        case "unmark":
            one.metadata = {}
        case "stub" if grade_id(one).startswith("solution-"):
            one.source = cell(RELEASE, grade_id(one)).source
        case "use":
            cells.insert(j, new_code_cell(f"{name} = 3"))
        case "again":
            cells.insert(j, new_code_cell(cell(solved(), f"solution-{name}").source))
        case "retype":
            one.cell_type = dice.choice(["code", "markdown", "raw"])
        case "tag":
            one.metadata["tags"] = ["skip-execution"]
        case "new-id":
            one.id = f"new-{dice.randrange(10**6)}"
        case "lose":
            one.metadata.pop("nbgrader", None)
            one.id = f"lost-{dice.randrange(10**6)}"
        case "broken":
            cells.insert(j, new_code_cell(f"def {name}(:"))
        case "into-locked" if grade_id(one).startswith("check-"):
            one.source = cell(solved(), f"solution-{name}").source + "\n" + one.source


def is_code(one) -> bool:
    """Whether a submitted cell is code for the sanitiser: by its id where it has one, else by its type."""
    key = PLAN.key(piece(one))
    return PLAN.cells[key].cell_type == "code" and key not in PLAN.locked if key else one.cell_type == "code"


@pytest.mark.parametrize("part", range(4))
def test_an_answer_that_is_anywhere_is_there_when_it_is_graded(folder, part):
    held = 0
    for seed in range(25):
        dice = random.Random(f"{part} {seed}")
        notebook = solved()
        for _ in range(dice.randrange(1, 25)):
            accident(notebook.cells, dice)
        save(folder, json.dumps(notebook))
        wanted = {name for name in ALL for c in notebook.cells if is_code(c) and strength(c.source, name) == 2}
        result = rescue(folder, RELEASE)
        assert_whole(result, quick=True)
        assert wanted <= answered(result.notebook, alone=True), (seed, result.findings)
        held += len(wanted)
    assert held > 25 * 6
