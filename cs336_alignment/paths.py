"""Where the checkout and its folders are. No torch here: verbs that only need a path stay quick."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def course_root() -> Path:
    """The checkout that holds the package; the current folder where the package is installed without one."""
    return PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").exists() else Path.cwd()


def in_course(root: Path, *parts: str) -> Path:
    """A file of a course folder; where it has none, the checkout's."""
    path = root.joinpath(*parts)
    return path if path.exists() else course_root().joinpath(*parts)


def demo_folder(profile: str, seed: int, model: str | None, from_scratch: bool) -> str:
    """A folder for each kind of demo: another seed or model is another run, not a quarrel about the cache."""
    parts = ["demo", *([profile] if profile != "full" else [])]
    parts += [f"seed{seed}"] if seed else []
    parts += ["from-scratch"] if from_scratch else []
    parts += [Path(model).name] if model else []
    return "-".join(parts)


def shown(path: Path) -> str:
    """A path as a reader of saved output should see it: inside the checkout without the folders above it."""
    root = course_root()
    return str(path.relative_to(root)) if path.is_absolute() and path.is_relative_to(root) else str(path)
