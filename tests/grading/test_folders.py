"""What lies in a course folder: when a submission came in, and whether its grade is of what lies there now."""

import os
from datetime import UTC, datetime

import pytest

from cs336_alignment.grading.folders import is_graded, parse_time, read_report, read_timestamp
from cs336_alignment.grading.rescue_files import look

A = "a4_dpo"
TEN = datetime(2026, 11, 20, 22, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    "text",
    ["2026-11-20 22:00:00 UTC", "2026-11-20 22:00:00.000000 UTC", "2026-11-20T22:00:00Z", "2026-11-20T23:00:00+01:00",
     "2026-11-20 22:00", "20 Nov 2026 22:00 UTC", "2026/11/20 22:00:00 GMT", " 2026-11-20 22:00:00 UTC\n"],
)  # fmt: skip
def test_a_day_and_a_time_are_read_as_utc(text):
    assert parse_time(text) == TEN


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", "12", "10:30", "2026-11-20", "Nov 22:00", "2026-11-20 22:00 PST", "2026-11-20 22:00 CST",
     "2026-11-20 25:00", "9" * 900, "0001-01-01 00:00 +23:00", "2026-11-20 22:00 EST+3"],
)  # fmt: skip
def test_half_a_time_or_a_zone_that_nobody_knows_is_none(text):
    assert parse_time(text) is None


def test_links_pipes_and_folders_say_no_time(tmp_path):
    (tmp_path / "real").write_text("2026-11-20 22:00 UTC")
    for number, make in enumerate(
        (lambda p: p.symlink_to(tmp_path / "real"), os.mkfifo, os.mkdir, lambda p: p.write_text("1" * 2000))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder / "timestamp.txt")
        assert read_timestamp(folder) is None
    assert read_timestamp(tmp_path / "nowhere") is None


@pytest.fixture
def graded(tmp_path):
    """A submission, and what a report says of it."""
    folder = tmp_path / "submitted" / "ada" / A
    folder.mkdir(parents=True)
    (folder / f"{A}.ipynb").write_text("{}")
    return tmp_path, folder, {"digest": look(folder, A).digest, "timestamp": None, "exercises": {}}


def change_time(folder):
    (folder / "timestamp.txt").write_text("2026-11-20 22:00 UTC")


def change_work(folder):
    (folder / f"{A}.ipynb").write_text("{ }")


def add_module(folder):
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "helper.py").write_text("x = 1")


def add_data(folder):
    (folder / "mine.dat").write_bytes(b"\0")


@pytest.mark.parametrize("change", [change_time, change_work, add_module, add_data])
def test_a_grade_is_of_what_was_there(graded, change):
    root, folder, report = graded
    assert is_graded(root, A, "ada", report) and not is_graded(root, A, "ada", {})
    change(folder)
    assert not is_graded(root, A, "ada", report)


def test_a_report_that_cannot_be_read_is_none(tmp_path):
    assert read_report(tmp_path, A, "ada") == {}
