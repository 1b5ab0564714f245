"""Ways to mangle a notebook, each a function that writes a submission into a folder; see mangled.py for the table.

All start from the release of a4_dpo with the real solutions typed in.
"""

import copy
import functools
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell

from cs336_alignment.paths import course_root

ASSIGNMENT = "a4_dpo"
FILE = f"{ASSIGNMENT}.ipynb"
WRITTEN = "Both fall; the rejected one falls faster. Watch log pi(y_w)."


def release_of(assignment: str):
    return nbformat.read(course_root() / "assignments" / assignment / f"{assignment}.ipynb", as_version=4)


RELEASE = release_of(ASSIGNMENT)
KEYS = [cell.metadata.get("nbgrader", {}).get("grade_id", "") for cell in RELEASE.cells]
EXERCISES = {key for key in KEYS if f"solution-{key}" in KEYS}  # those with points


def grade_id(cell) -> str:
    return cell.metadata.get("nbgrader", {}).get("grade_id", "")


def solved(assignment: str = ASSIGNMENT):
    """The release with the solutions typed in, and one written answer."""
    return copy.deepcopy(read_solved(assignment))


@functools.cache
def read_solved(assignment: str):
    source = nbformat.read(course_root() / "solutions" / assignment / f"{assignment}.ipynb", as_version=4)
    answers = {grade_id(cell): cell.source for cell in source.cells if grade_id(cell).startswith("solution-")}
    notebook = release_of(assignment)
    for one in notebook.cells:
        one.source = answers.get(grade_id(one), one.source)
        if grade_id(one) == "written-likelihood":
            one.source = WRITTEN
    return notebook


def at(notebook, key: str) -> int:
    return next(i for i, cell in enumerate(notebook.cells) if grade_id(cell) == key)


def cell(notebook, key: str):
    return notebook.cells[at(notebook, key)]


def text(notebook) -> str:
    return nbformat.writes(notebook)


def save(folder: Path, content, name: str = FILE) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        content = json.dumps(content, indent=1, ensure_ascii=False)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


def edit(change: Callable) -> Callable:
    """A maker of a submission whose notebook was changed so."""

    def make(folder: Path) -> None:
        notebook = solved()
        save(folder, json.loads(json.dumps(change(notebook) or notebook)))

    return make


def raw(change: Callable) -> Callable:
    """The same for the file's text or bytes."""
    return lambda folder: save(folder, change(text(solved())))


def named(name) -> Callable:
    return lambda folder: save(folder, text(solved()), name)


def each_cell(change: Callable) -> Callable:
    def of_all(notebook):
        for one in notebook.cells:
            change(one)

    return edit(of_all)


def delete(*keys: str) -> Callable:
    def gone(notebook):
        notebook.cells = [c for c in notebook.cells if grade_id(c) not in keys]

    return edit(gone)


def move(key: str, to: str) -> Callable:
    """Moves a cell to just before another one, or to the end."""

    def moved(notebook):
        one = notebook.cells.pop(at(notebook, key))
        notebook.cells.insert(at(notebook, to) if to else len(notebook.cells), one)

    return edit(moved)


def into_another_cell(where: str, stub_left: bool = True, also_before: bool = False) -> Callable:
    """dpo_loss is written in a new cell before `where`."""

    def moved(notebook):
        own = cell(notebook, "solution-dpo_loss")
        answer, own.source = own.source, cell(RELEASE, "solution-dpo_loss").source
        notebook.cells.insert(at(notebook, where), new_code_cell(answer))
        if also_before:
            notebook.cells.insert(at(notebook, "solution-dpo_loss"), new_code_cell("def dpo_loss(*a):\n    return 0"))
        if not stub_left:
            notebook.cells.pop(at(notebook, "solution-dpo_loss"))

    return edit(moved)


def duplicate(key: str, change: Callable[[str], str] = lambda s: s, after: bool = True) -> Callable:
    def twice(notebook):
        one = copy.deepcopy(cell(notebook, key))
        one.source, one.id = change(one.source), "copy-of-it"
        notebook.cells.insert(at(notebook, key) + after, one)

    return edit(twice)


def source_of(key: str, change: Callable[[str], str]) -> Callable:
    def changed(notebook):
        cell(notebook, key).source = change(cell(notebook, key).source)

    return edit(changed)


def insert(before: str, *sources: str) -> Callable:
    def inserted(notebook):
        place = at(notebook, before) if before else len(notebook.cells)
        notebook.cells[place:place] = [new_code_cell(source) for source in sources]

    return edit(inserted)


def helper_below(notebook):
    """The solution of dpo_loss calls a helper of a cell below it, and the points cell was deleted."""
    own = cell(notebook, "solution-dpo_loss")
    helper = own.source.replace("def dpo_loss", "def helper")
    own.source = "def dpo_loss(*arguments, **named):\n    return helper(*arguments, **named)"
    notebook.cells.insert(at(notebook, "dpo_loss"), new_code_cell(helper))
    notebook.cells.pop(at(notebook, "dpo_loss"))


def one_big_cell(notebook):
    code = [c.source for c in notebook.cells if grade_id(c) == "setup" or grade_id(c).startswith("solution-")]
    notebook.cells = [new_code_cell("\n\n".join(code))]


def without_marks(notebook):
    """As programs leave it that know neither nbgrader nor cell ids."""
    data = json.loads(text(notebook))
    for one in data["cells"]:
        one["metadata"] = {}
        one.pop("id", None)
    data["nbformat_minor"] = 4
    return nbformat.from_dict(data)


def as_version_3(notebook) -> str:
    cells = []
    for one in json.loads(text(notebook))["cells"]:
        one.pop("id")
        if one["cell_type"] == "code":
            one |= {"input": one.pop("source"), "language": "python", "prompt_number": 1}
            one.pop("execution_count")
        cells.append(one)
    cells.insert(0, {"cell_type": "heading", "level": 2, "source": ["My work"], "metadata": {}})
    return json.dumps({"metadata": {"name": ""}, "nbformat": 3, "nbformat_minor": 0, "worksheets": [{"cells": cells}]})


def strings(notebook) -> str:
    """Sources as strings, no outputs, no metadata but nbgrader's: what a program of one's own may write."""
    data = json.loads(text(notebook))
    for one in data["cells"]:
        one["source"] = "".join(one["source"])
        one.pop("outputs", None), one.pop("execution_count", None)
    return json.dumps({"cells": data["cells"]})


def conflict(ours: str, theirs: str) -> Callable[[str], str]:
    """git's marks around a line of dpo_loss."""

    def marked(whole: str) -> str:
        line = next(line for line in whole.split("\n") if "h = beta *" in line)
        sides = [line.replace("h = beta *", side) for side in (ours, theirs)]
        return whole.replace(line, f"<<<<<<< HEAD\n{sides[0]}\n=======\n{sides[1]}\n>>>>>>> mine", 1)

    return marked


def cells_in_conflict(whole: str) -> str:
    """Each side of a merge has the answer to another exercise; the marks stand around whole cells."""
    data, blank = json.loads(whole), json.loads(text(RELEASE))
    place = at(RELEASE, "solution-dpo_loss")
    first, second = (json.dumps(d["cells"][place], indent=1) for d in (data, blank))
    data["cells"][place] = "HERE"
    marked = f"<<<<<<< HEAD\n{second},\n=======\n{first},\n>>>>>>> mine\n"
    return json.dumps(data, indent=1).replace('  "HERE",\n', marked)


def script(notebook) -> str:
    return "\n\n\n".join(
        c.source for c in notebook.cells if grade_id(c) == "setup" or grade_id(c).startswith("solution-")
    )


def exported_script(notebook) -> str:
    cells = [c for c in notebook.cells if c.cell_type == "code" and not grade_id(c).startswith("experiment-")]
    return "#!/usr/bin/env python\n\n" + "\n\n\n".join(f"# In[{i}]:\n\n\n{c.source}" for i, c in enumerate(cells))


def zipped(*members: tuple[str, str]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def big_output(notebook):
    picture = nbformat.v4.new_output("display_data", {"image/png": "A" * 50_000_000})
    cell(notebook, "experiment-corner").outputs = [picture]


def both(*makers: Callable) -> Callable:
    def make(folder: Path) -> None:
        for one in makers:
            one(folder)

    return make


def untouched(folder: Path) -> None:
    save(folder, text(RELEASE))


def deep(whole: str) -> str:
    """An output nested deeper than any parser goes, in the cell of dpo_loss."""
    start = whole.index('"outputs": []', whole.index('"solution-dpo_loss"'))
    return whole[:start] + '"outputs": [' + "[" * 100_000 + "]" * 100_000 + "]" + whole[start + 13 :]


def lone_surrogate(whole: str) -> str:
    return whole.replace("Both fall", "Both \\ud83d fall\\u0000", 1)


def linked(folder: Path) -> None:
    save(folder.parent / "elsewhere", text(solved()))
    os.symlink(folder.parent / "elsewhere" / FILE, folder / FILE)


def pipe(folder: Path) -> None:
    os.mkfifo(folder / FILE)


def merge_cells(notebook):
    """JupyterLab's "Merge cell below": dpo_gradient_weight's code is in dpo_loss's cell."""
    other = notebook.cells.pop(at(notebook, "solution-dpo_gradient_weight"))
    cell(notebook, "solution-dpo_loss").source += f"\n\n{other.source}"


def shown_wrong(folder: Path) -> None:
    """A demonstration, three exercises further down, of what goes wrong without beta."""
    insert("experiment-corner", "def dpo_loss(*arguments):\n    return 7.0")(folder)


def retype(notebook, key: str, kind: str) -> None:
    one = cell(notebook, key)
    one.cell_type = kind
    one.pop("outputs", None), one.pop("execution_count", None)
    if kind == "code":
        one.outputs, one.execution_count = [], None


def into_locked(notebook, key: str, answer: str) -> None:
    cell(notebook, "solution-dpo_loss").source = cell(RELEASE, "solution-dpo_loss").source
    cell(notebook, key).source = f"{answer}\n\n{cell(notebook, key).source}"


def own_import(notebook) -> None:
    """dpo_loss needs a name that only the edited first cell imports."""
    cell(notebook, "setup").source += "\nfrom builtins import float as number"
    own = cell(notebook, "solution-dpo_loss")
    own.source = f"assert number is float\n{own.source}"


def edit_json(change: Callable) -> Callable:
    def make(folder: Path) -> None:
        data = json.loads(text(solved()))
        change(data)
        save(folder, data)

    return make


def moved_below(folder: Path) -> None:
    notebook = nbformat.read(folder / FILE, as_version=4)
    one = notebook.cells.pop(at(notebook, "dpo_loss"))
    notebook.cells.insert(at(notebook, "experiment-corner"), one)
    save(folder, text(notebook))


def as_colab_saves(notebook) -> str:
    """Other keys, in another order, and a cell of Colab's own."""
    cells = []
    for one in json.loads(text(notebook))["cells"]:
        colab = {"id": f"colab{len(cells)}", "colab": {"base_uri": "https://localhost:8080/"}}
        cells.append({"cell_type": one["cell_type"], "source": one["source"], "metadata": one["metadata"] | colab})
        if one["cell_type"] == "code":
            cells[-1] |= {"execution_count": 3, "outputs": one["outputs"]}
    cells.insert(0, {"cell_type": "code", "source": ["from google.colab import drive"], "metadata": {}, "outputs": []})
    kernel = {"colab": {"provenance": []}, "kernelspec": {"name": "gpu", "display_name": "Colab"}}
    return json.dumps({"nbformat": 4, "nbformat_minor": 0, "metadata": kernel, "cells": cells})
