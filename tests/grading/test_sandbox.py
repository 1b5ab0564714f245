"""The sandbox: what a submission cannot see, reach or use up; and that it works for any user, in any folder."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from courses import environment
from submissions import ASSIGNMENT, hand_in, solved

from cs336_alignment.grading.autograde import server_for
from cs336_alignment.grading.sandbox import GB, Died, Limits, NoSandbox, Server, bubblewrap, confinement
from cs336_alignment.paths import PACKAGE, course_root

WHY_NOT = bubblewrap() if isinstance(bubblewrap(), str) else ""
needs_bubblewrap = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
LIMITS = Limits(cell_seconds=20, memory=GB // 2, processes=20, disk=20_000_000, output=1_000_000)
NOBODY = 65_534


@pytest.fixture(scope="module")
def server():
    os.environ["A_SECRET_OF_THE_GRADER"] = "7"
    try:
        with server_for(ASSIGNMENT, LIMITS) as server:
            server.ready()
            yield server
    finally:
        del os.environ["A_SECRET_OF_THE_GRADER"]


def said(server, code: str, seconds: float = 20):
    """What a cell's last printed line is, as JSON; an error's name if there was one."""
    with server.run() as session:
        outputs, _ = session.step({"code": code}, seconds)
    for output in outputs:
        if output["output_type"] == "error":
            return output["ename"]
    return json.loads("".join(output["text"] for output in outputs if output["output_type"] == "stream"))


# ------------------------------------------------------------------------------------- what it cannot see


@needs_bubblewrap
def test_there_is_no_network(server):
    connect = "import socket\nsocket.create_connection(('{}', {}), 2)"
    assert said(server, connect.format("1.1.1.1", 53)) == "OSError"
    assert said(server, "import json, socket\nprint(json.dumps([name for _, name in socket.if_nameindex()]))") == ["lo"]


@needs_bubblewrap
def test_a_service_of_this_computer_cannot_be_reached(server):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert (
            said(server, f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)")
            == "ConnectionRefusedError"
        )


@needs_bubblewrap
def test_neither_home_nor_checkout_nor_the_rest_of_etc_can_be_seen(server, tmp_path):
    (tmp_path / "submission").write_text("of another student")
    places = [course_root() / "solutions", course_root() / "nbgrader_config.py", PACKAGE / "grading" / "score.py",
              Path.home() / ".ssh", tmp_path / "submission", Path("/etc/passwd"), Path("/var/log")]  # fmt: skip
    code = f"import json, os\nprint(json.dumps([p for p in {[str(p) for p in places]} if os.path.exists(p)]))"
    assert said(server, code) == []


@needs_bubblewrap
def test_the_package_there_has_no_answers(server):
    code = "import json, pathlib\nprint(json.dumps([p.name for p in pathlib.Path('/course').rglob('*.py')]))"
    names = said(server, code)
    assert "kernel.py" in names and "score.py" not in names and "dpo_loss.py" not in names


@needs_bubblewrap
def test_nothing_of_the_graders_environment_is_there(server):
    found = said(server, "import json, os\nprint(json.dumps(dict(os.environ)))")
    assert "A_SECRET_OF_THE_GRADER" not in found and str(course_root()) not in str(found)
    assert found["HOME"] == "/tmp" and found["OMP_NUM_THREADS"] == "1" and len(found) < 30


@needs_bubblewrap
def test_only_its_own_processes_are_there(server):
    assert len(said(server, "import json, os\nprint(json.dumps([p for p in os.listdir('/proc') if p.isdigit()]))")) <= 3


@needs_bubblewrap
@pytest.mark.parametrize("place", ["/course/x", "/venv/x", "/usr/x", "/etc/x", "/x/y"])
def test_it_can_write_to_nothing_but_its_own_folder(server, place):
    assert said(server, f"open({place!r}, 'w')") in ("OSError", "PermissionError", "FileNotFoundError")
    assert said(server, "open('here', 'w').write('x')\nprint(7)") == 7


@needs_bubblewrap
def test_it_is_nobody_and_cannot_become_anybody(server):
    rights = "print([int(x.split()[1], 16) for x in open('/proc/self/status') if x.startswith('CapEff')])"
    assert said(server, rights) == [0]
    assert said(server, "import os\nos.setuid(0 if os.getuid() else 1)") in ("PermissionError", "OSError")
    assert said(server, "import os\nos.kill(1, 9)\nprint(os.getppid())") in ("PermissionError", 1)


# ------------------------------------------------------------------------------------ what it cannot use up


def test_memory_has_a_limit(server_anyhow):
    assert said(server_anyhow, "x = bytearray(10**9)") == "MemoryError"


def test_memory_of_all_processes_together_has_a_limit(server_anyhow):
    code = """
import os, time
for _ in range(4):
    if os.fork() == 0:
        x = bytearray(b"1" * 200_000_000)
        time.sleep(60)
time.sleep(60)
"""
    with pytest.raises(Died, match="of memory"), server_anyhow.run() as session:
        session.step({"code": code}, 30)
    assert said(server_anyhow, "print(7)") == 7


def test_processes_have_a_limit_and_a_fork_bomb_ends(server_anyhow):
    bomb = "import os\nwhile True:\n    os.fork()"
    try:
        with server_anyhow.run() as session:
            outputs, _ = session.step({"code": bomb}, 5)
        assert any(o.get("ename") in ("BlockingIOError", "TimeoutError") for o in outputs)
    except Died:
        pass
    assert said(server_anyhow, "print(7)") == 7


@needs_bubblewrap
def test_the_disk_has_a_limit(server):
    code = "for i in range(5):\n    with open(f'big{i}', 'wb') as file:\n        file.write(bytes(9_000_000))"
    assert said(server, code) == "OSError"
    assert said(server, "import json, os\nprint(json.dumps(os.listdir('.')))") == []


def test_files_have_limits(server_anyhow):
    assert said(server_anyhow, "with open('big', 'wb') as file:\n    file.write(bytes(30_000_000))") == "OSError"
    assert said(server_anyhow, "held = [open('/dev/null') for _ in range(1000)]") == "OSError"


@pytest.fixture(scope="module")
def server_anyhow():
    """In a sandbox where there is one, and without where not: these limits hold in both."""
    with server_for(ASSIGNMENT, LIMITS, unsafe=True) as server:
        yield server


# ------------------------------------------------------------------------------------------- where, and who


def test_without_bubblewrap_it_has_to_be_said(monkeypatch, tmp_path):
    monkeypatch.setattr("cs336_alignment.grading.sandbox.bubblewrap", lambda: "there is none")
    with pytest.raises(NoSandbox, match="there is none"):
        Server(tmp_path, [])
    assert confinement(unsafe=True) is None


def test_a_server_that_does_not_start_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="cs336_alignment"):
        Server(tmp_path, [], unsafe=True).ready()  # an edition without the package


@needs_bubblewrap
def test_the_environment_may_lie_below_tmp_and_have_a_name_with_spaces(tmp_path):
    place = tmp_path / "an environment é"
    place.symlink_to(sys.prefix)
    python = place / Path(sys.executable).relative_to(sys.prefix)
    assert graded_by([str(python)], tmp_path / "a course ñ") == "80 of 80"


@needs_bubblewrap
@pytest.mark.skipif(os.geteuid() != 0, reason="the tests run as an ordinary user: all of them show it")
def test_an_ordinary_user_can_grade():
    readable = ["test", "-r", PACKAGE / "cli.py", "-a", "-x", os.path.realpath(sys.executable)]
    if subprocess.run(readable, user=NOBODY, group=NOBODY, extra_groups=[]).returncode:
        pytest.skip("Python or the checkout cannot be read by other users")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        Path(folder).chmod(0o755)
        ordinary = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        assert graded_by([sys.executable], Path(folder) / "course", **ordinary) == "80 of 80"


def graded_by(python: list[str], root: Path, **options) -> str:
    """The points of an honest submission, graded by another Python or user, with a sandbox."""
    hand_in(root, "ada", solved())
    root.chmod(0o777)
    own = environment() | {"HOME": str(root), "TMPDIR": str(root)}
    command = [*python, "-m", "cs336_alignment", "grade", ASSIGNMENT, "--course", str(root)]
    done = subprocess.run(command, env=own, cwd=root, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.partition("ada: ")[2].partition(",")[0]
