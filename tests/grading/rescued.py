"""What tests of the sanitiser ask of a result: is it whole, and which answers are there to be graded?"""

import contextlib
import functools
import json

import nbformat
from mangles import EXERCISES, RELEASE, cell, grade_id, solved, text
from nbgrader.nbgraderformat import MetadataValidator


def assert_whole(result, quick: bool = False) -> None:
    """Valid for nbformat and nbgrader; each of the release's cells once, as released or with the student's source.

    quick: without nbgrader's slow validation; it looks only at metadata, which is compared with the release's below.
    """
    notebook = result.notebook
    nbformat.validate(notebook)
    if not quick:
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


@functools.cache
def right_marks() -> dict[str, tuple | None]:
    """What the right functions look like; see `marks`."""
    space: dict = {}
    for one in solved().cells:
        if grade_id(one) == "setup" or grade_id(one).startswith("solution-"):
            run(one.source, space)
    return {name: marks(space[name]) for name in EXERCISES}


def answered(notebook, alone: bool = False) -> frozenset[str]:
    """The exercises whose right function is there when the points cell runs; other cells run as in a kernel.

    The functions of other exercises that it calls must be the right ones too, unless it is looked at alone.
    """
    right, space = right_marks(), {}
    found = set()
    for one in notebook.cells:
        key = grade_id(one)
        if key in right:
            names = {key} | (set() if alone else right[key][0] & set(right))
            if "helper" in space:  # see mangles.helper_below
                names = {"helper" if name == "dpo_loss" else name for name in names}
            if all(marks(space.get(name)) == right.get(name, right["dpo_loss"]) for name in names):
                found.add(key)
        elif one.cell_type == "code" and not key.startswith(("check-", "experiment-")):
            run(one.source, space)
    return frozenset(found)
