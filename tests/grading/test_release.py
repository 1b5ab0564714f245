"""Releases follow from solutions, and the students' zip holds no answer."""

import zipfile

import nbformat
import pytest

from cs336_alignment.grading.exercise import exercises
from cs336_alignment.grading.release import assignments, generate, student_zip
from cs336_alignment.grading.shell import check_notebook
from cs336_alignment.paths import course_root

each = pytest.mark.parametrize("assignment", assignments())


def read(folder, assignment):
    return nbformat.read(course_root() / folder / assignment / f"{assignment}.ipynb", as_version=4)


def kind(cell):
    return cell.metadata.get("nbgrader", {}).get("grade_id")


@each
def test_a_release_is_what_its_source_makes(assignment):
    """Who solves the assignment in this checkout changes solution cells and outputs, and nothing else."""
    expected, found = generate(assignment), read("assignments", assignment)
    touched = any(cell.get("outputs") or cell.get("execution_count") for cell in found.cells)
    by_id = {cell.id: cell for cell in found.cells}
    for cell in expected.cells:
        if not (touched and cell.metadata.get("nbgrader", {}).get("solution")):
            assert by_id[cell.id].source == cell.source, f"{cell.id}: run python3 course.py release"
        assert by_id[cell.id].metadata.get("nbgrader") == cell.metadata.get("nbgrader")
    assert touched or len(found.cells) == len(expected.cells)


@each
def test_a_release_holds_no_answer(assignment):
    source = {cell.id: cell.source for cell in read("solutions", assignment).cells}
    for cell in generate(assignment).cells:
        assert "BEGIN" not in cell.source and "Rubric" not in cell.source and "grade(" not in cell.source
        if cell.cell_type == "code" and cell.metadata.get("nbgrader", {}).get("solution"):
            assert "raise NotImplementedError" in cell.source and cell.source != source[cell.id]


@each
def test_the_notebook_asks_for_the_exercises_with_their_points(assignment):
    of_it = {exercise.name: exercise for exercise in exercises(assignment)}
    cells = {kind(cell): cell for cell in read("solutions", assignment).cells if kind(cell)}
    for name, exercise in of_it.items():
        assert f"def {name}(" in cells[f"solution-{name}"].source
        assert f'check("{name}", {name})' in cells[f"check-{name}"].source
        if exercise.optional:
            assert name not in cells
        else:
            assert cells[name].metadata.nbgrader.points == exercise.points
            assert f'grade("{name}", {name})' in cells[name].source
    graded = [cell for cell in cells.values() if cell.metadata.nbgrader.grade]
    written = [cell for cell in graded if kind(cell).startswith("written-")]
    assert len(written) >= 2
    total = sum(cell.metadata.nbgrader.points for cell in graded)
    assert f"{total:g} points" in read("solutions", assignment).cells[0].source


@each
def test_every_exercise_names_its_points_minutes_and_equation(assignment):
    text = read("solutions", assignment).cells[0].source
    for exercise in exercises(assignment):
        if not exercise.optional:
            row = next(line for line in text.splitlines() if line.startswith("|") and f"`{exercise.name}`" in line)
            assert f"| {exercise.points:g} | {exercise.minutes} |" in row and f"({exercise.equation})" in row, row


@each
def test_the_solutions_pass_every_visible_check_from_a_shell(assignment, capsys):
    path = course_root() / "solutions" / assignment / f"{assignment}.ipynb"
    assert check_notebook(assignment, path) == 0, capsys.readouterr().out
    assert "hidden ones run when it is graded" in capsys.readouterr().out


def test_an_unsolved_notebook_and_a_broken_one_are_told_from_a_shell(tmp_path, capsys):
    release = tmp_path / "a4_dpo.ipynb"
    nbformat.write(generate("a4_dpo"), release)
    assert check_notebook("a4_dpo", release) == len([e for e in exercises("a4_dpo") if not e.optional])
    said = capsys.readouterr().out
    assert "dpo_loss is not written yet" in said and "Traceback" not in said
    with pytest.raises(ValueError, match="no checks for an assignment 'a9'"):
        check_notebook("a9", release)
    with pytest.raises(ValueError, match="there is no notebook"):
        check_notebook("a4_dpo", tmp_path / "nowhere.ipynb")
    release.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be read as a notebook"):
        check_notebook("a4_dpo", release)


def test_the_students_zip_has_all_a_student_needs_and_no_answer(tmp_path):
    path = tmp_path / "students.zip"
    assert student_zip(path) > 50
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        texts = {name: archive.read(name).decode(errors="replace") for name in names}
    inside = {name.removeprefix("cs336_alignment/") for name in names}
    assert {"README.md", "course.py", "cs336_alignment/dpo.py", "cs336_alignment/grading/check.py"} <= inside
    assert {f"assignments/.release/{a}/{a}.ipynb" for a in assignments()} <= inside
    # the working copies are no part of it: unpacking over an older zip overwrites no student's notebook
    assert not any(name.startswith("assignments/a") for name in inside)
    assert not any("solutions" in name or "grading/exercises" in name or "tests/grading" in name for name in inside)
    for secret in ("BEGIN SOLUTION", "Mistake(", "Case("):
        assert not [name for name, text in texts.items() if secret in text and not name.endswith("release.py")], secret


def test_the_same_zip_twice_is_the_same_file_and_a_closed_one_has_no_reference(tmp_path):
    one, two, closed = (tmp_path / f"{name}.zip" for name in ("one", "two", "closed"))
    for path in (one, two):
        student_zip(path)
    student_zip(closed, closed=True)
    assert one.read_bytes() == two.read_bytes()
    with zipfile.ZipFile(closed) as archive:
        dpo = archive.read("cs336_alignment/cs336_alignment/dpo.py").decode()
        names = archive.namelist()
    assert "logsigmoid" not in dpo and "NotImplementedError" in dpo
    assert not any(name.endswith(".ipynb") and "/lectures/" in name for name in names)
    assert not any("/tests/" in name for name in names)
