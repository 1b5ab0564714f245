"""The feedback pages: what a student reads, and what no page may hold."""

import json
import re
import shutil

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_output
from nbgrader.api import Gradebook
from synthetic import ASSIGNMENT, filled, make_class, solutions, source_notebook
from test_markup import ALLOWED, HARMLESS, Reader

from cs336_alignment.grading.exercise import exercise
from cs336_alignment.grading.feedback import (
    TEMPLATES,
    definition,
    digest,
    discreet_problem,
    duration,
    error,
    known_message,
    lines_of,
    names_in,
    page_name,
    printed,
    shown_case,
    write_feedback,
    write_feedback_of,
)
from cs336_alignment.grading.judge import IN_TIME, what_went_wrong
from cs336_alignment.grading.records import from_text, judged, read_class
from cs336_alignment.grading.score import case_seeds, score

OURS = ALLOWED | set("html head meta title style body main header footer section details summary b".split())
SECRET_NUMBERS = "tensor([-4.4791, 17.0625]) 8317"  # what a function might say of its hidden inputs
SPELLED = "minus four point four seven"  # the same in words that the notebook has
EVIL = "</pre><script>alert(1)</script><img src=http://evil.example/x.png onerror=alert(1)>"


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A small class in which s000 tries everything against the page."""
    root = make_class(tmp_path_factory.mktemp("course"), 10)
    release = source_notebook("assignments")
    code = {name.removeprefix("solution-"): text for name, text in solutions().items()}
    code["dpo_loss"] = f"def dpo_loss(*a):\n    '''{EVIL}'''\n    raise ValueError(str(a))\n    {SPELLED.split()} = a"
    answers = {
        "written-likelihood": f"{EVIL} [x](javascript:alert(1)) ![y](http://evil.example/y.png) $\\text{{{EVIL}}}$"
    }
    answers["written-coverage"] = "Because $\\pi^*$ **moves**."
    notebook = filled(release, code, answers)
    for cell in notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("grade_id") == "solution-dpo_loss":
            cell.outputs = [
                new_output("stream", text=f"graded {SECRET_NUMBERS}"),
                new_output("error", ename="Leak8317", evalue=f"{EVIL} {SECRET_NUMBERS} {SPELLED}", traceback=[SPELLED]),
            ]
    notebook.cells.append(new_code_cell(f"# {EVIL}\nraise KeyError(SEEN)", outputs=[
        new_output("error", ename="Leak8317", evalue=f"{SECRET_NUMBERS} {SPELLED}", traceback=[])]))  # fmt: skip
    nbformat.write(notebook, root / "autograded" / "s000" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [new_output("stream", text=f"mine \x1b[31m{EVIL}")]
    submitted = root / "submitted" / "s000" / ASSIGNMENT / f"{EVIL}.ipynb"
    submitted.parent.mkdir(parents=True)
    nbformat.write(notebook, submitted)
    path = root / "autograded" / "s000" / ASSIGNMENT / "report.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    report |= {"file": f"{EVIL}.ipynb", "findings": [EVIL], "crashes": [{"cell": EVIL, "why": EVIL}]}
    wrong = report["exercises"]["dpo_loss"]
    wrong |= {
        "points": 0.0,
        "hint": "beta is missing. See equation (12.5).",
        "problem": f"The function's cases stopped with {SPELLED}: 8317 {SPELLED}",
    }
    for case in wrong["cases"]:
        said = f"{EVIL} {SECRET_NUMBERS} {SPELLED}"
        case |= {"right": False, "points": 0.0, "why": f"raised ValueError: {said}, at `x = 8317`"}
    wrong["cases"][0]["why"] = "raised ValueError: 8317, at `raise ValueError(str(a))`"
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


def page_of(course, student: str) -> str:
    return next(p for p in write_feedback(course, ASSIGNMENT) if p.stem == student).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(course):
    return page_of(course, "s000")


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
    for said in ("4.4791", "17.0625", "8317", "4791", "0625", SPELLED, "point four"):
        assert said not in words(page), said
    assert "raised ValueError, at `raise ValueError(str(a))`" in words(page)
    assert "stopped with an error of its own kind" in words(page)
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


def test_who_left_has_no_page(course):
    folder = write_feedback(course, ASSIGNMENT)[0].parent
    (folder / "gone.html").write_text("old")
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
    text = words(page_of(course, "s000"))
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
        assert "of 90 points" in words(page_of(course, "s000"))
    record = read_class(course, ASSIGNMENT).records[-2]
    record.report = {}
    assert judged(record, [], ASSIGNMENT) == {}


@pytest.mark.parametrize(
    "text, shown",
    [
        ("name 'my_loss' is not defined", "name 'my_loss' is not defined"),
        ("name 'other' is not defined", "name '…' is not defined"),
        ("The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 1",
         "The size of tensor a (…) must match the size of tensor b (…) at non-singleton dimension …"),
        ("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)",
         "mat1 and mat2 shapes cannot be multiplied (…x… and …x…)"),
        ("Dimension out of range (expected to be in range of [-1, 0], but got 1)",
         "Dimension out of range (expected to be in range of […], but got …)"),
        ("my_loss() missing 1 required positional argument: 'beta'",
         "…() missing … required positional argument: '…'"),
        ("unsupported operand type(s) for +: 'int' and 'NoneType'",
         "unsupported operand type(s) for +: 'int' and 'NoneType'"),
        ("invalid syntax (cell, line 3)", "invalid syntax"),
        ("'my_loss'", "'my_loss'"),
        ("dpo_loss is what this assignment asks you to write; it is not in the package here",
         "… is what this assignment asks you to write; it is not in the package here"),
        ("my_loss my_loss is not defined", ""),
        ("zero one one zero", ""),
        ("'…'", "'…'"),
        ("secret 0.125 1 2 3 4 5 6", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_an_errors_message_is_shown_if_it_is_a_common_one(text, shown):
    assert known_message(text, frozenset({"my_loss"})) == shown


@pytest.mark.parametrize(
    "do",
    ["undefined_name", "1 + None", "[][0]", "int.absent", "len(3)", "x = 3; x()", "a, b = 3", "a, b = [3]", "1 / 0",
     "{}['x']",
     "(lambda x: x)()", "def f(:", "import no_such_module", "torch.ones(2) + torch.ones(3)", "torch.absent",
     "torch.ones(2, 3) @ torch.ones(2, 3)",
     "torch.ones(2)[5]", "torch.ones(2).sum(3)", "torch.ones(6).view(4)", "torch.ones(2).item()", "bool(torch.ones(2))",
     "torch.ones(()).backward()", "torch.ones(2, requires_grad=True).backward()",
     "torch.ones(1, requires_grad=True).numpy()",
     "torch.ones(1, requires_grad=True).add_(1)", "torch.cat([torch.ones(2, 2), torch.ones(2, 3)])",
     "torch.stack([torch.ones(2), torch.ones(3)])", "torch.stack([3])"],
)  # fmt: skip
def test_the_errors_that_people_make_are_common_ones(do):
    try:
        exec(compile(do, "cell", "exec"), {"torch": torch})
    except Exception as raised:
        assert known_message(str(raised), frozenset()), str(raised)
    else:
        pytest.fail("nothing was raised")


def test_the_judges_own_sentences_stay_as_they_are():
    for text in (
        "The function gave no answer that could be read.",
        "This cell got no further: the kernel died.",
        IN_TIME,
        "",
    ):
        assert discreet_problem(text, "dpo_loss") == text
    absent = "The function was not there when its cases ran"
    for name, value, shown in (
        ("NameError", "name 'dpo_loss' is not defined", f"{absent}: name 'dpo_loss' is not defined."),
        ("NameError", "minus four", f"{absent}."),
        ("SystemExit", "4.4791", "The function's cases stopped with SystemExit"),
        ("Leak44791: a", "minus four", "The function's cases stopped with an error of its own kind"),
    ):  # fmt: skip
        problem = what_went_wrong([new_output("error", ename=name, evalue=value, traceback=[])])
        assert discreet_problem(problem, "dpo_loss") == shown


def of_case(why: str, visible: bool = False) -> str:
    cells = [{"cell_type": "code", "source": "def f(x):\n    y = x @ x\n    minus = four = y"}]
    return shown_case({"why": why, "visible": visible}, lines_of(cells))["why"]


def test_of_an_error_a_page_has_its_kind_and_the_students_line():
    assert of_case("raised ValueError: minus four, at `y = x @ x`") == "raised ValueError, at `y = x @ x`"
    assert of_case("raised KeyError: 'minus', at `y = made_in_the_run`") == "raised KeyError: '…'"
    assert of_case("raised KeyError: 'minus', at `y = x @ x`") == "raised KeyError: '…', at `y = x @ x`"
    assert of_case("raised KeyError: 'x', at `y = x @ x`") == "raised KeyError: 'x', at `y = x @ x`"
    assert of_case("raised minus: four") == of_case("raised Leak44791: 3") == "raised an error of its own kind"
    assert of_case("raised ValueError: a, at `z`, at `y = x @ x`") == "raised ValueError, at `y = x @ x`"
    assert of_case("raised KeyError; it should raise ValueError") == "raised KeyError; it should raise ValueError"
    assert of_case("raised KeyError: 3; it should raise minus") == "raised KeyError"
    many = [{"cell_type": "code", "source": "\n".join(f"word_{i}" for i in range(3_000))}]
    assert not lines_of(many) and not names_in(many[0]["source"])  # to choose among so many is to spell


@pytest.mark.parametrize(
    "why",
    ["the result has shape (0, 17882226); it should have ()", "the result is the text 'minus'; it should be", "is 447"],
)
def test_a_report_from_before_says_no_more_than_one_of_today(why):
    assert of_case(why) == "the result is not as expected" and of_case(why, visible=True) == why


def test_outputs_that_are_no_outputs_cost_nothing(tmp_path):
    for odd in (5, True, {"a": 1}, "x", [5], None, [{"output_type": "stream", "text": {"a": 1}}], [{"data": 3}]):
        assert isinstance(printed(odd), str) and error({"source": "", "outputs": odd}) == ""
    course = make_class(tmp_path, 6)
    for place in ("submitted", "autograded"):
        path = course / place / "s000" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb"
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            cell["outputs"] = 5
        path.write_text(json.dumps(notebook), encoding="utf-8")
    report = course / "autograded" / "s000" / ASSIGNMENT / "report.json"
    report.unlink()
    assert "of 90 points" in words(page_of(course, "s000"))


def test_a_page_that_cannot_be_made_costs_no_other(tmp_path, monkeypatch):
    course, notes = make_class(tmp_path, 6), []
    before = write_feedback(course, ASSIGNMENT)

    def broken_page(found, record, state):
        if record.student == "s000":
            raise TypeError("nobody thought of that")
        return "new"

    monkeypatch.setattr("cs336_alignment.grading.feedback.page", broken_page)
    monkeypatch.setattr("cs336_alignment.grading.feedback.beginning", lambda path: "")
    after = write_feedback_of(read_class(course, ASSIGNMENT), notes)
    assert len(after) == len(before) - 1 and all(path.read_text() == "new" for path in after)
    assert notes == ["no feedback page for s000: TypeError: nobody thought of that"]
    assert not next(path for path in before if path.stem == "s000").exists()  # of an older grade


def test_a_page_is_made_anew_when_its_style_changes(tmp_path, monkeypatch):
    course = make_class(tmp_path / "class", 5)
    record, found = read_class(course, ASSIGNMENT).records[0], read_class(course, ASSIGNMENT)
    before = digest(found, record)
    shutil.copytree(TEMPLATES, tmp_path / "templates")
    monkeypatch.setattr("cs336_alignment.grading.feedback.TEMPLATES", tmp_path / "templates")
    assert digest(found, record) == before
    (tmp_path / "templates" / "style.css").write_text("p { color: red }")
    assert digest(found, record) != before


def test_what_is_wrong_in_every_case_is_said_once(tmp_path):
    course = make_class(tmp_path, 5)
    path = course / "autograded" / "s000" / ASSIGNMENT / "report.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    for case in report["exercises"]["dpo_loss"]["cases"]:
        case |= {"right": False, "why": "raised NotImplementedError: your code here"}
    path.write_text(json.dumps(report), encoding="utf-8")
    text = words(page_of(course, "s000"))
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
