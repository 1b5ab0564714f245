#!/usr/bin/env python3
"""The one script of the course: `python3 course.py VERB ...`, from any folder, with nothing but Python.

What it does: makes the environment `.venv` beside this file, installs the pinned packages of constraints.txt
in it (with uv where there is one, with pip otherwise), remembers by a hash that this was done, and hands the
verb to `python -m cs336_alignment VERB ...` in that environment. `doctor`, `clean` and `setup` are handled
here, because they must work where that environment is missing or broken.

What it is not: it knows nothing of the course itself. Standard library only, written so that an old Python
can still read it and say clearly that it is too old.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import difflib
import hashlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

ROOT = os.path.dirname(os.path.abspath(__file__))
MIN_PYTHON = (3, 11)
NEEDED_GB = 2.5  # free disk before an installation with CPU torch: 1.4 GB installed, the rest for the download cache
NEEDED_GB_TO_RUN = 0.3  # once installed
NEEDED_MEMORY_GB = 2.0

VERBS = {
    "demo": "the whole story in one go: base, SFT, reward model, PPO, DPO; ends with an HTML report",
    "test": "run the tests (--full: the slow ones too; other arguments go to pytest)",
    "lab": "open JupyterLab",
    "check": "run the visible checks on your notebook: check a4_dpo",
    "collect": "for instructors: put submissions from a learning system's export in place: collect a4_dpo EXPORT.zip",
    "grade": "for instructors: grade the submissions of an assignment: grade a4_dpo",
    "report": "for instructors: make grades, feedback pages and the class report anew: report a4_dpo",
    "release": "for instructors: make the students' notebooks and their zip from solutions/",
    "lectures": "run the lectures' notebooks and keep their outputs (--stale: only those that need it; --fast)",
    "book": "make the lectures, glossary, bibliography and reference into pages that open in a browser, offline",
    "bench": "the package side by side with TRL: the same numbers, then time and memory (an hour)",
    "train": "train sft, reward or dpo on a file of your own: train sft --data FILE",
    "world": "look at the embedded world (world show) or retrain its base model (world train)",
    "setup": "make the environment and do nothing else",
    "doctor": "say what is wrong with this computer or environment, and what to do",
    "clean": "remove what course.py made: .venv, runs/, caches (asks first; --yes)",
}
HANDLED_HERE = ("setup", "doctor", "clean")
EXTRAS = {"book": "book"}  # verbs that need more packages than the rest: optional-dependencies of pyproject.toml

# Variables that would make the environment's Python, or pip in it, look or install somewhere else.
FOREIGN_VARIABLES = (
    "PYTHONHOME",
    "PYTHONPATH",
    "PYTHONSAFEPATH",
    "PYTHONUSERBASE",
    "__PYVENV_LAUNCHER__",
    "PIP_TARGET",
    "PIP_PREFIX",
    "PIP_ROOT",
    "PIP_REQUIREMENT",
    "CONDA_PREFIX",  # uv would otherwise take an active conda environment for a target
    "UV_PYTHON",
    "UV_SYSTEM_PYTHON",
    "UV_PROJECT_ENVIRONMENT",
)


class CourseError(Exception):
    """Something the person at the keyboard can put right; shown without a traceback."""


# ----------------------------------------------------------------------------------------------------
# Where things are


def venv_dir(root: str = ROOT) -> str:
    return os.path.join(root, ".venv")


def scripts_dir(root: str = ROOT) -> str:
    return os.path.join(venv_dir(root), "Scripts" if os.name == "nt" else "bin")


def venv_python(root: str = ROOT) -> str:
    return os.path.join(scripts_dir(root), "python.exe" if os.name == "nt" else "python")


def stamp_path(root: str = ROOT) -> str:
    return os.path.join(venv_dir(root), "course-installed.json")


def marker_path(root: str = ROOT) -> str:
    """Exists while an installation runs: found at the start, the last one was killed."""
    return os.path.join(venv_dir(root), "course-installing")


def state_dir(root: str = ROOT) -> str:
    return os.path.join(root, ".course")


def say(text: str = "") -> None:
    print(text, flush=True)


# ----------------------------------------------------------------------------------------------------
# Which Python


def python_problem(version: tuple | None = None) -> str | None:
    """None, or a sentence saying that this Python is too old and which one on PATH would do."""
    version = tuple(version or sys.version_info[:3])
    if version[:2] >= MIN_PYTHON:
        return None
    text = "this is Python {}; the course needs Python {}.{} or newer.".format(".".join(map(str, version)), *MIN_PYTHON)
    for minor in range(20, MIN_PYTHON[1] - 1, -1):
        name = f"python3.{minor}"
        if shutil.which(name) and answers([name, "-c", "import venv"]):
            return text + f"\n{name} is on this computer: run `{name} {os.path.basename(__file__)} ...` instead."
    return text + "\nInstall one (python.org or your package manager) and run this again with it."


def answers(command: list[str], timeout: float = 30) -> bool:
    """Whether a command runs and exits with 0; never raises, never prints."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=timeout,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0


def base_python() -> str:
    """What `.venv` is made from: never the Python of a virtual environment, which we may delete."""
    return getattr(sys, "_base_executable", None) or sys.executable


# ----------------------------------------------------------------------------------------------------
# Settings that have to reach uv, pip and the course


def output_of(command: list[str], timeout: float = 60) -> str:
    """Standard output of a command, or "" where it fails."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else ""


def pip_settings(listing: str | None = None) -> dict[str, list[str]]:
    """What `pip config list` says (files and environment), as {"find-links": [...], "index-url": [...]}."""
    if listing is None:
        listing = output_of([sys.executable, "-m", "pip", "config", "list"])
    settings = {}
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        name = key.strip().rpartition(".")[2]
        try:
            words = str(ast.literal_eval(value.strip())).split()
        except (ValueError, SyntaxError):
            continue
        for word in words:
            if word not in settings.setdefault(name, []):
                settings[name].append(word)
    return settings


def uv_settings(environ: dict, settings: dict[str, list[str]]) -> dict[str, str]:
    """Environment variables that make uv look where pip looks: uv reads none of pip's settings by itself."""
    found = environ.get("PIP_FIND_LINKS", "").split()
    found += [place for place in settings.get("find-links", []) if place not in found]
    result = {}
    if found and not environ.get("UV_FIND_LINKS"):
        result["UV_FIND_LINKS"] = ",".join(found)  # pip separates with spaces, uv with commas
    index = environ.get("PIP_INDEX_URL") or (settings.get("index-url") or [""])[-1]
    if index and not (environ.get("UV_DEFAULT_INDEX") or environ.get("UV_INDEX_URL")):
        result["UV_DEFAULT_INDEX"] = index
    return result


def can_write(folder: str) -> bool:
    """Whether a file can be made in a folder, or the nearest parent that exists: tried, not guessed."""
    while not os.path.isdir(folder):
        parent = os.path.dirname(folder)
        if parent == folder or os.path.exists(folder):
            return False
        folder = parent
    probe = os.path.join(folder, f".course-write-test-{os.getpid()}")
    try:
        with open(probe, "w"):
            pass
        os.remove(probe)
    except OSError:
        return False
    return True


def cache_settings(environ: dict, root: str = ROOT) -> dict[str, str]:
    """Where HOME is missing or read-only: variables that put every cache under `.course` instead."""
    home = environ.get("USERPROFILE" if os.name == "nt" else "HOME") or ""
    cache = environ.get("XDG_CACHE_HOME") or (os.path.join(home, ".cache") if home else "")
    if home and cache and os.path.isdir(home) and can_write(home) and can_write(cache):
        return {}
    ours = os.path.join(state_dir(root), "home")
    places = {
        "XDG_CACHE_HOME": "cache",
        "UV_CACHE_DIR": "cache/uv",
        "PIP_CACHE_DIR": "cache/pip",
        "HF_HOME": "cache/huggingface",
        "MPLCONFIGDIR": "matplotlib",
        "IPYTHONDIR": "ipython",
        "JUPYTER_CONFIG_DIR": "jupyter/config",
        "JUPYTER_DATA_DIR": "jupyter/data",
        "JUPYTER_RUNTIME_DIR": "jupyter/runtime",
    }
    result = {name: os.path.join(ours, *place.split("/")) for name, place in places.items() if not environ.get(name)}
    if environ.get("XDG_CACHE_HOME"):  # it is set and cannot be written
        result["XDG_CACHE_HOME"] = os.path.join(ours, "cache")
    return result


def child_environment(environ: dict, root: str = ROOT) -> dict[str, str]:
    """For all that runs in `.venv`: its scripts come first on PATH (nbgrader calls a bare `alembic`)."""
    child = {name: value for name, value in environ.items() if name not in FOREIGN_VARIABLES}
    child["VIRTUAL_ENV"] = venv_dir(root)
    child["PATH"] = scripts_dir(root) + os.pathsep + environ.get("PATH", os.defpath)
    child["PIP_USER"] = "0"
    child["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    child["PYTHONUTF8"] = "1"  # the course's files are UTF-8, whatever the computer's language is
    child.update(cache_settings(environ, root))
    return child


# ----------------------------------------------------------------------------------------------------
# What is installed


def wanted_hash(root: str = ROOT, version: tuple | None = None) -> str:
    """Changes with pyproject.toml, constraints.txt, Python's minor version and the folder."""
    version = version or sys.version_info
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        with open(os.path.join(root, name), "rb") as file:
            digest.update(file.read().replace(b"\r\n", b"\n") + b"\0")
    digest.update(f"{version[0]}.{version[1]}|{sys.platform}|{os.path.abspath(root)}".encode())
    return digest.hexdigest()


def read_stamp(root: str = ROOT) -> dict:
    """The stamp of the last finished installation, or {}."""
    try:
        with open(stamp_path(root), encoding="utf-8") as file:
            stamp = json.load(file)
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def venv_state(root: str = ROOT) -> str:
    """One of "missing", "interrupted", "broken", "other python", "unstamped", "out of date", "ready"."""
    if not os.path.lexists(venv_dir(root)):
        return "missing"
    if os.path.exists(marker_path(root)):
        return "interrupted"
    if not os.path.exists(venv_python(root)):  # also where the Python it links to is gone
        return "broken"
    stamp = read_stamp(root)
    if not stamp:
        return "unstamped"
    if stamp.get("python") != "{}.{}".format(*sys.version_info[:2]) or stamp.get("folder") != os.path.abspath(root):
        return "other python"
    return "ready" if stamp.get("hash") == wanted_hash(root) else "out of date"


STATE_TEXT = {
    "missing": "there is no .venv yet",
    "interrupted": "the last installation did not finish; .venv is made anew",
    "broken": ".venv has no working Python (was that Python removed?); it is made anew",
    "other python": ".venv was made by another Python version or in another folder; it is made anew",
    "unstamped": ".venv was not made by course.py; the packages are installed into it",
    "out of date": "pyproject.toml or constraints.txt has changed; .venv is brought up to date",
}
MADE_ANEW = ("interrupted", "broken", "other python")


def find_uv() -> list[str] | None:
    """The command that runs uv, or None. A uv on PATH that does not answer (an empty shim) is passed over."""
    for command in (["uv"], [sys.executable, "-m", "uv"]):
        if shutil.which(command[0]) and answers(command + ["--version"]):
            return command
    return None


def choose_installers(environ: dict) -> list[str]:
    """["uv", "pip"], ["pip"] or what COURSE_INSTALLER asks for: tried in this order."""
    forced = environ.get("COURSE_INSTALLER", "").strip().lower()
    if forced not in ("", "uv", "pip"):
        raise CourseError(f"COURSE_INSTALLER is {forced!r}; it can be uv or pip.")
    if forced == "pip":
        return ["pip"]
    if find_uv():
        return ["uv"] if forced else ["uv", "pip"]
    if forced:
        raise CourseError("COURSE_INSTALLER=uv, but neither `uv` nor `python -m uv` runs here.")
    return ["pip"]


def install_command(installer: str, root: str = ROOT, extra: str | None = None) -> list[str]:
    """The command that installs the course and everything it needs into `.venv`, every version pinned."""
    what = ["-c", os.path.join(root, "constraints.txt"), "-e", f"{root}[{extra}]" if extra else root]
    if installer == "uv":
        return list(find_uv() or ["uv"]) + ["pip", "install", "--python", venv_python(root)] + what
    if has_pip(root):
        return [venv_python(root), "-m", "pip", "install", "--progress-bar=off"] + what
    # Debian's Python without python3-venv has no ensurepip: its own pip can install into another environment.
    return [
        base_python(),
        "-m",
        "pip",
        "--python",
        venv_python(root),
        "install",
        "--progress-bar=off",
    ] + what


def has_pip(root: str = ROOT) -> bool:
    return answers([venv_python(root), "-m", "pip", "--version"])


# ----------------------------------------------------------------------------------------------------
# Installing


@contextlib.contextmanager
def one_at_a_time(root: str = ROOT):
    """Two terminals may ask for the environment at once: the second waits. The lock goes with the process."""
    try:
        os.makedirs(state_dir(root), exist_ok=True)
        file = open(os.path.join(state_dir(root), "lock"), "a+")
    except OSError as error:
        raise CourseError(
            f"cannot write in {root} ({error.strerror}).\nThe course keeps its environment and results "
            "beside course.py: copy the folder to a place of your own, or change its permissions."
        ) from None
    with file:
        waiting = False
        while True:
            try:
                if os.name == "nt":
                    import msvcrt

                    file.seek(0)
                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                else:
                    import fcntl

                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if not waiting:
                    say("course: another course.py is setting up the environment; waiting for it")
                    waiting = True
                time.sleep(0.5)
            except OSError:
                break  # a file system without locks (some network drives): go on without
        yield file


NOT_PROGRESS = (
    "WARNING",
    "Attempting uninstall",
    "Found existing",
    "Uninstalling",
    "Successfully uninstalled",
)


def run_shown(command: list[str], env: dict, log_path: str, step: str, lock=None) -> tuple[int, list[str]]:
    """Run a command; all output to a log, one moving line (or one each 20 s) to the screen. (code, tail)"""
    tail = collections.deque(maxlen=25)
    lines = queue.Queue()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # It holds the lock too: where course.py alone is killed, the next one waits for the installer's end.
        pass_fds=(lock.fileno(),) if lock and os.name == "posix" else (),
    )

    def read():
        for raw in process.stdout:
            lines.put(raw.decode("utf-8", "replace").rstrip())
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    moving = sys.stdout.isatty()
    start = shown = time.monotonic()
    last = ""
    try:
        with open(log_path, "a", encoding="utf-8") as log:
            log.write("\n$ {}\n".format(" ".join(command)))
            while True:
                try:
                    line = lines.get(timeout=0.5)
                    if line is None:
                        break
                    log.write(line + "\n")
                    if line.strip():
                        tail.append(line.strip().split("\r")[-1])
                        if not tail[-1].startswith(NOT_PROGRESS):
                            last = tail[-1]
                except queue.Empty:
                    pass
                now = time.monotonic()
                if moving and now - shown > 0.1 or now - shown > 20:
                    shown = now
                    text = f"  {now - start:3.0f} s  {last}"
                    if moving:
                        width = max(20, shutil.get_terminal_size().columns - 1)
                        sys.stdout.write("\r" + text[:width].ljust(width))
                        sys.stdout.flush()
                    else:
                        say(text[:150])
        code = process.wait()
    except BaseException:
        with contextlib.suppress(OSError):
            process.terminate()
        process.wait()
        raise
    finally:
        if moving:
            sys.stdout.write("\r" + " " * (max(20, shutil.get_terminal_size().columns - 1)) + "\r")
    if code == 0:
        say(f"  {step} in {time.monotonic() - start:.0f} s")
    return code, list(tail)


def make_venv(root: str, env: dict, log_path: str, lock=None) -> None:
    """Make `.venv` with the standard library; without pip in it where this Python has no ensurepip."""
    for extra in ([], ["--without-pip"]):
        command = [base_python(), "-m", "venv"] + extra + [venv_dir(root)]
        code, tail = run_shown(command, env, log_path, "made .venv", lock)
        if code == 0:
            return
    raise CourseError(f"`python -m venv` failed:\n{indented(tail)}\nOn Debian and Ubuntu: apt install python3-venv.")


def indented(lines: list[str]) -> str:
    return "\n".join("    " + line for line in lines)


def write_file(path: str, text: str) -> None:
    """Whole or not at all: written beside the target and moved into place."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".tmp", path)


def ensure_environment(
    root: str = ROOT, environ: dict | None = None, quiet: bool = False, extra: str | None = None
) -> None:
    """Make or repair `.venv` unless its stamp says that it is what constraints.txt and pyproject.toml ask."""
    environ = os.environ if environ is None else environ
    if venv_state(root) == "ready" and has_extra(root, extra):
        if not quiet:
            say("course: .venv is ready (installed with {})".format(read_stamp(root).get("installer")))
        return
    with one_at_a_time(root) as lock:
        state = venv_state(root)
        if state != "ready":  # another terminal may have done it while we waited
            install(root, environ, state, lock)
        if not has_extra(root, extra):
            install_extra(root, environ, extra, lock)


def has_extra(root: str, extra: str | None) -> bool:
    return extra is None or extra in read_stamp(root).get("extras", [])


def install(root: str, environ: dict, state: str, lock=None) -> None:
    installers = choose_installers(environ)
    say(f"course: {STATE_TEXT[state]}")
    if os.path.islink(venv_dir(root)) and state in MADE_ANEW:
        raise CourseError(f".venv is a link to {os.readlink(venv_dir(root))}; remove it, then run this again.")
    free = shutil.disk_usage(root).free / 1e9
    if free < NEEDED_GB:
        say(f"course: only {free:.1f} GB free here; the installation needs about {NEEDED_GB} GB and may fail")
    env = child_environment(environ, root)
    env.update(uv_settings(environ, pip_settings()))
    log_path = start_log(root)
    if state in MADE_ANEW:
        remove_tree(venv_dir(root))
    os.makedirs(venv_dir(root), exist_ok=True)
    write_file(marker_path(root), "an installation started and has not finished\n")
    with contextlib.suppress(FileNotFoundError):
        os.remove(stamp_path(root))
    if not os.path.exists(venv_python(root)):
        say(f"course: making .venv with Python {sys.version.split()[0]}")
        make_venv(root, env, log_path, lock)
    installer = run_installers(root, env, installers, log_path, lock)
    stamp = {
        "hash": wanted_hash(root),
        "python": "{}.{}".format(*sys.version_info[:2]),
        "folder": os.path.abspath(root),
        "installer": installer,
        "extras": [],
        "when": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    os.remove(marker_path(root))
    write_stamp(root, stamp)  # last: a killed run is repeated


def install_extra(root: str, environ: dict, extra: str, lock=None) -> None:
    """Add the packages that only some verbs need. Where that fails, `.venv` is still good for the other verbs."""
    installers = choose_installers(environ)
    env = child_environment(environ, root)
    env.update(uv_settings(environ, pip_settings()))
    say(f"course: `{extra}` needs a few packages more")
    run_installers(root, env, installers, start_log(root), lock, extra)
    stamp = read_stamp(root)
    stamp["extras"] = sorted({*stamp.get("extras", []), extra})
    write_stamp(root, stamp)


def start_log(root: str) -> str:
    log_path = os.path.join(state_dir(root), "install.log")
    write_file(log_path, f"course.py, Python {sys.version.split()[0]}, {sys.platform}\n")
    return log_path


def write_stamp(root: str, stamp: dict) -> None:
    write_file(stamp_path(root), json.dumps(stamp, indent=1) + "\n")


def run_installers(
    root: str, env: dict, installers: list[str], log_path: str, lock=None, extra: str | None = None
) -> str:
    """Try one installer after the other; the name of the first that managed."""
    said = []
    for number, installer in enumerate(installers):
        say(
            "course: installing the packages of constraints.txt with {} ({})".format(
                installer, "seconds to a minute" if installer == "uv" else "a few minutes the first time"
            )
        )
        code, tail = run_shown(install_command(installer, root, extra), env, log_path, "installed", lock)
        if code == 0:
            return installer
        if number + 1 < len(installers):
            say(f"course: uv did not manage:\n{indented(tail[-4:])}\ncourse: trying pip instead")
        said += tail
    raise CourseError(install_failed(installers[-1], tail, "\n".join(said), log_path))


def install_failed(installer: str, tail: list[str], said: str, log_path: str) -> str:
    """The installer's last lines and what to try, by what was said (by uv too, where pip came after it)."""
    hints = []
    if re.search(r"No space left|Errno 28|disk quota", said, re.I):
        hints.append(f"The disk is full: free about {NEEDED_GB} GB, then run the same command again.")
    if re.search(
        r"connection|network|timed? ?out|unreachable|getaddrinfo|dns error|name resolution|certificate|proxy|"
        r"retrying|error sending request|failed to fetch",
        said,
        re.I,
    ):
        hints.append(
            "It looks like the network: the first installation needs one. Behind a proxy set HTTPS_PROXY; "
            "with a package mirror or a folder of wheels set PIP_INDEX_URL or PIP_FIND_LINKS; then try again."
        )
    elif re.search(r"No matching distribution|No solution found|requires-python|cp3\d+ .*not", said, re.I):
        hints.append(
            "A pinned package has no build for Python {}.{} here: try another Python (3.11 is the one that "
            "was tried).".format(*sys.version_info[:2])
        )
    if re.search(r"Permission denied|Errno 13|Access is denied", said, re.I):
        hints.append("A folder cannot be written: see `python3 course.py doctor`.")
    if not hints:
        hints.append("Run it again; if it fails at the same place, try the other installer: COURSE_INSTALLER=pip.")
    if not tail:
        tail = ["(it printed nothing)"]
    return "{} failed. Its last lines:\n{}\nWhat to try:\n{}\nAll of its output: {}".format(
        installer, indented(tail[-12:]), "\n".join("  - " + hint for hint in hints), log_path
    )


# ----------------------------------------------------------------------------------------------------
# Handing a verb on


def hand_over(arguments: list[str], environ: dict | None = None, root: str = ROOT) -> int:
    """Run `python -m cs336_alignment ...` in `.venv`; its exit code is ours, Ctrl-C is its own business."""
    env = child_environment(os.environ if environ is None else environ, root)
    command = [venv_python(root), "-m", "cs336_alignment"] + list(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        os.execve(command[0], command, env)  # the verb *becomes* this process: signals and exit code are exact
    return run_and_wait(command, env)


def run_and_wait(command: list[str], env: dict) -> int:
    """What Windows needs instead of exec: the child gets the Ctrl-C too, and we wait for it to finish."""
    process = subprocess.Popen(command, env=env)
    while True:
        try:
            code = process.wait()
            return code if code >= 0 else 128 - code
        except KeyboardInterrupt:
            continue


# ----------------------------------------------------------------------------------------------------
# doctor

PROBE = """
import importlib.metadata as m, json, sys
out = {"python": sys.version.split()[0]}
out["packages"] = {str(d.metadata["Name"]): d.version for d in m.distributions()}
print("@@" + json.dumps(out), flush=True)
"""
PROBE_TORCH = """
import json, time
start = time.perf_counter()
import torch
out = {"torch": torch.__version__, "seconds": time.perf_counter() - start, "threads": torch.get_num_threads()}
out["device"] = "cuda (" + torch.cuda.get_device_name(0) + ")" if torch.cuda.is_available() else "cpu"
x = torch.ones(8, 8, device=out["device"][:4].strip())
assert float((x @ x).sum()) == 512.0
import cs336_alignment
out["package"] = cs336_alignment.__file__
print("@@" + json.dumps(out), flush=True)
"""


def pinned_versions(text: str) -> dict[str, set[str]]:
    """{name: versions} of a constraints file; a name may stand in several lines with different markers."""
    pins = {}
    for line in text.splitlines():
        match = re.match(r"\s*([A-Za-z0-9._-]+)==([^\s;#]+)", line)
        if match:
            pins.setdefault(normal(match.group(1)), set()).add(match.group(2))
    return pins


def normal(name: str) -> str:
    """PEP 503: Jinja2, jinja2 and jinja_2 are one name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def version_differences(installed: dict[str, str], pins: dict[str, set[str]]) -> list[str]:
    """Lines "name: installed, pinned" where they differ; a local part (2.13.0+cpu) is the same version."""
    lines = []
    for name, version in sorted(installed.items()):
        wanted = pins.get(normal(name))
        if wanted and version.split("+")[0] not in wanted and version not in wanted:
            lines.append("{} is {}, pinned {}".format(name, version, " or ".join(sorted(wanted))))
    return lines


def required_names(pyproject_text: str) -> list[str]:
    """The names in pyproject.toml's `dependencies` (read by pattern: an old Python has no tomllib)."""
    block = re.search(r"^dependencies = \[(.*?)^\]", pyproject_text, re.S | re.M)
    return re.findall(r'^\s*"([A-Za-z0-9._-]+)', block.group(1), re.M) if block else []


def probe(python: str, code: str, env: dict, timeout: float = 120) -> dict:
    """What a probe printed after "@@", as a dict; or {"error": last line}."""
    try:
        done = subprocess.run(
            [python, "-c", code],
            env=env,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error)}
    for line in done.stdout.decode("utf-8", "replace").splitlines():
        if line.startswith("@@"):
            return json.loads(line[2:])
    errors = [line for line in done.stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    return {"error": errors[-1] if errors else f"exit code {done.returncode}"}


def memory_gb() -> float | None:
    """Physical memory in GB, or None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError):
        return None


def doctor(root: str = ROOT, environ: dict | None = None) -> int:
    """Look at everything that has to be right; print a line for each; 0 if nothing is wrong, else 1."""
    environ = os.environ if environ is None else environ
    wrong = []

    def good(what, text):
        say(f"  ok     {what:<12} {text}")

    def note(what, text):
        say(f"  note   {what:<12} {text}")

    def bad(what, text, remedy):
        say(f"  WRONG  {what:<12} {text}")
        say("         {:<12} -> {}".format("", remedy))
        wrong.append(what)

    say(f"course doctor: {root}")
    problem = python_problem()
    version = f"{sys.version.split()[0]} ({sys.executable})"
    if problem:
        bad("python", version, problem.replace("\n", " "))
    else:
        good("python", version)

    for name in ("pyproject.toml", "constraints.txt", os.path.join("cs336_alignment", "__init__.py")):
        if not os.path.exists(os.path.join(root, name)):
            bad("checkout", name + " is missing", "the checkout is not complete: clone or unpack it again")
    if can_write(root):
        good("folder", "can be written")
    else:
        bad(
            "folder",
            root + " cannot be written",
            "copy the course to a folder of your own, or change permissions",
        )

    state = venv_state(root) if "checkout" not in wrong else "missing"
    free = shutil.disk_usage(root).free / 1e9
    needed = NEEDED_GB_TO_RUN if state in ("ready", "unstamped", "out of date") else NEEDED_GB
    if free < needed:
        bad("disk", f"{free:.1f} GB free, {needed} needed", "free some space, or move the folder")
    else:
        good("disk", f"{free:.1f} GB free")
    memory = memory_gb()
    if memory is None:
        note("memory", f"this system does not tell; the demo needs about {NEEDED_MEMORY_GB:.0f} GB")
    elif memory < NEEDED_MEMORY_GB:
        bad("memory", f"{memory:.1f} GB", "the demo may be killed: use `demo --profile test`")
    else:
        good("memory", f"{memory:.1f} GB, {os.cpu_count()} cores")
    if cache_settings(environ, root):
        note("home", "the home folder cannot be written: caches go to {}".format(os.path.join(root, ".course")))
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        note("user", "running as root: it works, an ordinary user is safer")

    if os.path.isdir(os.path.join(root, "solutions")) and sys.platform == "linux" and not shutil.which("bwrap"):
        note("bubblewrap", "not installed; only `grade` needs it, to run what students wrote: apt install bubblewrap")

    try:
        installers = choose_installers(environ)
        uv = find_uv() if "uv" in installers else None
        good("installer", " ".join(uv) if uv else "pip (uv would be several times faster: `pip install uv`)")
    except CourseError as error:
        bad("installer", str(error), "unset COURSE_INSTALLER")

    if state == "ready":
        stamp = read_stamp(root)
        good(".venv", "ready (with {}, {})".format(stamp.get("installer"), stamp.get("when")))
    elif state in ("missing", "unstamped"):
        note(".venv", STATE_TEXT[state] + "; `python3 course.py setup` does it")
    else:
        bad(".venv", STATE_TEXT[state], "run `python3 course.py setup`, or any verb: it repairs this")

    if state in ("ready", "unstamped", "out of date"):
        env = child_environment(environ, root)
        found = probe(venv_python(root), PROBE, env)
        if "error" in found:
            bad(".venv", "its Python does not run: " + found["error"], "`python3 course.py clean`, then setup")
        else:
            with open(os.path.join(root, "constraints.txt"), encoding="utf-8") as file:
                pins = pinned_versions(file.read())
            with open(os.path.join(root, "pyproject.toml"), encoding="utf-8") as file:
                required = required_names(file.read())
            present = {normal(name) for name in found["packages"]}
            faults = [f"{name} is missing" for name in required if normal(name) not in present]
            faults += version_differences(found["packages"], pins)
            if faults:
                bad(
                    "packages",
                    "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else ""),
                    "`python3 course.py clean --yes` and `setup` make the environment anew",
                )
            else:
                good("packages", f"{len(present)} installed, none differs from constraints.txt")
            torch = probe(venv_python(root), PROBE_TORCH, env)
            if "error" in torch:
                bad("torch", torch["error"], "`python3 course.py clean --yes`, then `setup`")
            else:
                good("torch", "{torch} imports in {seconds:.1f} s, {threads} threads".format(**torch))
                good("device", torch["device"])
                where = os.path.dirname(os.path.dirname(os.path.realpath(torch["package"])))
                if where != os.path.realpath(root):
                    bad(
                        "package",
                        "cs336_alignment comes from " + where,
                        "`python3 course.py clean --yes`, then setup",
                    )
    say()
    say("{} thing(s) wrong: {}".format(len(wrong), ", ".join(wrong)) if wrong else "nothing is wrong")
    return 1 if wrong else 0


# ----------------------------------------------------------------------------------------------------
# clean


def tracked_by_git(path: str, root: str = ROOT) -> bool:
    """Whether git tracks anything at a path (False where there is no git or no repository)."""
    return bool(output_of(["git", "-C", root, "ls-files", "--", path]).strip())


def made_by_course(root: str = ROOT) -> list[str]:
    """What `clean` may remove, as paths relative to the checkout: never a notebook, never a tracked file."""
    found = [name for name in (".venv", ".course", "runs", "build", ".pytest_cache", ".ruff_cache")]
    found += [name for name in sorted(os.listdir(root)) if name.endswith(".egg-info")]
    for folder, names, _ in os.walk(root):
        names[:] = [name for name in names if name not in (".venv", ".git", ".course", "runs") and name[0] != "."]
        if "__pycache__" in names:
            names.remove("__pycache__")
            found.append(os.path.relpath(os.path.join(folder, "__pycache__"), root))
    found = [name for name in found if os.path.lexists(os.path.join(root, name))]
    return [name for name in found if not tracked_by_git(name, root)]


def size_of(path: str) -> int:
    """Bytes in a file or folder; links are not followed."""
    if os.path.islink(path) or not os.path.isdir(path):
        return os.lstat(path).st_size
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def remove_tree(path: str) -> None:
    """Remove a file, link or folder. Read-only files too; what a link points to stays."""
    if os.path.islink(path) or os.path.isfile(path):
        os.remove(path)
        return

    def again(function, name, _):
        with contextlib.suppress(OSError):
            os.chmod(os.path.dirname(name), 0o700)
            os.chmod(name, 0o700)
            function(name)

    handler = {"onexc": again} if sys.version_info >= (3, 12) else {"onerror": again}
    for _ in range(3):  # a process that is just ending may still write a file into it
        if not os.path.lexists(path):
            return
        shutil.rmtree(path, **handler)
    if os.path.lexists(path):
        raise CourseError(f"cannot remove {path}: is a program still using it?")


def remove_but_notebooks(path: str) -> list[str]:
    """Remove a folder, but leave every notebook in it where it is. Returns the notebooks left."""
    kept = []
    if not os.path.islink(path):
        for folder, _, names in os.walk(path):
            kept += [os.path.join(folder, name) for name in names if name.endswith(".ipynb")]
    if not kept:
        remove_tree(path)
        return []
    for folder, folders, names in os.walk(path, topdown=False):
        for name in names:
            if not name.endswith(".ipynb"):
                os.remove(os.path.join(folder, name))
        for name in folders:
            inner = os.path.join(folder, name)
            if os.path.islink(inner):
                os.remove(inner)
            else:
                with contextlib.suppress(OSError):  # not empty: a notebook lives there
                    os.rmdir(inner)
    return kept


def clean(arguments: list[str], root: str = ROOT, ask=input) -> int:
    """List what course.py made, ask, remove it."""
    unknown = [word for word in arguments if word not in ("--yes", "-y")]
    if unknown:
        raise CourseError("clean knows only --yes, not {}.".format(" ".join(unknown)))
    found = made_by_course(root)
    caches = [name for name in found if os.path.basename(name) == "__pycache__"]
    if not found:
        say("course: nothing to remove")
        return 0
    say(f"course: made by course.py in {root}:")
    for name in found:
        if name not in caches:
            remark = "  (results of your runs)" if name == "runs" else ""
            say(f"  {size_of(os.path.join(root, name)) / 1e6:8.1f} MB  {name}{remark}")
    if caches:
        total = sum(size_of(os.path.join(root, name)) for name in caches)
        say(f"  {total / 1e6:8.1f} MB  {len(caches)} __pycache__ folders")
    if not set(arguments) & {"--yes", "-y"}:
        try:
            answer = ask("remove all of this? [y/N] ")
        except EOFError:
            say()
            raise CourseError("nobody here to ask: run `python3 course.py clean --yes`.") from None
        if answer.strip().lower() not in ("y", "yes"):
            say("course: nothing removed")
            return 1
    kept = []
    for name in found:
        path = os.path.join(root, name)
        if name in (".venv", ".course"):  # the notebooks in there belong to installed packages
            remove_tree(path)
        else:
            kept += remove_but_notebooks(path)
    say("course: removed")
    for path in kept:
        say(f"course: kept the notebook {os.path.relpath(path, root)}")
    return 0


# ----------------------------------------------------------------------------------------------------
# A student's notebooks


def place_assignments(root: str = ROOT) -> None:
    """Puts a working copy of each released assignment beside `assignments/.release/`, where a student's zip has them.

    A notebook that was edited stays. If its assignment has changed since, the new version comes beside it and this
    says so; one that nobody has touched is simply replaced.
    """
    folder = os.path.join(root, "assignments", ".release")
    record_path = os.path.join(root, ".course", "assignments.json")
    record = {}
    with contextlib.suppress(OSError, ValueError), open(record_path, encoding="utf-8") as file:
        record = json.load(file)
    before = dict(record)
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        source = os.path.join(folder, name, name + ".ipynb")
        target = os.path.join(root, "assignments", name, name + ".ipynb")
        released = file_hash(source)
        if not os.path.exists(target) or file_hash(target) == record.get(name):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copyfile(source, target)
        elif record.get(name) != released and file_hash(target) != released:
            newer = os.path.join(root, "assignments", name, f"{name}-new-{released[:6]}.ipynb")
            if record.get(name) is not None or not os.path.exists(newer):
                shutil.copyfile(source, newer)
                say(
                    f"course: {name} has changed. Your notebook stays as it is; the new version is "
                    f"{os.path.relpath(newer, root)}"
                )
        record[name] = released
    if record != before:
        os.makedirs(os.path.dirname(record_path), exist_ok=True)
        write_file(record_path, json.dumps(record, indent=1))


def file_hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


# ----------------------------------------------------------------------------------------------------


def usage() -> str:
    lines = [
        "usage: python3 course.py VERB [options]      (options of a verb: python3 course.py VERB --help)",
        "",
    ]
    lines += [f"  {verb:<8} {text}" for verb, text in VERBS.items()]
    lines += [
        "",
        "The first verb that needs it makes the environment (.venv). COURSE_INSTALLER=uv|pip chooses how.",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        say(usage())
        return 0
    if arguments[0] == "--debug":  # wherever it stands, it is the verb's
        arguments.append(arguments.pop(0))
    verb = arguments[0]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        hint = f"did you mean `{near[0]}`?" if near else "these are the verbs:\n\n" + usage()
        raise CourseError(f"there is no verb `{verb}`; {hint}")
    if verb in HANDLED_HERE and set(arguments[1:]) & {"-h", "--help"}:
        say(f"python3 course.py {verb}: {VERBS[verb]}")
        return 0
    if verb == "doctor":
        return doctor()
    if verb == "clean":
        return clean(arguments[1:])
    problem = python_problem()
    if problem:
        raise CourseError(problem)
    place_assignments()
    ensure_environment(quiet=verb != "setup", extra=EXTRAS.get(verb))
    if verb == "setup":
        return 0
    return hand_over(arguments)


def run(arguments: list[str] | None = None) -> int:
    """main() with errors shown as a person wants to read them."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # a terminal that cannot print a letter is no reason to stop
    try:
        return main(arguments)
    except CourseError as error:
        say(f"course: {error}")
        return 2
    except KeyboardInterrupt:
        say("\ncourse: stopped; run the same command again to go on")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        say(f"course: {error}\n(`python3 course.py doctor` looks for the cause)")
        return 1


def stop(number, frame):
    raise KeyboardInterrupt


if __name__ == "__main__":
    if hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, stop)  # an installation that is told to end also ends its installer
    sys.exit(run())
