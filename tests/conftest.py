"""What every test gets: no network, one thread, fixed seeds; and what skips a test, with the reason.

`--full` (from `course.py test --full`) runs the tests marked `slow`; `gpu` ones need a GPU.
"""

import importlib.util
import ipaddress
import os
import random
import socket
import sys

# Before torch, numpy or huggingface_hub are imported, here and in every process that a test starts.
os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MPLBACKEND": "Agg",
        # A started process that wants the network is refused at once: nothing listens on port 9 here.
        "HTTP_PROXY": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "ALL_PROXY": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "all_proxy": "http://127.0.0.1:9",
        "NO_PROXY": "127.0.0.1,localhost,::1",
        "no_proxy": "127.0.0.1,localhost,::1",
    }
)

import pytest


class NetworkBlocked(Exception):
    """A test reached for the network. Not an OSError, which a library would take for a mere failure."""


def is_local(host) -> bool:
    """Whether a host is this computer: a name for it, or a loopback address."""
    if host in (None, "", "localhost", b"localhost", b""):
        return True
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host).is_loopback
    except ValueError:
        return False


def refuse(host) -> None:
    raise NetworkBlocked(f"a test tried to reach {host!r}: the tests run without a network")


def pytest_configure(config) -> None:
    """Close the sockets: connections and name look-ups that leave this computer raise."""
    connect, connect_ex, look_up = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def guarded(original):
        def call(self, address):
            if self.family in (socket.AF_INET, socket.AF_INET6) and not is_local(address[0]):
                refuse(address[0])
            return original(self, address)

        return call

    def guarded_look_up(host, *args, **kwargs):
        if not is_local(host):
            refuse(host)
        return look_up(host, *args, **kwargs)

    socket.socket.connect = guarded(connect)
    socket.socket.connect_ex = guarded(connect_ex)
    socket.getaddrinfo = guarded_look_up


def pytest_addoption(parser) -> None:
    parser.addoption("--full", action="store_true", help="run the tests marked slow too")


def no_gpu_reason() -> str | None:
    """None where torch sees a CUDA GPU, else why not. torch is imported only if a collected test asks."""
    if importlib.util.find_spec("torch") is None:
        return "needs a GPU; torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "needs a GPU; torch sees none"


def pytest_collection_modifyitems(config, items) -> None:
    slow = pytest.mark.skip(reason="slow; `course.py test --full` runs it")
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--full"):
            item.add_marker(slow)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    reason = no_gpu_reason() if on_gpu else None
    on_cpu_instead = os.environ.get("COURSE_GPU_TESTS_ON") == "cpu"  # a rehearsal: see test_gpu.py
    for item in on_gpu:
        rehearsed = on_cpu_instead and item.get_closest_marker("gpu").kwargs.get("cpu_too")
        if reason and not rehearsed:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def fixed_seeds():
    """The same random numbers for a test wherever and after whatever it runs."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.manual_seed(0)
        if torch.get_num_threads() != 1:
            torch.set_num_threads(1)
