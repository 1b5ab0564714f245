"""Every exercise: its cases accept what is right, and nothing else; the mutation test, in process, every time."""

import math
from functools import cache

import pytest

from cs336_alignment.grading.exercise import exercises
from cs336_alignment.grading.probe import decode_results, encode_results
from cs336_alignment.grading.score import ask, case_seeds, known_mistake, score
from cs336_alignment.grading.visible import VISIBLE_SEED

GRADED = [exercise for exercise in exercises() if not exercise.optional]
SECRETS = ("a", "b", "c")
each = pytest.mark.parametrize("exercise", exercises(), ids=lambda e: e.name)
each_graded = pytest.mark.parametrize("exercise", GRADED, ids=lambda e: e.name)


@cache
def questions(exercise, secret="a"):
    seeds = case_seeds(exercise, secret, "ada")
    return [ask(exercise, case, seeds[case.name]) for case in exercise.cases]


def points(exercise, function, secret="a", visible=True):
    """What a function earns, through the encoding that a kernel's answers take."""
    asked = [q for q in questions(exercise, secret) if visible or not q.case.visible]
    answers = [decode_results(encode_results(q.results(function))) for q in asked]
    return sum(q.case.points for q, results in zip(asked, answers) if q.difference(results) is None)


@each
def test_the_points_of_the_cases_are_those_of_the_exercise(exercise):
    assert math.isclose(sum(case.points for case in exercise.cases), exercise.points)
    names = [case.name for case in exercise.cases]
    assert len(set(names)) == len(names)
    assert any(case.visible for case in exercise.cases)
    assert exercise.optional or sum(not case.visible for case in exercise.cases) >= 2


def test_an_exercises_name_is_that_of_one_function():
    names = [exercise.name for exercise in exercises()]
    assert len(set(names)) == len(names)


@each
@pytest.mark.parametrize("secret", SECRETS)
def test_the_reference_and_unusual_right_answers_earn_all_points(exercise, secret):
    assert exercise.unusual
    for function in (exercise.reference, *exercise.unusual):
        seeds = case_seeds(exercise, secret, "ada")
        answers = [exercise.results(function, case, case.calls(seeds[case.name])) for case in exercise.cases]
        result = score(exercise, answers, seeds)
        assert result.points == exercise.points and not any(v.wrong for v in result.verdicts), str(result)


@each_graded
def test_every_wrong_answer_loses_points_on_hidden_cases(exercise):
    wrong = [mistake.function for mistake in exercise.mistakes] + list(exercise.wrong)
    assert len(wrong) >= 4
    hidden = sum(case.points for case in exercise.cases if not case.visible)
    for number, function in enumerate(wrong):
        for secret in SECRETS:
            assert points(exercise, function, secret, visible=False) < hidden, f"wrong answer {number} survives"


@each_graded
def test_no_constant_earns_a_point(exercise):
    def raises(*_):
        raise ValueError("always")

    number = len(exercise.parameters)
    constants = [lambda *_, value=value: value for value in (0.0, 1.0, 0.5, math.log(2), None, {}, [])]
    arguments = [lambda *args, i=i: args[i] if i < len(args) else None for i in range(number)]
    zeros = [lambda *args: args[0] * 0.0, lambda *args: args[0] * 0.0 + 1.0]
    for function in (*constants, *arguments, *zeros, raises):
        assert points(exercise, function) == 0


@each
def test_known_mistakes_are_told_by_the_visible_cases(exercise):
    """The hint that a student sees is that of the mistake they made; two that look alike have the same words."""
    asked = [ask(exercise, case, VISIBLE_SEED) for case in exercise.cases if case.visible]
    for mistake in exercise.mistakes:
        results = [list(question.results(mistake.function)) for question in asked]
        wrong = [question.difference(found) for question, found in zip(asked, results)]
        assert any(wrong), mistake.hint
        assert known_mistake(asked, results, wrong).hint == mistake.hint


def test_the_mutation_test_is_as_large_as_we_say():
    for assignment in {exercise.assignment for exercise in GRADED}:
        of_it = [exercise for exercise in GRADED if exercise.assignment == assignment]
        hinted = sum(len(e.mistakes) for e in of_it)
        wrong = hinted + sum(len(e.wrong) for e in of_it)
        unusual = sum(len(e.unusual) for e in of_it)
        assert wrong >= 40 and unusual >= 15
        # All known mistakes get their hint (above); of all wrong answers these are the share:
        assert hinted / wrong >= 0.8


@each
def test_a_student_who_asks_again_gets_the_same_cases_and_another_student_others(exercise):
    assert case_seeds(exercise, "s", "ada") == case_seeds(exercise, "s", "ada")
    assert not set(case_seeds(exercise, "s", "ada").values()) & set(case_seeds(exercise, "s", "bob").values())
    assert not set(case_seeds(exercise, "s", "ada").values()) & set(case_seeds(exercise, "t", "ada").values())
