"""Submissions from learning systems' exports: whose they are, which is the newest, and that nothing gets out."""

import io
import os
import sqlite3
import stat
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from nbgrader.api import Gradebook
from rich.console import Console

from cs336_alignment.cli import main
from cs336_alignment.grading import unpack
from cs336_alignment.grading.collect import collect, show
from cs336_alignment.grading.folders import only_one
from cs336_alignment.grading.gradebook import enrol
from cs336_alignment.grading.lms import canonical, first_and_last, make_id, origins, read_metadata, read_roster
from cs336_alignment.grading.results import settle_penalties
from cs336_alignment.grading.unpack import files_of, unsafe

A = "a4_dpo"
ROSTER = """student,name,email,canvas_id
ada,Ada Lovelace,ada.l@uni.edu,12345
bob,Bob Æther,b@uni.edu,222
rené,René Müller,r@uni.edu,333
"""


def zipped(path: Path, files: dict[str, bytes | str]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def archive_bytes(files: dict[str, bytes | str]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "course"
    folder.mkdir()
    return folder


@pytest.fixture
def roster(tmp_path):
    path = tmp_path / "roster.csv"
    path.write_text(ROSTER, encoding="utf-8")
    return path


def submitted(root: Path) -> dict[str, str]:
    """What is in submitted/: the notebooks' text by student."""
    return {p.parent.parent.name: p.read_text(errors="replace") for p in (root / "submitted").glob(f"*/{A}/{A}.ipynb")}


def written(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


# -------------------------------------------------------------------------------------------- layouts

LAYOUTS = {
    "canvas": {
        f"lovelaceada_12345_67890_{A}.ipynb": "first",
        f"lovelaceada_LATE_12345_67999_{A}-2.ipynb": "third",
        f"lovelaceada_12345_67950_{A}-1.ipynb": "second",
        "aetherbob_222_70000_my work.ipynb": "bob's",
    },
    "moodle": {
        "Ada Lovelace_1001_assignsubmission_file_/anything.ipynb": "third",
        "Ada Lovelace_1001_assignsubmission_file_/plot.png": "no",
        "Bob Æther_1002_assignsubmission_file_work.ipynb": "bob's",
        "Bob Æther_1002_assignsubmission_onlinetext_/onlinetext.html": "<p>see file",
    },
    "blackboard": {
        f"Assignment 4_ada_attempt_2026-11-20-22-00-00_{A}.ipynb": "first",
        f"Assignment 4_ada_attempt_2026-11-20-23-00-00_{A}.ipynb": "third",
        "Assignment 4_ada_attempt_2026-11-20-23-00-00.txt": "Name: Ada",
        "Assignment 4_bob_attempt_2026-11-19-08-30-00_x.ipynb": "bob's",
    },
    "gradescope": {
        "assignment_99_export/submission_metadata.yml": (
            "submission_5:\n  :submitters:\n  - :name: Ada Lovelace\n    :sid: '17'\n    :email: ada.l@uni.edu\n"
            "  :created_at: 2026-11-20 22:00:00.5 -08:00\nsubmission_6:\n  :submitters:\n  - :name: Bob Æther\n"
            "  :created_at: 2026-11-20 10:00:00 Z\n"
        ),
        "assignment_99_export/submission_5/a4.ipynb": "third",
        "assignment_99_export/submission_6/sub/a4.ipynb": "bob's",
    },
    "files": {"ada.ipynb": "third", f"{A}_bob.ipynb": "bob's"},
    "wrapped files": {"export/ada.ipynb": "third", "export/bob.ipynb": "bob's"},
    "folders": {f"ada/{A}.ipynb": "third", "bob/other.ipynb": "bob's", "ada/notes.txt": "x"},
    "nbgrader": {f"submitted/ada/{A}/{A}.ipynb": "third", f"submitted/bob/{A}/{A}.ipynb": "bob's"},
    "zips in a zip": {
        "Ada Lovelace_1001_assignsubmission_file_/work.zip": archive_bytes({f"deep/{A}.ipynb": "third"}),
        "aetherbob_222_70000_work.zip": archive_bytes({"x.ipynb": "bob's", "__MACOSX/._x.ipynb": "no"}),
    },
    "endings": {"ada/a4_dpo.ipynb.txt": "third", "bob/A4_DPO.IPYNB": "bob's"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_known_layouts_with_a_class_list(layout, kind, tmp_path, root, roster):
    source = zipped(tmp_path / "export.zip", LAYOUTS[layout])
    if kind == "folder":
        with zipfile.ZipFile(source) as archive:
            archive.extractall(tmp_path / "export")
        source = tmp_path / "export"
    result = collect(source, A, root, roster)
    assert submitted(root) == {"ada": "third", "bob": "bob's"}, result
    assert result.complete and result.missing == ["rené"]
    assert all(name.startswith("submitted/") for name in written(root))


@pytest.mark.parametrize("layout", ["files", "wrapped files", "folders", "nbgrader", "endings", "blackboard"])
def test_known_layouts_without_a_class_list(layout, tmp_path, root):
    assert collect(zipped(tmp_path / "e.zip", LAYOUTS[layout]), A, root).complete
    assert submitted(root) == {"ada": "third", "bob": "bob's"}


def test_without_a_class_list_ids_are_made_from_names(tmp_path, root):
    files = LAYOUTS["moodle"] | {"Zoë  D'Arc_7_assignsubmission_file_/a.ipynb": "z"}
    collect(zipped(tmp_path / "e.zip", files), A, root)
    assert set(submitted(root)) == {"Ada_Lovelace", "Bob_Æther", "Zoë_D_Arc"}


def test_earlier_attempts_are_named_and_left(tmp_path, root, roster):
    result = collect(zipped(tmp_path / "e.zip", LAYOUTS["canvas"]), A, root, roster)
    earlier = [name for name, why in result.ignored if why == "ada: an earlier attempt"]
    assert len(earlier) == 2 and all("-2" not in name for name in earlier)
    assert "late, says Canvas" in next(what for student, _, what in result.placed if student == "ada")


def test_of_two_notebooks_in_one_attempt_the_one_with_the_right_name_wins(tmp_path, root):
    files = {"ada/a.ipynb": "1", f"ada/{A}.ipynb": "2", "ada/.ipynb_checkpoints/x.ipynb": "3", "bob/b.ipynb": "4"}
    result = collect(zipped(tmp_path / "e.zip", files), A, root)
    assert submitted(root) == {"ada": "2", "bob": "4"}
    assert result.ignored == [("ada/a.ipynb", "ada: another notebook of the same attempt")]


def test_a_group_has_a_copy_each(tmp_path, root, roster):
    metadata = "submission_5:\n  :submitters:\n  - :name: Ada Lovelace\n  - :email: b@uni.edu\n"
    files = {"submission_metadata.yml": metadata, "submission_5/x.ipynb": "ours"}
    assert collect(zipped(tmp_path / "e.zip", files), A, root, roster).complete
    assert submitted(root) == {"ada": "ours", "bob": "ours"}


def test_metadata_that_a_student_hands_in_is_not_believed(tmp_path, root, roster):
    metadata = "submission_6:\n  :submitters:\n  - :name: Ada Lovelace\n"
    files = {
        "submission_5/submission_metadata.yml": metadata,
        "submission_6/x.ipynb": "bob's",
        "submission_5/y.ipynb": "y",
    }
    result = collect(zipped(tmp_path / "e.zip", files), A, root, roster)
    assert submitted(root) == {} and len(result.unmatched) == 2


@pytest.mark.parametrize(
    "data",
    [b"", b"[1]", b"a: [", b"&a [*a]", b"\xff\xfe", b"submission_5: 3", b"submission_5:\n  :submitters: [3, {}]"],
)
def test_metadata_that_makes_no_sense_says_nothing(data):
    assert read_metadata(data) == {}


# ---------------------------------------------------------------------------------------------- times


@pytest.mark.parametrize("zone, hour", [("Europe/Berlin", 22), ("UTC", 23), ("America/Los_Angeles", 31)])
def test_blackboards_times_are_of_the_zone_that_is_said(tmp_path, root, zone, hour):
    collect(zipped(tmp_path / "e.zip", LAYOUTS["blackboard"]), A, root, zone=zone)
    day, hour = (21, hour - 24) if hour > 23 else (20, hour)
    assert (root / "submitted/ada" / A / "timestamp.txt").read_text() == f"2026-11-{day} {hour:02}:00:00 UTC\n"


def test_gradescopes_times_name_their_zone(tmp_path, root, roster):
    collect(zipped(tmp_path / "e.zip", LAYOUTS["gradescope"]), A, root, roster, zone="Asia/Tokyo")
    assert (root / "submitted/ada" / A / "timestamp.txt").read_text() == "2026-11-21 06:00:00 UTC\n"
    assert (root / "submitted/bob" / A / "timestamp.txt").read_text() == "2026-11-20 10:00:00 UTC\n"


def test_a_timestamp_beside_a_notebook_is_taken_and_times_of_files_are_not(tmp_path, root):
    files = {f"ada/{A}/{A}.ipynb": "1", f"ada/{A}/timestamp.txt": "2026-11-20 12:00:00 UTC", f"bob/{A}.ipynb": "2"}
    collect(zipped(tmp_path / "e.zip", files), A, root)
    assert (root / "submitted/ada" / A / "timestamp.txt").read_text() == "2026-11-20 12:00:00 UTC\n"
    assert not (root / "submitted/bob" / A / "timestamp.txt").exists()


def test_an_unknown_zone_is_said_so(tmp_path, root):
    with pytest.raises(ValueError, match="no time zone 'Mars/Olympus'"):
        collect(zipped(tmp_path / "e.zip", LAYOUTS["files"]), A, root, zone="Mars/Olympus")


# ------------------------------------------------------------------------------------- what was there


def test_the_same_again_changes_nothing(tmp_path, root):
    source = zipped(tmp_path / "e.zip", LAYOUTS["blackboard"])
    collect(source, A, root)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert {what for _, _, what in collect(source, A, root).placed} == {"as it was"}
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before


def test_a_different_one_moves_what_was_there(tmp_path, root):
    collect(zipped(tmp_path / "1.zip", {"ada.ipynb": "old", "bob.ipynb": "same"}), A, root)
    (root / "submitted/ada" / A / "helper.py").write_text("x = 1")
    for number, text in ((1, "new"), (2, "newer")):
        result = collect(zipped(tmp_path / "2.zip", {"ada.ipynb": text, "bob.ipynb": "same"}), A, root)
        assert f".course/replaced/{A}/ada/00{number}" in result.placed[0][2]
    assert submitted(root) == {"ada": "newer", "bob": "same"}
    kept = root / ".course/replaced" / A / "ada"
    assert (kept / "001" / f"{A}.ipynb").read_text() == "old" and (kept / "001/helper.py").exists()
    assert (kept / "002" / f"{A}.ipynb").read_text() == "new"


def test_an_older_export_does_not_replace_a_newer_submission(tmp_path, root):
    new = {f"X_ada_attempt_2026-11-20-23-00-00_{A}.ipynb": "new"}
    collect(zipped(tmp_path / "1.zip", new), A, root)
    old = {f"X_ada_attempt_2026-11-20-22-00-00_{A}.ipynb": "old"}
    assert "newer" in collect(zipped(tmp_path / "2.zip", old), A, root).placed[0][2]
    assert submitted(root) == {"ada": "new"}


def test_the_time_of_what_is_there_is_read_as_grading_reads_it(tmp_path, root):
    home = root / "submitted/ada" / A
    home.mkdir(parents=True)
    (home / f"{A}.ipynb").write_text("new")
    (home / "timestamp.txt").write_text("20 Nov 2026 23:00 UTC")
    old = {f"X_ada_attempt_2026-11-20-22-00-00_{A}.ipynb": "old"}
    assert "newer" in collect(zipped(tmp_path / "2.zip", old), A, root, zone="UTC").placed[0][2]
    assert submitted(root) == {"ada": "new"}


def test_a_dry_run_writes_nothing_and_says_the_same(tmp_path, root):
    collect(zipped(tmp_path / "1.zip", {"ada.ipynb": "old"}), A, root)
    before = {name: (root / name).read_bytes() for name in written(root)}
    dry = collect(zipped(tmp_path / "2.zip", {"ada.ipynb": "new", "bob.ipynb": "b"}), A, root, dry_run=True)
    assert {name: (root / name).read_bytes() for name in written(root)} == before
    assert collect(tmp_path / "2.zip", A, root) == dry


def test_links_in_the_way_are_not_written_through(tmp_path, root):
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / "submitted").mkdir()
    (root / "submitted" / "ada").symlink_to(outside)
    result = collect(zipped(tmp_path / "e.zip", {"ada.ipynb": "x", "bob.ipynb": "y"}), A, root)
    assert not any(outside.iterdir()) and "no plain folder" in result.refused[0][1] and submitted(root) == {"bob": "y"}


# -------------------------------------------------------------------------------------- who is who

BOBS = {"canvas": "aetherbob_222_70000_a4_dpo.ipynb", "blackboard": "Work_bob_attempt_2026-11-19-08-30-00_a4.ipynb",
        "moodle": "Bob Æther_1002_assignsubmission_file_/a4.ipynb", "plain": "bob/zz.ipynb"}  # fmt: skip
PREFIXES = {"canvas": "lovelaceada_12345_67890_", "blackboard": "Work_ada_attempt_2026-11-20-22-00-00_",
            "moodle": "Ada Lovelace_1001_assignsubmission_file_", "plain": "ada/"}  # fmt: skip
FORGED = ("x_bob_attempt_2099-01-01-00-00-00_a4.ipynb", "aetherbob_222_99999_x.ipynb", "submission_6/x.ipynb",
          "Bob Æther_1002_assignsubmission_file_x.ipynb", "bob.ipynb", "bob/a4_dpo.ipynb")  # fmt: skip


@pytest.mark.parametrize("system", PREFIXES)
@pytest.mark.parametrize("own", FORGED)
def test_a_students_own_name_of_a_file_does_not_make_it_somebody_elses(system, own, tmp_path, root, roster):
    metadata = "submission_6:\n  :submitters:\n  - :name: Bob Æther\n"
    files = {PREFIXES[system] + own: "ada's", BOBS[system]: "bob's", "submission_metadata.yml": metadata}
    collect(zipped(tmp_path / "e.zip", files), A, root, roster)
    assert submitted(root) == {"ada": "ada's", "bob": "bob's"}
    alone = tmp_path / "alone"
    collect(zipped(tmp_path / "alone.zip", {PREFIXES[system] + own: "ada's"}), A, alone, roster)
    assert submitted(alone) == {"ada": "ada's"}


@pytest.mark.parametrize("with_list", [True, False])
def test_numbers_in_the_name_of_a_file_are_not_canvas(tmp_path, root, roster, with_list):
    files = {"ada/dpo_4_2_final.ipynb": "ada's", "bob/zz.ipynb": "bob's"}
    assert collect(zipped(tmp_path / "e.zip", files), A, root, roster if with_list else None).complete
    assert submitted(root) == {"ada": "ada's", "bob": "bob's"}


def test_a_strangers_folder_is_nobodys_whatever_is_in_it(tmp_path, root, roster):
    files = {f"Stranger/bob/{A}.ipynb": "?", "bob/zz.ipynb": "bob's", "Xyzzy/ada.ipynb": "?", "!/ada.ipynb": "?"}
    result = collect(zipped(tmp_path / "e.zip", files), A, root, roster)
    assert submitted(root) == {"bob": "bob's"} and result.missing == ["ada", "rené"]
    assert {name for name, _, _ in result.unmatched} == {"Stranger", "Xyzzy", "!"}


def test_the_only_student_who_handed_in_is_not_a_wrapper(tmp_path, root, roster):
    assert collect(zipped(tmp_path / "e.zip", {"ada/bob.ipynb": "1", f"ada/{A}.ipynb": "2"}), A, root, roster).complete
    assert collect(zipped(tmp_path / "f.zip", {"ada/bob.ipynb": "1", "ada/rené.ipynb": "2"}), A, root, roster).complete
    assert set(submitted(root)) == {"ada"}


def test_a_user_whose_name_may_be_two_students_is_not_guessed(tmp_path, root):
    roster = tmp_path / "r.csv"
    roster.write_text("student\nsmith\njo_smith\n")
    files = {"Work_jo_smith_attempt_2026-11-20-22-00-00_x.ipynb": "?"}
    assert collect(zipped(tmp_path / "e.zip", files), A, root, roster).unmatched[0][2] == "may be jo_smith or smith"
    sure = {f"{A}_jo_smith_attempt_2026-11-20-22-00-00_x.ipynb": "jo's"}
    assert collect(zipped(tmp_path / "f.zip", sure), A, root, roster).complete
    assert submitted(root) == {"jo_smith": "jo's"}
    roster.write_text("student\nsmith\nada\n")  # with others beside it one sees where the assignment's name ends
    files["Work_ada_attempt_2026-11-20-22-00-00_x.ipynb"] = "ada's"
    result = collect(zipped(tmp_path / "g.zip", files), A, tmp_path / "with", roster)
    assert set(submitted(tmp_path / "with")) == {"ada"} and result.unmatched[0][0] == "jo_smith"
    collect(tmp_path / "g.zip", A, tmp_path / "without")
    assert set(submitted(tmp_path / "without")) == {"ada", "jo_smith"}


def test_canvas_numbers_its_submissions_and_not_the_students_files(tmp_path, root, roster):
    files = {"lovelaceada_12345_67890_work-2026.ipynb": "first", "lovelaceada_late_12345_99999_final.ipynb": "last"}
    result = collect(zipped(tmp_path / "e.zip", files), A, root, roster)
    assert submitted(root) == {"ada": "last"} and "late, says Canvas" in result.placed[0][2]


def test_canvas_names_keep_the_marks_of_their_script():
    assert origins("สมชายใจดี_12345_67890_x.ipynb", A, None, {})[0].system == "Canvas"


def test_a_numbered_assignment_and_a_numbered_user_are_blackboards(tmp_path, root):
    for name in (
        "week_4_1234567_attempt_2026-11-20-22-00-00_x.ipynb",
        "HW_4_2026_1234567_attempt_2026-11-20-22-00-00_x.ipynb",
    ):
        assert [(o.system, o.who) for o in origins(name, A, None, {})] == [("Blackboard", "1234567")]


def test_gradescopes_wrapper_is_known_when_there_is_one_submission(tmp_path, root, roster):
    files = {"assignment_99_export/submission_metadata.yml": "submission_5:\n  :submitters:\n  - :name: Ada Lovelace\n",
             "assignment_99_export/submission_5/x.ipynb": "ada's"}  # fmt: skip
    assert collect(zipped(tmp_path / "e.zip", files), A, root, roster).complete and submitted(root) == {"ada": "ada's"}


def test_who_is_not_matched_is_named_with_the_nearest(tmp_path, root, roster):
    files = {"Adda Lovelac_5_assignsubmission_file_/x.ipynb": "1", "Xyzzy Qqq_6_assignsubmission_file_/x.ipynb": "2",
             f"{A}.ipynb": "3"}  # fmt: skip
    result = collect(zipped(tmp_path / "e.zip", files), A, root, roster)
    why = {name: why for name, _, why in result.unmatched}
    assert why == {"Adda Lovelac": "nearest: ada", "Xyzzy Qqq": "nobody like that in the class list",
                   "?": "nothing says whose it is"}  # fmt: skip
    assert not result.complete and result.missing == ["ada", "bob", "rené"] and submitted(root) == {}


def test_two_of_the_same_name_are_not_guessed(tmp_path, root):
    roster = tmp_path / "r.csv"
    roster.write_text("student,name,canvas_id\nli1,Li Wei,1\nli2,Li Wei,2\n")
    files = {"Li Wei_5_assignsubmission_file_/x.ipynb": "?", f"weili_2_9_{A}.ipynb": "second"}
    result = collect(zipped(tmp_path / "e.zip", files), A, root, roster)
    assert submitted(root) == {"li2": "second"} and result.unmatched[0][2] == "may be li1 or li2"


def test_names_that_would_become_one_id_are_not_mixed(tmp_path, root):
    files = {"Ada L_1_assignsubmission_file_/x.ipynb": "1", "ada-l_2_assignsubmission_file_/x.ipynb": "2"}
    result = collect(zipped(tmp_path / "e.zip", files), A, root)
    assert submitted(root) == {} and len(result.unmatched) == 2 and "the same id" in result.unmatched[0][2]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_class_list_as_spreadsheets_save_it(tmp_path, encoding, delimiter):
    path = tmp_path / "r.csv"
    path.write_bytes(ROSTER.replace(",", delimiter).replace("\n", "\r\n").encode(encoding))
    roster = read_roster(path)
    assert list(roster.students) == ["ada", "bob", "rené"] and roster.names["mullerrene"] == {"rené"}


def test_the_gradebook_gets_the_class_list_and_keeps_what_the_list_does_not_say(tmp_path, root, roster):
    source = zipped(tmp_path / "e.zip", {"ada.ipynb": "1"})
    command = ["collect", A, str(source), "--students", str(roster), "--course", str(root)]
    assert main([*command, "--dry-run"]) == 0 and not (root / "gradebook.db").exists()
    assert main(command) == 0
    roster.write_text("student,first_name,last_name\nada,Ada,King\n")
    assert main(command) == 0
    with Gradebook(f"sqlite:///{root}/gradebook.db", "cs336_alignment") as gradebook:
        found = {s.id: (s.first_name, s.last_name, s.email) for s in gradebook.students}
    assert found == {
        "ada": ("Ada", "King", "ada.l@uni.edu"), "bob": ("Bob", "Æther", "b@uni.edu"),
        "rené": ("René", "Müller", "r@uni.edu"),
    }  # fmt: skip


def test_a_fresh_course_gets_its_gradebook_whatever_is_on_the_path(tmp_path, root, roster, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    enrol(root, read_roster(roster).students)
    with sqlite3.connect(root / "gradebook.db") as database:
        assert database.execute("SELECT count(*) FROM alembic_version").fetchone() == (1,)


def test_while_a_grade_is_running_nobody_is_enrolled_and_no_penalty_written(root, roster):
    with only_one(root), pytest.raises(ValueError, match="another `grade` is running"):
        enrol(root, read_roster(roster).students)
    assert not (root / "gradebook.db").exists()
    enrol(root, read_roster(roster).students)
    (root / "nbgrader_config.py").write_text("c = get_config()\nc.LateDays.percent_per_day = 10\n")
    with only_one(root):
        assert ["a `grade` is running" in note for note in settle_penalties(root)] == [True]
    assert settle_penalties(root) == []


def test_a_gradebook_that_is_none_is_said_so(root, roster):
    (root / "gradebook.db").write_text("garbage" * 50)
    with pytest.raises(ValueError, match="gradebook.db cannot be opened as a gradebook: file is not a database"):
        enrol(root, read_roster(roster).students)


def test_a_name_in_two():
    assert first_and_last("Ada King Lovelace") == first_and_last("Lovelace, Ada King") == ("Ada King", "Lovelace")
    assert first_and_last("Plato") == ("Plato", "") and first_and_last("김 철수") == ("김", "철수")
    assert first_and_last(" ") == first_and_last("") == ("", "")


def test_an_older_export_that_comes_again_does_not_undo_a_newer_one(tmp_path, root):
    """Canvas states no times; what was replaced once stays replaced."""
    old = zipped(tmp_path / "old.zip", {"ada_1_100_a4_dpo.ipynb": "first"})
    collect(old, A, root)
    collect(zipped(tmp_path / "new.zip", {"ada_1_200_a4_dpo-1.ipynb": "second"}), A, root)
    assert "left alone" in collect(old, A, root).placed[0][2] and submitted(root) == {"ada": "second"}


def test_an_assignment_that_is_not_there_is_said_so_and_nothing_is_written(tmp_path, root):
    for name in ("a4_dop", "../a4_dpo", ""):
        with pytest.raises(ValueError, match="there is no assignment .*; there are a1_sft, .*a4_dpo"):
            collect(zipped(tmp_path / "e.zip", {"ada.ipynb": "1"}), name, root)
    assert written(root) == set()


def test_a_course_folder_with_another_assignment_of_its_own_has_the_checkouts_too(tmp_path, root):
    (root / "assignments/b1").mkdir(parents=True)
    (root / "assignments/b1/b1.ipynb").write_text("{}")
    for assignment in ("b1", A):
        assert collect(zipped(tmp_path / "e.zip", {"ada.ipynb": "1"}), assignment, root).complete
    with pytest.raises(ValueError, match="there are a1_sft, .*b1"):
        collect(tmp_path / "e.zip", "b2", root)


@pytest.mark.parametrize(
    "text, message",
    [("name,email\nx,y\n", "needs a column student"), ("student\n../x\n", "line 2: '../x' cannot be"),
     ("student\nada\nADA\n", "line 3: ADA is there a second time"), ("", "has nothing"),
     ("student\ncon\n", "cannot be"), ("student,name\nada," + "x" * 200_000, r"r.csv, line 2: field larger than")],
)  # fmt: skip
def test_a_class_list_that_cannot_be_used_says_where(tmp_path, text, message):
    path = tmp_path / "r.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_roster(path)


@pytest.mark.parametrize(
    "name, made",
    [("Ada Lovelace", "Ada_Lovelace"), ("../../etc", "etc"), ("CON", "_CON"), ("nul.txt", "_nul.txt"),
     ("a\x00b\u202ec", "abc"),
     ("e\u0301a", "éa"), ("...", ""), ("", ""), ("x" * 500, "x" * 64), ("é" * 50, "é" * 32),
     ("a/b\\c:d*e", "a_b_c_d_e"),
     ("=cmd|'x'", "cmd_x")],
)  # fmt: skip
def test_ids_are_names_of_folders_everywhere(name, made):
    assert make_id(name) == made and make_id(made) == made


def test_a_name_is_the_same_in_every_spelling():
    assert canonical("Müller, Zoë") == canonical("muller zoe") == canonical("MU\u0308LLER_ZOE")


def test_a_user_whose_name_holds_the_separator():
    found = origins(f"{A}_jo_smith_attempt_2026-11-20-22-00-00_x.ipynb", A, ZoneInfo("UTC"), {})
    assert found[0].who == "jo_smith" and found[0].when == datetime(2026, 11, 20, 22, tzinfo=UTC)
    assert origins("Week_4_jo_attempt_2026-99-20-22-00-00_x.ipynb", A, None, {})[0].when is None


# ----------------------------------------------------------------------------------------- attacks

NAMES = ("../ada.ipynb", "/etc/ada.ipynb", "x/../../ada.ipynb", "C:\\ada.ipynb", "..\\ada.ipynb", "a\x07/b.ipynb",
         "con/x.ipynb", "x/NUL.ipynb", "x/" + "a" * 300 + ".ipynb", "y/" * 600 + "a.ipynb",
         ".. /ada.ipynb", "\\\\server\\a.ipynb")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_that_could_lead_elsewhere_are_refused(tmp_path, root, name):
    before = {p for p in tmp_path.rglob("*")}
    result = collect(zipped(tmp_path / "e.zip", {name: "evil", "bob.ipynb": "fine", "ada.ipynb": "ok"}), A, root)
    assert len(result.refused) == 1 and result.refused[0][1] == unsafe(name) != "" and not result.complete
    assert submitted(root) == {"ada": "ok", "bob": "fine"}
    outside = {p for p in tmp_path.rglob("*") if not p.is_relative_to(root)} - before
    assert outside == {tmp_path / "e.zip"}


def test_a_zero_in_a_name_does_not_hide_what_follows(tmp_path, root):
    source = zipped(tmp_path / "e.zip", {"bobX.ipynb": "evil", "ada.ipynb": "ok"})
    source.write_bytes(source.read_bytes().replace(b"bobX.ipynb", b"bob\x00.ipynb"))
    result = collect(source, A, root)
    assert submitted(root) == {"ada": "ok"} and "control characters" in result.refused[0][1]


def test_links_in_archives_and_folders_are_refused(tmp_path, root):
    (tmp_path / "secret").write_text("secret")
    source = tmp_path / "e.zip"
    with zipfile.ZipFile(source, "w") as archive:
        link = zipfile.ZipInfo("ada.ipynb")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, str(tmp_path / "secret"))
        archive.writestr("bob.ipynb", "b")
    assert collect(source, A, root).refused == [("ada.ipynb", "is a link")]
    folder = tmp_path / "export"
    (folder / "eve").mkdir(parents=True)
    (folder / "eve" / "x.ipynb").symlink_to(tmp_path / "secret")
    (folder / "mallory").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.ipynb")
    assert sorted(collect(folder, A, root).refused) == [
        ("eve/x.ipynb", "is a link"), ("mallory", "is a link"), ("pipe.ipynb", "is no regular file")]  # fmt: skip
    assert submitted(root) == {"bob": "b"}


def test_bombs_are_not_unfolded(tmp_path, root, monkeypatch):
    monkeypatch.setattr(unpack, "LARGEST", 3_000_000)
    files = {"ada.ipynb": b"0" * 2_000_000, "big.ipynb": os.urandom(3_000_001), "bob.ipynb": b"x" * 900_000}
    result = collect(zipped(tmp_path / "e.zip", files), A, root)
    assert dict(result.refused) == {"ada.ipynb": "would unfold to many times its size", "big.ipynb": "is too large"}
    assert set(submitted(root)) == {"bob"}
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ada.ipynb", b"0" * 2_000_000)
        archive.writestr("again.zip", archive_bytes({"x.ipynb": "x"}))
    result = collect(zipped(tmp_path / "n.zip", {"ada.zip": inner.getvalue()}), A, root)
    assert {why for _, why in result.refused} == {
        "would unfold to many times its size",
        "is an archive in an archive in an archive",
    }


def test_all_files_together_have_a_bound(tmp_path, root, monkeypatch):
    monkeypatch.setattr(unpack, "LARGEST_TOGETHER", 1_000_000)
    files = {f"s{i}.ipynb": os.urandom(400_000) for i in range(5)}
    result = collect(zipped(tmp_path / "e.zip", files), A, root)
    assert len(result.refused) >= 2 and len(submitted(root)) <= 3


def test_encrypted_broken_and_crowded_archives_are_refused(tmp_path, root, monkeypatch):
    source = zipped(tmp_path / "e.zip", {"ada.ipynb": "x", "bob.ipynb": "y"})
    data = bytearray(source.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the central directory says of ada's: encrypted
    source.write_bytes(bytes(data))
    assert collect(source, A, root).refused == [("ada.ipynb", "is encrypted")]
    broken = archive_bytes({"x.ipynb": "x" * 1000})[:-30]
    result = collect(
        zipped(tmp_path / "b.zip", {"ada.zip": broken, "eve.zip": b"PK\x03\x04", "bob.ipynb": "y"}), A, root
    )
    assert [why[:39] for _, why in result.refused] == ["is an archive that cannot be opened (Ba"] * 2
    monkeypatch.setattr(unpack, "MOST_FILES", 10)
    crowd = {f"{i}.ipynb": "" for i in range(11)}
    with pytest.raises(ValueError, match="archive of 11 entries"):
        collect(zipped(tmp_path / "c.zip", crowd), A, root)
    assert (
        "archive of 11 entries"
        in collect(zipped(tmp_path / "d.zip", {"z.zip": archive_bytes(crowd)}), A, root).refused[0][1]
    )
    with pytest.raises(ValueError, match="neither a folder nor a zip"):
        files_of(Path(__file__))
    with pytest.raises(ValueError, match="there is no"):
        files_of(tmp_path / "nothing")


def test_the_verb_says_what_was_done_and_fails_when_something_is_left(tmp_path, root, roster, capsys):
    source = zipped(tmp_path / "e.zip", LAYOUTS["moodle"])
    assert main(["collect", A, str(source), "--students", str(roster), "--course", str(root)]) == 0
    assert "Put in place: 2" in capsys.readouterr().out and set(submitted(root)) == {"ada", "bob"}
    assert main(["collect", A, str(zipped(source, {"../x.ipynb": "x"})), "--course", str(root)]) == 1


def test_the_tables_can_be_read_whatever_files_are_called(tmp_path, root):
    files = {"[red]ada[/red].ipynb": "x", "b\u202eob.ipynb": "y", "../e.ipynb": "z"}
    result = collect(zipped(tmp_path / "e.zip", files), A, root)
    console = Console(file=io.StringIO(), width=200)
    show(result, console=console)
    text = console.file.getvalue()
    assert "[red]ada[/red].ipynb" in text and "\u202e" not in text and "leads out of its folder" in text
    show(collect(zipped(tmp_path / "n.zip", {"a.txt": "x"}), A, root), True, console)
    assert "There is no notebook in it." in console.file.getvalue()
