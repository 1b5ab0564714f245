"""What students get: releases made from the solutions, and a zip of the course that holds no answer.

`assignments/` is generated from `solutions/`, as nbgrader does it. The zip brings releases under
`assignments/.release/`, and course.py puts a working copy beside them where there is none. So unpacking a newer zip
over an older one never overwrites a notebook that a student has edited.
"""

import io
import tempfile
import zipfile
from pathlib import Path

import nbformat
from nbgrader.converters import GenerateAssignment
from nbgrader.coursedir import CourseDirectory
from traitlets.config.loader import PyFileConfigLoader

from cs336_alignment.grading.editions import by_file, is_public, without_bodies
from cs336_alignment.grading.exercise import stripped_of
from cs336_alignment.grading.visible import write_visible
from cs336_alignment.paths import PACKAGE, course_root

# Of the checkout, beside the package, lectures and releases.
STUDENT_FILES = ("README.md", "LICENSE", "LICENSE-CONTENT", "pyproject.toml", "constraints.txt", "course.py")
NOTE = """# Your notebooks

`python3 course.py lab` (or `check`) puts the assignments' notebooks into this folder. Work on them here. When your
instructor sends a newer zip, unpack it over this folder: notebooks that are here stay as they are, and if an
assignment has changed, course.py says so and puts the new version beside yours.
"""


def assignments() -> list[str]:
    """Those that have a source notebook."""
    return sorted(path.parent.name for path in (course_root() / "solutions").glob("*/*.ipynb"))


def generate(assignment: str) -> nbformat.NotebookNode:
    """The release of an assignment, made from its source by nbgrader itself, with no gradebook touched."""
    root = course_root()
    with tempfile.TemporaryDirectory() as folder:
        config = PyFileConfigLoader("nbgrader_config.py", path=str(root)).load_config()
        config.CourseDirectory.root = str(root)
        config.CourseDirectory.release_directory = str(Path(folder).resolve())
        config.CourseDirectory.assignment_id = assignment
        config.GenerateAssignment.no_database = True
        config.SaveCells.enabled = False
        converter = GenerateAssignment(coursedir=CourseDirectory(config=config), config=config)
        converter.start()
        return nbformat.read(Path(folder) / assignment / f"{assignment}.ipynb", as_version=4)


def write_releases() -> list[Path]:
    """Writes assignments/ and the visible halves of all exercises."""
    write_visible()
    written = []
    for assignment in assignments():
        path = course_root() / "assignments" / assignment / f"{assignment}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(generate(assignment), path)
        written.append(path)
    return written


def student_zip(path: Path, closed: bool = False) -> int:
    """Writes the zip; returns how many files are in it.

    closed: for a course that keeps the reference to itself. Functions that an assignment asks for have no body in the
    package, and lectures come as HTML, because they could not run.
    """
    root = course_root()
    stripped = by_file(stripped_of()) if closed else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:

        def put(name: str, data: bytes) -> None:
            # The same content gives the same zip, whenever and wherever it is made.
            info = zipfile.ZipInfo(f"cs336_alignment/{name}", date_time=(2026, 1, 1, 0, 0, 0))
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(info, data)

        for name in STUDENT_FILES:
            put(name, (root / name).read_bytes())
        for source in sorted(p for p in PACKAGE.rglob("*") if p.is_file() and is_public(p)):
            data = source.read_bytes()
            if source.parent == PACKAGE and source.name in stripped:
                data = without_bodies(data.decode(), stripped[source.name]).encode()
            put(f"{PACKAGE.name}/{source.relative_to(PACKAGE).as_posix()}", data)
        for source in sorted((root / "lectures").glob("*.ipynb")):
            if closed:
                put(f"lectures/{source.stem}.html", as_html(source).encode())
            else:
                put(f"lectures/{source.name}", source.read_bytes())
        for source in sorted((root / "benchmarks" / "results").glob("*.json")):  # lectures read some of them
            put(f"benchmarks/results/{source.name}", source.read_bytes())
        for source in [] if closed else sorted((root / "tests").rglob("*")):
            if (
                source.is_file()
                and source.suffix != ".pyc"
                and "grading" not in source.relative_to(root / "tests").parts
            ):
                put(f"tests/{source.relative_to(root / 'tests').as_posix()}", source.read_bytes())
        for assignment in assignments():
            put(f"assignments/.release/{assignment}/{assignment}.ipynb", notebook_bytes(generate(assignment)))
        put("assignments/README.md", NOTE.encode())
        return len(archive.namelist())


def notebook_bytes(notebook) -> bytes:
    text = io.StringIO()
    nbformat.write(notebook, text)
    return text.getvalue().encode()


def as_html(path: Path) -> str:
    from nbconvert import HTMLExporter  # slow to import, and only needed here

    return HTMLExporter().from_filename(str(path))[0]
