"""Is a batch that was killed again and again the same in the end? The grader is killed twenty times. Some minutes.

    python benchmarks/grading_faults.py

Thirty submissions, two workers. At each of twenty moments (drawn from a seed) the grader gets SIGKILL, which it cannot
see coming, and is started again. Compared with an untouched batch: the whole gradebook but ids, the reports but
their times, and the outputs of the graded notebooks. Writes benchmarks/results/grading_faults.json and .md.
"""

import json
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import nbformat
import psutil
from grading_speed import ASSIGNMENT, RESULTS, environment, judged_course, machine

from cs336_alignment.grading.sandbox import bubblewrap

SIZE, KILLS, SEED = 30, 20, 5
TIMES = ("graded_at", "seconds", "cpu_seconds")


def start(root: Path) -> subprocess.Popen:
    unsafe = ["--unsafe"] if isinstance(bubblewrap(), str) else []
    command = [sys.executable, "-m", "cs336_alignment", "grade", ASSIGNMENT, "--course", str(root), "--jobs=2", *unsafe]
    return subprocess.Popen(command, cwd=root, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(root: Path) -> None:
    process = start(root)
    said = process.communicate()[0]
    if process.returncode:
        sys.exit(said.decode("utf-8", "replace")[-3000:])


def finished(root: Path) -> int:
    return len(list((root / "autograded").glob(f"*/{ASSIGNMENT}/report.json")))


def gradebook(root: Path) -> dict:
    """All that the gradebook says of the submissions, without ids."""
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{root}/gradebook.db") as book:
        return {
            s.student.id: {
                "submission": [str(s.timestamp), str(s.extension), s.score, s.max_score, s.late_submission_penalty],
                "notebooks": [notebook.name for notebook in s.notebooks],
                "grades": sorted(
                    [g.name, g.auto_score, g.manual_score, g.extra_credit, bool(g.needs_manual_grade)]
                    for notebook in s.notebooks for g in notebook.grades
                ),
                "comments": sorted(
                    [c.name, c.auto_comment, c.manual_comment] for notebook in s.notebooks for c in notebook.comments
                ),
            }
            for s in book.assignment_submissions(ASSIGNMENT)
        }  # fmt: skip


def files(root: Path) -> dict:
    """What is in `autograded/`: reports without their times, cells of notebooks, and the names of all files."""
    found = {}
    for folder in sorted((root / "autograded").glob(f"*/{ASSIGNMENT}")):
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        cells = nbformat.read(folder / f"{ASSIGNMENT}.ipynb", as_version=4).cells
        found[folder.parent.name] = {
            "report": {key: value for key, value in report.items() if key not in TIMES},
            "cells": [[cell.source, cell.get("outputs")] for cell in cells],
            "files": sorted(path.relative_to(folder.parent).as_posix() for path in folder.parent.rglob("*")),
        }
    return found


def killed(root: Path, wanted: int, delay: float) -> dict:
    """Starts the batch, kills it `delay` seconds after so many submissions are finished, and looks at what is left."""
    before, begin = finished(root), time.monotonic()
    process = start(root)
    while finished(root) < wanted and process.poll() is None:
        time.sleep(0.005)
    time.sleep(delay)
    started = psutil.Process(process.pid).children(recursive=True)
    ended = process.poll() is not None
    process.kill()
    seconds = time.monotonic() - begin
    process.communicate()
    _, alive = psutil.wait_procs(started, timeout=5)
    with sqlite3.connect(root / "gradebook.db") as book:
        sound = book.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    return {
        "finished before": before, "finished after": finished(root), "seconds": round(seconds, 2),
        "had ended": ended, "processes": len(started), "left after 5 s": len(alive), "gradebook sound": sound,
    }  # fmt: skip


def page(record: dict) -> str:
    rows = record["kills"]
    left = sum(row["left after 5 s"] for row in rows)
    sound = sum(row["gradebook sound"] for row in rows)
    lines = [
        "# Killed and resumed",
        "",
        f"{record['date']}; made by `python benchmarks/grading_faults.py` on {record['machine']}, seed {SEED}.",
        "",
        f"One batch of {SIZE} submissions of {ASSIGNMENT}, graded by two workers "
        f"{'in sandboxes' if record['sandbox'] else 'without sandboxes'}, got SIGKILL {len(rows)} times and was "
        f"started again each time. {record['equal']} of {SIZE} submissions ended with the same rows in the gradebook "
        "(points, comments, what waits for a person), the same report and the same outputs as in an untouched batch. "
        f"The gradebook was sound after {sound} of {len(rows)} kills; {left} processes of submissions were left 5 "
        "seconds later.",
        "",
        "| kill | after seconds | finished when started | finished when killed | its processes | left after 5 s |",
        "|---|---|---|---|---|---|",
    ]
    for number, row in enumerate(rows, 1):
        cells = [number, row["seconds"], row["finished before"], row["finished after"], row["processes"],
                 row["left after 5 s"]]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    draw = random.Random(SEED)
    moments = sorted(draw.randrange(SIZE - 2) for _ in range(KILLS))
    with tempfile.TemporaryDirectory() as name:
        whole = judged_course(Path(name) / "whole", SIZE)
        (whole / ".course").mkdir(exist_ok=True)
        (whole / ".course" / "grading-secret").write_text("a secret that both courses have\n", encoding="utf-8")
        course = Path(name) / "killed"
        shutil.copytree(whole, course)
        finish(whole)
        kills = []
        for wanted in moments:
            # A moment that was reached before: the kill falls into the start.
            kills.append(killed(course, wanted, draw.uniform(0, 6 if finished(course) >= wanted else 0.5)))
            print(kills[-1], flush=True)
        finish(course)
        books, kept = (gradebook(whole), gradebook(course)), (files(whole), files(course))
    students = set(books[0]) | set(books[1])
    equal = sum(all(two[0].get(s) == two[1].get(s) is not None for two in (books, kept)) for s in students)
    record = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "sandbox": not isinstance(bubblewrap(), str),
        "submissions": SIZE,
        "equal": equal,
        "kills": kills,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "grading_faults.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "grading_faults.md").write_text(page(record), encoding="utf-8")
    print(page(record))
    if equal < SIZE or any(row["left after 5 s"] or not row["gradebook sound"] for row in kills):
        sys.exit("not the same")


if __name__ == "__main__":
    main()
