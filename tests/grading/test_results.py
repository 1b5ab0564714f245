"""The list of grades: who is in it, what is empty, what wins, and what a spreadsheet must not compute."""

import csv

import pytest
from nbgrader.api import Gradebook
from synthetic import ASSIGNMENT, make_class

from cs336_alignment.cli import main
from cs336_alignment.grading.records import Cell, Mark, Record, read_class
from cs336_alignment.grading.results import after_grading, harmless, settle_penalties, short, write_grades


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    return make_class(tmp_path_factory.mktemp("course"), 12)


def lines(path) -> dict[str, dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return {line["student"]: line for line in csv.DictReader(file)}


def test_each_student_has_a_line_and_who_submitted_nothing_an_empty_one(course):
    found = lines(write_grades(course, ASSIGNMENT))
    assert len(found) == 12 and found["zz_absent"]["student"] == "zz_absent"
    assert set(found["zz_absent"].values()) == {"zz_absent", "", "nothing handed in"}


def test_columns_are_the_exercises_and_answers_in_the_notebooks_order(course):
    head = list(lines(write_grades(course, ASSIGNMENT))["s000"])
    assert head[2:4] == ["log_partition", "optimal_policy"] and "check-dpo_loss" not in head
    assert head.index("dpo_train_step") < head.index("written-likelihood") < head.index("total")


def test_an_answer_that_nobody_read_is_empty_and_counted_and_never_zero(course):
    found = lines(write_grades(course, ASSIGNMENT))
    assert found["s000"]["written-likelihood"] == "" and found["s000"]["waiting"] == "2"
    assert float(found["s001"]["written-likelihood"]) >= 0 and found["s001"]["waiting"] == "0"


def test_sums_agree_with_the_gradebooks_own(course):
    found = lines(write_grades(course, ASSIGNMENT))
    with Gradebook(f"sqlite:///{course}/gradebook.db", "cs336_alignment") as gradebook:
        for submission in gradebook.assignment_submissions(ASSIGNMENT):
            line = found[submission.student.id]
            assert float(line["automatic"]) + float(line["manual"]) == pytest.approx(submission.score)
            expected = max(0.0, submission.score - (submission.late_submission_penalty or 0.0))
            assert float(line["total"]) == pytest.approx(expected)
            assert float(line["maximum"]) == submission.max_score


def test_points_by_hand_win_over_automatic_ones():
    cells = [Cell("f", 10, False, "f"), Cell("w", 5, True, "w")]
    record = Record("ada", submitted=True, penalty=1.0, marks={"f": Mark(2.0, 7.0, 0.5), "w": Mark(None, None)})
    assert record.total(cells) == 6.5 and record.waiting(cells) == ["w"]
    record.marks["w"] = Mark(0.0, None)  # an answer left as released gets 0 by itself
    assert record.waiting(cells) == []


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", " =1", '=HYPERLINK("http://x")', "\u200b=1", "\ufeff=1"]
)
def test_no_text_of_a_student_is_a_formula(text):
    assert harmless(text).startswith("'") and harmless("ada") == "ada" and harmless("3-1") == "3-1"


def test_formulas_in_ids_and_findings_reach_the_file_as_text(tmp_path):
    course = make_class(tmp_path, 5)
    with Gradebook(f"sqlite:///{course}/gradebook.db", "cs336_alignment") as gradebook:
        gradebook.add_student("=cmd|' /C calc'!A0", first_name="@evil", last_name='","x')
    report = course / "autograded" / "s000" / ASSIGNMENT / "report.json"
    report.write_text(report.read_text(encoding="utf-8").replace('"findings": [', '"findings": ["=1+1\\n=2",'), "utf-8")
    found = lines(write_grades(course, ASSIGNMENT))
    assert found["'=cmd|' /C calc'!A0"]["name"].startswith("'@evil")
    assert found["s000"]["findings"].startswith("'=1+1 =2")
    assert all(not value.startswith(("=", "+", "@", "\t")) for line in found.values() for value in line.values())


def test_long_findings_are_cut():
    assert len(short(["x" * 500])) == 200 and short(["a\nb", "c"]) == "a b; c"


def test_no_gradebook_and_an_unknown_assignment_are_said_so(tmp_path, course):
    with pytest.raises(ValueError, match="nothing has been graded"):
        write_grades(tmp_path, ASSIGNMENT)
    assert not (tmp_path / "gradebook.db").exists()
    (tmp_path / "gradebook.db").write_bytes(b"no database" * 100)
    with pytest.raises(ValueError, match="gradebook.db cannot be read as a gradebook"):
        write_grades(tmp_path, ASSIGNMENT)
    with pytest.raises(ValueError, match="a9 is not in the gradebook; there are a4_dpo"):
        write_grades(course, "a9")


def test_a_broken_report_counts_as_none(tmp_path):
    course = make_class(tmp_path, 9)
    broken = ("", "[]", "{", '{"exercises": 3, "findings": 3, "crashes": [3], "seconds": "x"}', "[" * 100_000,
              '{"exercises": {"dpo_loss": {"points": 1, "of": 2, "cases": [3]}}, "findings": ["\\ud800\\u202e"]}',
              '{"exercises": {"f": 1}}', '{"exercises": {"f": {"cases": {}}}, "file": ["x"]}')  # fmt: skip
    for student, text in zip([r.student for r in read_class(course, ASSIGNMENT).submitted()], broken, strict=True):
        (course / "autograded" / student / ASSIGNMENT / "report.json").write_text(text, encoding="utf-8")
    after = after_grading(course, ASSIGNMENT)
    assert len(after.pages) == 8 and after.report.is_file() and len(lines(after.grades)) == 9
    assert all(not r.report.get("exercises") for r in read_class(course, ASSIGNMENT).records)


def test_the_verb_says_where_everything_is(course, capsys):
    assert main(["report", ASSIGNMENT, "--course", str(course)]) == 0
    said = capsys.readouterr().out
    assert "11 pages" in said and "report.html" in said and "answers that wait for a person: " in said
    assert main(["report", "a9", "--course", str(course)]) == 2


def test_submissions_that_are_newer_than_their_grade_are_named(tmp_path):
    course = make_class(tmp_path, 6)
    assert after_grading(course, ASSIGNMENT).notes == []
    student = read_class(course, ASSIGNMENT).submitted()[0].student
    for name in ("stranger", student):
        folder = course / "submitted" / name / ASSIGNMENT
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{ASSIGNMENT}.ipynb").write_text("{}", encoding="utf-8")
    assert after_grading(course, ASSIGNMENT).notes == [
        f"2 not graded yet, or newer than their grade: {student}, stranger; say `grade`"
    ]


def test_an_extension_for_nobody_is_named_with_the_nearest_student(tmp_path):
    course = make_class(tmp_path, 6)
    (course / "nbgrader_config.py").write_text("c = get_config()\nc.LateDays.percent_per_day = 10\n", encoding="utf-8")
    (course / "extensions.csv").write_text(
        f"student,assignment,days\ns0001,{ASSIGNMENT},2\ns001,a4_dop,2\ns001,a1_sft,2\n", encoding="utf-8"
    )
    assert settle_penalties(course) == [
        "extensions.csv: the gradebook has no student s0001; did you mean s001?",
        "extensions.csv: there is no assignment a4_dop; did you mean a4_dpo?",
    ]


def test_a_due_date_taken_away_takes_the_penalties_with_it(tmp_path):
    course = make_class(tmp_path, 24)
    (course / "nbgrader_config.py").write_text("c = get_config()\nc.LateDays.percent_per_day = 10\n", encoding="utf-8")
    settle_penalties(course)
    assert any(record.penalty for record in read_class(course, ASSIGNMENT).records)
    with Gradebook(f"sqlite:///{course}/gradebook.db", "cs336_alignment") as gradebook:
        gradebook.find_assignment(ASSIGNMENT).duedate = None
        gradebook.db.commit()
    settle_penalties(course)
    assert not any(record.penalty for record in read_class(course, ASSIGNMENT).records)


@pytest.mark.parametrize(
    "line, message",
    [("c.LateDays.percent_per_day = 'ten'", "nbgrader_config.py: .*percent_per_day"),
     ("c.LateDays.percent_per_day = 1000", "nbgrader_config.py: .*percent_per_day"),
     ("c.LateDays.percent_per_day = (", "nbgrader_config.py cannot be run: SyntaxError: .*line 2"),
     ("c.LateDays.percent_per_day = ten", "nbgrader_config.py cannot be run: NameError: name 'ten'")],
)  # fmt: skip
def test_a_configuration_that_makes_no_sense_is_said_so(tmp_path, line, message):
    (tmp_path / "nbgrader_config.py").write_text(f"c = get_config()\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        settle_penalties(tmp_path)


def test_points_by_hand_change_the_late_penalty_when_the_report_is_made(tmp_path):
    course = make_class(tmp_path, 24)
    (course / "nbgrader_config.py").write_text("c = get_config()\nc.LateDays.percent_per_day = 10\n", encoding="utf-8")
    settle_penalties(course)
    late = [record for record in read_class(course, ASSIGNMENT).submitted() if record.late]
    cells = read_class(course, ASSIGNMENT).cells
    assert late and all(record.penalty == round(record.points(cells) * 0.1, 2) for record in late)
    with Gradebook(f"sqlite:///{course}/gradebook.db", "cs336_alignment") as gradebook:
        grade = gradebook.find_grade("dpo_loss", ASSIGNMENT, ASSIGNMENT, late[0].student)
        grade.manual_score = grade.auto_score + 10
        gradebook.db.commit()
    after_grading(course, ASSIGNMENT)
    again = next(r for r in read_class(course, ASSIGNMENT).records if r.student == late[0].student)
    assert again.penalty == pytest.approx(late[0].penalty + 1.0)
