"""`course.py collect`: submissions as a learning system exports them, put where they are graded.

Each student's newest attempt becomes `submitted/STUDENT/ASSIGNMENT/ASSIGNMENT.ipynb`, with a `timestamp.txt` where the
export states the time. A submission that is there already and differs is moved to `.course/replaced/`, never lost.
Nothing is written anywhere else, whatever files and people are called.
"""

import os
import re
import shutil
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from pathlib import Path, PurePosixPath
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cs336_alignment.grading.folders import parse_time, read_timestamp
from cs336_alignment.grading.gradebook import Person, assignment_names
from cs336_alignment.grading.lms import (
    METADATA,
    Origin,
    Roster,
    canonical,
    make_id,
    origins,
    read_metadata,
    read_roster,
    shared_start,
    without_wrapper,
)
from cs336_alignment.grading.rescue_files import rank
from cs336_alignment.grading.unpack import Entry, Refused, files_of

NOTEBOOK = re.compile(r"(?i)\.ipynb(\.txt|\.json)?\Z")  # mail and browsers add endings
CRUFT = re.compile(
    r"(?i)(\A|/)(__MACOSX|\.ipynb_checkpoints|\.git|__pycache__)/|(\A|/)(\._[^/]*|\.DS_Store|Thumbs\.db)\Z"
)
MOST_LINES = 30  # of files that are named without being anyone's submission


@dataclass(frozen=True)
class Candidate:
    """A file that may be a student's submission."""

    entry: Entry
    origin: Origin

    def newer(self) -> tuple:
        """Sorts attempts: by time, then by number."""
        return (self.origin.when or datetime.min.replace(tzinfo=UTC), self.origin.attempt)


@dataclass
class Collected:
    """What became of an export. Lines are tuples of text, as the tables show them."""

    placed: list[tuple[str, str, str]] = field(default_factory=list)  # student, file, what was done
    unmatched: list[tuple[str, str, str]] = field(default_factory=list)  # name, file, nearest guess
    ignored: list[tuple[str, str]] = field(default_factory=list)  # file, why
    refused: list[tuple[str, str]] = field(default_factory=list)
    students: dict[str, Person] = field(default_factory=dict)  # of the class list
    missing: list[str] = field(default_factory=list)  # of them, those who are not in the export

    @property
    def complete(self) -> bool:
        return not self.unmatched and not self.refused


def collect(
    source: Path,
    assignment: str,
    root: Path,
    students: Path | None = None,
    dry_run: bool = False,
    zone: str | None = None,
) -> Collected:
    """Brings the submissions of an export under `root/submitted/`; says what was done with every file.

    source: a folder or zip archive. students: a csv file, see `read_roster`; without it ids are made from names.
    zone: the time zone of times that the export states without one ("Europe/Berlin"); by default this computer's.
    Raises: ValueError for a source, class list or zone that cannot be used, or an assignment that is not there.
    """
    assignments = assignment_names(root)
    if assignment not in assignments:
        raise ValueError(f"there is no assignment {assignment!r}; there are {', '.join(assignments) or 'none'}")
    roster = read_roster(students) if students else None
    result = Collected()
    try:
        entries, result.refused = files_of(source)
    except Refused as why:
        raise ValueError(f"{source} {why}") from None
    owned, times = candidates(entries, assignment, source.stem, time_zone(zone), roster, result)
    for student in sorted(owned):
        settle(root, assignment, student, owned[student], times, dry_run, result)
    result.students = roster.students if roster else {}
    result.missing = sorted(set(result.students) - set(owned))
    return result


def time_zone(name: str | None) -> tzinfo | None:
    try:
        return ZoneInfo(name) if name else None
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"there is no time zone {name!r}; one is Europe/Berlin") from None


def candidates(
    entries: list[Entry], assignment: str, source: str, zone: tzinfo | None, roster: Roster | None, result: Collected
) -> tuple[dict[str, list[Candidate]], dict[str, Entry]]:
    """The notebooks by student, and timestamp.txt files by their folder; what is neither goes into the result."""
    files = [entry for entry in entries if not CRUFT.search(entry.name)]
    notebooks = [entry for entry in files if NOTEBOOK.search(entry.name)]
    wrapper = without_wrapper([entry.name for entry in notebooks], assignment, source)
    if roster and any(map(roster.find, origins(f"{wrapper}{assignment}.ipynb", assignment, zone, {}))):
        wrapper = ""  # the one student who handed in anything
    shared = shared_start([entry.name.removeprefix(wrapper) for entry in notebooks])
    metadata = {}
    times: dict[str, Entry] = {}
    for entry in files:
        folder, _, name = entry.name.rpartition("/")
        if NOTEBOOK.search(name):
            continue
        if name == METADATA and not re.search(r"(\A|/)submission_\d+(/|\Z)", folder):  # a student may hand in one
            try:
                metadata |= read_metadata(entry.read())
            except Refused as why:
                result.refused.append((entry.name, str(why)))
        elif name == "timestamp.txt":
            times[folder] = entry
        else:
            result.ignored.append((entry.name, "no notebook"))
    owned: dict[str, list[Candidate]] = defaultdict(list)
    claims: dict[str, set[str]] = defaultdict(set)  # ids made from names: whose they are
    for entry in notebooks:
        found = origins(entry.name.removeprefix(wrapper), assignment, zone, metadata, shared)
        if not found:
            result.unmatched.append(("?", entry.name, "nothing says whose it is"))
        for origin in found:
            student, why = owner(origin, roster, claims)
            if student:
                owned[student].append(Candidate(entry, origin))
            else:
                result.unmatched.append((origin.who, entry.name, why))
    for same in (sorted(people) for people in claims.values() if len(people) > 1):
        for student in {make_id(who) for who in same} & set(owned):
            for candidate in owned.pop(student):
                why = f"{' and '.join(same)} would have the same id: give --students"
                result.unmatched.append((candidate.origin.who, candidate.entry.name, why))
    return owned, times


def owner(origin: Origin, roster: Roster | None, claims: dict[str, set[str]]) -> tuple[str | None, str]:
    """The student's id, or None and why not."""
    if roster is None:
        student = make_id(origin.who)
        claims[canonical(student)].add(origin.who)
        return (student, "") if student and canonical(student) else (None, "no id can be made from this name")
    found = roster.find(origin)
    if len(found) == 1:
        return next(iter(found)), ""
    if found:
        return None, f"may be {' or '.join(sorted(found))}"
    guess = roster.nearest(origin.who)
    return None, f"nearest: {guess}" if guess else "nobody like that in the class list"


def settle(
    root: Path, assignment: str, student: str, found: list[Candidate], times: dict, dry_run: bool, result: Collected
) -> None:
    """Chooses a student's newest attempt, puts it in place, and says what became of all."""
    newest = max(candidate.newer() for candidate in found)
    last = [c for c in found if c.newer() == newest]
    last.sort(key=lambda c: rank(PurePosixPath(c.origin.file).name, assignment))
    chosen = last[0]
    for other in found:
        if other is not chosen:
            why = "another notebook of the same attempt" if other in last else "an earlier attempt"
            result.ignored.append((other.entry.name, f"{student}: {why}"))
    folder = chosen.entry.name.rpartition("/")[0]
    when = chosen.origin.when
    try:
        data = chosen.entry.read()
        if when is None and folder in times:
            when = parse_time(times[folder].read()[:1000].decode("utf-8", "replace"))
        done = place(root, assignment, student, data, when, dry_run)
    except Refused as why:
        result.refused.append((chosen.entry.name, str(why)))
        return
    result.placed.append((student, chosen.entry.name, "; ".join(filter(None, (done, chosen.origin.note)))))


def place(root: Path, assignment: str, student: str, data: bytes, when: datetime | None, dry_run: bool) -> str:
    """Writes one submission; returns what was done. Raises: Refused where something stands in the way."""
    home = root / "submitted" / student / assignment
    for folder in (root / "submitted", home.parent, home):
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise Refused(f"cannot be put in place: {folder.relative_to(root).as_posix()} is no plain folder")
    file, stamp = home / f"{assignment}.ipynb", home / "timestamp.txt"
    stated = f"{when:%Y-%m-%d %H:%M:%S} UTC" if when else ""
    before = parse_time(read_timestamp(home) or "")
    done = f"new, of {stated}" if stated else "new"
    if home.is_dir() and any(home.iterdir()):
        if file.is_file() and not file.is_symlink() and file.read_bytes() == data:
            if when is None or before == when.replace(microsecond=0):
                return "as it was"
            done = f"as it was; time now {stated}"
            if not dry_run:
                write(stamp, f"{stated}\n".encode())
            return done
        if when and before and before > when:
            return f"left alone: what is there is newer ({before:%Y-%m-%d %H:%M:%S} UTC)"
        if not (when and before) and was_replaced(root, assignment, student, data):
            return "left alone: what is there took its place before"
        kept = replaced_folder(root, assignment, student)
        done = f"{done}; what was there goes to {kept.relative_to(root).as_posix()}"
        if not dry_run:
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(home, kept)
    if not dry_run:
        home.mkdir(parents=True, exist_ok=True)
        write(file, data)
        if stated:
            write(stamp, f"{stated}\n".encode())
    return done


def replaced_folder(root: Path, assignment: str, student: str) -> Path:
    """A folder that is not there yet."""
    base = root / ".course" / "replaced" / assignment / student
    return next(path for i in range(1, 10_000) if not os.path.lexists(path := base / f"{i:03}"))


def was_replaced(root: Path, assignment: str, student: str, data: bytes) -> bool:
    """Whether a newer one took this notebook's place earlier: an older export has come again."""
    old = (root / ".course" / "replaced" / assignment / student).glob(f"*/{assignment}.ipynb")
    return any(path.is_file() and not path.is_symlink() and path.read_bytes() == data for path in old)


def write(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.replace(path)


# -------------------------------------------------------------------------------------------- to read


def show(result: Collected, dry_run: bool = False, console: Console | None = None) -> None:
    """The result as tables."""
    console = console or Console()
    sections = (
        ("Would be put in place" if dry_run else "Put in place", ("student", "file", "what"), result.placed, None),
        ("Not matched", ("name", "file", "why"), result.unmatched, None),
        ("Refused", ("file", "it ..."), result.refused, MOST_LINES),
        ("Ignored", ("file", "why"), result.ignored, MOST_LINES),
    )
    for title, head, lines, most in sections:
        if lines:
            table = Table(*head, title=f"{title}: {len(lines)}", title_justify="left", box=None, padding=(0, 2, 0, 0))
            for line in lines[:most]:
                table.add_row(*(escape("".join(c if c.isprintable() else "\ufffd" for c in word)) for word in line))
            console.print(table)
            if most and len(lines) > most:
                console.print(f"... and {len(lines) - most} more")
            console.print()
    if result.missing:
        console.print(f"Nothing from {len(result.missing)} of the class list: {escape(', '.join(result.missing))}\n")
    if not any((result.placed, result.unmatched, result.refused)):
        console.print("There is no notebook in it.")
