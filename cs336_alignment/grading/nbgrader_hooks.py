"""The sanitiser under nbgrader's own `autograde`: `nbgrader_config.py` names what is here.

nbgrader knows notebooks by their names, and gives up a submission if it cannot read one. With these two each submission
has a notebook with the right name, read by `rescue`. What nbgrader does afterwards is as before.

A folder without any file that ends in `.ipynb` is not seen by nbgrader at all; `course.py grade` sees it.
"""

import os
from pathlib import Path
from typing import Any

import nbformat
from nbconvert.exporters import NotebookExporter
from nbformat import NotebookNode

from cs336_alignment.grading.rescue import rescue


def release_of(coursedir, assignment: str) -> NotebookNode | None:
    """An assignment's release, if it is one of this course's kind: a single notebook, named like the assignment."""
    folder = Path(coursedir.format_path(coursedir.release_directory, ".", assignment))
    if [path.name for path in folder.glob("*.ipynb")] != [f"{assignment}.ipynb"]:
        return None
    return nbformat.read(folder / f"{assignment}.ipynb", as_version=4)


class RescueExporter(NotebookExporter):
    """Reads what was submitted with `rescue`, and everything else as nbgrader does."""

    def from_filename(self, filename: str, resources: dict | None = None, **kwargs: Any) -> tuple[str, dict]:
        identity = (resources or {}).get("nbgrader", {})
        coursedir = getattr(self.parent, "coursedir", None)
        if not identity or coursedir is None:
            return super().from_filename(filename, resources, **kwargs)
        student, assignment = identity["student"], identity["assignment"]
        folder = Path(coursedir.format_path(coursedir.submitted_directory, student, assignment))
        release = release_of(coursedir, assignment) if Path(filename).parent == folder else None
        if release is None:
            return super().from_filename(filename, resources, **kwargs)
        others = Path(coursedir.format_path(coursedir.release_directory, ".", "."))
        names = [path.name for path in others.iterdir() if path.is_dir() and path.name != assignment]
        releases = {name: other for name in names if (other := release_of(coursedir, name)) is not None}
        result = rescue(folder, release, releases)
        for finding in result.findings:
            self.log.warning("%s, %s: %s", student, assignment, finding)
        resources["metadata"] = {"name": assignment, "path": str(folder)}
        return self.from_notebook_node(result.notebook, resources, **kwargs)


def add_right_name(assignment: str, student: str, notebooks: list[str]) -> None:
    """Before a submission is converted: whatever its files are called, one notebook of it has the right name.

    notebooks: nbgrader's own list of paths, changed in place. The file need not be there: `RescueExporter` finds what
    is. Names that the gradebook does not know are skipped by nbgrader, so the others are graded under no name.
    assignment and student may be patterns; the paths say which submission this is.
    """
    for folder in {Path(path).parent for path in notebooks}:
        right = str(folder / f"{folder.name}.ipynb")
        if right not in notebooks:
            notebooks.append(right)
    # A name that is no text would stop the submission: the gradebook cannot even be asked for it.
    notebooks[:] = [path for path in notebooks if os.fsencode(path).decode("utf-8", "replace") == path]
