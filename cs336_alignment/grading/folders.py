"""What lies in a course folder: submissions as they came in, and what `grade` left of each in `autograded/`."""

import contextlib
import json
import re
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from pathlib import Path

from dateutil.parser import parse

from cs336_alignment.grading.rescue_files import look

REPORT = "report.json"
DAYS = (datetime(2024, 1, 1), datetime(2025, 2, 2))  # nothing of the date is the same


def submissions(root: Path, assignment: str) -> list[str]:
    """The students who have a folder for the assignment."""
    return sorted(path.parent.name for path in (root / "submitted").glob(f"*/{assignment}"))


def autograded(root: Path, assignment: str, student: str) -> Path:
    return root / "autograded" / student / assignment


def unfinished(root: Path, assignment: str, student: str) -> Path:
    """Where a result is put together. It is there afterwards if that was stopped: the submission is not graded."""
    return autograded(root, assignment, student).with_name(f".{assignment}.part")


def read_timestamp(folder: Path) -> str | None:
    """When a submission came in, if its folder says so. A file that says nothing sensible says nothing."""
    path = folder / "timestamp.txt"
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if is_small_file(path) else ""
    except OSError:
        return None
    when = parse_time(text)
    return f"{when:%Y-%m-%d %H:%M:%S.%f} UTC" if when else None


def is_small_file(path: Path) -> bool:
    """Whether it is an ordinary file of a line or two; links, and pipes that never end, are not. Raises: OSError."""
    found = path.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_size <= 1000


def parse_time(text: str) -> datetime | None:
    """A day and a time as a person or program writes them, in UTC; None for what is not both.

    UTC where no zone is named. A zone that is not known, as the many that are called "CST", is no time.
    """
    text = text.strip()
    try:
        first, second = (parse(text, default=day, tzinfos=known_zone) for day in DAYS)
        # What the text leaves out comes from the default: without year, month and day the two are different.
        if first != second or not re.search(r"\d:\d", text):
            return None
        return first.replace(tzinfo=UTC) if first.tzinfo is None else first.astimezone(UTC)
    except (ValueError, OverflowError, TypeError):
        return None


def known_zone(name: str | None, offset: int | None) -> tzinfo:
    """For dateutil. Raises: ValueError for a name that stands for no zone, or for several."""
    if name is None or name in ("UTC", "GMT", "Z"):
        return timezone(timedelta(seconds=offset or 0))
    raise ValueError(f"{name!r} is no zone")


def is_graded(root: Path, assignment: str, student: str, report: dict) -> bool:
    """Whether a report is of what lies in the student's folder now, with the time that it came in."""
    folder = root / "submitted" / student / assignment
    now = look(folder, assignment).digest, read_timestamp(folder)
    return (report.get("digest"), report.get("timestamp")) == now and "exercises" in report


def read_report(root: Path, assignment: str, student: str) -> dict:
    """The report.json of a graded submission; {} where there is none, or none that can be read. What is of another
    kind than it should is left out, so that one broken file costs nobody else's pages."""
    try:
        report = json.loads((autograded(root, assignment, student) / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(report, dict):
        return {}
    for key in ("findings", "crashes", "changed"):
        report[key] = report[key] if isinstance(report.get(key), list) else []
    report["crashes"] = [crash for crash in report["crashes"] if isinstance(crash, dict)]
    if not isinstance(report.get("seconds"), int | float):
        report["seconds"] = 0.0
    verdicts = report.pop("exercises", None)
    if isinstance(verdicts, dict) and all(map(well_formed, verdicts.values())):
        report["exercises"] = verdicts
    return report


def well_formed(verdict) -> bool:
    """Whether an exercise's part of a report has points and cases."""
    if not isinstance(verdict, dict) or not isinstance(verdict.get("cases") or [], list):
        return False
    parts = [verdict, *(verdict.get("cases") or [])]
    return all(isinstance(x, dict) and isinstance(x.get(k), int | float) for x in parts for k in ("points", "of"))


@contextlib.contextmanager
def only_one(root: Path) -> Iterator[None]:
    """Two that write to one gradebook would undo each other. The lock goes with the process."""
    path = root / ".course" / "grading.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            pass
        except OSError:
            raise ValueError(f"another `grade` is running in {root}: wait for it, or stop it") from None
        yield
