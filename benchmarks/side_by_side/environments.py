"""An environment for each TRL release, made by uv where it is there and by venv and pip where not.

TRL is no dependency of the course. What is measured beside it must run on the same torch and the same transformers
as the course itself, so those versions are copied from the running environment.
"""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

RELEASES = {"trl": "1.16.0", "trl112": "1.12.0"}  # side -> TRL; 1.12.0 was the last with PPO


def interpreter(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make(side: str, root: Path) -> Path | None:
    """The Python of the environment for this side, made if need be; None, and a message, where that fails."""
    folder = root / f"trl-{RELEASES[side]}"
    packages = [f"torch=={version('torch').split('+')[0]}", f"transformers=={version('transformers')}"]
    packages.append(f"trl=={RELEASES[side]}")
    stamp = folder / "made-with.txt"
    if stamp.exists() and stamp.read_text() == " ".join(packages):
        return interpreter(folder)
    print(f"making an environment with {', '.join(packages)}")
    environment = dict(os.environ)
    environment.setdefault("UV_FIND_LINKS", environment.get("PIP_FIND_LINKS", ""))
    if uv := shutil.which("uv"):
        commands = [
            [uv, "venv", "-q", "--clear", "--python", sys.executable, str(folder)],
            [uv, "pip", "install", "-q", "--python", str(interpreter(folder)), *packages],
        ]
    else:
        commands = [
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(interpreter(folder)), "-m", "pip", "install", "-q", *packages],
        ]
    for command in commands:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"TRL {RELEASES[side]} cannot be installed, so nothing is compared with it: {why}")
            print(
                "it needs a network once (or PIP_FIND_LINKS on a folder of wheels); the rest is measured all the same"
            )
            return None
    stamp.write_text(" ".join(packages))
    return interpreter(folder)
