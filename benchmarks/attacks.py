"""What attacks on the grading get: with plain nbgrader, and here. Some ten minutes.

    python benchmarks/attacks.py

The attacks are those of `tests/grading/attacks.py`. Plain nbgrader is stock `nbgrader autograde` without any
configuration, in a folder with `source/a4_dpo` from `solutions/`, whose experiment cells are taken out: it would run
them for minutes. Each of its runs is put into bubblewrap with a copy of that folder and, but for attacks on networks,
without a network: what it harms is the copy. Needs Linux with bubblewrap. Writes benchmarks/results/attacks.json and
attacks.md.
"""

import copy
import json
import os
import platform
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import date
from pathlib import Path

import nbformat
from tqdm import tqdm

from cs336_alignment.grading.exercise import exercises
from cs336_alignment.grading.folders import read_report
from cs336_alignment.grading.grade import grade_assignment
from cs336_alignment.grading.rescue_files import files_in
from cs336_alignment.grading.sandbox import GB, Limits, bubblewrap
from cs336_alignment.paths import course_root

sys.path.insert(0, str(course_root() / "tests" / "grading"))
from attack_parts import FORGED, NETWORK, Attack, placed
from attacks import ATTACKS
from submissions import ASSIGNMENT, AUTOMATIC, hand_in, nbgrader, release, solved

RESULTS = Path(__file__).parent / "results"
PATIENCE = 60  # seconds for one run of plain nbgrader, which takes some five
CANARY, MARK = "canary-5d21", "attack-by-benchmark"
COMMAND = f"nbgrader autograde {ASSIGNMENT} --student=attacker; echo ended: $?; pgrep -fc '^[^ ]*python.*{MARK}$'"
NAMES = {exercise.name for exercise in exercises(ASSIGNMENT) if not exercise.optional}


def make_plain(root: Path) -> nbformat.NotebookNode:
    """A course of plain nbgrader with one honest student, graded; returns its release."""
    path = root / "source" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb"
    path.parent.mkdir(parents=True)
    source = nbformat.read(course_root() / "solutions" / ASSIGNMENT / path.name, as_version=4)
    source.cells = [
        c for c in source.cells if not c.metadata.get("nbgrader", {}).get("grade_id", "").startswith("experi")
    ]
    nbformat.write(source, path)
    shutil.copytree(path.parent, root / "solutions" / ASSIGNMENT)  # where an attack looks for them
    nbgrader("generate_assignment", ASSIGNMENT, cwd=root)
    made = nbformat.read(root / "release" / ASSIGNMENT / path.name, as_version=4)
    hand_in(root, "honest", solved(made))
    nbgrader("autograde", ASSIGNMENT, cwd=root)
    (root / ".course").mkdir()
    for place in (root / "home" / "canary", root / ".course" / "grading-secret"):
        place.parent.mkdir(exist_ok=True)
        place.write_text(CANARY)
    return made


def points(root: Path) -> dict[str, float]:
    """Each student's automatic and manual points, as the gradebook has them."""
    query = """select s.student_id, b.name, coalesce(g.manual_score, g.auto_score, 0) from grade g
        join submitted_notebook n on n.id = g.notebook_id join submitted_assignment s on s.id = n.assignment_id
        join base_cell b on b.id = g.cell_id"""
    found: dict[str, float] = {}
    book = sqlite3.connect(root / "gradebook.db")
    for student, name, score in book.execute(query):
        found[student] = found.get(student, 0.0) + (score if name in NAMES else 0.0)
    book.close()
    return found


def state(root: Path) -> dict[str, bytes]:
    places = [
        root / place for place in ("source", "solutions", "submitted/honest", "autograded/honest", "home", "release")
    ]
    return {str(path): path.read_bytes() for place in places for path in files_in(place)}


def plainly(attack: Attack, base: Path, made, port: int, listener: socket.socket) -> str:
    """What plain nbgrader makes of it, in words."""
    if not attack.plain:
        return "not run: would harm the computer"
    if attack.kind == FORGED:
        return "not run: speaks to our grader alone"
    if attack.name == "looks-up":
        return "not run: needs the network"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        root = Path(folder, "course")
        shutil.copytree(base, root)
        places = {"COURSE": "/mnt", "HOME_FOLDER": "/mnt/home", "PORT": str(port), "MARK": MARK}
        place = hand_in(root, "attacker", placed(attack.make(copy.deepcopy(made)), places))
        if attack.name == "link":
            shutil.copytree(root / "submitted" / "honest", root / "submitted" / "aa-honest")
        if attack.beside:
            attack.beside(place)
        before = state(root)
        net = [] if attack.kind == NETWORK else ["--unshare-net"]
        command = ["bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp", "--tmpfs",
                   "/var/tmp", "--unshare-pid", "--unshare-ipc", *net, "--die-with-parent",
                   "--bind", str(root), "/mnt", "--chdir", "/mnt", "bash", "-c", COMMAND]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(course_root()), "OMP_NUM_THREADS": "1", "HOME": "/mnt/home"}
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=PATIENCE, errors="replace"
            )
            said = done.stdout
        except subprocess.TimeoutExpired:
            said = "no end"
        return outcome(attack, root, before, said, listener)


def outcome(attack: Attack, root: Path, before: dict, said: str, listener: socket.socket) -> str:
    notes = []
    try:
        found = points(root)
    except sqlite3.Error:
        return "the gradebook is destroyed"
    graded = root / "autograded" / "attacker" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb"
    if said == "no end":
        notes.append(f"no end within {PATIENCE} s")
    elif not graded.is_file():
        notes.append("no grade: autograde stops with an error")
    else:
        notes.append(f"{found.get('attacker', 0.0):g} points")
    if found.get("honest") != AUTOMATIC:
        notes.append("changes another student's points")
    if any(before[path] != data for path, data in state(root).items() if path in before) or (root / "owned").exists():
        notes.append("changes files of the course")
    if graded.is_file() and CANARY in graded.read_text(encoding="utf-8", errors="replace"):
        notes.append("reads the secret")
    if not said.rstrip().endswith("0") and "ended" in said:
        notes.append("leaves a process")
    if attack.kind == NETWORK and reached(listener):
        notes.append("reaches the network")
    return "; ".join(notes)


def reached(listener: socket.socket) -> bool:
    """Whether somebody has connected since the last question."""
    listener.setblocking(False)
    found = False
    with suppress(BlockingIOError):
        while True:
            listener.accept()[0].close()
            found = True
    return found


def ours(root: Path) -> dict[str, tuple[str, float]]:
    """What we make of each, in words, and the points."""
    for part in ("solutions", "assignments"):
        shutil.copytree(course_root() / part / ASSIGNMENT, root / part / ASSIGNMENT)
    places = {"COURSE": str(root), "HOME_FOLDER": str(root / "home"), "PORT": "9", "MARK": MARK}
    hand_in(root, "aa-honest", solved())
    for attack in ATTACKS:
        folder = hand_in(root, attack.name, placed(attack.make(copy.deepcopy(release())), places))
        if attack.beside:
            attack.beside(folder)
    limits = Limits(cell_seconds=3, notebook_seconds=30, memory=GB, disk=GB // 8)
    batch = grade_assignment(root, ASSIGNMENT, jobs=2, limits=limits, say=lambda line: None)
    found = {}
    for attack in ATTACKS:
        if attack.name in batch.failed:
            found[attack.name] = "NOT GRADED", -1.0
            continue
        report = read_report(root, ASSIGNMENT, attack.name)
        earned = sum(exercise["points"] for exercise in report["exercises"].values())
        notes = [c["why"] for c in report["crashes"]] + report["findings"]
        found[attack.name] = f"{earned:g} points" + "".join(f"; {note.rstrip('.')}" for note in notes[:1]), earned
    return found


def cell(text: str) -> str:
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text.replace("|", "\\|").replace("<", "&lt;").replace("$", "\\$")


def write(rows: list[dict]) -> None:
    ran = [row for row in rows if not row["plain nbgrader"].startswith("not run")]
    endless = sum(row["plain nbgrader"].startswith("no end") for row in ran)
    count = sum(row["plain succeeds"] for row in ran)
    fails = sum(row["ours, points"] != row["own mathematics"] for row in rows)
    lines = [
        "# What attacks on the grading get",
        "",
        f"{date.today()}; {os.cpu_count()} cores ({platform.machine()}), {bubblewrap_version()}. Made by "
        "`python benchmarks/attacks.py`.",
        "",
        f"{len(rows)} submissions that cheat or try to do harm, graded as {ASSIGNMENT} ({AUTOMATIC:g} points by "
        "program). *Earned* is what the mathematics in the notebook is worth. Plain nbgrader is stock `nbgrader "
        "autograde` without configuration, with `source/` from `solutions/` and the experiment cells taken out; each "
        "run in a sandbox of its own with a copy of the course, so that it could harm the copy only. Here: `course.py "
        "grade` with bubblewrap, all in one batch with short limits (3 s a cell, 1 GB).",
        "",
        f"Against plain nbgrader {count} of the {len(ran)} that were run gain points, lose some, or do harm "
        f"({endless} more did not end within {PATIENCE} s on a busy computer, and are not counted); "
        f"here {fails} of {len(rows)} get other points than they earned.",
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        lines += [
            "",
            f"## {kind[0].upper()}{kind[1:]}",
            "",
            "| attack | earned | plain nbgrader | here |",
            "|---|---|---|---|",
        ]
        for row in rows:
            if row["kind"] == kind:
                texts = row["tries"], f"{row['own mathematics']:g}", row["plain nbgrader"], row["ours"]
                lines.append("| " + " | ".join(map(cell, texts)) + " |")
    (RESULTS / "attacks.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "attacks.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def bubblewrap_version() -> str:
    return subprocess.run(["bwrap", "--version"], capture_output=True, text=True).stdout.strip()


def main() -> None:
    if isinstance(bubblewrap(), str):
        raise SystemExit(bubblewrap())
    listener = socket.create_server(("127.0.0.1", 0))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        here = ours(Path(folder, "ours"))
        subprocess.run(["rm", "-rf", Path(folder, "ours")], check=True)  # folders too deep for Python
        base = Path(folder, "plain")
        base.mkdir()
        made = make_plain(base)
        port = listener.getsockname()[1]
        with ThreadPoolExecutor(2) as pool:
            texts = list(tqdm(pool.map(lambda a: plainly(a, base, made, port, listener), ATTACKS), total=len(ATTACKS)))
    for attack, text in zip(ATTACKS, texts):
        gained = not text.startswith(("not run", "no end")) and text != f"{attack.earns:g} points"
        rows.append({
            "name": attack.name, "kind": attack.kind, "tries": attack.tries, "own mathematics": attack.earns,
            "plain nbgrader": text, "plain succeeds": gained,
            "ours": here[attack.name][0], "ours, points": here[attack.name][1],
        })  # fmt: skip
    write(rows)


if __name__ == "__main__":
    main()
