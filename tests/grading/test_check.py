"""What a student sees: `check` in the notebook, from numbers alone."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from cs336_alignment import dpo
from cs336_alignment.grading import check
from cs336_alignment.grading.check import VISIBLE, CheckFailed
from cs336_alignment.grading.exercise import exercises
from cs336_alignment.grading.visible import text_of


def right(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0):
    h = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
    return (-(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)).mean()


def failure(name, function):
    with pytest.raises(CheckFailed) as caught:
        check(name, function)
    return str(caught.value)


@pytest.mark.parametrize("exercise", exercises(), ids=lambda e: e.name)
def test_what_is_published_is_what_the_exercises_say(exercise):
    assert (VISIBLE / f"{exercise.name}.json").read_text(encoding="utf-8") == text_of(exercise), (
        "run: python3 course.py release"
    )


def test_nothing_is_published_of_an_exercise_that_is_gone():
    assert {path.stem for path in VISIBLE.glob("*.json")} == {exercise.name for exercise in exercises()}


def test_what_is_right_passes_and_hidden_checks_are_announced(capsys):
    assert check("dpo_loss", right) is None
    said = capsys.readouterr().out
    assert "4 of 4 visible checks pass; 5 hidden ones run when it is graded." in said
    assert "all" not in said and "WRONG" not in said


def test_a_known_mistake_is_named_with_its_equation():
    said = failure("dpo_loss", lambda pc, pr, rc, rr, beta, eps=0.0: right(pr, pc, rr, rc, beta, eps))
    assert "Chosen and rejected are swapped." in said and "(12.6)" in said and "lecture 12" in said
    assert "WRONG   a few pairs" in said and "it should be" in said and "asked for: the mean over the pairs" in said


def test_who_makes_two_mistakes_is_told_of_one():
    said = failure("dpo_loss", lambda pc, pr, rc, rr, beta, eps=0.0: -F.logsigmoid(beta * ((pc - rc) - (pr - rr))))
    assert "take the mean over the batch" in said


def test_a_function_that_fails_because_of_another_says_so_and_gets_no_wrong_diagnosis():
    """log_partition overflows; optimal_policy uses it rightly."""

    def log_partition(ref_log_probs, rewards, beta):
        return (ref_log_probs.exp() * (rewards / beta).exp()).sum(-1).log()

    space = {"log_partition": log_partition}
    exec("def optimal_policy(q, r, beta):\n    return q + r / beta - log_partition(q, r, beta)[..., None]", space)
    said = failure("optimal_policy", space["optimal_policy"])
    assert "It calls your `log_partition`, which does not pass its own checks: mend that first." in said
    assert "Z where log Z belongs" not in said


def test_an_unknown_mistake_gets_no_hint():
    said = failure("dpo_loss", lambda *args: right(*args) * 1.37)
    assert "Looks like" not in said and "0 of 4" in said


def test_an_error_shows_the_students_line_and_not_ours():
    def dpo_loss(policy_chosen, *_):
        return policy_chosen[99]

    said = failure("dpo_loss", dpo_loss)
    assert "raised IndexError" in said and "at `return policy_chosen[99]`" in said
    assert "Traceback" not in said and "probe" not in said


def test_in_a_notebook_the_report_is_all_that_shows():
    with pytest.raises(CheckFailed) as caught:
        check("dpo_loss", lambda *_: None)
    assert "\n".join(caught.value._render_traceback_()) == str(caught.value)


def test_a_stub_is_not_written_yet():
    def stub(*_):
        raise NotImplementedError

    assert failure("dpo_loss", stub) == "dpo_loss is not written yet: it raises NotImplementedError."


def test_a_detached_result_is_no_nan_gradient():
    """Nothing to differentiate is another mistake than a NaN in the gradient."""
    from cs336_alignment.ppo import reinforce_loss

    said = failure(
        "reinforce_loss", lambda log_probs, advantages, mask: reinforce_loss(log_probs.detach(), advantages, mask)
    )
    assert "the gradient by `log_probs` is missing" in said and "Looks like" not in said


def test_who_calls_the_packages_function_where_it_has_no_body_is_told_so():
    def wrapped(*_):
        raise NotImplementedError("dpo_loss is what this assignment asks you to write; it is not in the package here")

    assert "dpo_loss calls the package's own function" in failure("dpo_loss", wrapped)


def test_the_packages_own_function_is_recognised():
    assert "the package's own dpo_loss" in failure("dpo_loss", dpo.dpo_loss)


def test_what_is_no_function_and_what_is_no_exercise():
    assert "not a function" in failure("dpo_loss", torch.tensor(1.0))
    with pytest.raises(ValueError, match="no exercise 'dpo_lost'; there are .*dpo_loss"):
        check("dpo_lost", right)


def test_arguments_that_are_changed_in_place_are_noticed():
    def greedy(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0):
        result = right(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, label_smoothing)
        policy_chosen.sub_(ref_chosen)
        return result

    assert "changes its argument `policy_chosen` in place" in failure("dpo_loss", greedy)


def test_published_files_hold_numbers_and_sentences_only():
    for path in VISIBLE.glob("*.json"):
        exercise = json.loads(path.read_text(encoding="utf-8"))
        assert all(set(mistake) == {"hint", "equation", "results"} for mistake in exercise["mistakes"])
        assert all("make" not in case and type(case["expected"]) is list for case in exercise["cases"])


def test_check_imports_neither_answers_nor_nbgrader():
    """What a student imports must not need what a student has not got."""
    code = (
        "import sys; from cs336_alignment.grading import check; check('implicit_reward', lambda p, r, b: b * (p - r));"
        "print([m for m in sys.modules if 'nbgrader' in m or 'grading.exercise' in m or 'grading.score' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
