"""A batch that is stopped: by Ctrl-C, or killed. What was finished is kept, the same command goes on, and nothing runs
on behind anyone's back."""

import random
import shutil
import signal
import time

import pytest
from courses import (
    below,
    contents,
    count_reports,
    graded,
    make_class,
    outputs,
    reports,
    start_grading,
    still_there,
    wait_for,
)
from submissions import ASSIGNMENT, hand_in, solved, with_first_cell

from cs336_alignment.grading.gradebook import Writer
from cs336_alignment.grading.sandbox import bubblewrap

CLASS = 8
SLOW = "import time\ntime.sleep(600)"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A class graded without interruption."""
    root = tmp_path_factory.mktemp("whole")
    make_class(root, CLASS)
    with Writer(root, ASSIGNMENT):  # a new gradebook takes seconds
        shutil.copy(root / "gradebook.db", root / "new.db")
    graded(root)
    return root


@pytest.fixture
def course(whole, tmp_path):
    """The same class before anything is graded. The assignment is in the gradebook."""
    root = tmp_path / "course"
    shutil.copytree(whole / "submitted", root / "submitted")
    shutil.copytree(whole / ".course", root / ".course")
    shutil.copy(whole / "new.db", root / "gradebook.db")
    return root


def same(root, other) -> bool:
    assert contents(root) == contents(other) and reports(root) == reports(other)
    return all(outputs(root, student) == outputs(other, student) for student in reports(other))


def finish(root) -> str:
    process = start_grading(root, "--unsafe", "--jobs=2")
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    return said


def test_ctrl_c_ends_a_batch_soon_and_the_next_run_goes_on(course, whole):
    process = start_grading(course, "--unsafe", "--jobs=2")
    wait_for(lambda: count_reports(course) >= 2)
    started, begin = below(process), time.monotonic()
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[0]
    assert time.monotonic() - begin < 10 and process.returncode == 130, said
    assert "goes on from there" in said and "Traceback" not in said
    assert started and still_there(started, 1) == []
    done = count_reports(course)
    assert 2 <= done < CLASS
    assert f"{CLASS - done} graded, {done} were graded before" in finish(course)
    assert same(course, whole)


def test_ctrl_c_does_not_wait_for_a_cell_that_sleeps(course):
    shutil.rmtree(course / "submitted")
    hand_in(course, "ada", with_first_cell(solved(), SLOW))
    process = start_grading(course, "--unsafe", "--jobs=1")
    wait_for(
        lambda: any("kernel" in " ".join(p.cmdline()) and p.num_threads() and len(p.children()) for p in below(process))
    )
    time.sleep(0.5)
    begin, started = time.monotonic(), below(process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert time.monotonic() - begin < 10 and process.returncode == 130
    assert still_there(started, 1) == [] and count_reports(course) == 0


def kill(course, wanted: int, delay: float) -> None:
    """Starts a batch and kills it that many seconds after so many submissions are finished."""
    process = start_grading(course, "--unsafe", "--jobs=2")
    wait_for(lambda: count_reports(course) >= wanted or process.poll() is not None)
    time.sleep(delay)
    started = below(process)
    process.kill()
    process.communicate()
    assert still_there(started, 5) == []


def test_killed_at_random_moments_and_resumed_it_ends_as_if_nothing_had_been(course, whole):
    draw = random.Random(7)
    for number in range(3):
        kill(course, draw.randrange(number, number + 3), draw.uniform(0, 0.3))
    finish(course)
    assert same(course, whole)


@pytest.mark.parametrize("unsafe", [False, True])
def test_what_a_submission_started_ends_with_a_killed_grader(course, unsafe):
    if not unsafe and isinstance(bubblewrap(), str):
        pytest.skip(bubblewrap())
    shutil.rmtree(course / "submitted")
    hides = (
        f"import subprocess, os\nfor _ in range(3): subprocess.Popen(['sleep', '611'], start_new_session=True)\n{SLOW}"
    )
    hand_in(course, "ada", with_first_cell(solved(), f"{hides}\n{SLOW}"))
    process = start_grading(course, *["--unsafe"] * unsafe, "--jobs=1")
    sleepers = lambda: [p for p in below(process) if p.name() == "sleep"]  # noqa: E731
    wait_for(lambda: len(sleepers()) == 3)
    started = below(process)
    process.kill()
    process.communicate()
    assert still_there(started, 5) == []


def test_the_command_says_how_it_ended(course):
    """0: all graded; 2: nothing done, and why."""
    said = finish(course)
    assert f"{CLASS} graded, 0 were graded before" in said and "student00: " in said
    for arguments, words in [(["--student=nobody"], "nobody"), (["--exercise=nothing"], "dpo_loss")]:
        process = start_grading(course, "--unsafe", *arguments)
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 2 and words in said and "Traceback" not in said


def test_without_bubblewrap_the_command_refuses_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    root = tmp_path / "course"
    hand_in(root, "ada", solved())
    process = start_grading(root)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and "--unsafe" in said and "apt install bubblewrap" in said, said
    assert [path.name for path in root.iterdir()] == ["submitted"]


def test_an_error_of_ours_is_the_exit_code(course):
    """A graded folder that is no folder: the one submission fails, the others are graded."""
    (course / "autograded").mkdir()
    (course / "autograded" / "student03").write_text("in the way")
    process = start_grading(course, "--unsafe", "--jobs=1")
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and "student03: NOT GRADED" in said and count_reports(course) == CLASS - 1, said
    assert "1 NOT GRADED, by an error of ours: student03" in said
    assert ASSIGNMENT in said
