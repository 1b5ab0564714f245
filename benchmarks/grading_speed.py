"""How long does grading take? nbgrader's own autograde, the same with the judge, and `course.py grade`. A quarter hour.

    python benchmarks/grading_speed.py

The same 32 submissions of one assignment, four ways in one interleaved run, three rounds; then 32, 100 and 300 with two
workers. CPU seconds are those of all processes, also of the sandboxes' (a process that is killed is counted when its
parent, or for want of one this benchmark, takes leave of it). Writes benchmarks/results/grading_speed.json and .md.
"""

import ctypes
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import nbformat

from cs336_alignment.grading.gradebook import Writer
from cs336_alignment.paths import course_root

ASSIGNMENT = "a4_dpo"
RESULTS = Path(__file__).parent / "results"
SIZE, ROUNDS, GROWTH = 32, 3, (32, 100, 300)
# `course.py grade` without what it makes at the end: nbgrader has other commands for lists and pages.
ONLY_GRADING = """import gc, sys
sys.modules["rfc3987_syntax"] = None  # this and the next as course.py does
gc.disable()
from cs336_alignment import cli
from cs336_alignment.grading import results
gc.enable()
results.after_grading = cli.show_what_follows = lambda *_: None
sys.exit(cli.main(sys.argv[1:]))"""
GRADE = ["-c", ONLY_GRADING, "grade", ASSIGNMENT, "--course", "."]
WAYS = {
    "nbgrader, stock": ["-m", "nbgrader", "autograde", ASSIGNMENT],
    "nbgrader with the judge": ["-m", "nbgrader", "autograde", ASSIGNMENT],
    "course.py grade, 1 worker": [*GRADE, "--jobs", "1"],
    "course.py grade, 2 workers": [*GRADE, "--jobs", "2"],
}
STOCK = next(iter(WAYS))


# ---------------------------------------------------------------------------------------------- submissions


def notebook_of(folder: str):
    return nbformat.read(course_root() / folder / ASSIGNMENT / f"{ASSIGNMENT}.ipynb", as_version=4)


def grade_id(cell) -> str:
    return cell.metadata.get("nbgrader", {}).get("grade_id", "")


def without_experiments(notebook):
    notebook.cells = [cell for cell in notebook.cells if not grade_id(cell).startswith("experiment-")]
    return notebook


def submission(notebook, number: int):
    """The release with right answers typed in: words of the student's own, and every other loss by another function."""
    answers = {grade_id(cell): cell.source for cell in notebook_of("solutions").cells}
    for cell in notebook.cells:
        name = grade_id(cell)
        if name.startswith("solution-"):
            cell.source = f"{answers[name]}\n\n# My answer, number {number}."
            if number % 2:
                cell.source = cell.source.replace("F.logsigmoid(h)", "-F.softplus(-h)")
        elif name.startswith("written-"):
            cell.source = f"Both fall, the rejected one faster. ({number})"
    return notebook


def hand_in(root: Path, size: int, release) -> None:
    for number in range(size):
        student = f"student{number:03d}"
        folder = root / "submitted" / student / ASSIGNMENT
        folder.mkdir(parents=True)
        notebook = submission(nbformat.from_dict(json.loads(json.dumps(release))), number)
        nbformat.write(notebook, folder / f"{ASSIGNMENT}.ipynb")


def stock_course(root: Path, size: int) -> Path:
    """A folder for nbgrader without any configuration. Its notebooks have no experiments, which it would run."""
    source = root / "source" / ASSIGNMENT
    source.mkdir(parents=True)
    nbformat.write(without_experiments(notebook_of("solutions")), source / f"{ASSIGNMENT}.ipynb")
    command = [sys.executable, "-m", "nbgrader", "generate_assignment", ASSIGNMENT]
    subprocess.run(command, cwd=root, env=environment(), check=True, capture_output=True)
    hand_in(root, size, nbformat.read(root / "release" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb", as_version=4))
    return root


def judged_course(root: Path, size: int) -> Path:
    """A folder with our configuration. The assignment is in its gradebook, as in the other."""
    hand_in(root, size, notebook_of("assignments"))
    shutil.copy(course_root() / "nbgrader_config.py", root)
    for folder in ("solutions", "assignments"):
        shutil.copytree(course_root() / folder / ASSIGNMENT, root / folder / ASSIGNMENT)
    with Writer(root, ASSIGNMENT):
        return root


# ------------------------------------------------------------------------------------------------ measuring


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    return kept | {"PYTHONPATH": str(course_root()), "OMP_NUM_THREADS": "1"}


def account(command: list[str]) -> None:
    """Runs a command and prints its seconds, the CPU seconds of all that it started, and its own largest memory."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans are given to this process
    begin = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.monotonic() - begin
    try:
        while True:
            os.wait()
    except ChildProcessError:
        pass
    if status:
        sys.exit(said.decode("utf-8", "replace")[-3000:])
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = children.ru_utime + children.ru_stime
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "megabytes": used.ru_maxrss / 1024}))


def measured(course: Path, way: list[str]) -> dict:
    """Grades a copy of a course; returns times, memory and scores."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "course"
        shutil.copytree(course, root)
        load = os.getloadavg()[0]
        command = [sys.executable, str(Path(__file__).resolve()), "--account", sys.executable, *way]
        done = subprocess.run(command, cwd=root, env=environment(), stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout) | {"load": load, "scores": scores(root)}


def scores(root: Path) -> dict:
    """Automatic points by student and cell."""
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{root}/gradebook.db") as book:
        return {
            s.student.id: {g.name: g.auto_score for g in s.notebooks[0].grades if not g.name.startswith("written-")}
            for s in book.assignment_submissions(ASSIGNMENT)
        }


def compare(courses: dict[str, Path]) -> list[dict]:
    """Rounds of all ways, forwards and backwards in turn. Raises: AssertionError if scores differ."""
    measured(courses["course.py grade, 1 worker"], [*WAYS["course.py grade, 1 worker"], "--student", "student000"])
    rows, wanted = [], None
    for number in range(ROUNDS):
        for way in list(WAYS) if number % 2 == 0 else list(WAYS)[::-1]:
            row = measured(courses[way], WAYS[way])
            found = row.pop("scores")
            wanted = wanted or found
            assert len(found) == SIZE and found == wanted, f"other scores by {way}"
            rows.append({"round": number, "way": way} | row)
            print(rows[-1], flush=True)
    return rows


def growth(folder: Path) -> list[dict]:
    rows = []
    for size in GROWTH:
        row = measured(judged_course(folder / f"class{size}", size), WAYS["course.py grade, 2 workers"])
        assert len(row.pop("scores")) == size
        rows.append({"submissions": size} | row)
        print(rows[-1], flush=True)
    return rows


# ------------------------------------------------------------------------------------------------- the page


def page(record: dict) -> str:
    def each(way: str, what: str) -> list[float]:
        return [row[what] for row in record["rows"] if row["way"] == way]

    def middle(values: list[float], digits: int = 2) -> str:
        return f"{statistics.median(values):.{digits}f}"

    def ratios(way: str, what: str) -> str:
        return ", ".join(f"{stock / own:.1f}" for stock, own in zip(each(STOCK, what), each(way, what)))

    lines = [
        "# How long does grading take?",
        "",
        f"{record['date']}; made by `python benchmarks/grading_speed.py` on {record['machine']}; "
        f"{record['versions']}. The computer had other work to do: its load was between {record['load'][0]:.1f} and "
        f"{record['load'][1]:.1f} when the runs started, so seconds are too long, for all ways alike; CPU seconds "
        "suffer less.",
        "",
        f"The same {SIZE} submissions of {ASSIGNMENT}, whole notebooks, all right, no two the same. "
        f"All ways gave the same points, cell by cell. {ROUNDS} rounds in one run, in turn forwards and backwards; "
        "the table has medians per submission, with what starting takes. For stock nbgrader the experiments were taken "
        "out of the notebooks, since it would run them; the others skip them. The assignment was in the gradebook. "
        "Sandboxes were on for all but stock nbgrader, which has none. Lists, pages and the report, which grade makes "
        "at the end, were left out, as nbgrader has other commands for them.",
        "",
        "| way | seconds | CPU seconds | times faster, round by round | times less CPU, round by round |",
        "|---|---|---|---|---|",
    ]
    for way in WAYS:
        cells = [middle([x / SIZE for x in each(way, what)]) for what in ("seconds", "cpu_seconds")]
        cells += ["", ""] if way == STOCK else [ratios(way, "seconds"), ratios(way, "cpu_seconds")]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "`course.py grade` with two workers on classes of different size:",
        "",
        "| submissions | seconds | seconds each | CPU seconds each | memory of the grader, MB |",
        "|---|---|---|---|---|",
    ]
    for row in record["growth"]:
        size = row["submissions"]
        lines.append(
            f"| {size} | {row['seconds']:.0f} | {row['seconds'] / size:.2f} | {row['cpu_seconds'] / size:.2f} | "
            f"{row['megabytes']:.0f} |"
        )
    return "\n".join([*lines, ""])


def machine() -> str:
    """The kind of computer, without its name."""
    model = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{os.cpu_count()} cores ({model[0] if model else platform.machine()}), {platform.system()}"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stock = stock_course(folder / "stock", SIZE)
        judged = judged_course(folder / "judged", SIZE)
        rows = compare({way: stock if way == STOCK else judged for way in WAYS})
        grown = growth(folder)
    loads = [row["load"] for row in [*rows, *grown]]
    names = ("nbgrader", "nbformat", "torch", "ipykernel")
    record = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": f"Python {platform.python_version()}, " + ", ".join(f"{n} {version(n)}" for n in names),
        "load": [min(loads), max(loads)],
        "assignment": ASSIGNMENT,
        "rows": rows,
        "growth": grown,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "grading_speed.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "grading_speed.md").write_text(page(record), encoding="utf-8")
    print(page(record))


if __name__ == "__main__":
    account(sys.argv[2:]) if sys.argv[1:2] == ["--account"] else main()
