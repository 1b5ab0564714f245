"""Where submissions run on macOS and Windows: in an ordinary Jupyter kernel, started anew for each.

There is no sandbox there, and a process with torch in it cannot be forked safely. So this is slow, and runs only where
`unsafe` was said. It has the same two classes as `sandbox.py`, as far as the judge uses them.
"""

import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from jupyter_client.manager import start_new_kernel

from cs336_alignment.grading import kernel
from cs336_alignment.grading.sandbox import LIMITS, MISSING, Died, Limits, NoSandbox, interrupted_output

# What a kernel needs to start, and none of the grader's secrets.
PASSED_ON = ("PATH", "HOME", "LANG", "TMPDIR", "SYSTEMROOT", "USERPROFILE", "APPDATA", "LOCALAPPDATA", "TEMP", "TMP")
KINDS = ("stream", "display_data", "execute_result", "error")


class OrdinaryServer:
    """Starts a kernel for each submission. Of the limits, only those of time hold."""

    def __init__(self, edition: Path, limits: Limits = LIMITS, unsafe: bool = False):
        """Raises: NoSandbox."""
        if not unsafe:
            raise NoSandbox(MISSING.format(why="sandboxes need Linux"))
        self.edition, self.limits = edition, limits

    def run(self, files: dict[str, bytes] | None = None) -> "OrdinarySession":
        return OrdinarySession(self, files or {})

    def close(self) -> None:
        """Nothing outlives a session."""

    def __enter__(self) -> "OrdinaryServer":
        return self

    def __exit__(self, *error) -> None:
        self.close()


class OrdinarySession:
    """A submission that runs in a kernel of its own."""

    def __init__(self, server: OrdinaryServer, files: dict[str, bytes]):
        self.limits, self.cpu_seconds = server.limits, 0.0
        self.folder = tempfile.TemporaryDirectory(prefix="submission-", ignore_cleanup_errors=True)
        for name, data in files.items():
            path = Path(self.folder.name, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        environment |= {"PYTHONPATH": str(server.edition), "OMP_NUM_THREADS": "1"}
        arguments = ["--HistoryManager.hist_file=:memory:", "--log-level=ERROR"]
        self.manager, self.client = start_new_kernel(
            kernel_name="python3", cwd=self.folder.name, env=environment, extra_arguments=arguments
        )

    def __enter__(self) -> "OrdinarySession":
        return self

    def __exit__(self, *error) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.folder.cleanup()

    def step(self, step: dict, seconds: float) -> tuple[list[dict], list]:
        """Runs a step; returns its outputs and answers. Raises: Died. See `sandbox.Session.step`."""
        outputs, answers, received = [], [], 0

        def hear(message: dict) -> None:
            nonlocal received
            content = message["content"]
            received += len(str(content))
            if received > self.limits.output:
                raise Died(f"it printed more than {self.limits.output / 1e6:g} MB")
            answer = content.get("data", {}).get(kernel.ANSWER) if isinstance(content.get("data"), dict) else None
            if isinstance(answer, str):
                answers.append(understood(answer))
            elif message["msg_type"] in KINDS:
                outputs.append({"output_type": message["msg_type"], **content})

        code = step.get("code", f"from {kernel.__name__} import publish as _publish\n_publish({json.dumps(step)!r})")
        try:
            self.client.execute_interactive(
                code, timeout=seconds, output_hook=hear, allow_stdin=False, store_history="code" in step
            )
        except TimeoutError:
            self.interrupt(seconds)
            outputs.append(interrupted_output())
        except RuntimeError:
            raise died("the kernel died", outputs, answers) from None
        except Died as death:
            raise died(str(death), outputs, answers) from None
        if not self.manager.is_alive():
            raise died("the kernel died", outputs, answers)
        return outputs, answers

    def interrupt(self, seconds: float) -> None:
        """As Ctrl-C would. Raises: Died if the kernel does not come back."""
        if not self.manager.is_alive():  # it says nothing when it dies: the time has to be up
            raise Died("the kernel died")
        self.manager.interrupt_kernel()
        end = time.monotonic() + 3
        while time.monotonic() < end:
            try:
                self.client.execute_interactive("", timeout=max(0.1, end - time.monotonic()), silent=True)
                return
            except (TimeoutError, RuntimeError):
                continue
        raise Died(f"it ran longer than {seconds:g} seconds and could not be interrupted")


def died(why: str, outputs: Sequence[dict], answers: Sequence) -> Died:
    death = Died(why)
    death.outputs, death.answers = outputs, answers
    return death


def understood(text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
