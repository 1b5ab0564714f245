"""The sanitiser: whatever a student did to a notebook, what can be recovered is graded, and the report says what was
found. The submitted files are read, never written.

`rescue_files` finds and reads the files, `rescue_read` gets cells out of them, `rescue_rebuild` puts the cells on the
release. Here they meet: which file is the submission? It never raises for anything that a folder may hold.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nbformat import NotebookNode

from cs336_alignment.grading.rescue_files import CHECKPOINTS, File, Unreadable, look, shown
from cs336_alignment.grading.rescue_read import Reading, read_notebook
from cs336_alignment.grading.rescue_rebuild import Plan, rebuild, which_assignment


@dataclass(frozen=True)
class Rescued:
    notebook: NotebookNode  # nbformat 4: the release's locked cells and the student's own
    file: str | None  # the file that was used, relative to the folder; None if nothing could be read
    digest: str  # sha256 of the files that were considered: changes if and only if the submission does
    findings: tuple[str, ...]  # sentences for the instructor and the student; none for an ordinary submission


@dataclass(frozen=True)
class Candidate:
    """A file of the folder, and what is in it."""

    file: File
    reading: Reading | None
    problem: str = ""  # why it cannot be read
    worth: int = 0  # exercises and questions with something of the student's in them
    known: int = 0  # cells of the assignment


def rescue(folder: Path, release: NotebookNode, others: Mapping[str, NotebookNode] | None = None) -> Rescued:
    """What is to be graded of submitted/STUDENT/ASSIGNMENT.

    folder: may be missing, empty, a link, full of anything. release: of the assignment, from `assignments/`.
    others: the releases of other assignments by name, to say whose notebook this is.
    """
    plan = Plan(release)
    nothing, _ = rebuild(plan, release, [])
    seen = look(folder, folder.name)
    if seen.problem:
        return Rescued(nothing, None, seen.digest, (seen.problem,))
    try:
        chosen, findings = choose(candidates(seen.files, folder.name, plan), folder.name)
        if chosen is None or chosen.reading is None:
            return Rescued(nothing, None, seen.digest, tuple(findings))
        name = shown_path(chosen.file.name)
        findings += [f"{shown(chosen.file.name)} {remark}." for remark in chosen.reading.remarks]
        if not chosen.worth and not chosen.known:
            plans = {other: Plan(notebook) for other, notebook in (others or {}).items() if other != folder.name}
            whose = which_assignment(chosen.reading.pieces, plans)
            what = f"is a notebook of {whose}, not of" if whose else "has no cell of"
            return Rescued(nothing, name, seen.digest, (*findings, f"{shown(chosen.file.name)} {what} {folder.name}."))
        notebook, mended = rebuild(plan, release, chosen.reading.pieces)
        return Rescued(notebook, name, seen.digest, (*findings, *mended))
    except Exception as error:  # one submission must never stop the others, whatever was overlooked above
        why = f"The submission could not be read ({type(error).__name__}): look at it."
        return Rescued(nothing, None, seen.digest, (why,))


def shown_path(name: str) -> str:
    """A file's name as it is, except for bytes that no text can hold."""
    return os.fsencode(name).decode("utf-8", "replace")


def candidates(files: list[File], assignment: str, plan: Plan) -> list[Candidate]:
    """What is in the files. If the right name has answers, the others only matter if they look like notebooks too."""
    first = candidate(files[0], plan)  # the right name, if it is there
    rest = files[1:]
    if first.worth and first.file.name == f"{assignment}.ipynb":
        rest = [file for file in rest if file.is_notebook and CHECKPOINTS not in file.name]
    return [first, *(candidate(file, plan) for file in rest)]


def candidate(file: File, plan: Plan) -> Candidate:
    if file.data is None:
        return Candidate(file, None, file.problem)
    try:
        reading = read_notebook(file.data, plan.worth)
    except Unreadable as why:
        return Candidate(file, None, str(why))
    return Candidate(file, reading, "", plan.worth(reading.pieces), plan.known(reading.pieces))


def choose(candidates: list[Candidate], assignment: str) -> tuple[Candidate | None, list[str]]:
    """The candidate that is graded, and what to say of the choice. They come in the order of their names' fitness."""
    exact = next((c for c in candidates if c.file.name == f"{assignment}.ipynb"), None)
    usable = [c for c in candidates if c.reading is not None]
    if exact is not None and exact.reading is not None and exact.worth:
        best = exact
    else:
        best = max(usable, key=lambda c: (c.worth, c is exact, c.known, -candidates.index(c)), default=None)
    named = [c for c in candidates if c.file.is_notebook or c is best]
    findings = [f"{shown(c.file.name)} {c.problem}." for c in named[:5] if c.problem]
    if best is None:
        return None, findings or [f"{shown(c.file.name)} {c.problem}." for c in candidates[:1]]
    if best is not exact:
        why = "has no answers" if exact and exact.reading else "cannot be read" if exact else "is not there"
        findings.append(f"{shown(best.file.name)} was graded, since {assignment}.ipynb {why}.")
    unused = [c for c in named if c.reading is not None and c.file.data != best.file.data]
    unused = [c for c in unused if CHECKPOINTS not in c.file.name]
    if unused:
        names = ", ".join(shown(c.file.name) for c in unused[:5]) + (" and more" if len(unused) > 5 else "")
        findings.append(f"Not graded: {names}.")
    fuller = [c for c in unused if c.worth > best.worth]
    if fuller:
        findings.append(f"{shown(fuller[0].file.name)} has more answers than the file that was graded.")
    return best, findings
