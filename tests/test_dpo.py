"""DPO: Z(x) cancels, the policy is its own reward model, and the gradient is what the paper says it is."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from toys import GOLDEN, ToyTokenizer, assert_near, golden_llama, tiny_llama, weights_of

from cs336_alignment.dpo import (
    DPOConfig,
    dpo_gradient_weight,
    dpo_loss,
    implicit_reward,
    reference_log_probs,
    train_dpo,
)
from cs336_alignment.exact import kl_divergence, log_partition, optimal_policy
from cs336_alignment.reward import bradley_terry_prob, reward_model_loss
from cs336_alignment.tokens import sequence_log_probs, tokenize_prompt_and_output

SEEDS = range(5)
BETAS = [0.1, 0.5, 2.0]
TOKENIZER = ToyTokenizer()


def problem(seed: int = 0, responses: int = 6):
    """A reference policy, a policy and rewards over the responses to one prompt, each (responses,)."""
    generator = torch.Generator().manual_seed(seed)
    ref, policy, rewards = torch.randn(3, responses, generator=generator, dtype=torch.float64)
    return ref.log_softmax(-1), policy.log_softmax(-1), rewards


def all_pairs(responses: int):
    """Indices of the first and second response of every ordered pair."""
    pairs = torch.tensor(list(itertools.permutations(range(responses), 2)))
    return pairs[:, 0], pairs[:, 1]


def four(count: int = 5, seed: int = 0):
    """policy_chosen, policy_rejected, ref_chosen, ref_rejected."""
    generator = torch.Generator().manual_seed(seed)
    return [-5 * torch.rand(count, generator=generator, dtype=torch.float64) for _ in range(4)]


# ----------------------------------------------------------------------- from the optimum to implicit rewards


@pytest.mark.parametrize("beta", BETAS)
def test_the_implicit_reward_of_the_optimal_policy_is_the_reward_up_to_beta_log_z(beta):
    ref, _, rewards = problem()
    optimum = optimal_policy(ref, rewards, beta)
    expected = rewards - beta * log_partition(ref, rewards, beta)
    assert_near(implicit_reward(optimum, ref, beta), expected, 1e-12)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_z_cancels_in_the_preference_probability(seed, beta):
    """Two implicit rewards of pi* differ as the true ones do, so nobody has to compute Z(x)."""
    ref, _, rewards = problem(seed)
    implicit = implicit_reward(optimal_policy(ref, rewards, beta), ref, beta)
    first, second = all_pairs(6)
    true = bradley_terry_prob(rewards[first], rewards[second])
    assert_near(bradley_terry_prob(implicit[first], implicit[second]), true, 1e-12)
    assert (log_partition(ref, rewards, beta) * beta).abs() > 0.01  # there was something to cancel


def test_rewards_that_differ_by_a_function_of_the_prompt_are_the_same_preference():
    ref, _, rewards = problem()
    first, second = all_pairs(6)
    losses = []
    for offset in (0.0, 7.0):
        optimum = optimal_policy(ref, rewards + offset, 0.5)
        losses.append(dpo_loss(optimum[first], optimum[second], ref[first], ref[second], 0.5))
    assert_near(losses[0], losses[1], 1e-12)


def test_dpo_is_a_reward_model_loss_on_implicit_rewards():
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = x = four()
    chosen = implicit_reward(policy_chosen, ref_chosen, 0.3)
    rejected = implicit_reward(policy_rejected, ref_rejected, 0.3)
    assert_near(dpo_loss(*x, beta=0.3), reward_model_loss(chosen, rejected), 1e-14)


# --------------------------------------------------------------------------------------------------- the loss


def test_the_loss_by_hand():
    """beta 1/2; log-ratios 2 (chosen) and -2 (rejected): h = 2, and -log sigma(2) = .1269."""
    loss = dpo_loss(*(torch.tensor([x]) for x in (-1.0, -5.0, -3.0, -3.0)), beta=0.5)
    assert_near(loss, math.log(1 + math.exp(-2)))
    assert_near(loss, 0.126928, 1e-6)


def test_a_policy_that_is_the_reference_pays_log_2():
    log_probs = four()[:2]
    for label_smoothing in (0.0, 0.3, 1.0):
        loss = dpo_loss(*log_probs, *log_probs, beta=0.5, label_smoothing=label_smoothing)
        assert_near(loss, math.log(2), 1e-14)


def test_only_the_log_ratios_count():
    """Moving policy and reference together changes nothing: text that is easy to predict is no better."""
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = four()
    shift = torch.randn(5, dtype=torch.float64)
    moved = dpo_loss(policy_chosen + shift, policy_rejected, ref_chosen + shift, ref_rejected, 0.5)
    assert_near(moved, dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, 0.5), 1e-14)


def test_the_loss_is_the_mean_over_the_pairs():
    x = four()
    single = torch.stack([dpo_loss(*(column[i : i + 1] for column in x), beta=0.5) for i in range(5)])
    assert_near(dpo_loss(*x, beta=0.5), single.mean(), 1e-14)


@pytest.mark.parametrize("wrong_by", [1e4, 1e5])
def test_log_ratios_of_ten_thousand_give_a_finite_loss_and_gradient(wrong_by):
    """A pair ranked hopelessly wrong costs |h|, one ranked right costs 0. log(sigmoid) gives inf."""
    values = torch.tensor([0.0, -wrong_by])
    x = [values.clone().requires_grad_(), values.flip(0), torch.zeros(2), torch.zeros(2)]
    for label_smoothing, slopes in ((0.0, [0.0, -1.0]), (0.25, [0.25, -0.75])):
        loss = dpo_loss(*x, beta=1.0, label_smoothing=label_smoothing)
        assert loss == wrong_by / 2
        (gradient,) = torch.autograd.grad(loss, x[0])
        assert gradient.tolist() == [slopes[0] / 2, slopes[1] / 2]
    h = x[0] - x[1]
    assert torch.sigmoid(h).log()[1].isinf()  # the naive form


def test_with_beta_to_0_nothing_is_learned_and_with_beta_to_infinity_only_the_order_counts():
    x = [column.requires_grad_() for column in four()]
    loss = dpo_loss(*x, beta=0.0)
    assert_near(loss, math.log(2), 1e-14)
    assert all((g == 0).all() for g in torch.autograd.grad(loss, x))
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = x
    margin = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    assert_near(dpo_loss(*x, beta=1e6) / 1e6, F.relu(-margin).mean(), 1e-9)


@pytest.mark.parametrize("beta", [-0.1, math.nan])
def test_beta_must_not_be_negative(beta):
    for function in (dpo_loss, dpo_gradient_weight):
        with pytest.raises(ValueError, match="beta"):
            function(*four(), beta=beta)


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("shape", [(5, 1), (1,), (4,), ()])
def test_shapes_that_would_broadcast_are_refused(position, shape):
    x = four()
    x[position] = torch.zeros(shape, dtype=torch.float64)
    for function in (dpo_loss, dpo_gradient_weight):
        with pytest.raises(ValueError, match="shape"):
            function(*x, beta=0.5)


# ----------------------------------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_is_minus_beta_over_b_times_the_weight(beta):
    """-(beta / B) w on the chosen, +(beta / B) w on the rejected log-probability: beta must not be lost."""
    policy_chosen, policy_rejected, *ref = four()
    policy = [policy_chosen.requires_grad_(), policy_rejected.requires_grad_()]
    chosen, rejected = torch.autograd.grad(dpo_loss(*policy, *ref, beta=beta), policy)
    weight = dpo_gradient_weight(*policy, *ref, beta=beta)
    assert_near(chosen, -beta / 5 * weight, 1e-14)
    assert_near(rejected, beta / 5 * weight, 1e-14)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_gradient_in_the_policys_parameters_is_the_papers_formula(seed):
    """-(beta / B) sum of w (grad log pi(y_w) - grad log pi(y_l)), term by term for a softmax policy."""
    ref, policy, _ = problem(seed)
    first, second = all_pairs(6)
    logits = policy.clone().requires_grad_()
    log_probs = logits.log_softmax(-1)
    loss = dpo_loss(log_probs[first], log_probs[second], ref[first], ref[second], 0.7)
    (gradient,) = torch.autograd.grad(loss, logits)

    expected = torch.zeros(6, dtype=torch.float64)
    for w, l in zip(first, second, strict=True):  # noqa: E741
        h = 0.7 * ((policy[w] - ref[w]) - (policy[l] - ref[l]))
        grad_log_pi = torch.eye(6, dtype=torch.float64) - policy.exp()  # row y: d log pi(y) / d logits
        expected -= 0.7 / len(first) * torch.sigmoid(-h) * (grad_log_pi[w] - grad_log_pi[l])
    assert_near(gradient, expected, 1e-14)


def test_the_gradient_of_a_networks_weights_is_the_papers_formula():
    """The same for every weight of a small Llama, with the log-probabilities of whole responses."""
    model, ref_model = tiny_llama(1, torch.float64), tiny_llama(2, torch.float64)
    batch = tokenize_prompt_and_output(
        ["w2 w3", "w4", "w2 w3", "w4"], ["w5 <eos>", "w6 w7 w8", "w5 w5 w5 <eos>", "<eos>"], TOKENIZER
    )
    policy_chosen, policy_rejected = sequence_log_probs(model, batch).chunk(2)
    ref_chosen, ref_rejected = sequence_log_probs(ref_model, batch).detach().chunk(2)
    x = (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    weights = list(model.parameters())
    gradient = torch.autograd.grad(dpo_loss(*x, beta=0.3), weights, retain_graph=True)
    w = dpo_gradient_weight(*x, beta=0.3).detach()
    surrogate = -(0.3 / 2) * (w * (policy_chosen - policy_rejected)).sum()
    for actual, expected in zip(gradient, torch.autograd.grad(surrogate, weights), strict=True):
        assert_near(actual, expected, 1e-12)


def test_the_weight_says_how_wrong_the_ranking_is():
    """1/2 at the start, towards 1 for a pair ranked wrong, towards 0 for one ranked right."""
    zero = torch.zeros(3)
    weight = dpo_gradient_weight(torch.tensor([0.0, -10.0, 10.0]), zero, zero, zero, beta=1.0)
    assert_near(weight, torch.tensor([0.5, 0.9999546, 0.0000454]))


def test_only_the_difference_is_pinned_down_so_both_log_probs_may_fall():
    """The loss falls with a falling chosen log-probability too, if the rejected one falls further."""
    policy_chosen, policy_rejected, *ref = four()
    before = dpo_loss(policy_chosen, policy_rejected, *ref, beta=0.5)
    assert dpo_loss(policy_chosen - 3, policy_rejected - 4, *ref, beta=0.5) < before


# ---------------------------------------------------------------------------- soft labels and label smoothing


def expected_loss(policy, ref, rewards, beta, temperature=1.0):
    """The loss over all pairs of responses with the annotator's probabilities as soft labels."""
    first, second = all_pairs(len(ref))
    p_first = bradley_terry_prob(rewards[first] / temperature, rewards[second] / temperature)
    return dpo_loss(policy[first], policy[second], ref[first], ref[second], beta, 1 - p_first)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_with_soft_labels_the_optimum_is_the_optimal_policy(seed, beta):
    """On pairs of full support the gradient vanishes at pi*, and every other policy pays more."""
    ref, _, rewards = problem(seed)
    optimum = optimal_policy(ref, rewards, beta)
    logits = optimum.clone().requires_grad_()
    best = expected_loss(logits.log_softmax(-1), ref, rewards, beta)
    assert_near(torch.autograd.grad(best, logits)[0], torch.zeros(6), 1e-14)
    generator = torch.Generator().manual_seed(seed)
    for scale in (0.01, 1.0, 10.0):
        for _ in range(20):
            other = optimum + scale * torch.randn(6, generator=generator, dtype=torch.float64)
            assert expected_loss(other.log_softmax(-1), ref, rewards, beta) > best


def test_minimising_dpo_on_soft_labels_reaches_the_policy_that_rl_would():
    ref, _, rewards = problem()
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = expected_loss(logits.log_softmax(-1), ref, rewards, 0.5)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert kl_divergence(logits.log_softmax(-1), optimal_policy(ref, rewards, 0.5)) < 1e-9


def test_an_annotators_temperature_divides_beta():
    """Labels of temperature T and DPO at beta / T lead to the optimum at beta: what is fitted is r / T."""
    ref, _, rewards = problem()
    logits = optimal_policy(ref, rewards, 0.6).requires_grad_()
    loss = expected_loss(logits.log_softmax(-1), ref, rewards, 0.6 / 0.3, temperature=0.3)
    assert_near(torch.autograd.grad(loss, logits)[0], torch.zeros(6), 1e-14)


def test_a_soft_label_is_the_average_over_hard_ones():
    x = four()
    swapped = [x[1], x[0], x[3], x[2]]
    for eps in (0.0, 0.2, 0.5, 1.0):
        expected = (1 - eps) * dpo_loss(*x, beta=0.5) + eps * dpo_loss(*swapped, beta=0.5)
        assert_near(dpo_loss(*x, beta=0.5, label_smoothing=eps), expected, 1e-14)


def test_each_pair_can_have_its_own_label():
    x, eps = four(), torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    single = [dpo_loss(*(c[i : i + 1] for c in x), beta=0.5, label_smoothing=eps[i].item()) for i in range(5)]
    assert_near(dpo_loss(*x, beta=0.5, label_smoothing=eps), torch.stack(single).mean(), 1e-14)


def test_smoothing_keeps_the_margin_finite():
    """Without it the best h is infinite. With eps = 1/4 it is log 3: odds of 3 : 1, and no more."""
    h = torch.linspace(0, 3, 3001, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    losses = torch.stack([dpo_loss(x.view(1), zero, zero, zero, 1.0, 0.25) for x in h])
    assert h[losses.argmin()].item() == pytest.approx(math.log(3), abs=1e-3)
    unsmoothed = torch.stack([dpo_loss(x.view(1), zero, zero, zero, 1.0) for x in h])
    assert unsmoothed.argmin() == 3000


@pytest.mark.parametrize("eps", [-0.01, 1.01, math.nan, torch.tensor([0.1, 0.1, 0.1, 0.1, 1.5])])
def test_a_label_must_be_a_probability(eps):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        dpo_loss(*four(), beta=0.5, label_smoothing=eps)


@pytest.mark.parametrize("shape", [(5, 1), (4,), (1,)])
def test_labels_must_be_one_number_or_one_a_pair(shape):
    with pytest.raises(ValueError, match="label_smoothing"):
        dpo_loss(*four(), beta=0.5, label_smoothing=torch.zeros(shape))


def test_on_the_corner_the_optimal_policy_is_stationary_for_dpo():
    """All 3.5 million pairs of the 1,885 responses to "name two animals", with the town's gold reward."""
    from cs336_alignment.world import World

    corner = World().corner()
    rewards = corner.rewards[4].double()
    ref = torch.randn(1885, dtype=torch.float64).log_softmax(-1)
    p_first = bradley_terry_prob(rewards.unsqueeze(1), rewards.unsqueeze(0)).flatten()
    gradients = {}
    for name, start in {"optimum": optimal_policy(ref, rewards, 0.2), "reference": ref}.items():
        logits = start.clone().requires_grad_()
        log_probs = logits.log_softmax(-1)
        first, second = (x.flatten() for x in torch.broadcast_tensors(log_probs.unsqueeze(1), log_probs))
        ref_first, ref_second = (x.flatten() for x in torch.broadcast_tensors(ref.unsqueeze(1), ref))
        loss = dpo_loss(first, second, ref_first, ref_second, 0.2, 1 - p_first)
        gradients[name] = torch.autograd.grad(loss, logits)[0].abs().max().item()
    assert gradients["optimum"] < 1e-12 < 1e-6 < gradients["reference"]


# --------------------------------------------------------------------------------------------------- the loop

# w9 is preferred to w4. Responses of different length, so that sums and means differ.
PREFERENCES = [
    {"prompt": f"w{a} w3", "chosen": f"w{b} w9 <eos>", "rejected": f"w4 w{b} w{a} w4 <eos>"}
    for a, b in itertools.product((2, 3, 5), (6, 7))
]


def config(**changes) -> DPOConfig:
    defaults = {"steps": 4, "batch_size": 3, "learning_rate": 3e-3, "warmup": 1, "decay": 2, "beta": 0.5}
    return DPOConfig(**(defaults | changes))


def test_training_ranks_the_pairs_and_starts_at_log_2():
    log = train_dpo(tiny_llama(), TOKENIZER, PREFERENCES, config(steps=40), progress=False)
    assert [line["step"] for line in log] == list(range(40))
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the reference is the policy as it came
    assert log[0]["margin"] == pytest.approx(0, abs=1e-6)
    assert log[-1]["loss"] < 0.2 and log[-1]["accuracy"] == 1 and log[-1]["margin"] > 1
    assert log[-1]["rejected_log_prob"] < log[0]["rejected_log_prob"]


def test_the_reference_is_computed_once_and_does_not_move():
    """With the trained policy as its own moving reference the loss would be log 2 for ever."""
    model, ref_model = tiny_llama(1), tiny_llama(2)
    before = weights_of(ref_model)
    log = train_dpo(model, TOKENIZER, PREFERENCES, config(), ref_model=ref_model, progress=False)
    assert torch.equal(weights_of(ref_model), before)
    assert abs(log[0]["loss"] - math.log(2)) > 0.01  # another reference, another start


def test_reference_log_probs_are_those_of_each_response_alone():
    model = tiny_llama(dtype=torch.float64)
    data = tokenize_prompt_and_output(
        [p["prompt"] for p in PREFERENCES], [p["rejected"] for p in PREFERENCES], TOKENIZER
    )
    expected = sequence_log_probs(model, data)
    for batch_size in (1, 4, 128):
        result = reference_log_probs(model, data, batch_size)
        assert not result.requires_grad
        assert_near(result, expected, 1e-12)


def test_soft_labels_in_the_data_reach_the_loss():
    """p_chosen goes in as label_smoothing 1 - p_chosen; a pair without one takes the configuration's."""
    data = [dict(pair) for pair in PREFERENCES]
    data[0]["p_chosen"], data[1]["p_chosen"] = 0.9, 0.25
    seen = []

    def loss_fn(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, label_smoothing):
        seen.append((beta, sorted(round(x, 6) for x in label_smoothing.tolist())))
        return dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, label_smoothing)

    settings = config(steps=1, batch_size=6, label_smoothing=0.05)
    train_dpo(tiny_llama(), TOKENIZER, data, settings, loss_fn=loss_fn, progress=False)
    assert seen == [(0.5, [0.05] * 4 + [0.1, 0.75])]


def test_with_certain_labels_the_other_way_round_it_learns_the_other_way_round():
    data = [pair | {"p_chosen": 0.0} for pair in PREFERENCES]
    log = train_dpo(tiny_llama(), TOKENIZER, data, config(steps=40), progress=False)
    assert log[-1]["accuracy"] == 0 and log[-1]["margin"] < -1


def test_a_share_of_nll_keeps_the_chosen_responses_probable():
    ends = []
    for nll_coef in (0.0, 1.0):
        settings = config(steps=40, nll_coef=nll_coef, batch_size=6)
        log = train_dpo(tiny_llama(), TOKENIZER, PREFERENCES, settings, progress=False)
        ends.append(log[-1]["chosen_log_prob"])
    assert ends[1] > ends[0] + 0.5


def test_evaluation_is_logged_on_the_steps_that_ask_for_it():
    calls = []

    def evaluate_fn(model):
        calls.append(model)
        return {"calls": len(calls)}

    model = tiny_llama()
    settings = config(steps=5, eval_every=2)
    log = train_dpo(model, TOKENIZER, PREFERENCES, settings, evaluate_fn=evaluate_fn, progress=False)
    assert [line.get("calls") for line in log] == [1, None, 2, None, 3]
    assert all(seen is model for seen in calls)


class Killed(Exception):
    pass


def test_a_run_killed_in_the_middle_ends_with_the_same_model(tmp_path):
    """The reference too: it is the policy before training, not the one in the checkpoint."""
    settings = config(steps=7, save_every=2)
    whole = tiny_llama()
    expected = train_dpo(whole, TOKENIZER, PREFERENCES, settings, progress=False)
    calls = 0

    def dies_in_step_5(*args):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Killed
        return dpo_loss(*args)

    run = {"checkpoint": tmp_path / "dpo.pt", "progress": False}
    with pytest.raises(Killed):
        train_dpo(tiny_llama(), TOKENIZER, PREFERENCES, settings, loss_fn=dies_in_step_5, **run)
    resumed = tiny_llama()
    log = train_dpo(resumed, TOKENIZER, PREFERENCES, settings, **run)
    assert torch.equal(weights_of(resumed), weights_of(whole))
    assert log == expected


def test_nothing_to_learn_from_is_refused():
    with pytest.raises(ValueError, match="no preferences"):
        train_dpo(tiny_llama(), TOKENIZER, [], config(), progress=False)
    empty = [{"prompt": "w2 w3", "chosen": "", "rejected": ""}]
    for nothing in (empty, [{"prompt": "w2", "chosen": "", "rejected": ""}]):
        with pytest.raises(ValueError, match="no response has a token"):
            train_dpo(tiny_llama(), TOKENIZER, nothing, config(), progress=False)
    with pytest.raises(ValueError, match="no response of the batch has a token"):
        train_dpo(tiny_llama(), TOKENIZER, empty + PREFERENCES[:1], config(batch_size=1, steps=2), progress=False)


@pytest.mark.parametrize("nll_coef", [0.0, 1.0])
def test_an_empty_chosen_response_is_a_response_too(nll_coef):
    """Its log-probability is 0; a mean over its tokens would be 0 / 0."""
    data = [{"prompt": "w2 w3", "chosen": "", "rejected": "w4 <eos>"}]
    model = tiny_llama()
    log = train_dpo(model, TOKENIZER, data, config(steps=10, nll_coef=nll_coef), progress=False)
    assert weights_of(model).isfinite().all()
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["chosen_log_prob"] == 0


# -------------------------------------------------------------------- TRL 1.16: where it agrees and where not

CASES = {(case["loss_type"], case["beta"], case["label_smoothing"]): case for case in GOLDEN["dpo"]["cases"]}


def golden_log_probs(case):
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    return [torch.tensor(case[name]) for name in names]


def golden_batch():
    ids = torch.tensor(GOLDEN["dpo"]["input_ids"])
    mask = torch.tensor(GOLDEN["dpo"]["completion_mask"]).bool()
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": mask[:, 1:]}


@pytest.mark.parametrize("key", [key for key in CASES if len(CASES[key]["chosen_logps"]) > 1])
def test_trls_log_probs_are_ours(key):
    """Sums over the response tokens, EOS included, of the same network on the same ragged batch."""
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = golden_log_probs(CASES[key])
    assert GOLDEN["dpo"]["made_by"]["trl"] == "1.16.0"
    for name, expected in (
        ("model", (policy_chosen, policy_rejected)),
        ("ref_model", (ref_chosen, ref_rejected)),
    ):
        log_probs = sequence_log_probs(golden_llama(GOLDEN["dpo"][name]), golden_batch())
        assert_near(log_probs, torch.cat(expected), 1e-5)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_loss_and_gradient_are_trls(beta):
    case, model = CASES["sigmoid", beta, 0.0], golden_llama(GOLDEN["dpo"]["model"])
    policy = sequence_log_probs(model, golden_batch()).chunk(2)
    loss = dpo_loss(*policy, *golden_log_probs(case)[2:], beta)
    assert_near(loss, case["loss"], 1e-6)
    loss.backward()
    weights = dict(model.named_parameters())
    for name, gradient in case["gradient"].items():
        assert_near(weights[name].grad, torch.tensor(gradient), 1e-5)


def test_trls_sigmoid_loss_ignores_label_smoothing_and_ours_does_not():
    smoothed, plain = CASES["sigmoid", 0.5, 0.2], CASES["sigmoid", 0.5, 0.0]
    assert smoothed["loss"] == plain["loss"]
    ours = dpo_loss(*golden_log_probs(smoothed), 0.5, label_smoothing=0.2)
    assert abs(ours.item() - smoothed["loss"]) > 0.1 * smoothed["loss"] * 0.2


def test_where_trl_smooths_labels_it_smooths_them_as_we_do():
    """Its `aot` loss sorts the pairs first, which does nothing to a single one."""
    case = CASES["aot", 0.5, 0.2]
    assert_near(dpo_loss(*golden_log_probs(case), 0.5, label_smoothing=0.2), case["loss"], 1e-6)


def test_trls_robust_loss_is_a_combination_of_ours():
    """((1 - eps) l(h) - eps l(-h)) / (1 - 2 eps): unbiased under flipped labels, where ours is smoothed."""
    case, eps = CASES["robust", 0.5, 0.2], 0.2
    x = golden_log_probs(case)
    right, flipped = dpo_loss(*x, 0.5), dpo_loss(*x, 0.5, label_smoothing=1.0)
    assert_near(((1 - eps) * right - eps * flipped) / (1 - 2 * eps), case["loss"], 1e-6)
    assert abs(dpo_loss(*x, 0.5, label_smoothing=eps).item() - case["loss"]) > 1e-2


def test_trls_ipo_averages_over_tokens_where_the_paper_sums():
    """(difference of log-ratios - 1 / (2 beta))^2, in TRL with log-ratios a token."""
    case = CASES["ipo", 0.5, 0.0]
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = golden_log_probs(case)
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    chosen_length, rejected_length = golden_batch()["response_mask"].sum(1).chunk(2)
    per_token = chosen / chosen_length - rejected / rejected_length
    assert_near(((per_token - 1 / (2 * 0.5)) ** 2).mean(), case["loss"], 1e-5)
    summed = ((chosen - rejected - 1 / (2 * 0.5)) ** 2).mean()
    assert abs(summed.item() - case["loss"]) > 1


def test_an_impossible_rejected_response_costs_nothing():
    """log pi(y_l) = -inf, as under a restricted vocabulary: h is inf, the loss of a certain label is 0, not NaN."""
    chosen = torch.tensor([-1.0, -2.0], requires_grad=True)
    rejected = torch.tensor([-math.inf, -3.0])
    ref = torch.tensor([-1.0, -1.0])
    loss = dpo_loss(chosen, rejected, ref, ref, 0.1)
    loss.backward()
    rest = dpo_loss(chosen[1:], rejected[1:], ref[1:], ref[1:], 0.1) / 2
    assert torch.allclose(loss, rest)
    assert chosen.grad[0] == 0 and chosen.grad[1] < 0
