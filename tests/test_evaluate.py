"""Measuring: accuracy with ties, calibration, standard errors, and policies against themselves and others."""

import math

import pytest
import torch
from toys import EOS, PAD, VOCABULARY, ToyTokenizer, assert_near, tiny_llama

from cs336_alignment.evaluate import (
    evaluate_policy,
    expected_calibration_error,
    mean_and_error,
    pair_accuracy,
    refusal_rates,
    win_rate,
)
from cs336_alignment.exact import kl_divergence
from cs336_alignment.generate import response_log_probs, sample

TOKENIZER = ToyTokenizer()
PROMPTS = [f"w{a} w{b}" for a in range(2, 8) for b in (3, 9)] + ["w5"]


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ----------------------------------------------------------------------------------------- means and accuracy


def test_mean_and_standard_error_by_hand():
    """1, 2, 3, 6: mean 3, unbiased variance 14/3, divided by 4 values."""
    mean, error = mean_and_error(tensor(1, 2, 3, 6))
    assert mean == 3
    assert error == pytest.approx(math.sqrt(14 / 3 / 4))


def test_the_standard_error_is_the_spread_of_means():
    """Over 2,000 samples of 25 values, the means scatter as each sample's error says."""
    samples = torch.rand(2000, 25, dtype=torch.float64)
    means, errors = zip(*map(mean_and_error, samples), strict=True)
    spread = tensor(*means).std().item()
    assert spread == pytest.approx(math.sqrt(1 / 12 / 25), rel=0.06)
    assert math.sqrt(tensor(*errors).square().mean().item()) == pytest.approx(spread, rel=0.06)


def test_the_error_of_one_value_is_infinite_and_of_none_an_error():
    assert mean_and_error(tensor(4)) == (4, math.inf)
    with pytest.raises(ValueError, match="no values"):
        mean_and_error(tensor())


def test_integers_booleans_and_half_precision_have_means_too():
    assert mean_and_error(torch.tensor([True, False, True, True]))[0] == 0.75
    assert mean_and_error(torch.tensor([1, 2]))[0] == 1.5
    mean, _ = mean_and_error(torch.full((4000,), 3.0, dtype=torch.float16))
    assert mean == 3


def test_a_tie_counts_one_half():
    assert pair_accuracy(tensor(1, 2, 3, 4), tensor(0, 3, 3, 1)) == (1 + 0 + 0.5 + 1) / 4
    assert pair_accuracy(tensor(7, 7), tensor(7, 7)) == 0.5  # a constant is a coin


@pytest.mark.parametrize("seed", range(3))
def test_swapping_the_sides_gives_the_complement(seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randint(0, 4, (2, 50), generator=generator).double()
    assert pair_accuracy(a, b) + pair_accuracy(b, a) == pytest.approx(1)
    assert win_rate(a, b) == pair_accuracy(a, b)
    assert pair_accuracy(a.exp() * 3 - 1, b.exp() * 3 - 1) == pair_accuracy(a, b)  # only the order counts


@pytest.mark.parametrize(("chosen", "rejected"), [((1, 2), (1,)), ((), ())])
def test_pairs_need_two_sides(chosen, rejected):
    with pytest.raises(ValueError, match="as many chosen as rejected"):
        pair_accuracy(tensor(*chosen), tensor(*rejected))


# ------------------------------------------------------------------------------------------------ calibration


def test_the_calibration_error_by_hand():
    """Two bins of five. [0, .5]: confidences .5 .5, one right: 0. (.5, 1]: .9 .7 .8, one right: .8 - 1/3."""
    confidence, correct = tensor(0.5, 0.5, 0.9, 0.7, 0.8), tensor(1, 0, 1, 0, 0)
    expected = 3 / 5 * (0.8 - 1 / 3)
    assert expected_calibration_error(confidence, correct, bins=2) == pytest.approx(expected)
    assert expected_calibration_error(confidence, correct.bool(), bins=2) == pytest.approx(expected)
    # One bin for all: |3.4 - 2| / 5. Errors in two directions cancel within a bin and not between bins.
    assert expected_calibration_error(confidence, correct, bins=1) == pytest.approx(1.4 / 5)
    assert expected_calibration_error(tensor(0.1, 0.9), tensor(1, 0), bins=2) == pytest.approx(0.9)
    assert expected_calibration_error(tensor(0.1, 0.9), tensor(1, 0), bins=1) == pytest.approx(0)


def test_bins_hold_their_upper_end_and_the_first_holds_0():
    """0 and .1 share the first of ten bins, and their errors cancel there; .1 and .11 do not."""
    assert expected_calibration_error(tensor(0, 0.1), tensor(0, 0), bins=10) == pytest.approx(0.05)
    over_and_under = expected_calibration_error(tensor(0.1, 0.11), tensor(1, 0), bins=10)
    assert over_and_under == pytest.approx((0.9 + 0.11) / 2)
    together = expected_calibration_error(tensor(0.11, 0.2), tensor(1, 0), bins=10)
    assert together == pytest.approx((0.89 - 0.2) / 2)
    assert expected_calibration_error(tensor(1, 0), tensor(1, 0)) == 0


def test_who_is_right_as_often_as_claimed_is_calibrated_and_who_boasts_is_not():
    confidence = torch.rand(100_000, dtype=torch.float64)
    correct = torch.rand(100_000, dtype=torch.float64) < confidence
    assert expected_calibration_error(confidence, correct) < 0.01
    boast = (confidence + 0.2).clamp(max=1)
    assert expected_calibration_error(boast, correct) == pytest.approx((boast - confidence).mean().item(), abs=0.01)


@pytest.mark.parametrize("confidence", [(1.1, 0.5), (-0.1, 0.5), (math.nan, 0.5)])
def test_a_confidence_is_a_probability(confidence):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        expected_calibration_error(tensor(*confidence), tensor(1, 0))


def test_each_confidence_needs_its_answer():
    for confidence, correct in ((tensor(0.5), tensor(1, 0)), (tensor(), tensor())):
        with pytest.raises(ValueError, match="one correctness a confidence"):
            expected_calibration_error(confidence, correct)


# --------------------------------------------------------------------------------------------------- policies


def length_reward(prompts: list[str], responses: list[str]) -> torch.Tensor:
    """Distinguishes prompts and responses, so that a mix-up shows."""
    return torch.tensor([float(p[1]) + 10 * len(r.split()) for p, r in zip(prompts, responses, strict=True)])


def evaluation(model, prompts=PROMPTS, **kwargs):
    return evaluate_policy(model, TOKENIZER, prompts, length_reward, **({"max_new_tokens": 6} | kwargs))


def test_the_same_seed_gives_the_same_answers_and_another_one_others():
    model = tiny_llama()
    first, second, other = (evaluation(model, seed=seed) for seed in (0, 0, 1))
    assert first.responses == second.responses != other.responses
    assert torch.equal(first.rewards, second.rewards)


def test_a_policy_has_kl_0_to_itself():
    model = tiny_llama()
    assert_near(evaluation(model, ref_model=model).kl, torch.zeros(len(PROMPTS)), 1e-5)
    assert (evaluation(model).kl == 0).all()  # and without a reference


def test_what_is_reported_is_what_was_sampled():
    model = tiny_llama()
    result = evaluation(model)
    for prompt, text, length, finished, reward in zip(
        result.prompts, result.responses, result.lengths, result.finished, result.rewards, strict=True
    ):
        assert length == len(text.split()) <= 6
        assert finished == text.endswith("<eos>")
        assert reward == length_reward([prompt], [text])
        assert finished or length == 6
    assert 0 < result.finished.sum() < len(PROMPTS)  # both kinds occur


def test_the_summary_holds_means_with_their_errors():
    result = evaluation(tiny_llama(), ref_model=tiny_llama(seed=1))
    summary = result.summary()
    assert (summary["reward"], summary["reward_se"]) == mean_and_error(result.rewards)
    assert (summary["kl"], summary["kl_se"]) == mean_and_error(result.kl)
    assert summary["length"] == pytest.approx(result.lengths.double().mean().item())
    assert summary["finished"] == pytest.approx(result.finished.double().mean().item())


def test_the_kl_is_the_log_ratio_of_each_sampled_response():
    model, ref = tiny_llama(), tiny_llama(seed=1)
    result = evaluation(model, ref_model=ref, batch_size=4)
    ids = [TOKENIZER.encode(p, add_special_tokens=False) for p in PROMPTS]
    samples = []
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(ids), 4):
        part = sample(
            model,
            ids[start : start + 4],
            max_new_tokens=6,
            eos_token_id=EOS,
            pad_token_id=PAD,
            generator=generator,
        )
        samples.append((part.log_probs - response_log_probs(ref, part)).sum(1))
    assert_near(result.kl, torch.cat(samples), 1e-5)


def test_the_mean_kl_estimates_the_exact_one():
    """Responses of one token, so the exact KL is that of two softmaxes; within four standard errors."""
    model, ref = tiny_llama(std=0.6), tiny_llama(seed=1, std=0.6)
    result = evaluation(model, ["w5 w3"] * 3000, ref_model=ref, max_new_tokens=1)
    ids = torch.tensor([[5, 3]])
    exact = kl_divergence(model(ids)[0, -1].log_softmax(-1), ref(ids)[0, -1].log_softmax(-1)).item()
    mean, error = mean_and_error(result.kl)
    assert exact > 4 * error  # or 0 would pass
    assert abs(mean - exact) < 4 * error


def test_more_prompts_than_a_batch_holds():
    result = evaluation(tiny_llama(), batch_size=5)
    assert len(result.responses) == len(result.kl) == len(result.lengths) == len(PROMPTS)
    assert result.prompts == PROMPTS


class Parrot(torch.nn.Module):
    """Says the prompt's last word, then EOS: greedy answers that are known in advance."""

    vocab_size, hidden_size, max_positions = VOCABULARY, VOCABULARY, None

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(9.0))

    def new_cache(self, batch_size, max_length):
        return self

    def batch_select_indices(self, rows):
        pass

    def hidden(self, input_ids, attention_mask=None, position_ids=None, cache=None):
        words = torch.nn.functional.one_hot(input_ids, VOCABULARY).float()
        if input_ids.shape[1] == 1:  # the second step, behind a prompt of two words
            words = torch.zeros_like(words).index_fill_(2, torch.tensor([EOS]), 1.0)
        return words * self.scale

    def head(self, hidden):
        return hidden


def test_refusals_are_counted_on_each_side():
    """Refusing is saying w7: two of three harmful prompts end in it, and one of four harmless ones."""
    rates = refusal_rates(
        Parrot(), TOKENIZER, ["w2 w7", "w3 w7", "w2 w4"], ["w2 w5", "w3 w7", "w2 w2", "w4 w4"],
        lambda response: response.split()[0] == "w7", max_new_tokens=3,
    )  # fmt: skip
    assert rates == {"refusal": pytest.approx(2 / 3), "over_refusal": 1 / 4}


def test_refusal_rates_are_greedy_and_so_the_same_each_time():
    model = tiny_llama()
    arguments = (model, TOKENIZER, PROMPTS, PROMPTS[::-1], lambda response: "w4" in response)
    first = refusal_rates(*arguments, max_new_tokens=6)
    assert first == refusal_rates(*arguments, max_new_tokens=6)
    assert first["refusal"] == first["over_refusal"]  # the same prompts, in another order


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_confidence_on_an_edge_is_in_the_bin_below_in_any_precision(dtype):
    confidence, correct = torch.tensor([0.3, 0.25], dtype=dtype), torch.tensor([True, False])
    assert expected_calibration_error(confidence, correct) == pytest.approx(abs(1 - 0.55) / 2, abs=1e-6)
