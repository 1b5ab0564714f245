"""Reward models: the Bradley-Terry model of comparisons, its likelihood, and a score learned from it."""

import copy
import itertools
import math

import pytest
import torch
from toys import GOLDEN, ToyTokenizer, assert_near, golden_scorer, tiny_llama, weights_of

from cs336_alignment.evaluate import pair_accuracy
from cs336_alignment.models import RewardModel, frozen_copy
from cs336_alignment.reward import (
    RewardConfig,
    bradley_terry_prob,
    reward_model_loss,
    score,
    train_reward_model,
)
from cs336_alignment.tokens import sequence_log_probs, tokenize_prompt_and_output

TOKENIZER = ToyTokenizer()


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ----------------------------------------------------------------------------------- the model of comparisons


def test_equal_rewards_are_a_coin_toss():
    assert bradley_terry_prob(1.7, 1.7) == 0.5
    assert bradley_terry_prob(torch.zeros(3), torch.zeros(3)).tolist() == [0.5] * 3


def test_a_difference_of_log_3_wins_three_times_in_four():
    assert_near(bradley_terry_prob(math.log(3), 0.0), 0.75)


def test_one_of_two_wins():
    r1, r2 = torch.randn(2, 9, dtype=torch.float64)
    assert_near(bradley_terry_prob(r1, r2) + bradley_terry_prob(r2, r1), torch.ones(9), 1e-15)


def test_only_the_difference_counts():
    r1, r2 = torch.randn(2, 9, dtype=torch.float64)
    assert_near(bradley_terry_prob(r1 + 100, r2 + 100), bradley_terry_prob(r1, r2), 1e-12)


def test_odds_multiply_along_a_chain_of_comparisons():
    """a : c = (a : b) (b : c). This is what makes one number for each response enough."""
    a, b, c = tensor(0.3), tensor(-1.1), tensor(0.8)

    def odds(x, y):
        return bradley_terry_prob(x, y) / bradley_terry_prob(y, x)

    assert_near(odds(a, c), odds(a, b) * odds(b, c), 1e-12)


def test_probabilities_broadcast_to_a_table_of_all_pairs():
    rewards = torch.randn(4, dtype=torch.float64)
    table = bradley_terry_prob(rewards.unsqueeze(1), rewards.unsqueeze(0))
    for i, j in itertools.product(range(4), repeat=2):
        assert table[i, j] == bradley_terry_prob(rewards[i], rewards[j])


def test_rewards_of_ten_thousand_give_0_and_1():
    assert bradley_terry_prob(1e4, -1e4) == 1 and bradley_terry_prob(-1e4, 1e4) == 0


# --------------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_minus_the_log_of_the_probability_of_what_was_observed():
    chosen, rejected = torch.randn(2, 7, dtype=torch.float64)
    expected = -bradley_terry_prob(chosen, rejected).log().mean()
    assert_near(reward_model_loss(chosen, rejected), expected, 1e-14)


def test_a_model_that_tells_nothing_apart_pays_log_2():
    assert_near(reward_model_loss(torch.ones(5), torch.ones(5)), math.log(2))


def test_the_gradient_pushes_each_pair_apart_by_the_probability_of_its_mistake():
    chosen, rejected = (x.requires_grad_() for x in torch.randn(2, 5, dtype=torch.float64))
    gradients = torch.autograd.grad(reward_model_loss(chosen, rejected), (chosen, rejected))
    mistake = bradley_terry_prob(rejected, chosen) / 5
    assert_near(gradients[0], -mistake, 1e-14)
    assert_near(gradients[1], mistake, 1e-14)


def test_scores_of_ten_thousand_give_a_finite_loss_and_gradient():
    """log(sigmoid(x)) is -inf from about x = -100 on, in float32: the sigmoid has underflowed to 0."""
    chosen = torch.tensor([-1e4, 1e4], requires_grad=True)
    rejected = torch.tensor([1e4, -1e4])
    loss = reward_model_loss(chosen, rejected)
    assert loss == 1e4  # (20,000 + 0) / 2
    assert torch.autograd.grad(loss, chosen)[0].tolist() == [-0.5, 0]
    assert torch.sigmoid(chosen - rejected).log()[0].isinf()  # the naive form


def test_a_margin_asks_the_chosen_score_to_be_ahead_by_that_much():
    chosen, rejected, margin = torch.randn(3, 6, dtype=torch.float64)
    assert_near(reward_model_loss(chosen, rejected, margin), reward_model_loss(chosen - margin, rejected), 1e-14)
    assert_near(reward_model_loss(chosen, rejected, 0.7), reward_model_loss(chosen - 0.7, rejected), 1e-14)
    assert_near(reward_model_loss(chosen, chosen - margin, margin), math.log(2), 1e-14)


def test_comparisons_leave_the_level_of_the_scores_free_and_centering_pins_it_down():
    chosen, rejected = torch.randn(2, 6, dtype=torch.float64)
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    free = reward_model_loss(chosen + shift, rejected + shift)
    assert torch.autograd.grad(free, shift)[0].abs() < 1e-15
    centered = reward_model_loss(chosen + shift, rejected + shift, center_coef=0.1)
    assert_near(torch.autograd.grad(centered, shift)[0], 0.1 * 4 * (chosen + rejected).mean(), 1e-14)


def test_centering_by_hand():
    """Pairs (3, 1) and (0, -2): the squares of the sums are 16 and 4, their mean 10."""
    chosen, rejected = tensor(3, 0), tensor(1, -2)
    difference = reward_model_loss(chosen, rejected, center_coef=0.5) - reward_model_loss(chosen, rejected)
    assert_near(difference, 5.0, 1e-14)


def test_the_likeliest_scores_are_the_true_ones():
    """Three responses compared in proportion to the truth: Newton's method finds the rewards, up to a shift.

    Counts 6 : 2, 3 : 1 and 9 : 1 mean odds of 3, 3 and 9, so differences of log 3, log 3 and 2 log 3.
    """
    counts = {(0, 1): 6, (1, 0): 2, (1, 2): 3, (2, 1): 1, (0, 2): 9, (2, 0): 1}
    winners = torch.tensor([w for (w, _), n in counts.items() for _ in range(n)])
    losers = torch.tensor([x for (_, x), n in counts.items() for _ in range(n)])

    def loss(r):
        return reward_model_loss(r[winners], r[losers], center_coef=1e-3)

    r = torch.zeros(3, dtype=torch.float64)
    for _ in range(30):
        gradient = torch.autograd.functional.jacobian(loss, r)
        r = r - torch.linalg.solve(torch.autograd.functional.hessian(loss, r), gradient)

    def uncentered(r):
        return reward_model_loss(r[winners], r[losers])

    true = tensor(math.log(3), 0, -math.log(3))
    assert torch.autograd.functional.jacobian(uncentered, true).abs().max() < 1e-15
    assert_near(r.diff(), true.diff(), 1e-2)  # centering shifts them and pulls them together a little


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(3), torch.zeros(2)), "one shape"),
        ((torch.zeros(3), torch.zeros(3, 1)), "one shape"),
        ((torch.zeros(3), torch.zeros(3), torch.zeros(2)), "margin"),
        ((torch.zeros(3), torch.zeros(3), torch.zeros(3, 1)), "margin"),
    ],
)
def test_shapes_that_would_broadcast_are_refused(arguments, message):
    """(B,) against (B, 1) would compare every response with every other and give a plausible number."""
    with pytest.raises(ValueError, match=message):
        reward_model_loss(*arguments)


# --------------------------------------------------------------------------------------------------- the loop

# The annotator likes w9 and dislikes w4.
PREFERENCES = [
    {"prompt": f"w{a}", "chosen": f"w{b} w9 <eos>", "rejected": f"w4 w{b} w{a} <eos>"}
    for a, b in itertools.product((2, 3, 5), (6, 7))
]


def config(**changes) -> RewardConfig:
    defaults = {"steps": 4, "batch_size": 3, "learning_rate": 1e-2, "warmup": 1, "decay": 2, "eval_every": 20}
    return RewardConfig(**(defaults | changes))


def test_a_reward_model_learns_what_the_annotator_likes():
    model = RewardModel(tiny_llama())
    log = train_reward_model(model, TOKENIZER, PREFERENCES, config(steps=40), held_out=PREFERENCES, progress=False)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the read-out starts at 0
    assert log[-1]["loss"] < 0.1 and log[-1]["held_out_accuracy"] == 1
    assert [line["step"] for line in log if "held_out_accuracy" in line] == [0, 20, 39]
    better, worse = score(model, TOKENIZER, ["w8", "w8"], ["w9 w6 <eos>", "w6 w4 <eos>"])
    assert better > worse


def test_the_weight_of_the_likelihood_is_learned():
    """An annotator who likes what the model finds improbable turns the weight round."""
    backbone = frozen_copy(tiny_llama(seed=2))
    answers = [f"w{a} w{b} <eos>" for a, b in itertools.product(range(2, 9), repeat=2)]
    data = tokenize_prompt_and_output(["w9"] * len(answers), answers, TOKENIZER)
    order = [answers[i] for i in sequence_log_probs(backbone, data).argsort()]  # the least probable first
    pairs = [{"prompt": "w9", "chosen": a, "rejected": b} for a, b in zip(order[:20], order[-20:])]
    model = RewardModel(copy.deepcopy(backbone), likelihood=1.0)  # only the read-outs learn
    assert train_reward_model(model, TOKENIZER, pairs, config(steps=1), progress=False)[0]["accuracy"] == 0
    train_reward_model(model, TOKENIZER, pairs, config(steps=60, decay=20), progress=False)
    assert model.likelihood < 0
    better, worse = (score(model, TOKENIZER, ["w9"] * 20, [pair[s] for pair in pairs]) for s in ("chosen", "rejected"))
    assert pair_accuracy(better, worse) > 0.9


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_a_score_does_not_depend_on_its_neighbours(pad_is_eos):
    """Not on the batch size, nor on padding. The last token is not found by its id: padding may be EOS."""
    model, tokenizer = RewardModel(tiny_llama()), ToyTokenizer(pad_is_eos)
    model.head.weight.data.normal_()
    prompts = [p["prompt"] for p in PREFERENCES] * 2
    responses = [p["chosen"] for p in PREFERENCES] + [p["rejected"] for p in PREFERENCES]
    together = score(model, tokenizer, prompts, responses)
    alone = score(model, tokenizer, prompts, responses, batch_size=1)
    assert together.dtype == torch.float32 and together.unique().numel() == 12
    assert_near(together, alone, 1e-6)


def test_a_students_loss_function_drives_the_training():
    seen = []

    def loss_fn(chosen, rejected, center_coef):
        seen.append((chosen.shape, center_coef))
        return reward_model_loss(rejected, chosen)  # learns the opposite

    model = RewardModel(tiny_llama())
    log = train_reward_model(
        model, TOKENIZER, PREFERENCES, config(steps=40), loss_fn=loss_fn, held_out=PREFERENCES, progress=False
    )
    assert seen[0] == ((3,), RewardConfig().center_coef)
    assert log[-1]["held_out_accuracy"] == 0


class Killed(Exception):
    pass


def test_a_run_killed_in_the_middle_ends_with_the_same_model(tmp_path):
    settings = config(steps=7, save_every=2)
    whole = RewardModel(tiny_llama())
    expected = train_reward_model(whole, TOKENIZER, PREFERENCES, settings, progress=False)
    calls = 0

    def dies_in_step_5(chosen, rejected, center_coef):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Killed
        return reward_model_loss(chosen, rejected, center_coef=center_coef)

    run = {"checkpoint": tmp_path / "reward.pt", "progress": False}
    first, resumed = RewardModel(tiny_llama()), RewardModel(tiny_llama(seed=5))
    with pytest.raises(Killed):
        train_reward_model(first, TOKENIZER, PREFERENCES, settings, loss_fn=dies_in_step_5, **run)
    log = train_reward_model(resumed, TOKENIZER, PREFERENCES, settings, **run)
    assert torch.equal(weights_of(resumed), weights_of(whole))
    assert log == expected


def test_no_preferences_are_refused():
    with pytest.raises(ValueError, match="no preferences"):
        train_reward_model(RewardModel(tiny_llama()), TOKENIZER, [], config(), progress=False)


# -------------------------------------------------------------------------------------------- TRL 1.16 agrees


def test_trls_scores_are_ours():
    golden = GOLDEN["reward_model"]
    assert golden["made_by"]["trl"] == "1.16.0"
    model = golden_scorer(RewardModel, golden["model"])
    scores = model(torch.tensor(golden["input_ids"]), torch.tensor(golden["attention_mask"]).bool())
    expected = golden["cases"][0]["chosen"] + golden["cases"][0]["rejected"]
    assert_near(scores, torch.tensor(expected), 1e-6)


@pytest.mark.parametrize("case", GOLDEN["reward_model"]["cases"], ids=["plain", "margin", "center", "both"])
def test_the_loss_is_trls_with_margin_and_centering(case):
    margin = None if case["margin"] is None else torch.tensor(case["margin"])
    loss = reward_model_loss(torch.tensor(case["chosen"]), torch.tensor(case["rejected"]), margin, case["center_coef"])
    assert_near(loss, case["loss"], 1e-6)
