"""The report on a class: what is counted, and that the page needs nothing and runs nothing."""

import json
import re
import shutil

import pytest
from nbgrader.api import Gradebook
from synthetic import ASSIGNMENT, make_class
from test_markup import Reader

from cs336_alignment.grading.class_report import (
    around,
    dearest_cases,
    exercise_row,
    histogram,
    known_mistakes,
    without_work,
    write_class_report,
)
from cs336_alignment.grading.records import Cell, Mark, Record, notebook_of, read_cells, read_class

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    root = make_class(tmp_path_factory.mktemp("course"), 44)
    path = root / "autograded" / "s001" / ASSIGNMENT / "report.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    report |= {"findings": [EVIL] * 9, "crashes": [{"cell": f"{EVIL}\u202e"}, {}], "seconds": 99.0}
    path.write_text(json.dumps(report), encoding="utf-8")
    release = root / "assignments" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb"
    (root / "autograded" / "s002" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb").write_bytes(release.read_bytes())
    with Gradebook(f"sqlite:///{root}/gradebook.db", "cs336_alignment") as gradebook:
        gradebook.find_student("s001").first_name = EVIL
        gradebook.add_student(EVIL)
        gradebook.db.commit()
    return root


@pytest.fixture(scope="module")
def page(course):
    return write_class_report(course, ASSIGNMENT).read_text(encoding="utf-8")


def words(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_the_page_runs_and_loads_nothing(page):
    for tag, attributes in Reader(page).tags:
        assert tag not in ("script", "img", "iframe", "link", "object", "embed", "image")
        assert not any(name.startswith("on") or name == "src" for name in attributes)
        assert re.match(r"#|feedback/|grades\.csv", attributes.get("href", "#")), attributes
    assert EVIL not in page and "&lt;script&gt;" in page and "default-src 'none'" in page
    assert "\u202e" not in page  # it turns the direction of text


def test_every_link_leads_to_a_page_that_will_be_there(course, page):
    from cs336_alignment.grading.feedback import write_feedback

    pages = {path.name for path in write_feedback(course, ASSIGNMENT)}
    links = set(re.findall(r'href="feedback/([^"]+)"', page))
    assert links and links <= pages


def test_who_and_what_is_on_it(page):
    text = words(page)
    assert (
        "43 of 45 students submitted" in text
        and "Nothing submitted (2): &lt;script&gt;" in text
        and "zz_absent" in text
    )
    assert "As released (1): s002" in text and "s001 &lt;script&gt;alert(1)&lt;/script&gt; S001 99.0 s" in text
    assert "and 3 more" in text  # findings of one student
    assert "copycat and s003 : code as written" in text and "renamer and s007 : structure of the code" in text
    assert "10a. likelihood (" in text and "hours" in text and "Known mistakes" in text


def test_an_exercises_row_counts_only_who_is_graded_there():
    cell = Cell("f", 10, False, "f")
    records = [Record(str(i), submitted=True, marks={"f": Mark(x)}) for i, x in enumerate((10, 5, 0, None))]
    row = exercise_row(cell, [*records, Record("no marks")])
    assert (row.graded, row.mean, row.full, row.none, row.lost) == (3, 0.5, 1 / 3, 1 / 3, 15.0)


def test_costs_are_summed_over_the_class():
    case = {"name": "a", "of": 3, "points": 0, "right": False, "visible": False}
    verdict = {
        "points": 4,
        "of": 10,
        "hint": "beta is missing.",
        "problem": None,
        "cases": [case, case | {"right": True}],
    }
    late = verdict | {"problem": "The function did not come to an end", "hint": None}  # and cases that were answered
    none = {"points": 0, "of": 10, "hint": None, "problem": None, "cases": [case, case]}
    found = {"ada": {"f": verdict}, "bob": {"f": verdict}, "eve": {"f": late}, "joe": {"f": none}}
    assert [(x.exercise, x.what, x.students, x.points, x.hidden) for x in dearest_cases(found)] == [
        ("f", "a", 3, 9.0, True)
    ]
    assert [(x.what, x.students, x.points) for x in known_mistakes(found)] == [("beta is missing.", 2, 12.0)]


def test_a_notebook_as_released_is_no_work_and_one_changed_answer_is(course):
    found = read_class(course, ASSIGNMENT)
    release = read_cells(course / "assignments" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb")
    assert (
        without_work(release, found) and without_work([], found) and not without_work(notebook_of(found, "s003"), found)
    )
    answered = [dict(cell) for cell in release]
    next(c for c in answered if c["metadata"].get("nbgrader", {}).get("grade_id") == "written-coverage")["source"] = (
        "It is."
    )
    assert not without_work(answered, found)


def test_a_course_folder_without_assignments_has_the_packages(tmp_path):
    course = make_class(tmp_path, 6)
    release = course / "assignments" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb"
    (course / "autograded" / "s000" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb").write_bytes(release.read_bytes())
    shutil.rmtree(course / "assignments")
    assert "As released (1): s000" in words(write_class_report(course, ASSIGNMENT).read_text(encoding="utf-8"))


def test_the_distribution_is_drawn_the_same_each_time_and_needs_a_class():
    assert histogram([1.0, 2.0, 90.0], 90) == histogram([1.0, 2.0, 90.0], 90) and "<svg" in histogram([0.0], 90)
    assert histogram([], 90) == "" and "http" not in re.sub(r'xmlns(:\w+)?="[^"]+"|<metadata>.*?</metadata>', "",
                                                            histogram([1.0], 90), flags=re.DOTALL)  # fmt: skip


def test_what_is_shown_of_a_text_is_around_the_marks():
    lines = [(str(i), i in (3, 9)) for i in range(12)]
    assert [line and line[0] for line in around(lines)] == ["2", "3", "4", None, "8", "9", "10", None]
