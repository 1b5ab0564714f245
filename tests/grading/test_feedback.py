"""The feedback pages: what a student reads, and what no page may hold."""

import json
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_output
from nbgrader.api import Gradebook
from synthetic import ASSIGNMENT, filled, make_class, solutions, source_notebook
from test_markup import ALLOWED, HARMLESS, Reader

from cs336_alignment.grading.exercise import exercise
from cs336_alignment.grading.feedback import (
    definition,
    discreet,
    discreet_problem,
    duration,
    page_name,
    shown_case,
    write_feedback,
)
from cs336_alignment.grading.records import from_text, judged, read_class
from cs336_alignment.grading.score import case_seeds, score

OURS = ALLOWED | set("html head meta title style body main header footer section details summary b".split())
SECRET_NUMBERS = "tensor([-4.4791, 17.0625]) 8317"  # what a function might say of its hidden inputs
EVIL = "</pre><script>alert(1)</script><img src=http://evil.example/x.png onerror=alert(1)>"


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A small class in which s000 tries everything against the page."""
    root = make_class(tmp_path_factory.mktemp("course"), 10)
    release = source_notebook("assignments")
    code = {name.removeprefix("solution-"): text for name, text in solutions().items()}
    code["dpo_loss"] = f"def dpo_loss(*a):\n    '''{EVIL}'''\n    raise ValueError(str(a))"
    answers = {
        "written-likelihood": f"{EVIL} [x](javascript:alert(1)) ![y](http://evil.example/y.png) $\\text{{{EVIL}}}$"
    }
    answers["written-coverage"] = "Because $\\pi^*$ **moves**."
    notebook = filled(release, code, answers)
    for cell in notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("grade_id") == "solution-dpo_loss":
            cell.outputs = [
                new_output("stream", text=f"graded {SECRET_NUMBERS}"),
                new_output("error", ename="ValueError", evalue=f"{EVIL} {SECRET_NUMBERS}", traceback=[SECRET_NUMBERS]),
            ]
    notebook.cells.append(new_code_cell(f"# {EVIL}\nraise KeyError(SEEN)", outputs=[
        new_output("error", ename="Leak8317", evalue=SECRET_NUMBERS, traceback=[])]))  # fmt: skip
    nbformat.write(notebook, root / "autograded" / "s000" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [new_output("stream", text=f"mine \x1b[31m{EVIL}")]
    nbformat.write(notebook, root / "submitted" / "s000" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb")
    path = root / "autograded" / "s000" / ASSIGNMENT / "report.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    report |= {"file": f"{EVIL}.ipynb", "findings": [EVIL], "crashes": [{"cell": EVIL, "why": EVIL}]}
    wrong = report["exercises"]["dpo_loss"]
    wrong |= {
        "points": 0.0,
        "hint": "beta is missing. See equation (12.5).",
        "problem": f"The cell stopped with {EVIL}: 8317",
    }
    for case in wrong["cases"]:
        case |= {"right": False, "points": 0.0, "why": f"raised ValueError: {EVIL} {SECRET_NUMBERS}, at `x = 8317`"}
    path.write_text(json.dumps(report), encoding="utf-8")
    with Gradebook(f"sqlite:///{root}/gradebook.db", "cs336_alignment") as gradebook:
        student = gradebook.find_student("s000")
        student.first_name, student.last_name = "<script>alert(2)</script>", "O'Neil"
        comment = gradebook.find_comment("solution-dpo_loss", ASSIGNMENT, ASSIGNMENT, "s000")
        comment.manual_comment = "See $h$ again. <script>alert(3)</script>"
        grade = gradebook.find_grade("dpo_loss", ASSIGNMENT, ASSIGNMENT, "s000")
        grade.auto_score, grade.manual_score = 0.0, 4.5
        gradebook.find_submission_notebook(ASSIGNMENT, ASSIGNMENT, "s000").late_submission_penalty = 1.5
        gradebook.db.commit()
    return root


@pytest.fixture(scope="module")
def page(course):
    return next(p for p in write_feedback(course, ASSIGNMENT) if p.stem == "s000").read_text(encoding="utf-8")


def words(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page[page.index("<body>") :]).split())


def test_a_page_holds_nothing_that_runs_or_loads(page):
    for tag, attributes in Reader(page).tags:
        assert tag in OURS, tag
        assert not any(name.startswith("on") or name in ("src", "srcset", "background") for name in attributes)
        assert re.match(r"#|https?://|mailto:", attributes.get("href", "#"))
        if tag not in (
            "meta",
            "html",
            "td",
            "th",
            "span",
            "section",
            "div",
            "p",
            "table",
            "pre",
            "summary",
            "h2",
            "footer",
        ):
            assert set(attributes) <= HARMLESS, (tag, attributes)
    assert "Content-Security-Policy" in page and "default-src 'none'" in page
    assert "url(" not in page and "@import" not in page


def test_a_page_is_small(course):
    assert max(path.stat().st_size for path in write_feedback(course, ASSIGNMENT)) < 100_000


def test_nothing_that_a_function_said_of_hidden_inputs_is_on_the_page(page):
    for number in ("4.4791", "17.0625", "8317", "4791", "0625"):
        assert number not in words(page).replace("x = 8317", ""), number
    assert "graded" not in words(page).split("mine")[1][:50]


def test_the_total_the_penalty_the_points_by_hand_and_comments_are_there(course, page):
    record = next(r for r in read_class(course, ASSIGNMENT).records if r.student == "s000")
    text = words(page)
    total = record.total(read_class(course, ASSIGNMENT).cells)
    assert f"{total:g} of 90 points" in text and "less 1.5 for being late" in text
    assert "given by a person; the cases below alone earn 0" in text and "4.5 of 15" in text
    assert "Comment See" in text and "again. &lt;script&gt;alert(3)" in text
    assert "10 points wait for a person" in text


def test_cases_hints_and_what_was_asked_for_are_there(page):
    text = words(page)
    assert "Looks like a known mistake. beta is missing. See equation (12.5)." in text
    assert "soft labels (hidden)" in text and "one eps for each pair" in text and "✗" in text


def test_written_answers_have_their_formulas(page):
    assert "<strong>moves</strong>" in page and re.search(r"<msup><mi>π</mi><mo[^>]*>", page)


def test_what_a_cell_printed_is_from_the_notebook_as_submitted(page):
    assert "mine &lt;/pre&gt;&lt;script&gt;" in page and "\x1b" not in page


def test_pages_are_left_alone_until_something_changes(course):
    before = {path: path.stat().st_mtime_ns for path in write_feedback(course, ASSIGNMENT)}
    with Gradebook(f"sqlite:///{course}/gradebook.db", "cs336_alignment") as gradebook:
        grade = gradebook.find_grade("log_partition", ASSIGNMENT, ASSIGNMENT, "s001")
        grade.manual_score = 1.0
        gradebook.db.commit()
    after = {path: path.stat().st_mtime_ns for path in write_feedback(course, ASSIGNMENT)}
    assert [path.stem for path in after if after[path] != before[path]] == ["s001"]


def test_pages_of_some_students_and_of_none_who_left(course):
    folder = write_feedback(course, ASSIGNMENT)[0].parent
    (folder / "gone.html").write_text("old")
    assert [path.stem for path in write_feedback(course, ASSIGNMENT, ["s002", "zz_absent"])] == ["s002"]
    assert (folder / "gone.html").exists()
    write_feedback(course, ASSIGNMENT)
    assert not (folder / "gone.html").exists() and not (folder / "zz_absent.html").exists()


@pytest.mark.parametrize(
    "student",
    ["../../evil", "/etc/x", "a/b", "C:\\x", "con", "NUL.txt", "..", ".", "", "<script>", "a\nb", "x" * 500, "é" * 90],
)
def test_any_student_id_gives_a_file_name_in_the_folder(student):
    name = page_name(student)
    assert not set(name) & set('/\\:*?"<>|\n') and not name.startswith(".") and 5 < len(name.encode()) < 200
    assert name.split(".")[0].lower() not in ("con", "nul", "")


def test_ordinary_ids_keep_their_names_and_no_two_share_one():
    assert [page_name(s) for s in ("ada", "ada@x.org", "Ada L")] == ["ada.html", "ada@x.org.html", "Ada L.html"]
    assert len({page_name(s) for s in ("a/b", "a%2Fb", "a\\b", "a%5Cb", "con", "%636f6e")}) == 6


def test_without_a_report_the_notebook_says_what_the_judge_found(tmp_path):
    course = make_class(tmp_path, 5, reports=False)
    of = exercise("dpo_loss")
    seeds = case_seeds(of, "secret", "s000")
    result = score(
        of, [of.results(of.mistakes[6].function, case, case.calls(seeds[case.name])) for case in of.cases], seeds
    )
    path = course / "autograded" / "s000" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("grade_id") == "dpo_loss":
            cell.outputs = [new_output("display_data", {"text/html": "", "text/plain": str(result)})]
    nbformat.write(notebook, path)
    text = words(next(p for p in write_feedback(course, ASSIGNMENT) if p.stem == "s000").read_text(encoding="utf-8"))
    assert "beta is missing. See equation (12.5)." in text and "half precision (hidden)" in text
    expected = [v.points for v in result.verdicts]
    found = from_text(of, str(result))
    assert [case["points"] for case in found["cases"]] == expected and found["points"] == result.points
    assert [case["why"] for case in found["cases"]] == [v.why for v in result.verdicts]


def test_an_exercise_without_answers_says_why_in_both_forms():
    of = exercise("dpo_loss")
    result = score(of, None, case_seeds(of, "s", "ada"), "The cell stopped with NameError: name 'x' is not defined")
    assert from_text(of, str(result))["problem"] == result.problem


def test_a_notebook_that_is_no_notebook_still_has_a_page(tmp_path):
    course = make_class(tmp_path, 5)
    for text in ("", "null", '{"cells": [1, {"cell_type": "code"}]}', '{"cells": [{"cell_type": 3, "source": [1]}]}'):
        (course / "autograded" / "s000" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb").write_text(text)
        assert "of 90 points" in words(write_feedback(course, ASSIGNMENT, ["s000"])[0].read_text(encoding="utf-8"))
    record = read_class(course, ASSIGNMENT).records[-2]
    record.report = {}
    assert judged(record, [], ASSIGNMENT) == {}


@pytest.mark.parametrize(
    "text, shown",
    [
        ("name 'my_loss' is not defined", "name 'my_loss' is not defined"),
        ("The size of tensor a (3) must match the size of tensor b (4)", None),
        ("index 1 is out of range", "index 1 is out of range"),
        ("secret 0.125 1 2 3 4 5 6", "… … … …"),
        ("aGVsbG8= 12", "…= …"),
    ],
)
def test_errors_are_shown_in_known_words(text, shown):
    from cs336_alignment.grading.feedback import ERROR_WORDS

    found = discreet(text, ERROR_WORDS | {"my_loss"})
    assert found == (shown or text) if shown != "… … … …" else not re.search(r"\d", found)


def test_the_judges_own_sentences_stay_as_they_are():
    words = frozenset({"x"})
    for text in ("The kernel gave no answer: it may have died, or run out of time, in an earlier cell.", ""):
        assert discreet_problem(text, words) == text
    assert "0.5" not in discreet_problem("The cell stopped with ValueError: 0.5", words)
    case = {"visible": False, "why": "the result has shape (3,); it should have ()", "expects": "a scalar"}
    assert shown_case(case, words)["why"] == case["why"]


def test_what_is_wrong_in_every_case_is_said_once(tmp_path):
    course = make_class(tmp_path, 5)
    path = course / "autograded" / "s000" / ASSIGNMENT / "report.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    for case in report["exercises"]["dpo_loss"]["cases"]:
        case |= {"right": False, "why": "raised NotImplementedError: your code here"}
    path.write_text(json.dumps(report), encoding="utf-8")
    text = words(write_feedback(course, ASSIGNMENT, ["s000"])[0].read_text(encoding="utf-8"))
    assert text.count("raised NotImplementedError") == 1 and "All 9 cases: raised NotImplementedError" in text


def test_the_code_on_the_page_is_the_code_that_was_graded():
    stub = 'def f(x):\n    raise NotImplementedError("your code here")'
    cells = [
        {"cell_type": "code", "source": text} for text in ("def f(x):\n    return 1", "def f2(x): ...", stub, "f(3)")
    ]
    assert definition("f", stub, cells) == "def f(x):\n    return 1"
    assert definition("f", "def f(x):\n    return 2", cells) == "def f(x):\n    return 2"
    assert definition("g", stub, cells) == stub and definition("g", "", []) == ""


def test_how_late_in_words():
    assert [duration(x) for x in (0, 59, 3_600, 5_400, 90_000, 200_000)] == [
        "", "59 seconds", "1 hour", "1.5 hours", "1 day", "2.3 days"]  # fmt: skip
