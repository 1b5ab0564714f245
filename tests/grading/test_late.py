"""Late days: the arithmetic, the file of extensions, and what ends in a gradebook."""

from datetime import datetime, timedelta

import nbformat
import pytest
from nbgrader.api import Gradebook
from traitlets.config import Config

from cs336_alignment.grading.late import DAY, LateDays, days_late, days_to_pay, penalty, read_extensions, without_effect
from cs336_alignment.paths import course_root

DUE = datetime(2026, 3, 1, 23, 59)


@pytest.mark.parametrize(
    "seconds, extension, grace, days",
    [(0, 0, 0, 0), (1, 0, 0, 1), (DAY, 0, 0, 1), (DAY + 1, 0, 0, 2), (DAY + 1, 1, 0, 1), (DAY, 1, 0, 0), (5, 7, 0, 0)]
    + [(600, 0, 600, 0), (601, 0, 600, 1), (DAY + 1, 0, 600, 2)],
)
def test_a_started_day_counts_after_the_extension(seconds, extension, grace, days):
    assert days_late(seconds, extension, grace) == days


def test_free_days_are_used_up_in_order():
    assert days_to_pay([1, 0, 3, 2], free=3) == [0, 0, 1, 2]
    assert days_to_pay([2, 1], free=0) == [2, 1]
    assert days_to_pay([], free=3) == []


def test_a_penalty_is_never_more_than_the_score():
    assert penalty(50, 2, 10) == 10
    assert penalty(50, 30, 10) == 50
    assert penalty(50, 0, 10) == 0


def test_extensions_are_read_as_a_spreadsheet_saves_them(tmp_path):
    path = tmp_path / "extensions.csv"
    assert read_extensions(path) == {}
    path.write_bytes("\ufeffstudent,assignment,days\r\nada, a4_dpo ,3\r\n\r\n,,\r\n".encode())
    assert read_extensions(path) == {("ada", "a4_dpo"): 3}
    path.write_bytes("student,assignment,days\r\nJosé,a4_dpo,2\r\n".encode("cp1252"))
    assert read_extensions(path) == {("José", "a4_dpo"): 2}


@pytest.mark.parametrize(
    "text, message",
    [
        ("ada,a4_dpo,3\n", "first line has to be student,assignment,days"),
        ("", "first line has to be"),
        ("student;assignment;days\nada;a4_dpo;3\n", "first line has to be"),
        ("student,assignment,days\nada,a4_dpo\n", "line 2: 'ada,a4_dpo' is not of the form"),
        ("student,assignment,days\n\nada,,3\n", "line 3: 'ada,,3' is not of the form"),
        ("student,assignment,days\nada,a4_dpo,-1\n", "line 2: '-1' is not a whole number of days"),
        ("student,assignment,days\nada,a4_dpo,two\n", "line 2: 'two' is not a whole"),
        ("student,assignment,days\nada,a4_dpo," + "9" * 5000, "line 2: '999+' is not a whole"),
        ('student,assignment,days\n"ada' + "x" * 200_000, "extensions.csv, line 2: field larger than"),
        ("student,assignment,days\nada,a4_dpo,1\nada,a4_dpo,2\n", "line 3: a second line for ada and a4_dpo"),
    ],
)
def test_a_line_that_makes_no_sense_is_named(tmp_path, text, message):
    path = tmp_path / "extensions.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_extensions(path)


@pytest.fixture
def course(tmp_path):
    """Three assignments of 100 points a week apart; ada is 1, 2 and 2 days late with 80, 60 and 50 points."""
    url = f"sqlite:///{tmp_path}/gradebook.db"
    with Gradebook(url) as gradebook:
        gradebook.add_student("ada")
        late = {"a3": (2, 50), "a1": (1, 80), "a2": (2, 60)}  # not in the order of the due dates
        for name, (days, score) in late.items():
            due = DUE + timedelta(weeks=int(name[1]))
            gradebook.add_assignment(name, duedate=due)
            gradebook.add_notebook(name, name)
            gradebook.add_grade_cell("points", name, name, max_score=100, cell_type="code")
            gradebook.add_submission(name, "ada", timestamp=due + timedelta(days=days, hours=-1))
            gradebook.find_grade("points", name, name, "ada").auto_score = score
        gradebook.db.commit()
    return tmp_path


def settle(course, assignment, **settings):
    """Grades as nbgrader does it; penalties of all assignments then."""
    url = f"sqlite:///{course}/gradebook.db"
    identity = {"notebook": assignment, "assignment": assignment, "student": "ada", "db_url": url}
    judge = LateDays(config=Config(LateDays=settings))
    judge.preprocess(nbformat.v4.new_notebook(), {"nbgrader": identity})
    with Gradebook(url) as gradebook:
        return {s.name: s.late_submission_penalty for s in gradebook.find_student("ada").submissions}


def test_nothing_is_taken_unless_the_instructor_says_so(course):
    assert settle(course, "a1") == {"a1": 0, "a2": 0, "a3": 0}


def test_in_the_gradebook_free_days_go_by_due_date_whatever_is_graded_first(course):
    wanted = {"a1": 0, "a2": 0, "a3": 10}  # five days late, four of them free: the last costs 20 % of 50
    for assignment in ("a3", "a1", "a2", "a3"):
        assert settle(course, assignment, free_days=4, percent_per_day=20.0) == wanted


def test_an_extension_moves_the_due_date_and_frees_days_for_later(course):
    (course / "extensions.csv").write_text("student,assignment,days\nada,a1,1\nbo,a1,9\nada,a9,1\n")
    assert settle(course, "a1", free_days=2, percent_per_day=20.0) == {"a1": 0, "a2": 0, "a3": 20}


def test_without_a_due_date_nothing_is_late_any_more(course):
    assert settle(course, "a1", percent_per_day=20.0) == {"a1": 16, "a2": 24, "a3": 20}
    with Gradebook(f"sqlite:///{course}/gradebook.db") as gradebook:
        gradebook.find_assignment("a2").duedate = None
        gradebook.find_submission("a2", "ada").extension = timedelta(days=1)
        gradebook.db.commit()
    assert settle(course, "a1", percent_per_day=20.0) == {"a1": 16, "a2": 0, "a3": 20}


def test_without_a_percentage_nbgraders_rule_takes_the_penalty_away_when_graded_again(course):
    settle(course, "a1", percent_per_day=20.0)
    assert settle(course, "a2") == {"a1": 16, "a2": 0, "a3": 20}


def test_an_extension_without_effect_is_named_with_what_may_be_meant():
    extensions = {("ada", "a1"): 1, ("adda", "a1"): 1, ("ada", "a1_sff"): 2, ("ada", "a3"): 1, ("ada", "a5"): 1}
    assert without_effect(extensions, ["ada", "bob"], {"a1": True, "a1_sft": True, "a3": False}, ["a5"]) == [
        "the gradebook has no student adda; did you mean ada?",
        "there is no assignment a1_sff; did you mean a1_sft?",
        "a3 has no due date in the gradebook: nobody is late, extension or not",
    ]


def test_points_that_come_later_are_counted_when_it_runs_again(course):
    settings = {"percent_per_day": 10.0}
    assert settle(course, "a1", **settings)["a1"] == 8
    with Gradebook(f"sqlite:///{course}/gradebook.db") as gradebook:
        gradebook.find_grade("points", "a1", "a1", "ada").manual_score = 100
        gradebook.db.commit()
    assert settle(course, "a1", **settings)["a1"] == 10


def test_the_courses_configuration_takes_late_days_and_feedback_counts_them_again():
    from traitlets.config.loader import PyFileConfigLoader

    config = PyFileConfigLoader("nbgrader_config.py", path=str(course_root())).load_config()
    name = "cs336_alignment.grading.late.LateDays"
    assert name in config.Autograde.autograde_preprocessors and config.GenerateFeedback.preprocessors[0] == name
    assert LateDays(config=config).percent_per_day == 0
