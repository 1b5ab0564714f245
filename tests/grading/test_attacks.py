"""Cheating earns nothing, and what tries to do harm does none: to the grades of others, to files, to the computer.

All attacks are graded in one batch with three honest students. A sample is tried at every run of the tests, all with
`--full`; those that are harmless in a sandbox only are left out where there is none.
"""

import copy
import hashlib
import json
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import psutil
import pytest
from attack_parts import Attack, placed
from attacks import ATTACKS
from submissions import ASSIGNMENT, AUTOMATIC, hand_in, points_in, release, solved

from cs336_alignment.grading import sandbox
from cs336_alignment.grading.compare import difference
from cs336_alignment.grading.exercise import exercises
from cs336_alignment.grading.folders import read_report
from cs336_alignment.grading.grade import SECRET, Batch, grade_assignment
from cs336_alignment.grading.judge import course_secret, read_answers, report
from cs336_alignment.grading.probe import encode_results
from cs336_alignment.grading.rescue_files import files_in
from cs336_alignment.grading.sandbox import GB, Limits, bubblewrap
from cs336_alignment.grading.score import ask_all, case_seeds, score_of
from cs336_alignment.paths import course_root

NO_SANDBOX = bubblewrap() if isinstance(bubblewrap(), str) else ""
HONEST = ("aa-honest", "mm-honest", "zz-honest")  # the batch goes by name: one before all attacks, one after
CANARY = "canary-7f3a"
MARK = "attack-by-test"
# A size of disk that no other run has, by which this test's processes are found: it is on their command line.
OURS = GB // 8 + int(time.time() * 1000) % 10_000_000
TIMES = ("graded_at", "seconds", "cpu_seconds")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="submissions run in an ordinary kernel here, as plain")


@dataclass
class Course:
    root: Path
    batch: Batch
    lines: list[str]
    before: dict[str, str]  # a hash of each file that grading should leave alone
    connections: list[bytes] = field(default_factory=list)
    processes: list[str] = field(default_factory=list)  # that were left behind


def hashes(root: Path) -> dict[str, str]:
    parts = ("submitted", "solutions", "assignments", ".course", "home", "outside")
    files = [path for part in parts for path in files_in(root / part)]
    contents = {path: path.read_bytes() for path in files if path.is_file() and not path.is_symlink()}
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(data).hexdigest()
        for path, data in contents.items()
        if path.name != "grading.lock"
    }


def make_course(root: Path) -> None:
    for part in ("solutions", "assignments"):
        shutil.copytree(course_root() / part / ASSIGNMENT, root / part / ASSIGNMENT)
    for place in ("home", "outside"):
        (root / place).mkdir()
        (root / place / "canary").write_text(CANARY)
    for student in HONEST:
        hand_in(root, student, solved())


def grade(root: Path) -> tuple[Batch, list[str]]:
    lines: list[str] = []
    limits = Limits(cell_seconds=3, notebook_seconds=30, memory=GB, disk=OURS)
    return grade_assignment(root, ASSIGNMENT, jobs=2, unsafe=True, limits=limits, say=lines.append), lines


def left_behind() -> list[str]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = " ".join(process.info["cmdline"] or [])
        if (MARK in words or f'"disk": {OURS}' in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(f"{process.pid}: {words}")
    return found


def chosen(config) -> list[Attack]:
    possible = [attack for attack in ATTACKS if not (attack.sandbox and NO_SANDBOX)]
    return possible if config.getoption("--full") else [attack for attack in possible if attack.sample]


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Path:
    """The honest students in a batch of their own."""
    root = tmp_path_factory.mktemp("honest")
    make_course(root)
    course_secret(root / SECRET)
    grade(root)
    return root


@pytest.fixture(scope="module")
def course(tmp_path_factory, honest, request) -> Iterator[Course]:
    root = tmp_path_factory.mktemp("attacked")
    make_course(root)
    (root / SECRET).parent.mkdir()
    shutil.copy(honest / SECRET, root / SECRET)
    listener, abstract = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0{MARK}")
    abstract.listen()
    places = {
        "COURSE": str(root),
        "HOME_FOLDER": str(root / "home"),
        "PORT": str(listener.getsockname()[1]),
        "MARK": MARK,
    }
    for attack in chosen(request.config):
        folder = hand_in(root, attack.name, placed(attack.make(copy.deepcopy(release())), places))
        if attack.beside:
            attack.beside(folder)
    before = hashes(root)
    done = Course(root, *grade(root), before)
    for waiting in (listener, abstract):
        waiting.settimeout(0.2)
        try:
            done.connections.append(waiting.accept()[0].recv(100))
        except TimeoutError:
            continue
        finally:
            waiting.close()
    end = time.monotonic() + 10  # the kernel takes its time to end what it has killed
    while (left := left_behind()) and time.monotonic() < end:
        time.sleep(0.2)
    done.processes = left
    yield done
    subprocess.run(["rm", "-rf", root], check=True)  # what pytest could not remove: folders too deep for Python


def each_attack():
    for attack in ATTACKS:
        marks = [] if attack.sample else [pytest.mark.slow]
        if attack.sandbox and NO_SANDBOX:
            marks.append(pytest.mark.skip(reason=f"is harmless in a sandbox only, and {NO_SANDBOX}"))
        yield pytest.param(attack, marks=marks, id=attack.name.encode("ascii", "backslashreplace").decode())


def texts(course: Course, student: str) -> str:
    """All that a student and the instructor may see of a graded submission."""
    folder = course.root / "autograded" / student / ASSIGNMENT
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.iterdir()))


# --------------------------------------------------------------------------------------------- each of them


@pytest.mark.parametrize("attack", list(each_attack()))
def test_an_attack_earns_what_its_own_mathematics_earned(course, attack):
    report = read_report(course.root, ASSIGNMENT, attack.name)
    assert report is not None, course.batch.failed
    points = {name: exercise["points"] for name, exercise in report["exercises"].items()}
    assert sum(points.values()) == attack.earns, points
    told = json.dumps([report["findings"], report["crashes"], [e["problem"] for e in report["exercises"].values()]])
    assert attack.found in told


# ------------------------------------------------------------------------------------------------ all of them


def test_the_batch_ends_and_everyone_is_graded(course):
    assert course.batch.failed == {}
    assert len(course.batch.graded) == len(list((course.root / "submitted").iterdir()))


def test_the_gradebook_says_what_the_reports_say(course):
    for student, cells in points_in(course.root).items():
        report = read_report(course.root, ASSIGNMENT, student)
        for name, exercise in report["exercises"].items():
            assert cells[name] == exercise["points"], (student, name)


@pytest.mark.parametrize("student", HONEST)
def test_honest_students_get_what_they_get_alone(course, honest, student):
    ours, alone = (read_report(root, ASSIGNMENT, student) for root in (course.root, honest))
    assert sum(exercise["points"] for exercise in ours["exercises"].values()) == AUTOMATIC
    assert {k: x for k, x in ours.items() if k not in TIMES} == {k: x for k, x in alone.items() if k not in TIMES}
    path = Path("autograded", student, ASSIGNMENT, f"{ASSIGNMENT}.ipynb")
    assert (course.root / path).read_bytes() == (honest / path).read_bytes()


def test_no_file_is_changed_and_none_is_added(course):
    assert hashes(course.root) == course.before
    made = {"autograded", "gradebook.db", ".course", "submitted", "solutions", "assignments", "home", "outside"}
    assert {path.name for path in course.root.iterdir()} == made


def test_nothing_outlives_the_batch(course):
    assert course.processes == []


@pytest.mark.skipif(bool(NO_SANDBOX), reason=NO_SANDBOX)
def test_nothing_reaches_the_graders_network(course):
    assert course.connections == []


def test_no_secret_and_no_expected_value_can_be_read_in_any_result(course):
    secret = course_secret(course.root / SECRET)
    for graded in course.batch.graded:
        text = texts(course, graded.student)
        assert secret not in text and CANARY not in text and "root:x:0" not in text, graded.student
        for exercise in exercises(ASSIGNMENT):
            if exercise.optional:
                continue
            for question in ask_all(exercise, case_seeds(exercise, secret, graded.student)):
                values = [result.get("value") for result in question.expected]
                numbers = [f"{float(x.detach()):.6g}" for x in values if getattr(x, "numel", lambda: 0)() == 1]
                # A student who was right may see his own value; one who was wrong must not see the right one.
                if not question.case.visible and graded.points == 0:
                    assert not any(n in text for n in numbers if len(n) >= 6), (graded.student, question.case.name)


def test_what_the_terminal_and_the_pages_show_is_only_text(course):
    assert not any(ord(letter) < 32 for line in course.lines for letter in line.replace("\n", ""))
    for graded in course.batch.graded:
        notebook = nbformat.from_dict(graded.notebook)
        nbformat.validate(notebook)
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        for output in outputs:
            html = output.get("data", {}).get("text/html", "")
            assert "<script" not in html and "<img" not in html and "image/svg+xml" not in output.get("data", {})
        path = course.root / "autograded" / graded.student / ASSIGNMENT
        assert sum(file.stat().st_size for file in path.iterdir()) < 10_000_000, graded.student


# -------------------------------------------------------------------------------------------- parts by themselves


@pytest.mark.parametrize(
    "result",
    [{"error": ["x"], "line": 7, "message": {}}, {"value": 1, "changed": [-1000]}, {"value": 1, "changed": 5},
     {"value": 1, "gradients": 7}, {"value": 1, "gradients": ["x"]}, {"value": 1, "after": "abc"}, {"changed": []}],
)  # fmt: skip
def test_what_is_judged_has_the_form_of_a_result(result):
    read = read_answers([[result]])
    if read is not None:
        assert all(isinstance(read[0][0][part], str | None) for part in ("error", "message", "line"))


def test_a_gradient_that_is_left_out_is_missing():
    import torch

    x = torch.ones(2)
    expected = {"value": x, "gradients": [x, 2 * x]}
    found = difference({"value": x, "gradients": [x]}, expected, 1e-4, 1e-5, ("a", "b"), (0, 1))
    assert "gradient by `b` is missing" in found.text
    assert difference({"value": x, "gradients": [x, 2 * x]}, expected, 1e-4, 1e-5, ("a", "b"), (0, 1)) is None


@pytest.mark.skipif(bool(NO_SANDBOX), reason=NO_SANDBOX)
def test_a_course_in_a_visible_folder_is_hidden(monkeypatch, tmp_path):
    course = Path("/usr/share")
    monkeypatch.setattr(sandbox, "course_root", lambda: course)
    options, *_ = sandbox.confined(bubblewrap(), tmp_path, Limits())
    done = subprocess.run([*options, "ls", "-A", course, "/usr/bin"], capture_output=True, text=True)
    assert done.stdout.startswith(("/usr/bin:\n", f"{course}:\n\n")) and f"{course}:\n\n" in done.stdout + "\n"
    assert "\nls\n" in done.stdout and any(course.iterdir())


ODD = [
    None, True, -1, 10**30, "x", "\ud800", [], {}, [[]], {"list": []}, {"dict": {"a": 1}}, {"other": "T"},
    {"float": "nan"}, {"float": "0x1p+2000"}, {"tensor": "float32", "shape": [0], "bits": ""},
    {"error": "ValueError"},
    {"tensor": "int64", "shape": [-1], "bits": "AAAAAAAA8D8="},
    {"tensor": "bool", "shape": [1], "bits": "AQAAAAAAAAA="},
    {"model": {"tensor": "float32", "shape": [1], "bits": "AAAAAAAA8D8="}}, {"sgd": 1, "of": 0},
    {"tokenizer": ["a"], "pad": None, "eos": "b"}, {"list": [{"list": [{"list": []}]}]},
]  # fmt: skip


def parts(data, path=()):
    """The places in JSON."""
    yield path
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inner:
        yield from parts(value, (*path, key))


def replaced(data, path, value):
    if not path:
        return value
    data = copy.copy(data)
    data[path[0]] = replaced(data[path[0]], path[1:], value)
    return data


@pytest.mark.parametrize("of", [e for e in exercises() if not e.optional], ids=lambda e: e.name)
def test_right_answers_with_one_forged_part_break_nothing(of, request):
    questions = ask_all(of, case_seeds(of, "secret", "ada"))
    right = json.loads(json.dumps([encode_results(question.expected) for question in questions]))
    assert score_of(questions, read_answers(right)).points == of.points
    chance, places = random.Random(0), list(parts(right))
    for _ in range(60 if request.config.getoption("--full") else 3):
        forged = replaced(right, chance.choice(places), copy.deepcopy(chance.choice(ODD)))
        answers = [answer for answer in forged if isinstance(answer, list)] if isinstance(forged, list) else []
        result = score_of(questions, read_answers(answers), "nothing")
        assert 0 <= result.points <= of.points and of.name in report(result)
