"""`course.py check`: the visible checks of a notebook, from a shell. Not the grade: hidden cases run elsewhere."""

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

from cs336_alignment.grading.check import published
from cs336_alignment.grading.editions import kernel_edition
from cs336_alignment.paths import course_root, shown

SKIPPED = ("check-", "experiment-")


def notebook_path(assignment: str) -> Path:
    """Where a student's notebook of an assignment is. Raises: ValueError if there is none."""
    path = course_root() / "assignments" / assignment / f"{assignment}.ipynb"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.parent.glob("*/*.ipynb")))
        raise ValueError(f"there is no {path}; assignments here: {known or 'none'}")
    return path


def check_notebook(assignment: str, path: Path | None = None) -> int:
    """Runs a notebook's definitions in a fresh kernel, then every visible check, and prints the reports.

    path: of the notebook, by default the student's own in assignments/. Experiments are not run.
    Returns how many graded exercises are not right yet.
    Raises: ValueError for an assignment or a notebook that is not there.
    """
    exercises = published(assignment)
    path = path or notebook_path(assignment)
    if not exercises:
        raise ValueError(f"there are no checks for an assignment {assignment!r}")
    try:
        notebook = nbformat.read(path, as_version=4)
    except FileNotFoundError:
        raise ValueError(f"there is no notebook {path}") from None
    except Exception as error:  # nbformat raises half a dozen kinds for a broken file
        raise ValueError(f"{path} cannot be read as a notebook: {error}") from None
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and not skipped(cell, exercises)]
    checks = []
    for exercise in exercises:
        name = exercise["name"]
        source = f"from cs336_alignment.grading import check as _check\n_check({name!r}, {name})"
        checks.append(new_code_cell(source, metadata={"exercise": name}))
    notebook.cells = cells + checks
    print(f"{shown(path)}: running {len(cells)} cells, then the checks", flush=True)
    with tempfile.TemporaryDirectory(prefix="kernel-") as folder:
        # As when it is graded: the package has no body in the functions that are asked for.
        edition = kernel_edition({name for exercise in exercises for name in exercise["stripped"]}, Path(folder))
        client = NotebookClient(
            notebook,
            timeout=300,
            allow_errors=True,
            kernel_name="python3",
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": str(path.parent)}},
        )
        client.execute(env=os.environ | {"PYTHONPATH": str(edition)})
    others = 0
    for cell in cells:
        for error in errors_of(cell):
            if not grade_id(cell).startswith("solution-"):
                others += 1
            elif error.ename != "NotImplementedError":
                print(
                    f"\nThe cell of {grade_id(cell).removeprefix('solution-')} stops with {error.ename}: {error.evalue}"
                )
    right = [show(cell, exercise) for cell, exercise in zip(checks, exercises)]
    graded = [passed for passed, exercise in zip(right, exercises) if exercise["points"] > 0]
    print(f"\n{sum(graded)} of {len(graded)} graded exercises pass their visible checks.")
    if all(graded):
        print("The hidden ones also ask for the rest of the statements: errors, masks, gradients, precision.")
    if others:
        print(
            f"(Cells of your own that stopped: {others}. That is harmless if they use an experiment: none is run here.)"
        )
    return len(graded) - sum(graded)


def skipped(cell, exercises: list[dict]) -> bool:
    """Whether a cell is a check, an experiment, or one that only grading fills."""
    name = grade_id(cell)
    return name.startswith(SKIPPED) or name in {exercise["name"] for exercise in exercises}


def grade_id(cell) -> str:
    return cell.metadata.get("nbgrader", {}).get("grade_id", "")


def errors_of(cell) -> list:
    return [output for output in cell.outputs if output.output_type == "error"]


def show(cell, exercise: dict) -> bool:
    """Prints the report of one check; whether all was right."""
    errors = errors_of(cell)
    print()
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            print(output.text.rstrip())
    for error in errors:
        if error.ename == "CheckFailed":
            print(error.evalue)
        elif error.ename == "NameError":
            print(f"{exercise['name']}: {error.evalue}; its cell has to define it")
        else:
            print(f"{exercise['name']}: {error.ename}: {error.evalue}")
    return not errors
