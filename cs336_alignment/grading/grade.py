"""`course.py grade a4_dpo`: a batch of submissions, with several workers and one writer.

Each worker is a thread with a sandboxed server of its own: it reads what a student sent, runs it, judges it. The main
thread writes each result as it comes: the gradebook first, then the graded notebook with its `report.json`. A
submission whose report is there for what now lies in its folder is finished. So the batch can be stopped at any moment,
by Ctrl-C or for good, and goes on with what is not finished.
"""

import difflib
import gc
import hashlib
import json
import os
import queue
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from tqdm import tqdm

from cs336_alignment.grading.autograde import SECRET, server_for
from cs336_alignment.grading.exercise import exercises
from cs336_alignment.grading.folders import (
    REPORT,
    autograded,
    is_graded,
    only_one,
    read_report,
    read_timestamp,
    submissions,
    unfinished,
)
from cs336_alignment.grading.gradebook import Writer
from cs336_alignment.grading.judge import course_secret, grade_id, judge
from cs336_alignment.grading.markup import plain
from cs336_alignment.grading.rescue import rescue
from cs336_alignment.grading.rescue_files import files_beside, shown
from cs336_alignment.grading.sandbox import LIMITS, Limits, Server, confinement
from cs336_alignment.grading.score import Score
from cs336_alignment.paths import PACKAGE, course_root, in_course


@dataclass(frozen=True)
class Graded:
    """What became of a submission."""

    student: str
    notebook: NotebookNode
    report: dict  # what report.json holds
    only: Sequence[str] = ()  # exercises, if not all were graded now
    again: list[str] = field(default_factory=list)  # cells whose points by hand were given for something else

    @property
    def points(self) -> float:
        return sum(exercise["points"] for exercise in self.report["exercises"].values())


@dataclass
class Batch:
    """What a run of `grade` did."""

    graded: list[Graded] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)  # graded before, and nothing new came
    older: list[str] = field(default_factory=list)  # of them, those graded by other cases or references than today's
    failed: dict[str, str] = field(default_factory=dict)  # our own errors: student, what happened


def grade_assignment(
    root: Path,
    assignment: str,
    students: Sequence[str] = (),
    only: Sequence[str] = (),
    jobs: int | None = None,
    force: bool = False,
    unsafe: bool = False,
    limits: Limits = LIMITS,
    say: Callable[[str], None] | None = None,
) -> Batch:
    """Grades what lies in `root`/submitted/STUDENT/`assignment`/ and is not graded yet.

    students: these alone, graded again. only: these exercises alone, graded again; the rest of a graded notebook stays.
    jobs: how many at a time, by default one for each core. force: everything again. say: takes a line for each result,
    by default to standard output.
    Raises: ValueError for an assignment, student or exercise that is not there, or if another `grade` is running;
    NoSandbox if there is no sandbox and `unsafe` was not said.
    """
    chosen = [e for e in exercises(assignment) if not e.optional]
    unknown = sorted(set(only) - {exercise.name for exercise in chosen})
    if unknown:
        raise ValueError(f"{assignment} has no exercise {unknown[0]!r}; it has {', '.join(e.name for e in chosen)}")
    chosen = [e for e in chosen if not only or e.name in only]
    found = submissions(root, assignment)
    missing = sorted(set(students) - set(found))
    if missing:
        near = difflib.get_close_matches(missing[0], found, 1)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"there is no {root / 'submitted' / missing[0] / assignment}{guess}")
    check_points(root, assignment)
    if not found:
        raise ValueError(
            f"there is nothing to grade: submissions belong in {root / 'submitted'}/STUDENT/{assignment}/ "
            "(`course.py collect` puts the export of a learning system there)"
        )
    confinement(unsafe)  # raises before anything is written
    # Standard output as it is now: workers who call a function quietly turn it away for the whole process.
    say = say or partial(tqdm.write, file=sys.stdout)
    batch = Batch()
    with only_one(root), Writer(root, assignment) as writer:
        todo = []
        for student in dict.fromkeys(students) or found:
            report = read_report(root, assignment, student) if writer.has(student) else {}
            known = is_graded(root, assignment, student, report)
            if only and not known:
                say(f"{shown(student)}: graded whole, since this submission was not graded yet")
            if known and not (force or students or only):
                batch.finished.append(student)
                if any(report["exercises"].get(e.name, {}).get("code") != code_digest(e.name) for e in chosen):
                    batch.older.append(student)
                continue
            todo.append((student, [e.name for e in chosen] if only and known else []))
        if todo:
            run_batch(root, assignment, todo, jobs or os.cpu_count() or 1, unsafe, limits, say, writer, batch)
    return batch


def check_points(root: Path, assignment: str) -> None:
    """Raises: ValueError where an exercise's file, its cases and its points cell are not worth the same."""
    path = in_course(root, "assignments", assignment, f"{assignment}.ipynb")
    cells = nbformat.read(path, as_version=4).cells
    worth = {grade_id(cell): cell.metadata.nbgrader.get("points") for cell in cells if grade_id(cell)}
    for exercise in exercises(assignment):
        cases, cell = sum(case.points for case in exercise.cases), worth.get(exercise.name) or exercise.points
        if not exercise.optional and not exercise.points == cases == cell:
            raise ValueError(
                f"{exercise.name} is worth {exercise.points:g} in its file, {cases:g} by its cases and {cell:g} in the "
                'notebook: make them the same (see "Mend a hidden case" in book/instructors.md)'
            )


def run_batch(root, assignment, todo, jobs, unsafe, limits, say, writer, batch) -> None:
    """Workers grade, this thread writes."""
    paths = [path for folder in (course_root(), root) for path in folder.glob("assignments/*/*.ipynb")]
    releases = {name: nbformat.read(path, as_version=4) for name, path in {path.stem: path for path in paths}.items()}
    secret = course_secret(root / SECRET)
    jobs = min(jobs, len(todo))
    servers: queue.SimpleQueue[Server] = queue.SimpleQueue()
    made = [server_for(assignment, limits, unsafe, number) for number in range(jobs)]  # raises before any thread
    for server in made:
        servers.put(server)

    def work(student: str, only: list[str]) -> Graded:
        server = servers.get()
        try:
            return grade_one(root, assignment, student, only, releases, secret, server)
        finally:
            servers.put(server)

    gc.freeze()  # what is imported stays; it need not be looked through again and again
    tqdm.monitor_interval = 0  # no thread of tqdm's own
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="grade")
    try:
        tasks = {pool.submit(work, *task): task for task in todo}
        with tqdm(total=len(todo), unit="submission", desc=assignment, smoothing=0.05) as bar:
            for task in as_completed(tasks):
                student, _ = tasks[task]
                try:
                    result = task.result()
                    keep(root, assignment, result, writer)
                except Exception as error:  # ours, or the disk's: the others must not suffer
                    batch.failed[student] = f"{type(error).__name__}: {error}"
                    say(f"{shown(student)}: NOT GRADED: {plain(batch.failed[student])}")
                else:
                    batch.graded.append(result)
                    say(line(result))
                bar.update()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for server in made:
            server.close()
        pool.shutdown()


def grade_one(
    root: Path, assignment: str, student: str, only: list[str], releases: dict[str, NotebookNode], secret: str,
    server: Server,
) -> Graded:  # fmt: skip
    """A submission, read, run and judged. Nothing is written."""
    folder = root / "submitted" / student / assignment
    others = {name: release for name, release in releases.items() if name != assignment}
    rescued = rescue(folder, releases[assignment], others)
    graded = [e for e in exercises(assignment) if not e.optional and (not only or e.name in only)]
    judged = judge(rescued.notebook, graded, student, secret, server, files_beside(folder, rescued.file))
    timestamp, findings = read_timestamp(folder), list(rescued.findings)
    if timestamp is None and os.path.lexists(folder / "timestamp.txt"):
        findings.append("timestamp.txt says no day and time that can be read: it is graded as in time.")
    report = {
        "student": student,
        "assignment": assignment,
        "file": rescued.file,
        "digest": rescued.digest,
        "timestamp": timestamp,
        "graded_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(judged.seconds, 3),
        "cpu_seconds": round(judged.cpu_seconds, 3),
        "findings": findings,
        "crashes": judged.crashes,
        "exercises": {name: exercise_report(score) for name, score in judged.scores.items()},
    }
    return Graded(student, rescued.notebook, report, only)


def exercise_report(score: Score) -> dict:
    """An exercise as report.json has it. What a hidden case was given and what it wanted is not in it."""
    cases = [
        {
            "name": verdict.case.name,
            "points": verdict.points,
            "of": verdict.case.points,
            "visible": verdict.case.visible,
            "right": verdict.wrong is None,
            "why": verdict.why,
            "expects": verdict.case.expects,
        }
        for verdict in score.verdicts
    ]
    return {"points": score.points, "of": score.exercise.points, "hint": score.hint, "problem": score.problem,
            "code": code_digest(score.exercise.name), "cases": cases}  # fmt: skip


def line(graded: Graded) -> str:
    """A result on one line, and a line for each thing that was odd."""
    exercises = graded.report["exercises"]
    of = sum(exercise["of"] for exercise in exercises.values())
    text = f"{shown(graded.student)}: {graded.points:g} of {of:g}"
    if graded.only:
        parts = [f"{name} {exercises[name]['points']:g} of {exercises[name]['of']:g}" for name in graded.only]
        text += f", with {', '.join(parts)} now"
    else:
        text += f", {graded.report['seconds']:.1f} s"
    notes = graded.report["findings"] + [f"{c['cell']}: {c['why']}" for c in graded.report["crashes"]]
    if graded.again:
        notes.append(f"look again at points given by hand, for another answer or score: {', '.join(graded.again)}")
    return text + "".join(f"\n    {plain(note)}" for note in notes)


def summary(batch: Batch) -> str:
    """What a run did, in a few lines."""
    lines = [f"{len(batch.graded)} graded, {len(batch.finished)} were graded before"]
    if batch.older:
        lines.append(f"{len(batch.older)} of them by other cases or references than today's; --force grades them again")
    odd = [graded.student for graded in batch.graded if graded.report["findings"] or graded.report["crashes"]]
    if odd:
        lines.append(f"{len(odd)} with something to look at: {', '.join(map(shown, odd))}")
    if batch.failed:
        lines.append(f"{len(batch.failed)} NOT GRADED, by an error of ours: {', '.join(map(shown, batch.failed))}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------- keeping


def keep(root: Path, assignment: str, graded: Graded, writer: Writer) -> None:
    """Writes a result. Killed at any moment, the submission is graded as before, or counts as not graded.

    The files are made first, beside the old ones: if the disk is full, nothing has changed. While the gradebook is
    written there is no report.
    """
    folder = autograded(root, assignment, graded.student)
    report, notebook = merged(folder, graded) if graded.only else (graded.report, graded.notebook)
    before = read_report(root, assignment, graded.student).get("changed", [])
    changed = changed_answers(folder / f"{assignment}.ipynb", notebook)
    report["changed"] = sorted({*before, *changed})
    graded.report.update(report)
    timestamp = read_timestamp(root / "submitted" / graded.student / assignment)
    part, old = unfinished(root, assignment, graded.student), folder.with_name(f".{assignment}.old")
    for left in (part, old):
        shutil.rmtree(left, ignore_errors=True)
    part.mkdir(parents=True)
    # Not nbformat.write, whose many short lines are for people, and slow.
    text = json.dumps(notebook, ensure_ascii=False)
    (part / f"{assignment}.ipynb").write_text(text, encoding="utf-8", errors="replace")
    (part / REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")
    if timestamp:
        (part / "timestamp.txt").write_text(timestamp + "\n", encoding="utf-8")
    (folder / REPORT).unlink(missing_ok=True)
    points = {name: exercise["points"] for name, exercise in graded.report["exercises"].items()}
    graded.again.extend(writer.write(graded.student, graded.notebook, points, timestamp, graded.only or None, changed))
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def changed_answers(before: Path, notebook: NotebookNode) -> list[str]:
    """Exercises and questions whose answer is another than in the notebook that was graded before."""
    try:
        old = {grade_id(cell): cell.source for cell in nbformat.read(before, as_version=4).cells}
    except (OSError, ValueError, AttributeError):
        return []
    new = {grade_id(cell): cell.source for cell in notebook.cells if grade_id(cell)}
    return [name.removeprefix("solution-") for name, source in new.items() if source != old.get(name, source)]


def merged(folder: Path, graded: Graded) -> tuple[dict, NotebookNode]:
    """The report and the notebook that were there, with some exercises graded anew."""
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    # All other cells ran again, but not the points cells of other exercises.
    others = set(report["exercises"]) - set(graded.only)
    report["crashes"] = [c for c in report["crashes"] if c["cell"] in others] + graded.report["crashes"]
    report["exercises"] |= graded.report["exercises"]
    report["graded_at"] = graded.report["graded_at"]
    notebook = nbformat.read(folder / f"{graded.report['assignment']}.ipynb", as_version=4)
    new = {grade_id(cell): cell for cell in graded.notebook.cells}
    for cell in notebook.cells:
        if grade_id(cell) in graded.only:
            cell.outputs = new[grade_id(cell)].outputs
    return report, notebook


@cache
def code_digest(exercise: str) -> str:
    """Changes with an exercise's cases and reference, and with how all are judged: with the files of these."""
    found, waiting = {}, [f"grading/exercises/{exercise}", "grading/score"]
    while waiting:
        name = waiting.pop()
        path = PACKAGE / f"{name}.py"
        if name in found or not path.is_file():
            continue
        found[name] = path.read_bytes()
        if name.startswith("grading/"):  # of the package itself, the reference's own file is enough
            modules = re.findall(r"^from cs336_alignment\.([\w.]+) import", found[name].decode(), re.MULTILINE)
            waiting += [module.replace(".", "/") for module in modules]
    return hashlib.sha256(b"".join(found[name] for name in sorted(found))).hexdigest()[:16]
