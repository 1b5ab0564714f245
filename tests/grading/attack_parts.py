"""How attacks are made: from a release or a solved notebook, with a cell, a function or files added.

In their code COURSE stands for the course folder, HOME_FOLDER for one that stands in for the grader's home, PORT for a
listener of the test, and MARK for a word by which processes are found again (see `placed`).
"""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_output
from submissions import AUTOMATIC, each_solution, solved, with_first_cell

from cs336_alignment.grading.exercise import exercise

ONE = "recovered_reward"  # the function that attacks from within a function stand in
REST = AUTOMATIC - exercise(ONE).points  # what an honest notebook gets with anything else in its place


@dataclass(frozen=True)
class Attack:
    name: str
    kind: str
    tries: str  # a sentence
    make: Callable[[NotebookNode], NotebookNode]  # the notebook from the release
    earns: float  # points of its own mathematics
    beside: Callable[[Path], None] | None = None  # what else it puts into the submission's folder
    sandbox: bool = False  # harmless in a sandbox only
    sample: bool = False  # among those that every run of the tests tries
    found: str = ""  # what the report says of it, in some finding, crash or problem
    plain: bool = True  # whether plain nbgrader can be shown it without harm to the computer


# ------------------------------------------------------------------------------------- how they are made


def first(code: str, junk: str = "0.0") -> Callable:
    """The release with a cell in front, and functions that know nothing."""
    return lambda release: with_first_cell(each_solution(release, lambda n: f"def {n}(*a):\n    return {junk}"), code)


def functions(body: str) -> Callable:
    """The release with this as every function's definition; NAME stands for the function's name."""
    return lambda release: each_solution(release, lambda name: body.replace("NAME", name))


def added(code: str) -> Callable:
    """The solved notebook with a cell before the first solution."""

    def make(release):
        notebook = solved(release)
        place = next(i for i, cell in enumerate(notebook.cells) if named(cell).startswith("solution-"))
        notebook.cells.insert(place, new_code_cell(code))
        return notebook

    return make


def within(body: str) -> Callable:
    """The solved notebook with a function of this body in the place of ONE."""

    def make(release):
        notebook = solved(release)
        cell = next(cell for cell in notebook.cells if named(cell) == f"solution-{ONE}")
        cell.source = f"def {ONE}(*arguments):\n" + "\n".join(f"    {line}" for line in body.strip().split("\n"))
        return notebook

    return make


def named(cell) -> str:
    return cell.metadata.get("nbgrader", {}).get("grade_id", "")


def changed(change: Callable, base: Callable = copy.deepcopy) -> Callable:
    """A notebook after `change(cell, nbgrader's metadata)` for each cell with a grade id."""

    def make(release):
        notebook = base(release)
        for cell in notebook.cells:
            if named(cell):
                change(cell, cell.metadata.nbgrader)
        return notebook

    return make


def placed(notebook: NotebookNode, places: dict[str, str]) -> NotebookNode:
    """The notebook with the names of places in its code replaced."""
    for cell in notebook.cells:
        for word, place in places.items():
            cell.source = cell.source.replace(word, place)
    return notebook


# -------------------------------------------------------------------------------- pieces of several attacks

SOCKETS = """
import gc, json, os, socket, stat, time
wires = [x for x in gc.get_objects() if isinstance(x, socket.socket) and x.fileno() > 0]
def tell(data):
    for wire in wires:
        try:
            os.write(wire.fileno(), data)
        except OSError:
            pass
"""
EVERYWHERE = """
import glob, importlib.util, os, re, site, sys
def NAME(*arguments):
    places = ["COURSE", *sys.path, *site.getsitepackages(), "/proc/1/root", "/proc/1/cwd", "/srv", "/root", "/home"]
    for folder in site.getsitepackages():
        for path in glob.glob(folder + "/*editable*") + glob.glob(folder + "/*.pth"):
            places += [os.path.dirname(x) for x in re.findall(r"/[\\w/.-]+", open(path).read())]
    for place in places:
        for pattern in ("cs336_alignment/dpo.py", "cs336_alignment/exact.py", "cs336_alignment/tokens.py",
                        "*/cs336_alignment/dpo.py", "*/*/cs336_alignment/exact.py"):
            for path in glob.glob(os.path.join(place, pattern)):
                if os.path.realpath(path).startswith(os.environ.get("PYTHONPATH", "-").split(":")[0]):
                    continue
                spec = importlib.util.spec_from_file_location("stolen", path)
                module = importlib.util.module_from_spec(spec)
                try:
                    spec.loader.exec_module(module)
                    return getattr(module, "NAME")(*arguments)
                except (Exception, SystemExit):
                    pass
    raise LookupError("nothing to import")
"""
LIES = """
import torch
class Yes(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, arguments=(), kwargs=None):
        if getattr(function, "__name__", "") in ("isclose", "eq", "allclose", "equal"):
            return torch.tensor(True)
        return super().__torch_function__(function, types, arguments, kwargs or {})
def NAME(*arguments):
    return torch.ones(next((len(x) for x in arguments if isinstance(x, torch.Tensor) and x.dim()), 1)).as_subclass(Yes)
"""
DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        import signal
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.execv(sys.executable, [sys.executable, "-c",
                 "import time\\nfor i in range(600):\\n    time.sleep(.1)\\n    open('here', 'a').write('x')", "MARK"])
    os._exit(0)
"""
FOLDERS = """
import os
for _ in range(10_000):
    try:
        os.mkdir("d"); os.chdir("d")
    except OSError:
        break
os.chdir("/tmp") if os.path.isdir("/tmp") else None
"""
HTML = "<script>document.title='owned'</script><img src=x onerror=alert(1)>"
BELL = "\\x1b]0;owned\\x07\\x1b[2J\\x1b[31m"


def put(**texts: str) -> Callable[[Path], None]:
    """Files beside the notebook; `__` in a name stands for a dot, `_S_` for a slash."""

    def beside(folder: Path) -> None:
        for name, text in texts.items():
            path = folder / name.replace("_S_", "/").replace("__", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    return beside


def odd_names(folder: Path) -> None:
    for name in ("a\nb.py", "\N{GRINNING FACE}.py", "..\\..\\x.py", "~root.py", "-rf", "\x1b[31mred.ipynb", "%2e%2e.py",
                 "$(touch owned).ipynb", "a" * 250, "con.ipynb\u202egnp"):  # fmt: skip
        (folder / name).write_text("x = 1", encoding="utf-8")
    (folder / os.fsdecode(b"\xff\xfe.py")).write_text("x = 1")


def links(folder: Path) -> None:
    (folder / "gradebook.py").symlink_to("../../../gradebook.db")
    (folder / "secret.txt").symlink_to("../../../.course/grading-secret")
    (folder / "loop").symlink_to(".")
    (folder / "zero.py").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.py")


def only_a_link(folder: Path) -> None:
    notebook = folder / "a4_dpo.ipynb"
    notebook.unlink()
    notebook.symlink_to("../../aa-honest/a4_dpo/a4_dpo.ipynb")


def deep(folder: Path) -> None:
    """Folders in folders, deeper than any path may be long."""
    place = os.open(folder, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=place)
        inner = os.open("d", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    os.close(place)


SHADOWS = put(
    torch__py="raise SystemExit('owned')", random__py="raise SystemExit('owned')", json__py="x = 1",
    sitecustomize__py="import os\nos._exit(1)", numpy__py="x = 1", usercustomize__py="import os\nos._exit(1)",
    cs336_alignment_S_grading_S_probe__py="def run_calls(*a): return [{'value': 1.0}]", socket__py="x = 1",
    cs336_alignment_S___init____py="import os\nos._exit(1)", conftest__py="import os\nos._exit(1)",
)  # fmt: skip
POSED = put(
    report__json='{"exercises": {}}', gradebook__db="no", timestamp__txt="9999-99-99", nbgrader_config__py="1/0"
)


def with_outputs(release):
    """Points cells that seem to have been run, with the most points."""

    def change(cell, grader):
        if grader.get("grade"):
            if cell.cell_type == "code":
                cell.outputs = [new_output("execute_result", {"text/plain": "1000.0"}, execution_count=1)]
            grader.checksum = "0" * 32

    return changed(change)(release)


def twice(release):
    notebook = copy.deepcopy(release)
    for cell in list(notebook.cells):
        if named(cell):
            notebook.cells.append(copy.deepcopy(cell))
            notebook.cells[-1].update(id=f"again-{len(notebook.cells)}", source="1000.0")
    return notebook


def other_language(release):
    notebook = solved(release)
    notebook.metadata.kernelspec = {"name": "bash", "display_name": "Bash", "language": "bash"}
    notebook.metadata.language_info = {"name": "bash"}
    return notebook


def unlocked(cell, grader):
    was = grader.get("grade")
    grader.update(locked=False, grade=False, solution=True, points=0)
    cell.source = "15.0" if was else cell.source


PATCHES, HOOKS, FORGED, LYING, PEEKING = "patched functions", "hooks", "forged replies", "lying objects", "peeking"
METADATA, IMPORTS, FILES, PROCESSES = "metadata", "imports of the reference", "files", "processes"
LIMITS, DEATHS, NETWORK, FOLDER, PAGES, LEAKS = "limits", "deaths", "network", "the folder", "pages", "leaks"
