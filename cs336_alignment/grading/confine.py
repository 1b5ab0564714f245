"""What a kernel's server asks of Linux for its children: limits, forbidden system calls, and who may look at whom.

Python has no names for most of it. Used by `kernel.py` alone; in the sandbox it is the second fence, without a
sandbox it is the only one.
"""

import ctypes
import os
import platform
import struct
from contextlib import suppress
from pathlib import Path

with suppress(ImportError):  # Windows, where nothing of this is called
    import resource

# System calls that no honest notebook makes, by their numbers on x86_64 and on aarch64.
FORBIDDEN = {
    "memfd_create": (319, 279),  # memory that belongs to no process, so no limit sees it
    "memfd_secret": (447, 447),
    "unshare": (272, 97),  # a user namespace of its own, and in it disks without limit and more of the kernel to attack
    "setns": (308, 268),
    "mount": (165, 40),
    "add_key": (248, 217),  # what stays behind after the process, to be read by the next submission
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "mq_open": (240, 180),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "ptrace": (101, 117),  # other processes' memory
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "bpf": (321, 280),  # large and seldom needed parts of the kernel
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
}
CLONE, SOCKET, CLONE3 = (56, 220), (41, 198), (435, 435)
NEW_NAMESPACES = 0x7E020000  # the flags of `clone` that make one
VSOCK = 40  # a network between a virtual machine and its host, which knows no network namespaces
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column in the tables; the kernel's name for it
ALLOW, NOT_PERMITTED, UNKNOWN_CALL = 0x7FFF0000, 0x00050001, 0x00050026
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, MACHINE, FIRST_ARGUMENT = 0, 4, 16  # where they lie in what the kernel gives to a filter


def prctl(*arguments: int) -> int:
    words = [ctypes.c_ulong(x) for x in (*arguments, 0, 0, 0, 0)[:5]]
    return ctypes.CDLL(None, use_errno=True).prctl(*words)


def allow_inspection(allowed: bool) -> None:
    """Whether other processes of the same user may read and write this one's memory."""
    prctl(4, int(allowed))  # PR_SET_DUMPABLE


def adopt_orphans() -> None:
    """Processes below this one whose parents end become its children, so that they can be found and killed."""
    prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def call_filter(column: int, machine: int) -> bytes:
    """The program by which the kernel decides on system calls: (code, jump if true, jump if false, operand) each."""
    program = [
        (LOAD, 0, 0, MACHINE), (EQUAL, 1, 0, machine), (RETURN, 0, 0, NOT_PERMITTED),
        (LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, NOT_PERMITTED),  # x32: other numbers
        (EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, UNKNOWN_CALL),  # its flags cannot be seen; libraries use clone
    ]  # fmt: skip
    for call in FORBIDDEN.values():
        program += [(EQUAL, 0, 1, call[column]), (RETURN, 0, 0, NOT_PERMITTED)]
    for call, test, operand in ((CLONE, ANY_BIT, NEW_NAMESPACES), (SOCKET, EQUAL, VSOCK)):
        program += [(EQUAL, 0, 4, call[column]), (LOAD, 0, 0, FIRST_ARGUMENT), (test, 0, 1, operand)]
        program += [(RETURN, 0, 0, NOT_PERMITTED), (RETURN, 0, 0, ALLOW)]
    program.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("HBBI", *step) for step in program)


def forbid_calls() -> bool:
    """From now on this process and all that it starts get an error for FORBIDDEN calls, and never gain rights by
    starting a program. False where the machine or its kernel does not know how."""
    if platform.machine() not in MACHINES:
        return False
    program = ctypes.create_string_buffer(call_filter(*MACHINES[platform.machine()]))
    prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    head = ctypes.create_string_buffer(struct.pack("HP", (len(program) - 1) // 8, ctypes.addressof(program)))
    return prctl(22, 2, ctypes.addressof(head)) == 0  # PR_SET_SECCOMP, by a filter


def standing() -> tuple:
    """What another process of the same user may change of this one, and its children would inherit: limits,
    processors, priority."""
    names = sorted(name for name in vars(resource) if name.startswith("RLIMIT_"))
    limits = [resource.getrlimit(getattr(resource, name)) for name in names]
    priority = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0)
    return limits, os.sched_getaffinity(0), priority


def process_limits(limits: dict[str, int]) -> dict[int, int]:
    """Limits of a child by the number of the resource. limits: bytes of memory and disk, processes, CPU seconds."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return {
        resource.RLIMIT_AS: size + limits["memory"],
        resource.RLIMIT_FSIZE: limits["disk"],
        resource.RLIMIT_NPROC: limits["processes"],
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_NOFILE: 512,
        resource.RLIMIT_CORE: 0,
    }


def lower_limit(number: int, most: int) -> None:
    hard = resource.getrlimit(number)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(number, (most, most))
