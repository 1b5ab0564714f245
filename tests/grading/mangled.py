"""Mangled notebooks and what each gets: data for the tests and for the table in the instructor's page.

Each row is made from the release of a4_dpo with the real solutions typed in.
"""

import copy
import gzip
import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
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
    source = nbformat.read(course_root() / "solutions" / assignment / f"{assignment}.ipynb", as_version=4)
    answers = {grade_id(cell): cell.source for cell in source.cells if grade_id(cell).startswith("solution-")}
    notebook = copy.deepcopy(release_of(assignment))
    for cell in notebook.cells:
        cell.source = answers.get(grade_id(cell), cell.source)
        if grade_id(cell) == "written-likelihood":
            cell.source = WRITTEN
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


@dataclass(frozen=True)
class Row:
    what: str  # was handed in
    make: Callable[[Path], None]
    gets: str  # in words, for the page
    right: frozenset[str]  # exercises whose answer is there when their points cell runs
    says: tuple[str, ...] = ()  # what the findings contain; () is: there are none
    written: bool = True  # whether the written answer is still there


ALL, NONE = frozenset(EXERCISES), frozenset()
NOT_DPO = ALL - {"dpo_loss"}
FULL, NOTHING, REST = "everything", "nothing", "all but that exercise"


def rows() -> list[Row]:
    answer = cell(solved(), "solution-dpo_loss").source
    return [
        # ------------------------------------------------------------ cells
        Row("Nothing odd: answers typed in", edit(lambda n: None), FULL, ALL),
        Row("The points cells are deleted", delete(*EXERCISES), FULL, ALL, ("were missing and are there again",)),
        Row("The first cell (imports) is deleted", delete("setup"), FULL, ALL, ("were missing", "setup")),
        Row("The imports are moved to the end", move("setup", ""), FULL, ALL),
        Row("A points cell is moved above its function", move("dpo_loss", "solution-log_partition"), FULL, ALL),
        Row("A function's cell is moved to the end", move("solution-dpo_loss", ""), FULL, ALL),
        Row("A function's cell is deleted", delete("solution-dpo_loss"), REST, NOT_DPO,
            ("The cell solution-dpo_loss is missing; nothing was found.",)),
        Row("A function's cell is emptied", source_of("solution-dpo_loss", lambda s: ""), REST, NOT_DPO),
        Row("The function is written in a new cell, the stub is left above", into_another_cell("check-dpo_loss"),
            FULL, ALL, ("Not defined in its own cell, so the last cell that defines it counts: dpo_loss.",)),
        Row("The function is written in a new cell, the stub is left below", into_another_cell("solution-dpo_loss"),
            FULL, ALL, ("the last cell that defines it counts: dpo_loss.",)),
        Row("The function is written in a new cell, far below", into_another_cell("experiment-corner"),
            FULL, ALL, ("the last cell that defines it counts: dpo_loss.",)),
        Row("The same, and its own cell is deleted", into_another_cell("experiment-corner", stub_left=False),
            FULL, ALL, ("the last cell that defines it counts: dpo_loss.",)),
        Row("The function is in two new cells, the second is right", into_another_cell("check-dpo_loss", True, True),
            FULL, ALL, ("the last cell that defines it counts: dpo_loss.",)),
        Row("A wrong variant is shown further down", shown_wrong, FULL, ALL),
        Row("A wrong variant is shown further down and the points cell is below it",
            lambda folder: (shown_wrong(folder), moved_below(folder)), FULL, ALL),
        Row("The function's name is used for a number", insert("check-dpo_loss", "dpo_loss = 3.0"), FULL, ALL),
        Row("A helper is in a cell below, and the points cell is deleted", edit(helper_below), FULL, ALL,
            ("were missing and are there again: dpo_loss.",)),
        Row("A function's cell is there twice, the second is the stub",
            duplicate("solution-dpo_loss", lambda s: cell(RELEASE, "solution-dpo_loss").source), FULL, ALL),
        Row("A function's cell is there twice, the first is an older try",
            duplicate("solution-dpo_loss", lambda s: "def dpo_loss(*a):\n    return 0.0", after=False), FULL, ALL,
            ("The cell solution-dpo_loss is there 2 times; the last one with an answer counts.",)),
        Row("A function's cell is there twice, the second does not parse",
            duplicate("solution-dpo_loss", lambda s: "def dpo_loss(*a):\n    return (("), FULL, ALL,
            ("solution-dpo_loss is there 2 times",)),
        Row("A points cell is there three times",
            edit(lambda n: n.cells.extend([copy.deepcopy(cell(n, "dpo_loss")) for _ in range(2)])), FULL, ALL),
        Row("Two functions' cells are merged", edit(merge_cells), FULL, ALL,
            ("the last cell that defines it counts: dpo_gradient_weight.",)),
        Row("A function's cell has become text", edit(lambda n: retype(n, "solution-dpo_loss", "markdown")), FULL, ALL,
            ("The cell solution-dpo_loss had become a markdown cell; it is graded as code.",)),
        Row("A function's cell has become raw", edit(lambda n: retype(n, "solution-dpo_loss", "raw")), FULL, ALL,
            ("had become a raw cell",)),
        Row("A written answer has become code", edit(lambda n: retype(n, "written-likelihood", "code")), FULL, ALL,
            ("The cell written-likelihood had become a code cell; it is graded as text.",)),
        Row("A points cell has become text", edit(lambda n: retype(n, "dpo_loss", "markdown")), FULL, ALL),
        Row("A written answer is deleted", delete("written-likelihood"), "all but that answer", ALL,
            ("The cell written-likelihood is missing.",), written=False),
        Row("The points cells say what they are worth",
            each_cell(lambda c: c.metadata.get("nbgrader", {}).update(points=1000) if grade_id(c) in ALL else None),
            FULL, ALL, ("The points of cells were changed",)),
        Row("The points cells hold a number of their own",
            each_cell(lambda c: c.update(source="15.0") if grade_id(c) in ALL else None), FULL, ALL,
            ("The cell dpo_loss is locked and was changed; it is graded as released.",)),
        Row("All cells are tagged skip-execution", each_cell(lambda c: c.metadata.update(tags=["skip-execution"])),
            FULL, ALL, ("tags do not count",)),
        Row("The function is typed into the check cell",
            edit(lambda n: into_locked(n, "check-dpo_loss", answer)), FULL, ALL,
            ("what you defined in it stands in a cell beside it", "counts: dpo_loss.")),
        Row("Imports of one's own are in the locked first cell",
            both(edit(own_import)), FULL, ALL, ("The cell setup is locked and was changed",)),
        Row("All of nbgrader's marks are lost", each_cell(lambda c: c.update(metadata={})), FULL, ALL,
            ("has lost nbgrader's marks",)),
        Row("All marks and all cell ids are lost", edit(without_marks), "all functions; no written answers", ALL,
            ("has lost nbgrader's marks", "The cell written-likelihood is missing."), written=False),
        Row("All code is in one cell", edit(one_big_cell), "all functions; no written answers", ALL,
            ("were missing", "the last cell that defines it counts"), written=False),
        Row("nbgrader's ids are changed", each_cell(lambda c: c.metadata.get("nbgrader", {}).update(grade_id="mine")
            if grade_id(c) else None), FULL, ALL),
        # ------------------------------------------------------- the file's content
        Row("UTF-8 with a mark at the start", raw(lambda t: t.encode("utf-8-sig")), FULL, ALL),
        Row("UTF-16, little-endian", raw(lambda t: t.encode("utf-16")), FULL, ALL, ("UTF-16",)),
        Row("UTF-16, big-endian, without a mark", raw(lambda t: t.encode("utf-16-be")), FULL, ALL, ("UTF-16-BE",)),
        Row("Windows-1252", raw(lambda t: t.replace("Both fall", "Größer für naïve Fälle")
            .encode("cp1252", "ignore")), FULL, ALL, ("is not written in UTF-8; it was read as cp1252",),
            written=False),
        Row("nbformat 3", lambda f: save(f, as_version_3(solved())), FULL, ALL),
        Row("nbformat 4 with strings for sources and nothing else", lambda f: save(f, strings(solved())), FULL, ALL),
        Row("Cells that are no cells", edit_json(lambda d: d["cells"].extend([None, 7, "x", []])), FULL, ALL,
            ("has among its cells what is no cell (4 times); it was left out",)),
        Row("NaN and Infinity in metadata",
            edit_json(lambda d: d["metadata"].update(a=float("nan"), b=float("inf"))), FULL, ALL),
        Row("Zero bytes between the lines", raw(lambda t: t.replace("\n", "\x00\n")), FULL, ALL),
        Row("Half an emoji and a zero in an answer", raw(lone_surrogate), FULL, ALL, written=False),
        Row("50 MB of output", edit(big_output), FULL, ALL),
        Row("An output nested 100,000 deep", raw(deep), FULL, ALL, ("is damaged",)),
        Row("The file ends in the middle of the last exercise",
            raw(lambda t: t[: t.index('"text-039"')]), "what is there", ALL,
            ("is damaged (it is not valid JSON)", "The cell written-likelihood is missing."), written=False),
        Row("The file ends in the middle of dpo_loss", raw(lambda t: t[: t.index("h = beta *") + 4]), "what is there",
            frozenset({"log_partition", "optimal_policy", "implicit_reward", "recovered_reward", "preference_prob"}),
            ("is damaged", "perhaps in part"), written=False),
        Row("Trailing commas", raw(lambda t: t.replace("\n  }\n ],", "\n  },\n ],").replace('"\n   ]', '",\n   ]')),
            FULL, ALL, ("is damaged",)),
        Row("A quote is missing in a line of dpo_loss",
            raw(lambda t: t.replace('"    h = beta *', "    h = beta *", 1)),
            FULL, ALL, ("is damaged", "1 of them perhaps in part")),
        Row("A merge that git could not finish, within a function",
            raw(conflict("h = beta *", "h = 0.5 * beta *")), "the first side", ALL,
            ("what stands before the =======",)),
        Row("The same, and the first side is the stub", raw(cells_in_conflict), FULL, ALL,
            ("what stands after the =======",)),
        Row("A gzip archive", raw(lambda t: gzip.compress(t.encode())), FULL, ALL, ("is a gzip archive",)),
        Row("A zip archive of one notebook", lambda f: save(f, zipped((FILE, text(solved())), ("a.txt", ""))),
            FULL, ALL, ("is a zip archive; the notebook in it was graded",)),
        Row("A zip archive of two notebooks", lambda f: save(f, zipped(("a.ipynb", ""), ("b.ipynb", ""))), NOTHING,
            NONE, ("is a zip archive with 2 notebooks in it; one is needed",), written=False),
        Row("A zip archive that unpacks to 300 MB", lambda f: save(f, zipped((FILE, " " * 300_000_000))), NOTHING,
            NONE, ("whose content is too large",), written=False),
        Row("A Python script named .ipynb", lambda f: save(f, script(solved())), "all functions", ALL,
            ("is a Python script, not a notebook",), written=False),
        Row("A notebook exported as a script", lambda f: save(f, exported_script(solved()), "a4_dpo.py"),
            "all functions", ALL, ("is a Python script", "since a4_dpo.ipynb is not there"), written=False),
        Row("A web page named .ipynb", lambda f: save(f, "<!DOCTYPE html><html><body>Log in</body></html>"), NOTHING,
            NONE, ("is a web page, not a notebook",), written=False),
        Row("An empty file", lambda f: save(f, ""), NOTHING, NONE, ("a4_dpo.ipynb is empty",), written=False),
        Row("A file of zeros", lambda f: save(f, b"\x00" * 5000), NOTHING, NONE, ("holds only zeros",), written=False),
        Row("JSON that is no notebook", lambda f: save(f, '{"a": [1, 2]}'), NOTHING, NONE, ("no notebook",),
            written=False),
        Row("Another assignment's notebook", lambda f: save(f, text(solved("a2_reward"))), NOTHING, NONE,
            ("is a notebook of a2_reward, not of a4_dpo",), written=False),
        # ----------------------------------------------------------- the file's name
        Row("Named a4_dpo (1).ipynb", named("a4_dpo (1).ipynb"), FULL, ALL,
            ("a4_dpo (1).ipynb was graded, since a4_dpo.ipynb is not there.",)),
        Row("Named a4_dpo.ipynb.txt", named("a4_dpo.ipynb.txt"), FULL, ALL, ("a4_dpo.ipynb.txt was graded",)),
        Row("Named A4_DPO.IPYNB", named("A4_DPO.IPYNB"), FULL, ALL, ("A4_DPO.IPYNB was graded",)),
        Row("Named a4_dpo.json", named("a4_dpo.json"), FULL, ALL, ("a4_dpo.json was graded",)),
        Row("In a folder of its own", named(f"homework/{FILE}"), FULL, ALL, ("homework/a4_dpo.ipynb was graded",)),
        Row("A name with a line break and an emoji", named("my\n\N{CAT}.ipynb"), FULL, ALL, ("was graded",)),
        Row("A name that is no text", named(b"caf\xe9.ipynb".decode("utf-8", "surrogateescape")), FULL, ALL,
            ("was graded",)),
        Row("The right name is untouched, the work is in a4_dpo-Copy1.ipynb",
            both(untouched, named("a4_dpo-Copy1.ipynb")), FULL, ALL,
            ("a4_dpo-Copy1.ipynb was graded, since a4_dpo.ipynb has no answers.", "Not graded: a4_dpo.ipynb.")),
        Row("The right name is empty, the work is in a checkpoint of Jupyter's",
            both(lambda f: save(f, ""), named(".ipynb_checkpoints/a4_dpo-checkpoint.ipynb")), FULL, ALL,
            ("a4_dpo.ipynb is empty", "a4_dpo-checkpoint.ipynb was graded, since a4_dpo.ipynb cannot be read.")),
        Row("The right name has one answer less than another file",
            both(delete("solution-dpo_loss"), named("old.ipynb")), "what is in the right name", NOT_DPO,
            ("old.ipynb has more answers than the file that was graded.",)),
        Row("Nothing in the folder", lambda f: None, NOTHING, NONE, ("Nothing was handed in",), written=False),
        Row("A link to a notebook elsewhere", linked, NOTHING, NONE, ("links are not followed",), written=False),
        Row("A pipe", pipe, NOTHING, NONE, ("is no regular file",), written=False),
        Row("A folder named a4_dpo.ipynb", lambda f: (f / FILE).mkdir(), NOTHING, NONE, ("is a folder",),
            written=False),
    ]  # fmt: skip


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


ROWS = rows()


def table() -> str:
    """The rows as a Markdown table, for the instructor's page."""
    return "\n".join(
        ["| what was handed in | what is graded |", "|---|---|", *(f"| {row.what} | {row.gets} |" for row in ROWS)]
    )
