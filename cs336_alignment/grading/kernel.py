"""What runs a student's cells, inside the sandbox: a server that has all imported, and forks for each submission.

The grader (`sandbox.py`) starts it, one for each worker, and talks to it over a socket. For each submission the server
forks a child with IPython in it. The child gets one cell after the other over a socket of its own, and says what each
printed, showed or raised; in the place of a points cell it calls the student's function on inputs and says what came
out. Nothing here knows an answer. Whatever a submission leaves running is killed before the next one starts.

A child may say anything it likes, so all that it says is untrusted; what the server says is not.
"""

import base64
import gc
import importlib
import io
import json
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from traitlets import Type
from traitlets.config import Config

from cs336_alignment.grading.confine import (
    adopt_orphans,
    allow_inspection,
    forbid_calls,
    lower_limit,
    process_limits,
    standing,
)
from cs336_alignment.grading.probe import decode, encode_results, run_calls

# What the grader asks of the server (with the child's socket attached to the first), and what the server says.
START, INTERRUPT, STOP = b"s", b"i", b"k"
READY, ENDED, STOPPED = b"r", b"e", b"k"
# The server's program. What is imported stays, so looking for garbage meanwhile (a fifth of the time) finds none.
START_SERVER = """import gc, json, sys
gc.disable()
from cs336_alignment.grading import kernel
kernel.main(json.loads(sys.argv[1]))"""

ANSWER = "application/vnd.cs336-alignment.answer+json"
STREAM_LIMIT = 200_000  # characters that a cell may print; the rest is counted and dropped
FONTS = Path(__file__).parents[2] / "fonts"  # matplotlib's list of fonts, which takes seconds to make
WORK = "work"  # the folder below the scratch folder where a submission runs


# ------------------------------------------------------------------------------------------- running cells


class Line:
    """JSON lines over a socket. Only the process that made it writes: what a cell forks has no voice."""

    def __init__(self, connection: socket.socket):
        self.file, self.owner = connection.makefile("rwb"), os.getpid()
        self.streams: Sequence[Printed] = ()

    def say(self, **message) -> None:
        if os.getpid() == self.owner:
            self.file.write(json.dumps(message).encode() + b"\n")
            self.file.flush()

    def show(self, **output) -> None:
        """Says an output, after what was printed before it."""
        for stream in self.streams:
            stream.flush()
        self.say(output=output)

    def read(self) -> dict | None:
        line = self.file.readline()
        return json.loads(line) if line else None


class Printed(io.TextIOBase):
    """sys.stdout or sys.stderr of a cell."""

    encoding = "utf-8"

    def __init__(self, line: Line, name: str):
        self.line, self.name, self.parts, self.waiting, self.left = line, name, [], 0, STREAM_LIMIT

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if self.left > 0:
            self.parts.append(text[: self.left])
            self.waiting += len(self.parts[-1])
            self.left -= len(text)
            if self.left <= 0:
                self.parts.append("\n... the rest of what this cell printed is left out\n")
            if self.waiting > 10_000:
                self.flush()
        return len(text)

    def flush(self) -> None:
        text, self.parts, self.waiting = "".join(self.parts), [], 0
        if text:
            self.line.say(output={"output_type": "stream", "name": self.name, "text": text})

    def new_cell(self) -> None:
        self.left = STREAM_LIMIT


class Shown(DisplayPublisher):
    """What `display` shows. Pictures and text; no scripts, no widgets."""

    line: Line

    def publish(self, data, metadata=None, *, transient=None, update=False, **kwargs) -> None:
        kept = {kind: x for kind, x in data.items() if kind in ("text/plain", "image/png", "image/jpeg")}
        self.line.show(output_type="display_data", data=plain(kept))

    def clear_output(self, wait: bool = False) -> None:
        pass


class Value(DisplayHook):
    """The value of a cell's last line."""

    line: Line

    def start_displayhook(self) -> None:
        pass

    def write_output_prompt(self) -> None:
        pass

    def write_format_data(self, format_dict, md_dict=None) -> None:
        kept = {kind: x for kind, x in format_dict.items() if kind in ("text/plain", "image/png")}
        self.line.show(output_type="execute_result", data=plain(kept))

    def finish_displayhook(self) -> None:
        pass


def plain(data: dict) -> dict:
    """The data of an output as JSON has it: pictures in base64."""
    return {kind: base64.b64encode(x).decode() if isinstance(x, bytes) else str(x) for kind, x in data.items()}


class CellShell(InteractiveShell):
    """IPython, whose errors are outputs."""

    line: Line
    display_pub_class = Type(Shown)
    displayhook_class = Type(Value)

    def _showtraceback(self, etype, evalue, stb) -> None:
        traceback = stb if isinstance(stb, list) else str(stb).splitlines()
        self.line.show(output_type="error", ename=str(etype.__name__), evalue=str(evalue), traceback=traceback)

    def enable_gui(self, gui=None) -> None:
        """`%matplotlib inline` asks for it; there are no windows here."""

    def ask_exit(self) -> None:
        """`exit` in a cell ends nothing."""


def make_shell() -> CellShell:
    """The shell that children inherit: made once, since that takes longer than most notebooks do."""
    config = Config()
    config.HistoryManager.enabled = False  # no database, and no thread to write to it
    config.InteractiveShell.colors = "nocolor"
    config.InteractiveShell.xmode = "Context"
    return CellShell.instance(config=config)


def run_cells(connection: socket.socket, shell: CellShell) -> None:
    """The life of a child: steps come in, what became of them goes out, until the grader hangs up.

    A step is {"code": source}, {"probe": name of a function, "cases": [{"calls", "gradients", "after"}, ...]}, or
    {"files": {name: base64}}, which lie beside the notebook.
    """
    line = Line(connection)
    shell.line = shell.display_pub.line = shell.displayhook.line = line
    sys.stdout, sys.stderr = Printed(line, "stdout"), Printed(line, "stderr")
    line.streams = streams = sys.stdout, sys.stderr
    while (step := line.read()) is not None:
        for stream in streams:
            stream.new_cell()
        # Interrupts are for the student's code: between cells there is none to interrupt.
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if "files" in step:
                write_files(step["files"])
            elif "probe" in step:
                answer(step["probe"], step["cases"], shell.user_ns, line)
            else:
                shell.run_cell(step["code"], store_history=True)
        except KeyboardInterrupt as error:
            shell._showtraceback(KeyboardInterrupt, error, ["KeyboardInterrupt"])
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        for stream in streams:
            stream.flush()
        line.say(end=True)


def write_files(files: dict[str, str]) -> None:
    for name, text in files.items():
        path = Path(name)
        with suppress(OSError):  # a name that this file system does not take
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(text))


def answer(name: str, cases: Sequence[dict], namespace: dict, line: Line) -> None:
    """Calls the notebook's function of that name on each case and says what it returned, case by case.

    What a function says on its way is nobody's business; one that is stopped in a case leaves the rest unsaid.
    """
    if name not in namespace:
        message = f"name '{name}' is not defined"
        line.show(output_type="error", ename="NameError", evalue=message, traceback=[])
        return
    for case in cases:
        calls = [[decode(argument) for argument in call] for call in case["calls"]]
        line.say(answer=encode_results(run_calls(namespace[name], calls, case["gradients"], case["after"])))


def publish(step: str) -> None:
    """The same in an ordinary kernel, which hears of answers as data of an own kind."""
    from IPython.display import display

    class Displayed:
        def say(self, answer):
            display({ANSWER: json.dumps(answer), "text/plain": ""}, raw=True)

        def show(self, output_type, **error):
            raise NameError(error["evalue"])

    asked = json.loads(step)
    answer(asked["probe"], asked["cases"], InteractiveShell.instance().user_ns, Displayed())


# -------------------------------------------------------------------------------------------------- server


def child(connection: socket.socket, shell: CellShell, scratch: Path, limits: dict) -> None:
    """Becomes the process that a submission's code runs in. Does not return."""
    try:
        os.setsid()
        allow_inspection(True)
        for number, most in limits.items():
            lower_limit(number, most)
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        folder = scratch / WORK
        folder.mkdir()
        os.chdir(folder)
        sys.path.insert(0, "")  # as in a notebook: a module beside it can be imported
        if FONTS.is_dir():
            shutil.copytree(FONTS, os.environ["MPLCONFIGDIR"])
        run_cells(connection, shell)
    finally:
        os._exit(0)


def serve(control: socket.socket, folders: list[Path], limits: dict[str, int]) -> None:
    """Forks a child for each submission until the grader hangs up.

    folders: what a submission can write to; it runs in the first.
    """
    shell = make_shell()
    numbers = process_limits(limits)
    gc.collect()
    gc.freeze()  # so that children do not copy what they only look at
    gc.enable()
    if len(os.listdir("/proc/self/task")) != 1 or threading.active_count() != 1:
        raise RuntimeError("a process with threads must not fork: something imported here starts one")
    usual = standing()
    control.sendall(READY)
    pid, ended = None, None  # of the running child; the file that can be read from when it has ended
    while True:
        ready, _, _ = select.select([control] + ([ended] if ended is not None else []), [], [])
        if ended in ready:
            os.close(ended)
            ended = None
            control.sendall(ENDED)
        if control not in ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if message == START:
            connection = socket.socket(fileno=descriptors[0])
            pid = os.fork()
            if pid == 0:
                control.close()
                child(connection, shell, folders[0], numbers)
            connection.close()
            ended = os.pidfd_open(pid)
        elif message == INTERRUPT and ended is not None:
            os.kill(pid, signal.SIGINT)
        elif message == STOP:
            if ended is not None:
                os.close(ended)
                ended = None
            seconds = kill_all()
            if not clean(folders) or standing() != usual:
                return  # the grader starts another server
            control.sendall(STOPPED + f"{seconds:.6f}\n".encode())
        elif not message:
            kill_all()
            return


def kill_all(patience: float = 5.0) -> float:
    """Kills whatever a submission has started, however it hides. Returns the CPU seconds that it took.

    In the sandbox this is process 1, so everything but itself is the submission's. Without one, children whose parents
    have ended were given to this process (see `adopt_orphans`).
    """
    before = os.times()
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if os.getpid() == 1:
            with suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        else:
            for pid in descendants(os.getpid()):
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:  # none is left
            break
        time.sleep(0.002)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def descendants(root: int) -> list[int]:
    """The processes below a process, youngest generation last."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError, IndexError, ValueError):
                parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
    found, layer = [], [root]
    while layer:
        layer = [pid for pid, parent in parents.items() if parent in layer]
        found += layer
    return found


def clean(folders: Sequence[Path]) -> bool:
    """Empties what a submission could write to; False if it resists, or if shared memory was left behind."""

    def unlock(function, path, error):
        with suppress(OSError):
            os.chmod(path, 0o700)

    with suppress(OSError, RecursionError):
        for path in [path for _ in range(2) for folder in folders for path in folder.iterdir()]:  # what was locked
            if path.is_dir() and not path.is_symlink():  # in the first round is removed in the second
                shutil.rmtree(path, onerror=unlock)
            else:
                path.unlink(missing_ok=True)
        left = any(path for folder in folders for path in folder.iterdir())
        shared = [Path("/proc/sysvipc", kind).read_text().count("\n") > 1 for kind in ("shm", "sem", "msg")]
        return not left and not (os.getpid() == 1 and any(shared))  # outside of a sandbox it may be anybody's
    return False


def main(settings: dict) -> None:
    """settings: folders, modules, limits, user (None: stay who you are). Standard input is the socket to the grader."""
    control = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    folders = [Path(folder) for folder in settings["folders"]]
    for module in ["torch", *settings["modules"]]:
        with suppress(ImportError):
            importlib.import_module(module)
    sys.modules["torch"].set_num_threads(1)
    if settings["user"] is not None:  # started by root: a limit on processes means nothing to root
        for folder in folders:
            folder.chmod(0o777)
        os.setgroups([])
        os.setresgid(*[settings["user"]] * 3)
        os.setresuid(*[settings["user"]] * 3)
    adopt_orphans()
    allow_inspection(False)
    forbid_calls()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a submission may send it
    serve(control, folders, settings["limits"])
