"""Where submissions run: a server behind bubblewrap, and what the grader says to it (`kernel.py` is the other side).

In the sandbox there is no network, no folder but an empty one of its own, nothing of the course but the edition that
holds no answers, and no process but the submission's. Memory, processes, disk, output and time are limited. Where there
is no bubblewrap, limits remain and nothing else does: the caller has to say that this is meant (`unsafe`).
"""

import base64
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from cs336_alignment.grading import kernel
from cs336_alignment.paths import PACKAGE, course_root

STUDENT = 60_000  # the first user number of the servers that root starts; no account has it
GB = 2**30
MOST_SAID = 20_000  # outputs and answers of a cell that are kept; more than fits into what is kept of their text
HEAVIEST = 1_000_000  # values in one message: what JSON becomes in memory is many times larger than its text
INTERRUPTED = "interrupted when their time was up"  # a cell's commands


def interrupted_output() -> dict:
    """What a cell's outputs end with when it was interrupted."""
    return {"output_type": "error", "ename": "TimeoutError", "evalue": INTERRUPTED, "traceback": [INTERRUPTED]}


class NoSandbox(ValueError):
    """There is no bubblewrap here that works. The message says what is missing and what to do."""


class Died(Exception):
    """The process that ran a submission is gone, or had to be killed. The message is a sentence for the report."""

    outputs: Sequence[dict] = ()  # what it had said by then
    answers: Sequence = ()


@dataclass(frozen=True)
class Limits:
    """What a submission may use."""

    cell_seconds: float = 60.0  # a cell is interrupted after this; graded work takes well below a second
    notebook_seconds: float = 300.0  # all cells together, with those that ran again after a death
    memory: int = 4 * GB  # bytes, of all its processes together, beside what the server has already
    processes: int = 64
    disk: int = GB // 4  # bytes, in each of /tmp and /dev/shm
    output: int = 30_000_000  # bytes that all cells together may send: text, pictures, answers


LIMITS = Limits()


# --------------------------------------------------------------------------------------------- bubblewrap


@cache
def bubblewrap() -> list[str] | str:
    """The start of a command that runs in a sandbox, or a sentence saying why there is none. Tried, not guessed."""
    program = shutil.which("bwrap")
    if sys.platform != "linux":
        return "sandboxes need Linux"
    if program is None:
        return "bubblewrap (the program bwrap) is not installed"
    ways = [[], ["--unshare-user"]] if os.geteuid() == 0 else [["--unshare-user"]]
    problem = ""
    for way in ways:
        command = [program, *way, *"--unshare-ipc --unshare-pid --unshare-net --unshare-uts".split()]
        trial = [*command, *"--ro-bind / / --size 1000000 --tmpfs /tmp --proc /proc --dev /dev true".split()]
        done = subprocess.run(trial, capture_output=True, text=True)
        if done.returncode == 0:
            return command
        problem = done.stderr.strip()
    return f"bubblewrap is installed, but cannot make a sandbox here: {problem}"


MISSING = """Submissions cannot be run safely here: {why}.
Without a sandbox a submission's code has your rights: it can read the solutions, other submissions, the gradebook and
your files, change or delete them, and use the network. (Points are safe from it in any case as far as they are decided
outside its process; the files they are kept in are not.)
Install it (Debian, Ubuntu: apt install bubblewrap; Fedora: dnf install bubblewrap), or grade in a virtual machine or
container that holds nothing else and say that you mean it: --unsafe, or for nbgrader's own commands
c.JudgedExecute.unsafe = True in nbgrader_config.py."""


def confinement(unsafe: bool) -> list[str] | None:
    """The start of the command that runs a server in a sandbox; None without one. Raises: NoSandbox."""
    found = bubblewrap()
    if isinstance(found, list):
        return found
    if not unsafe:
        raise NoSandbox(MISSING.format(why=found))
    return None


def confined(start: list[str], edition: Path, limits: Limits) -> tuple[list[str], dict[str, str], str]:
    """The whole of bubblewrap's options, the environment inside, and the Python there.

    Visible are the system's programs and libraries, Python's own folders and the edition of the package; nothing of
    the home folder, of the checkout or of the rest of /etc.
    """
    options = [*start, "--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL"]
    if os.geteuid() == 0 and "--unshare-user" not in start:
        options += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]  # the server gives them up at once
    options += ["--proc", "/proc", "--dev", "/dev"]
    for folder in ("/tmp", "/dev/shm"):
        options += ["--size", str(limits.disk), "--tmpfs", folder]
    options += ["--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if os.path.islink(name):
            options += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            options += ["--ro-bind", name, name]
    for name in ("ld.so.cache", "alternatives", "localtime", "fonts", "mime.types"):
        options += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    python = Path(os.path.abspath(sys.executable))
    for prefix in {sys.base_prefix, os.path.realpath(sys.base_prefix)} - {"/usr"}:
        options += [*open_folders(prefix), "--ro-bind", prefix, prefix]
    if sys.prefix != sys.base_prefix:  # a virtual environment, which may lie in a home or in /tmp
        options += ["--ro-bind", sys.prefix, "/venv"]
        python = Path("/venv") / python.relative_to(sys.prefix)
    path = ["/course"]
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path}:
        inside = any(Path(folder).is_relative_to(place) for place in (sys.prefix, sys.base_prefix, "/usr"))
        if not inside and Path(folder).name in ("site-packages", "dist-packages"):
            options += [*open_folders(folder), "--ro-bind", folder, folder]
            path.append(folder)
    options += covered({options[i + 1]: options[i + 2] for i, word in enumerate(options) if word == "--ro-bind"})
    options += ["--ro-bind", str(edition), "/course", "--chdir", "/tmp"]
    environment = plain_environment(os.pathsep.join(path), "/tmp") | {"PATH": f"{python.parent}:/usr/bin:/bin"}
    return options, environment, str(python)


def covered(visible: dict[str, str]) -> list[str]:
    """Options that hide the course and the package where they lie in a folder that can be seen, such as /usr/src or
    site-packages. visible: under which name a folder is there."""
    places = [course_root(), PACKAGE, *([Path.cwd()] if Path("submitted").is_dir() else [])]
    return [
        word
        for place in places
        for folder, name in visible.items()
        if place.is_relative_to(folder) and place != Path(folder)
        for word in ("--tmpfs", str(Path(name, place.relative_to(folder))))
    ]


def open_folders(place: str) -> list[str]:
    """Options that make the (empty) folders above a place such that any user can pass through."""
    return [word for folder in reversed(Path(place).parents[:-1]) for word in ("--perms", "0755", "--dir", str(folder))]


def plain_environment(path: str, home: str) -> dict[str, str]:
    """All the environment variables that a submission sees: none of the grader's own."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return one_thread | {
        "PATH": os.defpath,
        "PYTHONPATH": path,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONNOUSERSITE": "1",
        "PYTHONUTF8": "1",
        "PYTHONSAFEPATH": "1",  # the server imports nothing from a folder that submissions write to
        "HOME": home,
        "TMPDIR": home,
        "IPYTHONDIR": f"{home}/.ipython",
        "MPLCONFIGDIR": f"{home}/.matplotlib",
        "USER": "student",
        "LOGNAME": "student",
        "LANG": "C.UTF-8",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "HF_HUB_OFFLINE": "1",
        "NBGRADER_EXECUTION": "autograde",
    }


def own_tasks() -> int:
    """How many processes and threads this user has: what a limit on processes counts outside of a sandbox."""
    return sum(p.info["num_threads"] or 0 for p in psutil.process_iter(["uids", "num_threads"])
               if p.info["uids"] and p.info["uids"].real == os.getuid())  # fmt: skip


# -------------------------------------------------------------------------------------------------- server


class Server:
    """A worker's server. `run` starts a submission; one at a time. Use it as a context, or `close` it."""

    def __init__(self, edition: Path, modules: Sequence[str], limits: Limits = LIMITS, unsafe: bool = False,
                 number: int = 0):  # fmt: skip
        """edition: the folder that holds the package for kernels; modules: imported before the first fork;
        number: of the worker, so that no two share a user. Raises: NoSandbox."""
        self.edition, self.modules, self.limits, self.number = Path(edition), list(modules), limits, number
        self.start = confinement(unsafe)
        self.closed = False
        self.process: subprocess.Popen | None = None
        self.scratch: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def ready(self) -> None:
        """Starts the server if it is not running. Raises: RuntimeError with what it said if it does not start."""
        if self.closed:
            raise RuntimeError("grading was stopped")
        if self.process is not None and self.process.poll() is None:
            return
        self.stop()
        mine, theirs = socket.socketpair()
        settings = {"modules": self.modules, "user": None, "folders": ["/tmp", "/dev/shm"]}
        processes = self.limits.processes
        if self.start is None:
            self.scratch = tempfile.TemporaryDirectory(prefix="submission-", ignore_cleanup_errors=True)
            settings["folders"] = [self.scratch.name]
            environment = plain_environment(str(self.edition), self.scratch.name) | {"PATH": os.environ["PATH"]}
            options, python = [], sys.executable
            processes += own_tasks()
        else:
            options, environment, python = confined(self.start, self.edition, self.limits)
            if "--unshare-user" in self.start:
                processes += own_tasks()  # older kernels count all of the user's, in the sandbox or not
            else:
                settings["user"] = STUDENT + (os.getpid() * 64 + self.number) % 5000
        settings["limits"] = {
            "memory": self.limits.memory,
            "disk": self.limits.disk,
            "processes": processes,
            "cpu_seconds": int(self.limits.notebook_seconds) + 60,
        }
        command = [*options, python, "-c", kernel.START_SERVER, json.dumps(settings)]
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=subprocess.DEVNULL, stderr=self.errors, env=environment, close_fds=True,
            start_new_session=True,  # Ctrl-C is for the grader
        )  # fmt: skip
        theirs.close()
        self.control = mine
        self.control.settimeout(120)
        try:
            said = self.control.recv(1)
        except TimeoutError:
            said = b""
        if said != kernel.READY:
            self.stop()
            self.errors.seek(0)
            text = self.errors.read().decode("utf-8", "replace").strip()
            raise RuntimeError(f"the process that runs submissions did not start:\n{text[-3000:]}")
        main = psutil.Process(self.process.pid)
        self.memory = max(own_memory(process.pid)[0] for process in (main, *main.children(recursive=True)))

    def run(self, files: dict[str, bytes] | None = None) -> "Session":
        """Starts a submission. files: what lies beside the notebook, by name. Raises: Died if it cannot be."""
        self.ready()
        try:
            return Session(self, files or {})
        except Died:  # the server, of something that came before
            self.stop()
            self.ready()
            return Session(self, files or {})

    def close(self) -> None:
        """Ends the server for good, and all that runs in it."""
        self.closed = True
        self.stop()

    def stop(self) -> None:
        """Ends the server that is running; the next submission starts another."""
        if self.process is None:
            return
        self.control.close()
        if self.start is not None:
            self.process.kill()  # of the sandbox: everything in it goes with it
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None
        if self.scratch is not None:
            self.scratch.cleanup()
            self.scratch = None


class Session:
    """A submission that runs. `step` runs a cell, `end` kills all that it started; use it as a context."""

    def __init__(self, server: Server, files: dict[str, bytes]):
        self.server, self.limits = server, server.limits
        self.data, theirs = socket.socketpair()
        self.buffer, self.received, self.cpu_seconds = bytearray(), 0, 0.0
        try:
            socket.send_fds(server.control, [kernel.START], [theirs.fileno()])
        except OSError:
            raise Died("the kernel died") from None
        finally:
            theirs.close()
        try:
            if files:
                self.step({"files": {name: base64.b64encode(data).decode() for name, data in files.items()}}, 30)
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error) -> None:
        self.end()

    def step(self, step: dict, seconds: float) -> tuple[list[dict], list]:
        """Runs a step; returns its outputs and answers.

        What was still running after `seconds` is interrupted. Raises: Died if the process ended or had to be killed.
        """
        outputs, answers = [], []
        try:
            self.send(json.dumps(step).encode() + b"\n", seconds)
            interrupted = False
            end, look = time.monotonic() + seconds, time.monotonic() + 0.5
            while True:
                message = understood(self.line(min(end, look)))
                if isinstance(message.get("output"), dict) and len(outputs) < MOST_SAID:
                    outputs.append(message["output"])
                if isinstance(message.get("answer"), list) and len(answers) < MOST_SAID:
                    answers.append(message["answer"])
                if "end" in message:
                    break
                now = time.monotonic()  # also while it talks without end
                if now >= look:
                    self.look_at_memory()
                    look = now + 0.25
                if now >= end and interrupted:
                    raise Died(f"it ran longer than {seconds:g} seconds and could not be interrupted")
                if now >= end:
                    interrupted, end = True, now + 3
                    self.interrupt()
        except Died as death:
            death.outputs, death.answers = outputs, answers
            raise
        if interrupted:
            outputs.append(interrupted_output())
        return outputs, answers

    def send(self, data: bytes, seconds: float) -> None:
        """Raises: Died if nobody listens."""
        self.data.settimeout(seconds)
        try:
            self.data.sendall(data)
        except OSError:
            raise Died("the kernel died") from None

    def interrupt(self) -> None:
        """As Ctrl-C would. Raises: Died if the server is gone."""
        try:
            self.server.control.sendall(kernel.INTERRUPT)
        except OSError:
            raise Died("the kernel died") from None

    def line(self, until: float) -> bytes | None:
        """The next line, or None if there is none by then. Raises: Died if there will be none."""
        while (position := self.buffer.find(b"\n")) < 0:
            left = until - time.monotonic()
            if left <= 0:
                return None
            ready, _, _ = select.select([self.data, self.server.control], [], [], left)
            if not ready:
                return None
            # What the process said before it died is read first: the server only speaks of its end.
            try:
                part = self.data.recv(1 << 20) if self.data in ready else b""
            except OSError:
                part = b""
            if not part:
                raise Died("the kernel died")
            self.received += len(part)
            if self.received > self.limits.output:
                raise Died(f"it printed more than {self.limits.output / 1e6:g} MB")
            self.buffer += part
        line = bytes(self.buffer[:position])
        del self.buffer[: position + 1]
        return line

    def look_at_memory(self) -> None:
        """Raises: Died if the processes of the submission together hold too much."""
        processes = psutil.Process(self.server.process.pid).children(recursive=True)
        if held(processes) > self.limits.memory and held(processes, self.server.memory) > self.limits.memory:
            raise Died(f"it took more than {self.limits.memory / GB:g} GB of memory")

    def end(self) -> None:
        """Kills whatever the submission has started and empties its folder."""
        self.data.close()
        control = self.server.control
        try:
            control.settimeout(15)
            control.sendall(kernel.STOP)
            said = b""
            while not said.endswith(b"\n"):
                part = control.recv(64)
                if not part:
                    raise OSError("the server ended")
                said += part
            self.cpu_seconds += float(said.rpartition(kernel.STOPPED)[2])
        except OSError:  # it resists, or its server went down with it: the next submission gets another
            self.server.stop()


def held(processes: Sequence[psutil.Process], inherited: int | None = None) -> int:
    """Bytes of memory that some processes hold. Counts what several share for each of them, which is quick, or once,
    if it is said how much of its own the server has: where nobody may look closer, each is taken to share that."""
    total = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess, OSError):
            try:
                total += process.memory_info().rss if inherited is None else process.memory_full_info().pss
            except psutil.AccessDenied:
                private, shared = own_memory(process.pid)
                total += max(0, private - (inherited or 0)) + shared
    return total


def own_memory(pid: int) -> tuple[int, int]:
    """Bytes of a process's memory that are in no file: its own (or still its parent's), and shared. Raises: OSError."""
    found = dict(re.findall(r"^(RssAnon|RssShmem):\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE))
    return 1024 * int(found.get("RssAnon", 0)), 1024 * int(found.get("RssShmem", 0))


def understood(line: bytes | None) -> dict:
    """What a submission's process said; nothing if it said nothing, or what makes no sense."""
    if line is None or line.count(b"{") + line.count(b"[") + line.count(b",") > HEAVIEST:
        return {}
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}
