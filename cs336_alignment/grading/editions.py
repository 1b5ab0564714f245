"""Editions of the package: what a student gets, and what the kernel that runs a student's notebook gets.

The repository has everything. The student's edition has no `solutions/`, no hidden cases and no code of known
mistakes. The kernel's edition of an assignment has, besides, no body in the functions that the assignment asks for:
whoever imports the reference there gets a NotImplementedError, and no point.
"""

import ast
import shutil
from collections.abc import Iterable
from pathlib import Path

from cs336_alignment.paths import PACKAGE

# What of grading/ a student may have. All else knows the answers.
PUBLIC = (
    "__init__.py", "check.py", "compare.py", "confine.py", "editions.py", "kernel.py", "probe.py", "shell.py", "visible"
)  # fmt: skip


NOT_HERE = "it is not in the package here"


def is_public(path: Path) -> bool:
    """Whether a file of the package belongs in a student's hands."""
    parts = path.relative_to(PACKAGE).parts
    return "__pycache__" not in parts and (parts[0] != "grading" or parts[1] in PUBLIC)


def copy_public(destination: Path) -> Path:
    """Copies the student's edition of the package into a folder; returns the copy."""
    target = destination / PACKAGE.name
    for path in sorted(PACKAGE.rglob("*")):
        if path.is_file() and is_public(path):
            to = target / path.relative_to(PACKAGE)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, to)
    return target


def kernel_edition(stripped: Iterable[str], destination: Path) -> Path:
    """Makes the edition for the kernels of an assignment; returns the folder to put on their path.

    stripped: the functions to take the bodies of, such as "dpo.dpo_loss".
    """
    package = copy_public(destination)
    for file, names in by_file(stripped).items():
        path = package / file
        path.write_text(without_bodies(path.read_text(encoding="utf-8"), names), encoding="utf-8")
    return destination


def by_file(functions: Iterable[str]) -> dict[str, set[str]]:
    """The names of functions by the file of the package that they are in: "dpo.dpo_loss" is in dpo.py."""
    found: dict[str, set[str]] = {}
    for function in functions:
        module, name = function.split(".")
        found.setdefault(f"{module}.py", set()).add(name)
    return found


def without_bodies(source: str, names: set[str]) -> str:
    """A module with NotImplementedError in the place of some functions. Raises: ValueError if one is not there."""
    lines = source.splitlines(keepends=True)
    found = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name in names]
    missing = names - {node.name for node in found}
    if missing:
        raise ValueError(f"no function {', '.join(sorted(missing))} to take out")
    for node in reversed(found):
        message = f"{node.name} is what this assignment asks you to write; {NOT_HERE}"
        lines[node.body[0].lineno - 1 : node.end_lineno] = [f"    raise NotImplementedError({message!r})\n"]
    return "".join(lines)
