"""course.py: the environment is made once, made anew when it must be, and never with the wrong settings.

None of these installs anything: the installer is replaced by a small script or by a function.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def course():
    """course.py as a fresh module: it is a script beside the package, not part of it."""
    spec = importlib.util.spec_from_file_location("course", ROOT / "course.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path):
    """A folder (with a space in its name) that looks like the course's checkout."""
    root = tmp_path / "my course"
    (root / "cs336_alignment").mkdir(parents=True)
    (root / "cs336_alignment" / "__init__.py").write_text("")
    (root / "pyproject.toml").write_text('dependencies = [\n    "torch",\n    "tqdm", # comment\n]\n')
    (root / "constraints.txt").write_text("torch==2.13.0\ntqdm==4.70.1\n")
    return root


def fake_venv(course, root):
    """The skeleton of a `.venv`: a `python` that exists."""
    python = Path(course.venv_python(root))
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)


def stamp_it(course, root, **changes):
    stamp = {
        "hash": course.wanted_hash(root),
        "python": "{}.{}".format(*sys.version_info[:2]),
        "folder": str(root),
        "installer": "uv",
        "when": "today",
    }
    Path(course.stamp_path(root)).write_text(json.dumps({**stamp, **changes}))


# What is installed


def test_the_hash_changes_with_every_file_that_decides_what_is_installed(course, checkout):
    before = course.wanted_hash(checkout)
    assert course.wanted_hash(checkout) == before
    (checkout / "constraints.txt").write_text("torch==2.13.1\n")
    changed = course.wanted_hash(checkout)
    (checkout / "pyproject.toml").write_text("")
    assert len({before, changed, course.wanted_hash(checkout)}) == 3


def test_the_hash_changes_with_the_python_and_the_folder_but_not_with_line_ends(course, checkout):
    before = course.wanted_hash(checkout, (3, 11, 7))
    assert course.wanted_hash(checkout, (3, 11, 9)) == before
    assert course.wanted_hash(checkout, (3, 12, 0)) != before
    (checkout / "constraints.txt").write_bytes((checkout / "constraints.txt").read_bytes().replace(b"\n", b"\r\n"))
    assert course.wanted_hash(checkout, (3, 11, 7)) == before
    moved = checkout.rename(checkout.parent / "elsewhere")
    assert course.wanted_hash(moved, (3, 11, 7)) != before


def test_each_state_of_the_environment_is_told_from_the_others(course, checkout):
    assert course.venv_state(checkout) == "missing"
    (checkout / ".venv").mkdir()
    assert course.venv_state(checkout) == "broken"
    (checkout / ".venv").rmdir()
    fake_venv(course, checkout)
    assert course.venv_state(checkout) == "unstamped"
    stamp_it(course, checkout)
    assert course.venv_state(checkout) == "ready"
    stamp_it(course, checkout, hash="another")
    assert course.venv_state(checkout) == "out of date"
    stamp_it(course, checkout, python="3.10")
    assert course.venv_state(checkout) == "other python"
    stamp_it(course, checkout, folder="/somewhere/else")
    assert course.venv_state(checkout) == "other python"
    Path(course.stamp_path(checkout)).write_text('{"hash": "cut o')
    assert course.venv_state(checkout) == "unstamped"
    stamp_it(course, checkout)
    Path(course.marker_path(checkout)).write_text("")
    assert course.venv_state(checkout) == "interrupted"


# Installing, with the installer replaced


def replace_installer(course, monkeypatch, script, installers=("uv",)):
    """`script` (Python source) runs in place of the installer; venvs are skeletons. Returns the calls."""
    calls = []

    def command(installer, root, extra=None):
        calls.append(f"{installer} {extra}" if extra else installer)
        return [sys.executable, "-c", script, calls[-1]]

    def make(root, env, log_path, lock=None):
        calls.append("venv")
        fake_venv(course, root)

    monkeypatch.setattr(course, "install_command", command)
    monkeypatch.setattr(course, "make_venv", make)
    monkeypatch.setattr(course, "choose_installers", lambda environ: list(installers))
    monkeypatch.setattr(course, "pip_settings", lambda: {})
    return calls


def test_an_environment_is_made_once_and_then_left_alone(course, checkout, monkeypatch):
    calls = replace_installer(course, monkeypatch, "print('done')")
    course.ensure_environment(checkout)
    course.ensure_environment(checkout)
    assert calls == ["venv", "uv"]
    assert course.venv_state(checkout) == "ready"
    assert not os.path.exists(course.marker_path(checkout))


def test_changed_pins_are_installed_into_the_same_environment(course, checkout, monkeypatch):
    calls = replace_installer(course, monkeypatch, "")
    course.ensure_environment(checkout)
    (checkout / "constraints.txt").write_text("torch==2.14.0\n")
    course.ensure_environment(checkout)
    assert calls == ["venv", "uv", "uv"]


def test_a_killed_installation_is_made_anew(course, checkout, monkeypatch):
    calls = replace_installer(course, monkeypatch, "")
    fake_venv(course, checkout)
    Path(course.marker_path(checkout)).write_text("")
    (checkout / ".venv" / "half a package").write_text("")
    course.ensure_environment(checkout)
    assert calls == ["venv", "uv"]
    assert not (checkout / ".venv" / "half a package").exists()
    assert course.venv_state(checkout) == "ready"


def test_a_failed_installation_leaves_no_stamp_and_says_what_to_try(course, checkout, monkeypatch):
    script = "print('line one'); print('ERROR: [Errno 28] No space left on device'); raise SystemExit(3)"
    replace_installer(course, monkeypatch, script)
    with pytest.raises(course.CourseError) as error:
        course.ensure_environment(checkout)
    message = str(error.value)
    assert "No space left" in message and "free about" in message and "install.log" in message
    assert "line one" in (checkout / ".course" / "install.log").read_text()
    assert course.venv_state(checkout) == "interrupted"


def test_pip_is_tried_where_uv_fails_and_the_network_is_named_if_either_did(course, checkout, monkeypatch):
    script = "import sys; sys.exit('dns error' if sys.argv[1] == 'uv' else 0)"
    calls = replace_installer(course, monkeypatch, script, ("uv", "pip"))
    course.ensure_environment(checkout)
    assert calls == ["venv", "uv", "pip"]
    assert course.read_stamp(checkout)["installer"] == "pip"

    script = "import sys; sys.exit('dns error' if sys.argv[1] == 'uv' else 'No matching distribution')"
    replace_installer(course, monkeypatch, script, ("uv", "pip"))
    (checkout / "constraints.txt").write_text("")
    with pytest.raises(course.CourseError, match="looks like the network"):
        course.ensure_environment(checkout)


def test_uv_and_pip_get_the_same_pins_and_a_path_with_a_space_stays_one_argument(course, checkout, monkeypatch):
    monkeypatch.setattr(course, "find_uv", lambda: ["uv"])
    monkeypatch.setattr(course, "has_pip", lambda root: True)
    book = course.install_command("pip", checkout, "book")
    assert book[-2:] == ["-e", f"{checkout}[book]"]
    uv, pip = course.install_command("uv", checkout), course.install_command("pip", checkout)
    assert uv[:3] == ["uv", "pip", "install"] and uv[uv.index("--python") + 1] == course.venv_python(checkout)
    assert pip[:4] == [course.venv_python(checkout), "-m", "pip", "install"]
    assert uv[-4:] == pip[-4:] == ["-c", os.path.join(checkout, "constraints.txt"), "-e", checkout]


def test_what_only_some_verbs_need_is_installed_when_one_of_them_is_asked_for(course, checkout, monkeypatch):
    calls = replace_installer(course, monkeypatch, "")
    course.ensure_environment(checkout)
    assert calls == ["venv", "uv"]
    course.ensure_environment(checkout, extra="book")
    course.ensure_environment(checkout, extra="book")
    course.ensure_environment(checkout)
    assert calls == ["venv", "uv", "uv book"] and course.venv_state(checkout) == "ready"
    (checkout / "constraints.txt").write_text("torch==2.14.0\n")
    course.ensure_environment(checkout, extra="book")
    assert calls == ["venv", "uv", "uv book", "uv", "uv book"]


def test_where_the_extra_packages_cannot_be_had_the_environment_stays_good(course, checkout, monkeypatch):
    replace_installer(course, monkeypatch, "import sys; sys.exit('dns error' if 'book' in sys.argv[1] else 0)")
    course.ensure_environment(checkout)
    with pytest.raises(course.CourseError, match="looks like the network"):
        course.ensure_environment(checkout, extra="book")
    assert course.venv_state(checkout) == "ready" and not course.has_extra(checkout, "book")


def test_every_extra_is_named_in_pyproject(course):
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(course.EXTRAS) <= set(course.VERBS)
    assert set(course.EXTRAS.values()) <= set(project["optional-dependencies"])


def test_a_python_without_ensurepip_installs_with_its_own_pip(course, checkout, monkeypatch):
    monkeypatch.setattr(course, "has_pip", lambda root: False)
    command = course.install_command("pip", checkout)
    assert command[:5] == [course.base_python(), "-m", "pip", "--python", course.venv_python(checkout)]


def test_a_uv_that_does_not_answer_is_passed_over(course, tmp_path, monkeypatch):
    uv = tmp_path / ("uv.bat" if os.name == "nt" else "uv")
    uv.write_text("#!/bin/sh\nexit 127\n")
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(course.sys, "executable", str(uv))  # `python -m uv` does not answer either
    assert course.find_uv() is None
    assert course.choose_installers({}) == ["pip"]
    with pytest.raises(course.CourseError, match="neither"):
        course.choose_installers({"COURSE_INSTALLER": "uv"})
    uv.write_text("#!/bin/sh\necho uv 1.0\n")
    assert course.find_uv() == ["uv"]
    assert course.choose_installers({}) == ["uv", "pip"]
    assert course.choose_installers({"COURSE_INSTALLER": "pip"}) == ["pip"]
    with pytest.raises(course.CourseError, match="can be uv or pip"):
        course.choose_installers({"COURSE_INSTALLER": "conda"})


@pytest.mark.skipif(os.name != "posix", reason="file locks of POSIX")
def test_a_second_terminal_waits_for_the_first(course, checkout, capsys):
    script = (
        "import importlib.util, sys, time\n"
        "spec = importlib.util.spec_from_file_location('course', sys.argv[1])\n"
        "course = importlib.util.module_from_spec(spec); spec.loader.exec_module(course)\n"
        "with course.one_at_a_time(sys.argv[2]):\n"
        "    print('mine', flush=True); time.sleep(1.5)\n"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", script, str(ROOT / "course.py"), str(checkout)], stdout=subprocess.PIPE
    )
    assert first.stdout.readline().strip() == b"mine"
    with course.one_at_a_time(checkout):
        assert first.wait(10) == 0
    assert "waiting for it" in capsys.readouterr().out
    first.stdout.close()


# Settings


def test_pips_find_links_reach_uv_with_commas(course):
    listing = "global.find-links='/a/wheels\\n/b'\n:env:.find-links='/c'\nodd line\n"
    listing += "global.index-url='file:///mirror'\n"
    settings = course.pip_settings(listing)
    assert settings == {"find-links": ["/a/wheels", "/b", "/c"], "index-url": ["file:///mirror"]}
    assert course.uv_settings({"PIP_FIND_LINKS": "/c /d"}, settings) == {
        "UV_FIND_LINKS": "/c,/d,/a/wheels,/b",
        "UV_DEFAULT_INDEX": "file:///mirror",
    }
    assert course.uv_settings({}, {}) == {}


def test_what_is_already_said_to_uv_is_not_overruled(course):
    environ = {"PIP_FIND_LINKS": "/c", "UV_FIND_LINKS": "/mine", "PIP_INDEX_URL": "x", "UV_INDEX_URL": "y"}
    assert course.uv_settings(environ, {}) == {}


def test_the_environments_scripts_come_first_and_foreign_pythons_stay_out(course, checkout, tmp_path):
    environ = {
        "PATH": "/usr/bin",
        "HOME": str(tmp_path),
        "PYTHONPATH": "/x",
        "PIP_TARGET": "/y",
        "OTHER": "kept",
    }
    child = course.child_environment(environ, checkout)
    assert child["PATH"].split(os.pathsep) == [course.scripts_dir(checkout), "/usr/bin"]
    assert child["VIRTUAL_ENV"] == course.venv_dir(checkout) and child["OTHER"] == "kept"
    assert "PYTHONPATH" not in child and "PIP_TARGET" not in child


def test_caches_move_into_the_checkout_only_where_home_cannot_be_written(course, checkout, tmp_path):
    name = "USERPROFILE" if os.name == "nt" else "HOME"
    assert course.cache_settings({name: str(tmp_path)}, checkout) == {}
    for environ in ({}, {name: str(tmp_path / "missing")}):
        places = course.cache_settings(environ, checkout)
        assert {"UV_CACHE_DIR", "HF_HOME", "MPLCONFIGDIR", "JUPYTER_RUNTIME_DIR"} <= set(places)
        assert all(place.startswith(str(checkout / ".course")) for place in places.values())
    assert "HF_HOME" not in course.cache_settings({"HF_HOME": "/mine"}, checkout)


# Verbs


def run_course(*arguments, cwd=None, env=None):
    return subprocess.run(
        [sys.executable, str(ROOT / "course.py"), *arguments],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_without_a_verb_every_verb_is_listed_with_one_line(course):
    done = run_course(cwd=os.sep)
    assert done.returncode == 0
    for verb, text in course.VERBS.items():
        assert re.search(rf"^  {verb} +{re.escape(text)}$", done.stdout, re.M)


def test_the_listed_verbs_are_those_of_the_package_and_those_handled_here(course):
    from typer.main import get_command

    from cs336_alignment.cli import app

    assert set(course.VERBS) == set(get_command(app).commands) | set(course.HANDLED_HERE)


def test_an_unknown_verb_installs_nothing_and_names_the_near_one():
    done = run_course("dmeo")
    assert done.returncode == 2
    assert done.stdout == "course: there is no verb `dmeo`; did you mean `demo`?\n"


def test_an_old_python_is_told_so_before_anything_happens(course, monkeypatch):
    assert course.python_problem((3, 11, 0)) is None and course.python_problem((3, 13, 1)) is None
    monkeypatch.setattr(course.shutil, "which", lambda name: name == "python3.12")
    monkeypatch.setattr(course, "answers", lambda command: True)
    assert "this is Python 3.9.18; the course needs Python 3.11 or newer" in course.python_problem((3, 9, 18))
    assert "run `python3.12 course.py" in course.python_problem((3, 9, 18))


def test_an_old_python_can_read_course_py():
    import ast

    ast.parse((ROOT / "course.py").read_text(encoding="utf-8"), feature_version=(3, 7))


@pytest.mark.skipif(os.name != "posix", reason="exec is what POSIX systems do")
def test_a_verb_becomes_the_process_with_its_arguments_untouched(course, checkout, monkeypatch):
    seen = {}
    monkeypatch.setattr(course.os, "execve", lambda *call: seen.update(call=call))
    monkeypatch.setattr(course, "run_and_wait", lambda command, env: 0)
    course.hand_over(["train", "sft", "--data", "a file.json"], {"PATH": "/usr/bin"}, checkout)
    program, command, env = seen["call"]
    assert program == course.venv_python(checkout)
    assert command == [program, "-m", "cs336_alignment", "train", "sft", "--data", "a file.json"]
    assert env["PATH"].startswith(course.scripts_dir(checkout))


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_the_exit_code_is_passed_through(course, code):
    assert course.run_and_wait([sys.executable, "-c", f"raise SystemExit({code})"], dict(os.environ)) == code


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_during_an_installation_ends_the_installer_and_leaves_it_to_be_repeated(checkout):
    script = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('course', sys.argv[1])\n"
        "course = importlib.util.module_from_spec(spec); spec.loader.exec_module(course)\n"
        "root = sys.argv[2]\n"
        'code = \'import os, time; open("pid", "w").write(str(os.getpid())); time.sleep(60)\'\n'
        "course.ROOT = root\n"
        "course.install_command = lambda installer, root, extra: [sys.executable, '-c', code]\n"
        "course.make_venv = lambda *rest: None\n"
        "course.choose_installers = lambda environ: ['uv']\n"
        "course.main = lambda arguments: course.ensure_environment(root)\n"
        "sys.exit(course.run([]))\n"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", script, str(ROOT / "course.py"), str(checkout)],
        stdout=subprocess.PIPE,
        text=True,
        # A shell starts background jobs deaf to Ctrl-C, and children inherit that: here it must be heard.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    pid_file = checkout / "pid"
    for _ in range(200):
        if pid_file.exists() and pid_file.read_text():
            break
        time.sleep(0.05)
    installer = int(pid_file.read_text())
    started.send_signal(signal.SIGINT)
    out, _ = started.communicate(timeout=20)
    assert started.returncode == 130
    assert "run the same command again" in out
    with pytest.raises(ProcessLookupError):
        os.kill(installer, 0)
    assert (checkout / ".venv" / "course-installing").exists()


# doctor


def test_doctor_finds_nothing_wrong_before_the_first_installation(course, checkout, tmp_path, capsys):
    assert course.doctor(checkout, {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}) == 0
    out = capsys.readouterr().out
    assert "there is no .venv yet; `python3 course.py setup` does it" in out and "nothing is wrong" in out


def test_doctor_names_everything_that_is_wrong_with_a_broken_environment(course, checkout, capsys, monkeypatch):
    fake_venv(course, checkout)
    stamp_it(course, checkout)
    packages = {"torch": "2.12.0+cpu", "Setuptools": "1"}

    def probe(python, code, env, timeout=120):
        return {"packages": packages} if code is course.PROBE else {"error": "ImportError: libtorch.so"}

    monkeypatch.setattr(course, "probe", probe)
    monkeypatch.setattr(course.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1e8}))
    assert course.doctor(checkout, dict(os.environ)) == 1
    out = capsys.readouterr().out
    assert "tqdm is missing" in out and "torch is 2.12.0+cpu, pinned 2.13.0" in out
    assert "ImportError: libtorch.so" in out and "0.1 GB free" in out
    assert "3 thing(s) wrong: disk, packages, torch" in out
    assert out.count("WRONG") == out.count("-> ") == 3  # each with what to do about it


def test_doctor_reports_an_interrupted_installation_and_an_incomplete_checkout(course, checkout, capsys):
    fake_venv(course, checkout)
    Path(course.marker_path(checkout)).write_text("")
    assert course.doctor(checkout, dict(os.environ)) == 1
    assert "did not finish" in capsys.readouterr().out
    (checkout / "constraints.txt").unlink()
    assert course.doctor(checkout, dict(os.environ)) == 1
    assert "constraints.txt is missing" in capsys.readouterr().out


def test_a_local_build_of_the_pinned_version_is_no_difference(course):
    pins = course.pinned_versions("torch==2.13.0\nsoupsieve==2.10 ; python_full_version < '3.11.5'\nsoupsieve==4.1.1\n")
    assert pins["soupsieve"] == {"2.10", "4.1.1"}
    assert course.version_differences({"torch": "2.13.0+cpu", "Soupsieve": "2.10", "own": "7"}, pins) == []
    assert course.version_differences({"Soupsieve": "3.0"}, pins) == ["Soupsieve is 3.0, pinned 2.10 or 4.1.1"]


def test_every_dependency_is_pinned(course):
    names = course.required_names((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pins = course.pinned_versions((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert len(names) >= 10 and "torch" in names
    assert [name for name in names if course.normal(name) not in pins] == []
    backend = re.search(r'requires = \["setuptools==([\d.]+)"\]', (ROOT / "pyproject.toml").read_text())
    assert pins["setuptools"] == {backend.group(1)}


# clean


def made_things(root):
    for name in (
        ".venv/lib",
        ".course",
        "runs/demo",
        "cs336_alignment/__pycache__",
        "x.egg-info",
        "lectures",
    ):
        (root / name).mkdir(parents=True)
    for name in (
        ".venv/lib/package.py",
        "runs/demo/model.pt",
        "cs336_alignment/__pycache__/a.pyc",
        "lectures/a.ipynb",
    ):
        (root / name).write_text("x")
    (root / "runs" / "demo" / "mine.ipynb").write_text("{}")


def test_clean_removes_what_was_made_and_nothing_else(course, checkout, capsys):
    made_things(checkout)
    before = {"pyproject.toml", "constraints.txt", "cs336_alignment", "lectures", "runs"}
    assert course.clean(["--yes"], checkout) == 0
    assert {path.name for path in checkout.iterdir()} == before
    assert (checkout / "lectures" / "a.ipynb").exists()
    assert [path.name for path in (checkout / "runs").rglob("*.*")] == ["mine.ipynb"]
    assert not (checkout / "cs336_alignment" / "__pycache__").exists()
    out = capsys.readouterr().out
    assert ".venv" in out and "results of your runs" in out and "kept the notebook" in out


def test_clean_asks_and_takes_only_yes(course, checkout):
    made_things(checkout)
    questions = []

    def answer(text):
        return lambda question: questions.append(question) or text

    for no in ("", "n", "yess"):
        assert course.clean([], checkout, ask=answer(no)) == 1
        assert (checkout / ".venv").exists()
    assert course.clean([], checkout, ask=answer("y")) == 0
    assert not (checkout / ".venv").exists() and len(questions) == 4
    with pytest.raises(course.CourseError, match="knows only --yes"):
        course.clean(["--all"], checkout)


def test_clean_leaves_tracked_files_and_what_links_point_to(course, checkout, tmp_path):
    made_things(checkout)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (checkout / "build").symlink_to(outside)
    for command in (["init", "-q"], ["add", "-f", "runs/demo/model.pt"]):
        subprocess.run(["git", "-C", str(checkout), *command], check=True)
    assert course.clean(["--yes"], checkout) == 0
    assert (checkout / "runs" / "demo" / "model.pt").exists()
    assert not (checkout / "build").exists() and (outside / "precious").exists()


def test_clean_without_anyone_to_ask_removes_nothing(course, checkout):
    made_things(checkout)

    def nobody(question):
        raise EOFError

    with pytest.raises(course.CourseError, match="clean --yes"):
        course.clean([], checkout, ask=nobody)
    assert (checkout / ".venv").exists()


# ---------------------------------------------------------------------------------- a student's notebooks


@pytest.fixture
def unpacked(course, tmp_path):
    """A folder as a student's zip leaves it; `release(text)` unpacks another zip over it."""

    def release(text):
        folder = tmp_path / "assignments" / ".release" / "a4_dpo"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a4_dpo.ipynb").write_text(text)
        course.place_assignments(str(tmp_path))

    release.folder = tmp_path / "assignments" / "a4_dpo"
    release.mine = release.folder / "a4_dpo.ipynb"
    return release


def test_the_first_verb_puts_the_assignments_where_students_work(unpacked, capsys):
    unpacked("first")
    assert unpacked.mine.read_text() == "first" and capsys.readouterr().out == ""


def test_a_newer_zip_loses_no_edited_notebook(unpacked, capsys):
    unpacked("first")
    unpacked.mine.write_text("first, with my answers")
    unpacked("first")  # the same zip again
    assert sorted(path.name for path in unpacked.folder.iterdir()) == ["a4_dpo.ipynb"]
    unpacked("second")
    unpacked("second")
    assert unpacked.mine.read_text() == "first, with my answers"
    (new,) = unpacked.folder.glob("a4_dpo-new-*.ipynb")
    assert new.read_text() == "second"
    said = capsys.readouterr().out
    assert said.count("a4_dpo has changed. Your notebook stays as it is") == 1 and new.name in said


def test_a_notebook_that_nobody_touched_follows_the_newer_zip(unpacked):
    unpacked("first")
    unpacked("second")
    assert unpacked.mine.read_text() == "second" and len(list(unpacked.folder.iterdir())) == 1


def test_in_a_checkout_without_releases_nothing_is_placed(course, tmp_path):
    course.place_assignments(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
