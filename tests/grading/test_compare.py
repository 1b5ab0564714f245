"""What counts as different, and what a student is told about it."""

import math
import re

import pytest
import torch

from cs336_alignment.grading.compare import difference, find_mistake
from cs336_alignment.grading.probe import Other

NAMES = ("x", "y")


def told(value, wanted, **kwargs):
    found = difference({"value": value}, {"value": wanted}, 1e-4, 1e-5, NAMES, **kwargs)
    return found and found.text


@pytest.mark.parametrize(
    "value, wanted",
    [
        (torch.tensor(1.0), torch.tensor(1.0)),
        (1.0, torch.tensor(1.00001)),  # a number is a tensor without dimensions
        (torch.tensor([1.0, -math.inf]), torch.tensor([1.0, -math.inf], dtype=torch.float64)),
        (torch.tensor([1.0], dtype=torch.float64), torch.tensor([1.0])),  # float types are not compared
        ({"a": 1.0, "more": "no harm"}, {"a": torch.tensor(1.0)}),
        ([1, 2], [1, 2]),
        (torch.tensor(True), True),
        (None, None),
        ("<user> hi", "<user> hi"),
    ],
)
def test_equal_enough(value, wanted):
    assert told(value, wanted) is None


@pytest.mark.parametrize(
    "value, wanted, text",
    [
        (torch.tensor(2.0), torch.tensor(1.0), "the result is 2; it should be 1"),
        (torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0]), r"at \[1\] is 3; it should be 2 \(1 of 2 values differ\)"),
        (torch.tensor([1.0]), torch.tensor(1.0), r"shape \(1,\); it should have \(\)"),
        (torch.tensor(math.nan), torch.tensor(1.0), "is nan; it should be 1"),
        (torch.tensor(math.inf), torch.tensor(1.0), "is inf"),
        (torch.tensor(1.0), torch.tensor(-math.inf), "it should be -inf"),
        (torch.tensor([1, 0]), torch.tensor([True, False]), "type int64; it should be bool"),
        (None, torch.tensor(1.0), "is None; it should be a tensor"),
        (Other("generator"), torch.tensor(1.0), "of type generator"),
        (1.0, {"loss": torch.tensor(1.0)}, "should be a dictionary with 'loss'"),
        ({"lost": 1.0}, {"loss": 1.0}, "has no 'loss'"),
        ({"loss": 2.0}, {"loss": 1.0}, r"the result\['loss'\] is 2"),
        ([1.0], [1.0, 2.0], "a list of 1; it should be 2 values"),
        (True, torch.tensor(1.0), "is True; it should be a tensor"),
        ("a", "b", "it should be 'b'"),
    ],
)
def test_different_and_how(value, wanted, text):
    assert re.search(text, told(value, wanted))


def test_errors_on_both_sides():
    wanted = {"error": "ValueError"}
    assert difference({"error": "ValueError", "message": "any"}, wanted, 0, 0, NAMES) is None
    assert "returned a value; it should raise ValueError" in difference({"value": 1}, wanted, 0, 0, NAMES).text
    raised = {"error": "IndexError", "message": "out of range", "line": "    x[5]"}
    assert difference(raised, {"value": 1}, 0, 0, NAMES).text == "raised IndexError: out of range, at `x[5]`"


def test_gradients_are_named_by_their_argument():
    one = torch.ones(2)
    wanted = {"value": one, "gradients": [one, 2 * one]}
    assert difference({"value": one, "gradients": [one, 2 * one]}, wanted, 1e-4, 1e-5, NAMES, (0, 1)) is None
    missing = difference({"value": one, "gradients": [one, None]}, wanted, 1e-4, 1e-5, NAMES, (0, 1))
    assert "the gradient by `y` is missing" in missing.text
    wrong = difference({"value": one, "gradients": [-one, 2 * one]}, wanted, 1e-4, 1e-5, NAMES, (0, 1))
    assert "the gradient by `x` at [0] is -1; it should be 1" in wrong.text


def test_changing_an_argument_in_place_is_told():
    found = difference({"value": 1.0, "changed": [1]}, {"value": 1.0}, 0, 0, NAMES)
    assert "changes its argument `y` in place" in found.text


def test_of_a_hidden_case_no_expected_number_is_told():
    found = difference({"value": 2.0}, {"value": 1.25}, 0, 0, NAMES)
    assert "1.25" in found.text and "1.25" not in found.without_numbers


@pytest.mark.parametrize(
    "got, wanted, told_of_it",
    [
        (
            torch.empty(0, 44791),
            torch.tensor(1.0),
            "the result should have no dimensions; it has another number of them",
        ),
        (torch.empty(44791), torch.ones(2), "the result has 1 dimension, as it should, but other sizes"),
        (44791, {"loss": 1.0}, "the result is a number; it should be a dictionary with 'loss'"),
        (-4.4791, [1.0, 2.0], "the result is a number; it should be 2 values"),
        ([0] * 44791, [1.0, 2.0], "the result is of another length; it should be 2 values"),
        ({"loss": "44791"}, {"loss": torch.ones(2)}, "the result['loss'] is a text; it should be a tensor"),
        (Other("Leak44791"), torch.ones(2), "the result is of another type; it should be a tensor"),
        (torch.empty(44791, 0), torch.ones(2), "the result should have 1 dimension; it has another number of them"),
        (44791, "text", "the result is not as expected"),
        (44791, True, "the result is not as expected"),
        (2**90, torch.tensor(1.0), "the result is a far too large integer"),
        (torch.ones(2, dtype=torch.int16), torch.ones(2) > 0, "the result has another type; it should be bool"),
    ],
)
def test_of_a_hidden_case_nothing_is_told_that_the_function_chose(got, wanted, told_of_it):
    """It has seen the hidden inputs: every size, number and name that it returns can carry them."""
    assert difference({"value": got}, {"value": wanted}, 0, 0, NAMES).without_numbers == told_of_it


def found_mistake(wrong, agrees, mistaken=None):
    """`find_mistake` on tables: a row a mistake, a column a case; a mistake is wrong on every case if not said."""
    mistaken = mistaken or [[True] * len(wrong)] * len(agrees)
    return find_mistake(wrong, len(agrees), lambda m, c: agrees[m][c], lambda m, c: mistaken[m][c])


def test_nothing_wrong_needs_no_explanation():
    assert found_mistake([False, False], [[True, True]]) is None
    assert found_mistake([], []) is None


def test_the_mistake_that_explains_every_case_is_preferred_to_one_that_explains_the_first():
    assert found_mistake([True, True], [[True, False], [True, True]]) == 1


def test_of_two_mistakes_at_once_the_one_of_the_first_wrong_case_is_named():
    assert found_mistake([False, True, True], [[True, False, True], [True, True, False]]) == 1


def test_a_mistake_that_would_have_shown_where_the_student_is_right_explains_nothing():
    assert found_mistake([False, True], [[False, True]]) is None


def test_a_mistake_that_is_right_on_a_case_does_not_explain_it():
    """The student is off by 1.5 tolerances, the mistake by 0.7: each near the next, and only the first is wrong."""
    assert found_mistake([True, False], [[True, True]], [[False, True]]) is None
    assert found_mistake([True, True], [[True, False], [True, False]], [[False, True], [True, True]]) == 1


def test_mistakes_are_not_run_where_the_answer_is_known():
    asked = []

    def agrees(mistake, case):
        asked.append((mistake, case))
        return False

    assert find_mistake([True, False, False], 2, agrees, agrees) is None
    assert asked == [(0, 1), (1, 1)]
