"""What lies in a course folder: submissions as they came in, and what `grade` left of each in `autograded/`."""

import json
from pathlib import Path

from nbgrader.utils import parse_utc

from cs336_alignment.grading.rescue_files import look

REPORT = "report.json"


def submissions(root: Path, assignment: str) -> list[str]:
    """The students who have a folder for the assignment."""
    return sorted(path.parent.name for path in (root / "submitted").glob(f"*/{assignment}"))


def autograded(root: Path, assignment: str, student: str) -> Path:
    return root / "autograded" / student / assignment


def read_timestamp(folder: Path) -> str | None:
    """When a submission came in, if its folder says so. A file that says nothing sensible says nothing."""
    path = folder / "timestamp.txt"
    if path.is_symlink() or not path.is_file() or path.stat().st_size > 1000:
        return None
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    try:
        parse_utc(text)
    except (ValueError, OverflowError):
        return None
    return text


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
    for key in ("findings", "crashes"):
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
