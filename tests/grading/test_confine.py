"""What a submission's process may not ask of Linux, and what it still may."""

import platform
import struct
import subprocess
import sys

import pytest

from cs336_alignment.grading import confine

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in confine.MACHINES, reason="system calls are filtered on Linux"
)
FILTERED = """
import ctypes, os, socket, subprocess, sys, threading
from cs336_alignment.grading.confine import forbid_calls, standing
usual = standing()
if not forbid_calls():
    print("none")
    raise SystemExit
refused = []
for call in (lambda: os.memfd_create("x"), lambda: socket.socket(40, socket.SOCK_STREAM)):
    try:
        call()
    except PermissionError:
        refused.append(True)
lib = ctypes.CDLL(None)
refused += [lib.unshare(0x10000000) == -1, lib.shmget(0, 4096, 0o1600) == -1, lib.ptrace(0, 0, 0, 0) == -1]
print(refused.count(True))
thread = threading.Thread(target=print, args=("thread",))
thread.start()
thread.join()
print(subprocess.run([sys.executable, "-c", "import os; os.fork() or os._exit(0); print('process')"],
                     capture_output=True, text=True).stdout.strip())
left, right = socket.socketpair()
left.send(b"socket")
print(right.recv(9).decode(), standing() == usual)
os.nice(1)
print(standing() == usual)
"""


def test_calls_that_no_notebook_needs_are_refused_and_others_are_not():
    done = subprocess.run([sys.executable, "-c", FILTERED], capture_output=True, text=True)
    if done.stdout == "none\n":
        pytest.skip("this kernel filters no system calls")
    assert done.stdout.split() == ["5", "thread", "process", "socket", "True", "False"], done.stdout + done.stderr


@pytest.mark.parametrize("machine", list(confine.MACHINES))
def test_the_filter_names_its_machine_and_ends_by_allowing(machine):
    column, name = confine.MACHINES[machine]
    steps = list(struct.iter_unpack("HBBI", confine.call_filter(column, name)))
    assert steps[1] == (confine.EQUAL, 1, 0, name) and steps[-1] == (confine.RETURN, 0, 0, confine.ALLOW)
    for place, (code, yes, no, _) in enumerate(steps):  # no jump leaves the program
        assert code == confine.RETURN or place + 1 + max(yes, no) < len(steps)
    numbers = [step[3] for step in steps if step[0] == confine.EQUAL]
    assert all(calls[column] in numbers for calls in confine.FORBIDDEN.values())
