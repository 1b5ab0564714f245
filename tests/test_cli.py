"""The verbs: what they call, with which arguments, and how an error looks to the person who made it."""

import importlib
import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest

from cs336_alignment import cli

ROOT = Path(__file__).resolve().parent.parent


def stand_in(monkeypatch, module, **functions):
    """A module of the package replaced by one that records its calls."""
    calls = []

    def recorder(name, answer):
        def record(**arguments):
            calls.append((name, arguments))
            return answer(**arguments)

        return record

    fake = types.ModuleType(module)
    for name, answer in functions.items():
        setattr(fake, name, recorder(name, answer))
    monkeypatch.setitem(sys.modules, module, fake)
    package, _, attribute = module.rpartition(".")
    monkeypatch.setattr(sys.modules[package], attribute, fake, raising=False)
    return calls


def test_demo_passes_its_options_on(monkeypatch, tmp_path):
    calls = stand_in(monkeypatch, "cs336_alignment.pipeline", run_demo=lambda **arguments: None)
    assert cli.main(["demo"]) == 0
    line = ["demo", "--seed", "3", "--device", "cpu", "--model", "m", "--out", str(tmp_path), "--fresh"]
    assert cli.main(line + ["--from-scratch", "--profile", "test"]) == 0
    default, given = (arguments for _, arguments in calls)
    assert default == {
        "seed": 0,
        "device": "auto",
        "model": None,
        "out": None,
        "fresh": False,
        "from_scratch": False,
        "profile": "full",
    }
    assert given == {
        "seed": 3,
        "device": "cpu",
        "model": "m",
        "out": tmp_path,
        "fresh": True,
        "from_scratch": True,
        "profile": "test",
    }
    assert type(given["profile"]) is str


@pytest.mark.parametrize(
    "module, function, arguments",
    [
        ("pipeline", "run_demo", "seed device model out fresh from_scratch profile"),
        ("real_data", "train_on_file", "stage data format model out seed device steps sharded"),
        ("world", "describe", ""),
        ("world_training", "train", ""),
    ],
)
def test_what_a_verb_calls_exists_and_takes_what_it_is_given(module, function, arguments):
    """The other tests replace these functions, so this one holds the stand-ins to the real signatures."""
    called = getattr(importlib.import_module(f"cs336_alignment.{module}"), function)
    inspect.signature(called).bind(**dict.fromkeys(arguments.split()))


def test_train_passes_its_options_on(monkeypatch):
    calls = stand_in(monkeypatch, "cs336_alignment.real_data", train_on_file=lambda **arguments: None)
    assert cli.main(["train", "reward", "--data", "p.json", "--steps", "5", "--out", "o"]) == 0
    assert calls == [
        (
            "train_on_file",
            {
                "stage": "reward",
                "data": "p.json",
                "format": "auto",
                "model": None,
                "out": "o",
                "seed": 0,
                "device": "auto",
                "steps": 5,
                "sharded": False,
            },
        )
    ]


@pytest.mark.parametrize(
    "line, said",
    [
        (["train", "ppo", "--data", "x"], "'sft', 'reward', 'dpo'"),
        (["train", "sft"], "--data"),
        (["train", "sft", "--data", "x", "--steps", "0"], "--steps"),
        (["demo", "--profile", "huge"], "'full', 'test'"),
        (["demo", "--sed", "1"], "--sed"),
        (["dmeo"], "dmeo"),
    ],
)
def test_a_wrong_command_line_is_named_without_a_traceback(line, said, capfd):
    assert cli.main(line) == 2
    shown = capfd.readouterr().err
    assert said in shown and "Traceback" not in shown


def ours(error):
    """A function that raises as the package's own code would: its frame lies in the package's folder."""
    namespace = {"error": error}
    source = "def fails(**arguments):\n    raise error\n"
    exec(compile(source, str(cli.PACKAGE / "data.py"), "exec"), namespace)
    return namespace["fails"]


def fails_elsewhere(error):
    def fails(**arguments):
        raise error

    return fails


@pytest.mark.parametrize(
    "function, shown",
    [
        (
            ours(ValueError("p.json, record 3: 'output' is empty")),
            "error: p.json, record 3: 'output' is empty",
        ),
        (ours(FileNotFoundError("there is no p.json")), "error: there is no p.json"),
        (
            fails_elsewhere(FileNotFoundError(2, "No such file or directory", "p.json")),
            "error: No such file or directory: p.json",
        ),
    ],
)
def test_what_the_user_can_put_right_is_one_readable_line(monkeypatch, capfd, function, shown):
    stand_in(monkeypatch, "cs336_alignment.real_data", train_on_file=function)
    assert cli.main(["train", "sft", "--data", "p.json"]) == 2
    err = capfd.readouterr().err
    assert err.splitlines() == [shown, "(--debug shows where it was raised)"]


def test_debug_shows_the_traceback_wherever_it_stands(monkeypatch):
    stand_in(monkeypatch, "cs336_alignment.real_data", train_on_file=ours(ValueError("bad record")))
    for line in (["--debug", "train", "sft", "--data", "p"], ["train", "sft", "--data", "p", "--debug"]):
        with pytest.raises(ValueError, match="bad record"):
            cli.main(line)


def test_a_bug_is_not_dressed_up_as_a_user_error(monkeypatch):
    for error in (ValueError("shapes differ"), KeyError("loss"), RuntimeError("boom")):
        stand_in(monkeypatch, "cs336_alignment.real_data", train_on_file=fails_elsewhere(error))
        with pytest.raises(type(error)):
            cli.main(["train", "sft", "--data", "p"])


def test_ctrl_c_is_130_without_a_traceback(monkeypatch, capfd):
    stand_in(monkeypatch, "cs336_alignment.real_data", train_on_file=fails_elsewhere(KeyboardInterrupt()))
    assert cli.main(["train", "sft", "--data", "p"]) == 130
    assert "stopped" in capfd.readouterr().err


# test and lab


def test_pytest_gets_two_workers_at_most_and_the_words_that_follow(monkeypatch):
    seen = {}

    def call(command, cwd, env):
        seen.update(command=command, cwd=cwd, env=env)
        return 5

    monkeypatch.setattr(cli.subprocess, "call", call)
    monkeypatch.setattr(cli.os, "cpu_count", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert cli.main(["test", "--full", "-k", "dpo", "--maxfail=1"]) == 5
    command = seen["command"]
    assert command[1:3] == ["-m", "pytest"] and "--full" in command
    assert command[command.index("-n") + 1] == "2"
    assert command[-3:] == ["-k", "dpo", "--maxfail=1"]
    assert seen["cwd"] == ROOT and seen["env"]["OMP_NUM_THREADS"] == "1"


def test_the_number_of_workers_can_be_chosen():
    assert "-n" not in cli.pytest_command(["-n4"], full=False, cores=2)
    assert cli.pytest_command([], full=False, cores=1)[-2:] == ["-n", "1"]
    assert "--full" not in cli.pytest_command([], full=False, cores=2)


def test_lab_opens_the_first_lecture_or_says_what_is_missing(tmp_path):
    command, message = cli.lab_command(tmp_path, ["--no-browser"], as_root=False)
    assert "no lectures" in message and command[-1] == "--no-browser" and "--allow-root" not in command
    (tmp_path / "lectures").mkdir()
    (tmp_path / "lectures" / "01_x.ipynb").write_text("{}")
    assert "folder of lectures" in cli.lab_command(tmp_path, [], as_root=False)[1]
    (tmp_path / "lectures" / "00_start_here.ipynb").write_text("{}")
    command, message = cli.lab_command(tmp_path, [], as_root=True)
    assert "--LabApp.default_url=/lab/tree/lectures/00_start_here.ipynb" in command
    assert "--allow-root" in command and "root" in message


def test_help_of_every_verb_is_quick_and_imports_no_torch():
    code = (
        "import sys; from cs336_alignment.cli import main, app; from typer.main import get_command\n"
        "assert all(main([verb, '--help']) == 0 for verb in get_command(app).commands)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# What conftest.py promises


def test_a_test_cannot_reach_the_network():
    import socket

    from conftest import NetworkBlocked

    with pytest.raises(NetworkBlocked):
        socket.create_connection(("example.org", 80), timeout=1)
    with pytest.raises(NetworkBlocked):
        socket.socket().connect(("192.0.2.1", 80))
    server = socket.create_server(("127.0.0.1", 0))
    socket.create_connection(server.getsockname(), timeout=1).close()
    server.close()


def test_the_hub_is_offline():
    import huggingface_hub.constants

    assert huggingface_hub.constants.HF_HUB_OFFLINE
