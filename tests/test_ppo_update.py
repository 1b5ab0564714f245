"""Whole PPO updates: `train_ppo` itself, from scores to the last optimizer step, ends where TRL 1.12's trainer ends.

benchmarks/golden_ppo.py computed TRL's side; trl_update.py makes ours and names TRL's peculiarities.
"""

import copy

import pytest
import torch
import trl_update

CASES = {(case["kl_estimator"], case["whiten_rewards"]): case for case in trl_update.GOLDEN["cases"]}


def test_the_golden_updates_ask_for_all_that_could_differ():
    """Four kinds; ragged responses from 1 to 6 tokens, one without EOS; sixteen steps, in which the clip is active."""
    assert trl_update.GOLDEN["made_by"]["trl"] == "1.12.0"
    assert set(CASES) == {(kind, whitened) for kind in ("k1", "k3") for whitened in (False, True)}
    for case in CASES.values():
        assert {n + 1 for n in case["sequence_lengths"]} == {1, 2, 3, 4, 5, 6}
        assert case["finished"].count(0) == 1
        assert case["responses"][case["finished"].index(0)].count(trl_update.PAD) == 0
        assert len(case["policy_losses"]) == len(case["value_losses"]) == 16
        assert case["clipped"][0] == 0 and max(case["clipped"]) > 0.5
        assert max(case["values_clipped"]) > 0.5


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: f"{kind[0]}, {'whitened' if kind[1] else 'plain'} rewards")
def test_a_whole_update_by_train_ppo_is_trls(kind):
    """Every minibatch's losses and every weight after sixteen steps, to 1e-6; the weights moved 20,000 times as far."""
    result = trl_update.compare(CASES[kind])
    assert result["optimizer_steps"] == 16 and result["largest_move_of_a_weight"] > 0.02
    for name, difference in result["largest_differences"].items():
        assert difference < 1e-6, name
    assert result["on_the_way"]["scores"] < 1e-6
    assert result["on_the_way"]["advantages"] < 1e-6
    assert result["on_the_way"]["returns"] < 3e-6  # they hold float32 log-probabilities, see trl_update.py


def losses_of(case: dict) -> torch.Tensor:
    made = trl_update.update(case)
    return torch.tensor(made["policy_losses"] + made["value_losses"], dtype=torch.float64)


PARTS = ["estimator", "whitening", "penalty", "score position", "finished", "temperature", "no clipping", "no bias"]


@pytest.mark.parametrize("part", PARTS)
def test_each_peculiarity_that_shows_is_needed(part, monkeypatch):
    """Leave one out, and the update is another: the agreement above is no accident of small numbers.

    Two are on trl_update.py's list and do not show here: a factor on the value loss, to which Adam is blind where
    nothing is clipped, and the 1e-7 of the temperature.
    """
    case = copy.deepcopy(CASES["k1", False])
    expected = torch.tensor(case["policy_losses"] + case["value_losses"], dtype=torch.float64)
    settings = trl_update.GOLDEN["settings"]
    if part == "estimator":
        case["kl_estimator"] = "k3"
    elif part == "whitening":
        case["whiten_rewards"] = True
    elif part == "penalty":
        monkeypatch.setitem(settings, "missing_eos_penalty", 0.0)
    elif part == "score position":
        monkeypatch.setattr(trl_update, "longer", lambda mask: mask)
    elif part == "finished":
        case["finished"] = [1] * len(case["finished"])
    elif part == "temperature":
        monkeypatch.setitem(settings, "temperature", 0.7001)
    elif part == "no clipping":
        monkeypatch.setattr(trl_update, "MAX_GRAD_NORM", 1.0)
    elif part == "no bias":
        monkeypatch.setattr(trl_update, "BIAS", True)
    assert (losses_of(case) - expected).abs().max() > 1e-5
