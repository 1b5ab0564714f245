"""`course.py grade`: a batch graded by several workers is the batch graded by one, and by nbgrader; what is there is
not graded again; what goes wrong with one submission is its own."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from courses import book, contents, graded, make_class, named, outputs, reports, without_beta
from submissions import ASSIGNMENT, AUTOMATIC, hand_in, nbgrader, release, solved

from cs336_alignment.grading import gradebook, judge, sandbox
from cs336_alignment.grading.folders import only_one, read_report
from cs336_alignment.grading.grade import code_digest, grade_assignment, summary
from cs336_alignment.grading.records import read_class
from cs336_alignment.grading.sandbox import NoSandbox
from cs336_alignment.paths import course_root

grade = importlib.import_module("cs336_alignment.grading.grade")  # the package has a function of that name

CUT = slice(0, 20_000)  # the bytes of a file that ends too early
ODD_NAMES = ["Ada Lovelace", "김철수", "o'neil.j", "a.b+c@school", "-n", "Zoë_2"]


def mangle(root) -> list[str]:
    """Hands in what is not in order; nbgrader sees each of them, too."""
    whole = nbformat.writes(named(solved(), "cut"))
    marks = named(solved(), "marks")
    for cell in marks.cells:
        cell.metadata = {}
    twice = named(solved(), "twice")
    place = next(i for i, c in enumerate(twice.cells) if c.metadata.get("nbgrader", {}).get("grade_id") == "dpo_loss")
    del twice.cells[place]
    files = {
        "cut": {f"{ASSIGNMENT}.ipynb": whole[CUT]},
        "empty": {f"{ASSIGNMENT}.ipynb": ""},
        "marks": {f"{ASSIGNMENT}.ipynb": nbformat.writes(marks)},
        "renamed": {f"{ASSIGNMENT} (1).ipynb": whole},
        "deleted": {f"{ASSIGNMENT}.ipynb": nbformat.writes(twice)},
        "nothing": {f"{ASSIGNMENT}.ipynb": "{}"},
    }
    for student, of in files.items():
        folder = root / "submitted" / student / ASSIGNMENT
        folder.mkdir(parents=True)
        for name, text in of.items():
            (folder / name).write_text(text, encoding="utf-8")
    return list(files)


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    """A course graded by two workers: ordinary submissions, mangled ones and odd names, two of them late."""
    root = tmp_path_factory.mktemp("a course é")  # a space, and a letter that is not ASCII
    make_class(root, 4)
    mangle(root)
    for name in ODD_NAMES:
        hand_in(root, name, release())
    (root / "submitted" / "student00" / ASSIGNMENT / "timestamp.txt").write_text("2026-11-22 12:00:00 UTC\n")
    (root / "submitted" / "student01" / ASSIGNMENT / "timestamp.txt").write_text("nonsense\n")
    with book(root) as opened:
        opened.add_assignment(ASSIGNMENT, duedate="2026-11-20 23:59:59 UTC")
    return root, *graded(root, jobs=2)


@pytest.fixture
def course(tmp_path, parallel):
    """A copy of the graded course, to change."""
    root = tmp_path / "course"
    shutil.copytree(parallel[0], root)
    return root


# ------------------------------------------------------------------------------------- the same grades


def test_everyone_is_graded_and_told(parallel):
    root, batch, lines = parallel
    assert len(batch.graded) == 4 + 6 + len(ODD_NAMES) == len(lines) and batch.failed == {}
    assert f"student00: {AUTOMATIC:g} of {AUTOMATIC:g}" in "\n".join(lines)
    points = {result.student: result.points for result in batch.graded}
    assert points["student00"] == points["marks"] == points["renamed"] == points["deleted"] == AUTOMATIC
    assert points["empty"] == points["nothing"] == points["Ada Lovelace"] == 0
    assert 0 < points["student02"] < AUTOMATIC and 0 < points["cut"] < AUTOMATIC
    assert "with something to look at: " in summary(batch) and "renamed" in summary(batch)


def test_several_workers_give_what_one_gives(parallel, tmp_path):
    root = parallel[0]
    shutil.copytree(root / "submitted", tmp_path / "submitted")
    shutil.copytree(root / ".course", tmp_path / ".course")
    with book(tmp_path) as opened:
        opened.add_assignment(ASSIGNMENT, duedate="2026-11-20 23:59:59 UTC")
    graded(tmp_path, jobs=1)
    assert contents(tmp_path) == contents(root)
    assert reports(tmp_path) == reports(root)
    for student in reports(root):
        assert outputs(tmp_path, student) == outputs(root, student)


def test_nbgraders_own_autograde_gives_the_same_gradebook(parallel, tmp_path):
    root = parallel[0]
    for name in ("submitted", ".course"):
        shutil.copytree(root / name, tmp_path / name)
    shutil.copy(course_root() / "nbgrader_config.py", tmp_path)
    for name in ("solutions", "assignments"):
        shutil.copytree(course_root() / name / ASSIGNMENT, tmp_path / name / ASSIGNMENT)
    # nbgrader gives up a submission whose timestamp it cannot read.
    (tmp_path / "submitted" / "student01" / ASSIGNMENT / "timestamp.txt").unlink()
    nbgrader("generate_assignment", ASSIGNMENT, "--force", cwd=tmp_path)
    nbgrader("db", "assignment", "add", ASSIGNMENT, "--duedate=2026-11-20 23:59:59 UTC", cwd=tmp_path)
    nbgrader("autograde", ASSIGNMENT, "--JudgedExecute.unsafe=True", cwd=tmp_path)
    assert contents(tmp_path) == contents(root)


def test_late_days_cost_what_they_cost_under_nbgrader(course):
    text = (course_root() / "nbgrader_config.py").read_text(encoding="utf-8")
    (course / "nbgrader_config.py").write_text(text + "\nc.LateDays.percent_per_day = 10\n", encoding="utf-8")
    assert contents(course)["student00"]["timestamp"] == "2026-11-22 12:00:00"
    assert contents(course)["student00"]["penalty"] is None
    graded(course, ["student00", "student01"])
    found = contents(course)
    assert found["student00"]["penalty"] == 0.2 * AUTOMATIC and not found["student01"]["penalty"]
    (course / "extensions.csv").write_text(f"student,assignment,days\nstudent00,{ASSIGNMENT},1\n")
    graded(course, ["student00"])
    assert contents(course)["student00"]["penalty"] == 0.1 * AUTOMATIC


def test_nbgraders_own_penalties_are_applied_where_they_are_configured(course):
    text = (course_root() / "nbgrader_config.py").read_text(encoding="utf-8")
    text += "\nc.LateSubmissionPlugin.penalty_method = 'zero'\n"
    (course / "nbgrader_config.py").write_text(text, encoding="utf-8")
    graded(course, ["student00", "student01"])
    found = contents(course)
    assert found["student00"]["penalty"] == AUTOMATIC and not found["student01"]["penalty"]


# ----------------------------------------------------------------------------------- what is graded again


def test_what_is_graded_is_not_graded_again(course, monkeypatch):
    before = contents(course), reports(course)
    monkeypatch.setattr(grade, "server_for", lambda *_: pytest.fail("nothing has to run"))
    batch, lines = graded(course)
    assert (batch.graded, lines, len(batch.finished)) == ([], [], 4 + 6 + len(ODD_NAMES))
    assert (contents(course), reports(course)) == before


def test_a_changed_submission_is_graded_again_by_itself(course):
    path = course / "submitted" / "student00" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb"
    nbformat.write(without_beta(solved()), path)
    before = contents(course)
    batch, _ = graded(course)
    after = contents(course)
    assert [result.student for result in batch.graded] == ["student00"]
    assert after["student00"]["score"] < before.pop("student00")["score"]
    assert before.items() <= after.items()


def test_chosen_students_are_graded_again_and_no_others(course):
    batch, _ = graded(course, ["student01", "empty"])
    assert sorted(result.student for result in batch.graded) == ["empty", "student01"] and not batch.finished


def test_force_grades_everything_again_to_the_same_points(course):
    before = contents(course)
    batch, _ = graded(course, force=True)
    assert len(batch.graded) == 4 + 6 + len(ODD_NAMES) and contents(course) == before


def test_points_and_comments_by_hand_survive(course):
    with book(course) as opened:
        opened.find_grade("written-likelihood", ASSIGNMENT, ASSIGNMENT, "student01").manual_score = 3.5
        opened.find_grade("dpo_loss", ASSIGNMENT, ASSIGNMENT, "student01").manual_score = 1.0
        opened.find_comment("written-likelihood", ASSIGNMENT, ASSIGNMENT, "student01").manual_comment = "Well seen."
        opened.db.commit()
    before = contents(course)["student01"]
    graded(course, ["student01"])
    after = contents(course)["student01"]
    assert after["grades"]["written-likelihood"] == (None, 3.5, None, True)
    assert after["grades"]["dpo_loss"][1] == 1.0 and not after["grades"]["dpo_loss"][3]  # nothing to look at again
    assert after["comments"] == before["comments"] and after["score"] == before["score"]


def test_one_exercise_alone_is_graded_again(course, monkeypatch):
    """By other rules, so that what was graded can be told from what was not."""
    with book(course) as opened:
        opened.find_grade("log_partition", ASSIGNMENT, ASSIGNMENT, "student02").manual_score = 2.0
        opened.db.commit()
    was, cells = contents(course), outputs(course, "student02")
    monkeypatch.setattr(judge, "score_of", lambda questions, *_: grade_nothing(questions))
    batch, lines = graded(course, (), ["dpo_loss"], jobs=1)
    now, shown = contents(course), outputs(course, "student02")
    assert len(batch.graded) == 4 + 6 + len(ODD_NAMES)
    for student, of in now.items():
        assert of["grades"].pop("dpo_loss")[0] == 0
        was[student]["grades"].pop("dpo_loss"), of.pop("score"), was[student].pop("score")
    assert now == was
    assert shown.pop("dpo_loss") != cells.pop("dpo_loss") and shown == cells
    report = read_report(course, ASSIGNMENT, "student00")["exercises"]
    assert report["dpo_loss"]["points"] == 0 and report["log_partition"]["points"] == 10
    of = batch.graded[0].report["exercises"]["dpo_loss"]["of"]
    assert lines and all(f", with dpo_loss 0 of {of:g} now" in line for line in lines)


def grade_nothing(questions):
    from cs336_alignment.grading.score import score_of

    return score_of(questions, None, "no points today")


def test_one_exercise_of_a_new_submission_is_graded_with_the_others(course):
    hand_in(course, "late", solved())
    batch, lines = graded(course, ["late"], ["dpo_loss"])
    assert batch.graded[0].points == AUTOMATIC and "graded whole" in lines[0]


def test_a_submission_whose_time_changed_is_graded_again(course):
    (course / "submitted" / "student02" / ASSIGNMENT / "timestamp.txt").write_text("2026-11-21 12:00:00 UTC\n")
    batch, _ = graded(course)
    assert [result.student for result in batch.graded] == ["student02"]
    assert graded(course)[0].graded == []


def test_results_are_said_while_other_workers_call_functions(course, capsys):
    """What a function prints is turned away for the whole process, but not what `grade` says."""
    batch = grade_assignment(course, ASSIGNMENT, jobs=2, force=True, unsafe=True)
    said = capsys.readouterr().out
    assert batch.graded and all(f"{result.student}: " in said for result in batch.graded)


def test_a_time_that_is_gone_is_gone_from_the_gradebook_too(course):
    """student00 was late."""
    (course / "submitted" / "student00" / ASSIGNMENT / "timestamp.txt").unlink()
    graded(course)
    with book(course) as opened:
        assert opened.find_submission(ASSIGNMENT, "student00").timestamp is None


def test_a_time_that_cannot_be_read_is_a_finding(course):
    report = read_report(course, ASSIGNMENT, "student01")
    assert report["timestamp"] is None and "timestamp.txt" in " ".join(report["findings"])


def with_function(name: str, source: str):
    """Solutions, but one of them is another."""
    notebook = solved()
    next(
        c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id") == f"solution-{name}"
    ).source = source
    return notebook


def test_an_error_message_that_is_no_text_costs_nothing_else(course):
    hand_in(
        course, "half", with_function("dpo_train_step", "def dpo_train_step(*a):\n    raise ValueError(chr(0xd800))")
    )
    batch, _ = graded(course)
    assert batch.failed == {} and [g.points for g in batch.graded] == [AUTOMATIC - 10]


def test_a_terminal_that_cannot_show_a_name_does_not_end_the_batch(tmp_path):
    for student in ("김철수", "zoe"):
        hand_in(tmp_path, student, release())
    command = [sys.executable, "-m", "cs336_alignment", "grade", ASSIGNMENT, "--course", str(tmp_path), "--unsafe"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONIOENCODING": "latin-1"}, capture_output=True, cwd=course_root()
    )
    assert done.returncode == 0 and b"2 graded" in done.stdout


SLOW_ONCE = """def log_partition(*arguments):
    import time
    if not hasattr(time, "slept"):
        time.slept = True
        time.sleep(3)
"""


def test_crashes_of_an_exercise_go_with_its_next_grading(course):
    hand_in(course, "slow", with_function("log_partition", SLOW_ONCE))
    graded(course, limits=sandbox.Limits(cell_seconds=1))
    crashes = read_report(course, ASSIGNMENT, "slow")["crashes"]
    assert [crash["cell"] for crash in crashes] == ["log_partition"]
    graded(course, ["slow"], ["dpo_loss"])
    assert read_report(course, ASSIGNMENT, "slow")["crashes"] == crashes
    graded(course, ["slow"], ["log_partition"])
    assert read_report(course, ASSIGNMENT, "slow")["crashes"] == []


def test_the_digest_of_an_exercises_code_knows_shared_cases_and_references():
    """kl_estimate takes its cases from a file that it shares, and its reference from the package."""
    read = Path.read_bytes
    names = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: names.append(path.name) or read(path))
        code_digest.__wrapped__("kl_estimate")
    assert {"kl_estimate.py", "_rollouts.py", "ppo.py", "compare.py", "score.py", "probe.py"} <= set(names)
    assert "cli.py" not in names and "grade.py" not in names


def test_a_student_who_is_not_there_is_named_with_the_nearest(course):
    with pytest.raises(ValueError, match="did you mean student02"):
        graded(course, ["studnt02"])


def test_other_cases_than_at_grading_are_told(course, monkeypatch):
    monkeypatch.setattr(grade, "code_digest", lambda name: "0" * 16 if name == "dpo_loss" else code_digest(name))
    batch, _ = graded(course)
    assert batch.older == batch.finished and "--force" in summary(batch)
    batch, _ = graded(course, only=["dpo_loss"])
    assert batch.graded and graded(course)[0].older == []


# ------------------------------------------------------------------------------------------- the assignment


def test_an_assignment_whose_solutions_changed_is_updated(course, monkeypatch):
    monkeypatch.setattr(grade, "check_points", lambda *_: None)
    released = changed_course(course, lambda cell: cell.metadata.nbgrader.update(points=20), "dpo_loss")
    graded(course, ["student00"])
    with book(course) as opened:
        assert opened.find_grade_cell("dpo_loss", ASSIGNMENT, ASSIGNMENT).max_score == 20
    assert released.is_file()


def test_points_that_do_not_agree_are_refused_before_anything_is_graded(course):
    changed_course(course, lambda cell: cell.metadata.nbgrader.update(points=20), "dpo_loss")
    before = contents(course)
    with pytest.raises(ValueError, match="dpo_loss is worth 15 in its file, 15 by its cases and 20 in the notebook"):
        graded(course, force=True)
    assert contents(course) == before


def test_points_by_hand_wait_for_a_person_when_the_answer_is_another(course):
    """An answer and a function: student02 hands in both anew, student00 the same as before."""
    names = "written-likelihood", "dpo_loss"
    with book(course) as opened:
        for student in ("student00", "student02"):
            for name in names:
                grade_of = opened.find_grade(name, ASSIGNMENT, ASSIGNMENT, student)
                grade_of.manual_score, grade_of.needs_manual_grade = 3.0, False
        opened.db.commit()
    shutil.rmtree(course / "submitted" / "student02")
    hand_in(course, "student02", named(solved(), "another"))
    batch, lines = graded(course, ["student00", "student02"])
    assert {g.student: sorted(g.again) for g in batch.graded} == {"student00": [], "student02": sorted(names)}
    assert sum("look again" in line for line in lines) == 1
    waiting = {r.student: r.waiting(found.cells) for found in [read_class(course, ASSIGNMENT)] for r in found.records}
    assert set(names) <= set(waiting["student02"]) and not set(names) & set(waiting["student00"])
    graded(course, ["student02"])  # once more changes nothing
    with book(course) as opened:
        for name in names:
            grade_of = opened.find_grade(name, ASSIGNMENT, ASSIGNMENT, "student02")
            assert grade_of.manual_score == 3.0 and grade_of.needs_manual_grade
            grade_of.needs_manual_grade = False  # as Formgrader does when points are saved
        opened.db.commit()
    graded(course, ["student02"])
    found = read_class(course, ASSIGNMENT)
    assert not set(names) & set(next(r for r in found.records if r.student == "student02").waiting(found.cells))


def test_a_change_that_nbgrader_cannot_make_is_told(course):
    def gone(cell):
        cell.metadata.pop("nbgrader")

    changed_course(course, gone, "dpo_loss")
    before = contents(course)
    with pytest.raises(ValueError, match="cannot mend it"):
        graded(course)
    assert contents(course) == before


def changed_course(root, change, name):
    """The course with solutions and a release of its own, in which a cell is different."""
    for folder in ("solutions", "assignments"):
        shutil.copytree(course_root() / folder / ASSIGNMENT, root / folder / ASSIGNMENT)
        path = root / folder / ASSIGNMENT / f"{ASSIGNMENT}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        change(next(c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id") == name))
        for cell in notebook.cells:
            cell.metadata.get("nbgrader", {}).pop("checksum", None) if folder == "solutions" else None
            if folder == "assignments" and cell.metadata.get("nbgrader", {}).get("grade_id") == name:
                cell.metadata.nbgrader.checksum = "changed"
        nbformat.write(notebook, path)
    return path


# ------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    "arguments, message",
    [(("a9_none",), "a9_none"), ((ASSIGNMENT, ["nobody"]), "nobody"), ((ASSIGNMENT, (), ["dpo"]), "dpo_loss")],
)
def test_names_that_are_not_there_are_told(course, arguments, message):
    with pytest.raises(ValueError, match=message):
        grade_assignment(course, *arguments, unsafe=True)


def test_nothing_handed_in_is_told(tmp_path):
    for folder in (tmp_path, tmp_path / "submitted"):
        folder.mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="nothing to grade"):
            graded(tmp_path)
    assert os.listdir(tmp_path) == ["submitted"]


def test_two_batches_at_once_are_refused(course):
    with only_one(course), pytest.raises(ValueError, match="another `grade` is running"):
        graded(course)
    graded(course)


def test_without_a_sandbox_nothing_runs_and_nothing_is_written(tmp_path, monkeypatch):
    hand_in(tmp_path, "ada", solved())
    monkeypatch.setattr(sandbox, "bubblewrap", lambda: "bubblewrap (the program bwrap) is not installed")
    with pytest.raises(NoSandbox, match="--unsafe") as error:
        graded(tmp_path, unsafe=False)
    assert "your rights" in str(error.value) and os.listdir(tmp_path) == ["submitted"]


def test_an_error_of_ours_leaves_the_others_graded(course, monkeypatch):
    judge_all = grade.judge

    def fails(notebook, of, student, *rest):
        if student == "student01":
            raise RuntimeError("our own mistake")
        return judge_all(notebook, of, student, *rest)

    monkeypatch.setattr(grade, "judge", fails)
    before = contents(course)
    batch, lines = graded(course, ["student00", "student01", "student02"])
    assert sorted(result.student for result in batch.graded) == ["student00", "student02"]
    assert batch.failed == {"student01": "RuntimeError: our own mistake"}
    assert "NOT GRADED" in "".join(lines) and "student01" in summary(batch)
    assert contents(course) == before


def test_a_full_disk_is_told_and_changes_nothing(course, monkeypatch):
    write = Path.write_text

    def full(path, *content, **options):
        if "student00" in str(path):
            raise OSError(28, "No space left on device")
        return write(path, *content, **options)

    nbformat.write(without_beta(solved()), course / "submitted" / "student00" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb")
    monkeypatch.setattr(Path, "write_text", full)
    before = contents(course), reports(course)
    batch, _ = graded(course, ["student00", "student01"])
    assert "No space left" in batch.failed["student00"] and [g.student for g in batch.graded] == ["student01"]
    assert (contents(course), reports(course)) == before


def test_a_gradebook_that_cannot_be_written_costs_one_submission(course, monkeypatch):
    from sqlalchemy.exc import OperationalError

    parse, failing = gradebook.utils.determine_grade, iter([True])

    def once(cell):
        if next(failing, False):
            raise OperationalError("UPDATE", {}, Exception("database or disk is full"))
        return parse(cell)

    monkeypatch.setattr(gradebook.utils, "determine_grade", once)
    before = contents(course)
    batch, _ = graded(course, ["student00", "student01"], jobs=1)
    assert "disk is full" in batch.failed["student00"] and [g.student for g in batch.graded] == ["student01"]
    assert contents(course) == before
    assert [g.student for g in graded(course)[0].graded] == ["student00"]


def test_stopped_between_the_gradebook_and_the_folder_it_is_graded_again(course, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    before = contents(course), reports(course)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(grade.Path, "rename", killed)
        graded(course, ["student02"])
    assert contents(course) == before[0] and read_report(course, ASSIGNMENT, "student02") == {}
    batch, _ = graded(course)
    assert [result.student for result in batch.graded] == ["student02"]
    assert (contents(course), reports(course)) == before
    assert sorted(os.listdir(course / "autograded" / "student02")) == [ASSIGNMENT]
