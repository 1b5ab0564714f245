"""Running the notebooks of lectures/ from fresh kernels, and knowing which of them are out of date.

A lecture is committed with its outputs. Its metadata say which code they came from: a stamp over the notebook's own
cells, the modules it imports (and what those import), the world's files, and the result files it shows.
`python3 course.py lectures` runs this file. It teaches nothing; what the cells use is in `notebook.py`.
"""

import ast
import hashlib
import os
import re
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm import tqdm

from cs336_alignment.paths import PACKAGE, course_root

STAMP = "cs336_alignment"  # the key of a lecture's metadata under which its stamp is
CELL_TIMEOUT = 900  # seconds


def lecture_paths(names: Iterable[str] = ()) -> list[Path]:
    """The lectures in reading order, or those whose file names start with one of `names` ("09", "12_dpo").

    Raises: ValueError if a name fits none.
    """
    paths = sorted((course_root() / "lectures").glob("[0-9][0-9]_*.ipynb"))
    chosen = set()
    for name in names:
        fitting = [path for path in paths if path.name.startswith(Path(name).name)]
        if not fitting:
            raise ValueError(f"there is no lecture {name!r}; there are {', '.join(path.stem for path in paths)}")
        chosen.update(fitting)
    return [path for path in paths if path in chosen] if names else paths


# --------------------------------------------------------------------------------------------- freshness


def stamp(notebook) -> str:
    """A hash of all that decides what the notebook's cells print.

    Comments, docstrings and layout of the modules do not count; neither does the Python version.
    """
    source = "\n".join(code_of(cell) for cell in notebook.cells if cell.cell_type == "code")
    digest = hashlib.sha256(source.encode())
    modules = imported_modules(source)
    for name in sorted(modules):
        digest.update(repr((name, syntax((PACKAGE / f"{name}.py").read_text(encoding="utf-8")))).encode())
    files = sorted((PACKAGE / "assets").iterdir()) if "world_training" in modules else []
    files += [course_root() / "benchmarks" / "results" / name for name in sorted(set(re.findall(r"\w+\.json", source)))]
    for path in files:
        if path.is_file():
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def code_of(cell) -> str:
    """The Python of a cell: lines for IPython alone are left out."""
    return "\n".join(line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!")))


def imported_modules(source: str) -> set[str]:
    """The package's modules that some code imports, at its top or in its functions, and those that these import."""
    found: set[str] = set()
    waiting = [source]
    while waiting:
        names = set()
        for node in ast.walk(ast.parse(waiting.pop())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
                names.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
            elif isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names if alias.name.startswith(f"{PACKAGE.name}."))
        for name in names:
            module = "/".join(name.split(".")[1:])
            path = PACKAGE / f"{module}.py"
            if module and module not in found and path.is_file():
                found.add(module)
                waiting.append(path.read_text(encoding="utf-8"))
    return found


@cache  # seven lectures import the same modules
def syntax(source: str):
    """What a module says, as nested tuples, without docstrings. (`ast.dump` differs between Python versions.)"""

    def simple(node):
        if isinstance(node, list):
            return tuple(map(simple, node))
        if not isinstance(node, ast.AST):
            return node
        fields = dict(ast.iter_fields(node))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            fields["body"] = node.body[1:]
        return type(node).__name__, *((k, simple(v)) for k, v in fields.items() if v not in (None, []) and k != "kind")

    return simple(ast.parse(source))


def stale(paths: list[Path]) -> list[Path]:
    """Those whose outputs came from other code than today's, or from nowhere."""
    notebooks = {path: nbformat.read(path, as_version=4) for path in paths}
    return [
        path for path, notebook in notebooks.items() if notebook.metadata.get(STAMP, {}).get("stamp") != stamp(notebook)
    ]


# --------------------------------------------------------------------------------------------- execution


def execute(path: Path, fast: bool) -> float:
    """Runs a lecture from a fresh kernel, top to bottom; returns the seconds it took.

    In full mode the file gets the new outputs and the stamp; in fast mode nothing is written.
    Raises: CellExecutionError with the cell and its traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    environment = os.environ | {"CS336_FAST": "1" if fast else ""}
    started = time.perf_counter()
    client = NotebookClient(
        notebook, timeout=CELL_TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--log-level=ERROR"],
    )  # fmt: skip
    client.execute(env=environment)
    seconds = time.perf_counter() - started
    if not fast:
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # when each cell ran: another diff every time
            if cell.cell_type == "code":
                cell.outputs = tidy(cell.outputs)
        notebook.metadata[STAMP] = {
            "stamp": stamp(notebook), "date": date.today().isoformat(), "seconds": round(seconds)
        }  # fmt: skip
        part = path.with_suffix(".part")
        nbformat.write(notebook, part)
        part.replace(path)
    return seconds


def tidy(outputs: list) -> list:
    """Outputs as a reader wants to find them: of a progress bar, which overwrote itself a hundred times, the last
    state; pieces of one stream joined; and progress bars as plain output, not on a warning's red ground."""
    kept: list = []
    for output in outputs:
        if output.output_type == "stream":
            if kept and kept[-1].output_type == "stream" and kept[-1].name == output.name:
                kept[-1].text += output.text
                continue
        kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in output.text.split("\n")]
            output.text = "\n".join(lines)
            if all(re.search(r"\d+%\|", line) for line in lines if line.strip()):
                output.name = "stdout"
    return [output for output in kept if output.output_type != "stream" or output.text.strip()]


def run_lectures(paths: list[Path], fast: bool = False, jobs: int = 1) -> int:
    """Runs notebooks in parallel, prints a line for each, and returns how many failed."""
    if not paths:
        print("nothing to run")
        return 0
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    os.environ.setdefault("OMP_NUM_THREADS", threads)  # for the kernels, which inherit it
    failed = 0
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        runs = {pool.submit(execute, path, fast): path for path in paths}
        for run in tqdm(as_completed(runs), total=len(runs), desc="lectures", disable=None):
            try:
                tqdm.write(f"{runs[run].stem}: {run.result():.0f} s")
            except CellExecutionError as error:
                failed += 1
                tqdm.write(f"{runs[run].stem}: failed\n{error}")
    return failed
