"""PPO and what it is made of: policy gradients, KL estimates, shaped rewards, GAE, whitening, clipping."""

import math

import pytest
import torch
from toys import (
    EOS,
    GOLDEN,
    PAD,
    ToyTokenizer,
    assert_near,
    golden_llama,
    golden_scorer,
    tiny_llama,
    weights_of,
)

from cs336_alignment.exact import kl_divergence, objective
from cs336_alignment.generate import Samples, response_log_probs, sample
from cs336_alignment.models import ValueModel
from cs336_alignment.ppo import (
    PPOConfig,
    gae,
    kl_estimate,
    ppo_policy_loss,
    ppo_value_loss,
    reinforce_loss,
    response_values,
    shaped_rewards,
    train_ppo,
    whiten,
)

SEEDS = range(5)
TOKENIZER = ToyTokenizer()


def everywhere(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


def prefix_mask(*lengths: int, width: int | None = None) -> torch.Tensor:
    return torch.arange(width or max(lengths)) < torch.tensor(lengths).unsqueeze(1)


def two_policies(seed: int = 0, actions: int = 5):
    """Logits of a policy and log-probabilities of a reference."""
    generator = torch.Generator().manual_seed(seed)
    logits, ref = torch.randn(2, actions, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), ref.log_softmax(-1)


def expected_gradient(loss_of_action, logits):
    """The gradient of a loss of one action's log-probability, in expectation over actions sampled from pi.

    `loss_of_action(log_probs, i)` is a scalar; pi's own probabilities weigh the gradients and have none.
    """
    total = torch.zeros_like(logits)
    for i, p in enumerate(logits.detach().softmax(-1)):
        (gradient,) = torch.autograd.grad(loss_of_action(logits.log_softmax(-1), i), logits)
        total += p * gradient
    return total


# ------------------------------------------------------------------------------------------- policy gradients


def test_reinforce_is_minus_the_mean_of_log_prob_times_advantage():
    log_probs = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]])
    advantages = torch.tensor([[2.0, -1.0], [1.0, 9.0]])
    assert reinforce_loss(log_probs, advantages, prefix_mask(2, 1)) == 1.0  # -(-2 + 2 - 3) / 3


@pytest.mark.parametrize("baseline", [0.0, 3.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_its_expected_gradient_is_that_of_the_expected_reward_whatever_the_baseline(seed, baseline):
    logits, rewards = two_policies(seed)

    def loss_of_action(log_probs, i):
        return reinforce_loss(log_probs[i].view(1, 1), (rewards[i] - baseline).view(1, 1), everywhere(1, 1))

    (exact,) = torch.autograd.grad((logits.softmax(-1) * rewards).sum(), logits)
    assert_near(expected_gradient(loss_of_action, logits), -exact, 1e-14)


def test_a_baseline_lowers_the_variance():
    logits, rewards = two_policies()
    rewards, probs = rewards + 10, logits.detach().softmax(-1)
    grad_log_pi = torch.eye(5, dtype=torch.float64) - probs
    variances = []
    for baseline in (0.0, (probs * rewards).sum()):
        terms = (rewards - baseline).unsqueeze(1) * grad_log_pi
        mean = (probs.unsqueeze(1) * terms).sum(0)
        variances.append((probs.unsqueeze(1) * (terms - mean) ** 2).sum())
    assert variances[1] < 0.05 * variances[0]


# ----------------------------------------------------------------------------------------------- KL estimates


def test_the_three_estimates_by_hand():
    """pi gives the sampled token 1/2, the reference 1/4: d = log 2."""
    log_probs, ref_log_probs = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    log_2 = math.log(2)
    assert_near(kl_estimate(log_probs, ref_log_probs, "k1"), [log_2])
    assert_near(kl_estimate(log_probs, ref_log_probs, "k2"), [log_2**2 / 2])
    assert_near(kl_estimate(log_probs, ref_log_probs, "k3"), [0.5 - 1 + log_2])
    assert torch.equal(kl_estimate(log_probs, ref_log_probs), kl_estimate(log_probs, ref_log_probs, "k1"))


@pytest.mark.parametrize("seed", SEEDS)
def test_k1_and_k3_are_unbiased_and_k2_is_not(seed):
    """Expectations over samples of pi, by enumeration. With sign or ratio reversed none of this holds."""
    logits, ref = two_policies(seed)
    policy = logits.detach().log_softmax(-1)
    kl = kl_divergence(policy, ref)
    for kind in ("k1", "k3"):
        assert_near((policy.exp() * kl_estimate(policy, ref, kind)).sum(), kl, 1e-14)
        assert abs((policy.exp() * kl_estimate(ref, policy, kind)).sum() - kl) > 1e-3
    assert abs((policy.exp() * kl_estimate(policy, ref, "k2")).sum() - kl) > 1e-3


def test_the_bias_of_k2_vanishes_as_the_policies_meet():
    logits, ref = two_policies()
    direction = logits.detach().log_softmax(-1) - ref
    errors = []
    for step in (0.1, 0.01):
        policy = (ref + step * direction).log_softmax(-1)
        k2 = (policy.exp() * kl_estimate(policy, ref, "k2")).sum()
        errors.append(abs(k2 / kl_divergence(policy, ref) - 1))
    assert errors[0] < 0.1 and errors[1] < errors[0] / 5


def test_k1_can_be_negative_and_k3_cannot():
    d = torch.linspace(-5, 5, 101, dtype=torch.float64)
    zero = torch.zeros_like(d)
    assert (kl_estimate(d, zero, "k1") < 0).any()
    for kind in ("k2", "k3"):
        estimate = kl_estimate(d, zero, kind)
        assert (estimate[d != 0] > 0).all() and (estimate[d == 0] == 0).all()


def test_k3_has_less_variance_than_k1_near_the_reference():
    logits, ref = two_policies()
    policy = (ref + 0.1 * logits.detach()).log_softmax(-1)
    variances = []
    for kind in ("k1", "k3"):
        estimate = kl_estimate(policy, ref, kind)
        mean = (policy.exp() * estimate).sum()
        variances.append((policy.exp() * (estimate - mean) ** 2).sum())
    assert variances[1] < 0.1 * variances[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_as_losses_the_estimates_have_other_gradients_than_as_values(seed):
    """On samples of pi the expected gradient of k1 is 0, of k2 that of KL(pi || ref), of k3 of KL(ref || pi).

    So k1 as a loss does nothing at all, and k3, the best value of the three, follows the other KL.
    """
    logits, ref = two_policies(seed)
    reverse = torch.autograd.grad(kl_divergence(logits.log_softmax(-1), ref), logits)[0]
    forward = torch.autograd.grad(kl_divergence(ref, logits.log_softmax(-1)), logits)[0]
    assert (reverse - forward).abs().max() > 1e-2
    for kind, expected in (("k1", torch.zeros(5)), ("k2", reverse), ("k3", forward)):
        gradient = expected_gradient(lambda lp, i, kind=kind: kl_estimate(lp[i], ref[i], kind), logits)
        assert_near(gradient, expected, 1e-14)


def test_k3_keeps_its_digits_next_to_the_reference():
    """In float32 exp(-d) - 1 + d is rounding noise at d = 1e-4: the two forms side by side."""
    d = torch.tensor([1e-4, -1e-4, 3e-4])
    exact = torch.expm1(-d.double()) + d.double()
    stable = kl_estimate(d, torch.zeros(3), "k3")
    naive = torch.exp(-d) - 1 + d
    assert ((stable - exact).abs() < 0.01 * exact).all()
    assert ((naive - exact).abs() > 0.5 * exact).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_is_finite_for_extreme_log_ratios(dtype):
    """exp(1e4) is inf, and inf times 0 would be NaN. Where the clamp acts, the gradient is that of d."""
    log_probs = torch.tensor([-1e4, 0.0], dtype=dtype, requires_grad=True)
    estimate = kl_estimate(log_probs, log_probs.detach().flip(0), "k3")
    assert estimate.isfinite().all() and estimate[0] > 1e30
    assert_near(estimate[1], 1e4 - 1, 1e-2)
    assert_near(torch.autograd.grad(estimate.sum(), log_probs)[0], [1.0, 1.0])


@pytest.mark.parametrize("kind", ["k4", "K1", "", None])
def test_an_unknown_estimate_is_refused(kind):
    with pytest.raises(ValueError, match="k1"):
        kl_estimate(torch.zeros(1), torch.zeros(1), kind)


# --------------------------------------------------------------------------------------------- shaped rewards


def test_the_score_stands_on_the_last_response_token_of_each_row():
    """Four rows of 3, 1, 0 and 2 tokens: one hits the length limit, one is empty and gets nothing."""
    scores = torch.tensor([10.0, 20.0, 30.0, 40.0])
    log_probs = torch.zeros(4, 3) - 1.0
    ref_log_probs = torch.zeros(4, 3) - 3.0  # the policy is 2 nats above the reference: -beta * 2 a token
    rewards = shaped_rewards(scores, log_probs, ref_log_probs, prefix_mask(3, 1, 0, 2), beta=0.5)
    assert rewards.tolist() == [[-1, -1, 9], [19, 0, 0], [0, 0, 0], [-1, 39, 0]]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_row_sums_to_the_score_minus_beta_times_its_log_ratio(seed):
    generator = torch.Generator().manual_seed(seed)
    log_probs, ref_log_probs = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    scores, mask = torch.randn(4, generator=generator, dtype=torch.float64), prefix_mask(6, 3, 1, 5)
    rewards = shaped_rewards(scores, log_probs, ref_log_probs, mask, 0.3)
    log_ratio = (log_probs * mask).sum(1) - (ref_log_probs * mask).sum(1)
    assert_near(rewards.sum(1), scores - 0.3 * log_ratio, 1e-13)


def test_in_expectation_a_row_sums_to_the_objective():
    """All 9 responses of two tokens to one prompt: E_pi of the sum is J(pi), what PPO is to maximize."""
    first, second = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, 3, dtype=torch.float64)
    policy, ref = (
        torch.stack([a.unsqueeze(1).expand(3, 3), b], dim=-1)
        for a, b in zip(first.log_softmax(-1), second.log_softmax(-1), strict=True)
    )
    policy, ref, scores = policy.flatten(0, 1), ref.flatten(0, 1), torch.randn(9, dtype=torch.float64)
    rewards = shaped_rewards(scores, policy, ref, everywhere(9, 2), 0.4).sum(1)
    expected = objective(policy.sum(1), ref.sum(1), scores, 0.4)
    assert_near((policy.sum(1).exp() * rewards).sum(), expected, 1e-14)


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_the_score_of_an_empty_response_is_never_used(score):
    scores = torch.tensor([1.0, score], requires_grad=True)
    rewards = shaped_rewards(scores, torch.zeros(2, 2), torch.zeros(2, 2), prefix_mask(2, 0), 0.1)
    assert rewards.tolist() == [[0, 1], [0, 0]]
    assert torch.autograd.grad(rewards.sum(), scores)[0].tolist() == [1, 0]


def test_beta_0_leaves_the_score_alone():
    rewards = shaped_rewards(torch.tensor([3.0]), torch.randn(1, 2), torch.randn(1, 2), everywhere(1, 2), 0.0)
    assert rewards.tolist() == [[0, 3]]


@pytest.mark.parametrize("shape", [(4, 1), (1,), (3,), ()])
def test_scores_must_be_one_a_response(shape):
    """(B, 1) from a reward head would broadcast: with B = T even without an error."""
    with pytest.raises(ValueError, match="scores"):
        shaped_rewards(torch.zeros(shape), torch.zeros(4, 4), torch.zeros(4, 4), everywhere(4, 4), 0.1)


# -------------------------------------------------------------------------------------------------------- GAE


def ragged(seed: int):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    return rewards, values, prefix_mask(7, 1, 0, 4, 6)


def test_gae_by_hand():
    """gamma 1/2, lambda 1/2. delta = (1 + 2 - 2, 2 + 0 - 4) = (1, -2); A = (1 - 2/4, -2)."""
    advantages, returns = gae(
        torch.tensor([[1.0, 2.0, 77.0]]), torch.tensor([[2.0, 4.0, 77.0]]), prefix_mask(2, width=3), 0.5, 0.5
    )
    assert advantages.tolist() == [[0.5, -2, 0]]
    assert returns.tolist() == [[2.5, 2, 0]]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("seed", SEEDS)
def test_gae_is_the_discounted_sum_of_td_errors(seed, gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_{t+l}: the definition, as a double loop over each row."""
    rewards, values, mask = ragged(seed)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for b in range(5):
        length = int(mask[b].sum())
        for t in range(7):
            expected = 0.0
            for s in range(t, length):
                next_value = values[b, s + 1] if s + 1 < length else 0.0
                expected += (gamma * lam) ** (s - t) * (rewards[b, s] + gamma * next_value - values[b, s])
            assert_near(advantages[b, t], expected, 1e-12)
            assert_near(returns[b, t], expected + values[b, t] if t < length else 0.0, 1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_with_lambda_0_the_advantage_is_the_td_error(seed):
    rewards, values, mask = ragged(seed)
    values = values * mask
    next_values = torch.cat([values[:, 1:], torch.zeros(5, 1)], dim=1)
    advantages, _ = gae(rewards, values, mask, 0.9, 0.0)
    assert_near(advantages, (rewards + 0.9 * next_values - values) * mask, 1e-14)


@pytest.mark.parametrize("seed", SEEDS)
def test_with_lambda_1_the_return_is_the_discounted_reward_to_go(seed):
    """The values have dropped out of the returns: a Monte Carlo estimate with a baseline."""
    rewards, values, mask = ragged(seed)
    _, returns = gae(rewards, values, mask, 0.9, 1.0)
    to_go = torch.zeros(5, dtype=torch.float64)
    for t in reversed(range(7)):
        to_go = rewards[:, t] * mask[:, t] + 0.9 * to_go
        assert_near(returns[:, t], to_go, 1e-13)
    assert_near(gae(rewards, values + 5, mask, 0.9, 1.0)[1], returns, 1e-13)


def test_with_the_true_values_every_advantage_is_0():
    rewards, _, mask = ragged(0)
    true_values = (rewards * mask).flip(1).cumsum(1).flip(1)
    for lam in (0.0, 0.5, 1.0):
        assert_near(gae(rewards, true_values, mask, 1.0, lam)[0], torch.zeros(5, 7), 1e-13)


def test_nothing_is_bootstrapped_after_the_last_token():
    """Also where the length limit cut the response off, and whatever the value model says behind it."""
    rewards, values = torch.tensor([[0.0, 3.0, 0.0]]), torch.tensor([[0.0, 1.0, 100.0]])
    for lam in (0.0, 1.0):
        assert gae(rewards, values, prefix_mask(2, width=3), 1.0, lam)[0][0, 1] == 2.0
        assert gae(rewards[:, :2], values[:, :2], everywhere(1, 2), 1.0, lam)[0][0, 1] == 2.0


@pytest.mark.parametrize("row", [[0, 1], [1, 0, 1], [0, 0, 1], [1, 1, 0, 1]])
def test_a_mask_that_is_no_prefix_is_refused(row):
    """With a hole the recursion would carry an advantage over tokens that were never sampled."""
    mask = torch.tensor([[1] * len(row), row]).bool()
    with pytest.raises(ValueError, match="prefix"):
        gae(torch.zeros(mask.shape), torch.zeros(mask.shape), mask, 1.0, 0.95)
    with pytest.raises(ValueError, match="prefix"):
        gae(torch.zeros(3), torch.zeros(3), everywhere(3), 1.0, 0.95)


# -------------------------------------------------------------------------------------------------- whitening


@pytest.mark.parametrize("seed", SEEDS)
def test_whitened_entries_have_mean_0_and_unbiased_variance_1_over_the_whole_batch(seed):
    x, _, mask = ragged(seed)
    x = 3 * x + 5
    whitened = whiten(x, mask)
    assert_near(whitened[mask].mean(), 0.0, 1e-12)
    assert_near(whitened[mask].var(unbiased=True), 1.0, 1e-7)
    assert whitened[0].mean().abs() > 1e-3  # not row by row
    kept = whiten(x, mask, shift_mean=False)
    assert_near(kept[mask].mean(), x[mask].mean(), 1e-12)
    assert_near(kept[mask] - x[mask].mean(), whitened[mask], 1e-12)


def test_whitening_by_hand():
    """(0, 2, 4): the variance is 8 / (3 - 1) = 4, so the entries become -1, 0, 1."""
    assert_near(whiten(torch.tensor([[0.0, 2.0], [4.0, 50.0]]), prefix_mask(2, 1)), [[-1, 0], [1, 0]])


def test_whitening_forgets_scale_and_shift():
    x, _, mask = ragged(0)
    assert_near(whiten(7 * x - 100, mask), whiten(x, mask), 1e-7)
    assert_near(whiten(-x, mask), -whiten(x, mask), 1e-12)


def test_equal_entries_and_single_ones_become_0_not_nan():
    for mask in (prefix_mask(2, 1), prefix_mask(1, 0, width=2)):
        x = torch.full(mask.shape, 3.0, requires_grad=True)
        whitened = whiten(x, mask)
        assert (whitened == 0).all()
        assert torch.autograd.grad(whitened.sum(), x)[0].isfinite().all()
        assert_near(whiten(x, mask, shift_mean=False), 3.0 * mask)


# -------------------------------------------------------------------------------------------- the policy loss


@pytest.mark.parametrize("clip_eps", [0.0, 0.2, 10.0, math.inf])
def test_where_the_policies_agree_the_loss_is_minus_the_mean_advantage(clip_eps):
    log_probs, advantages = torch.randn(2, 3, 4, dtype=torch.float64)
    mask = prefix_mask(4, 2, 1)
    loss = ppo_policy_loss(log_probs, log_probs, advantages, mask, clip_eps)
    assert_near(loss, -advantages[mask].mean(), 1e-14)


def test_and_its_gradient_is_that_of_reinforce():
    log_probs, advantages = torch.randn(2, 3, 4, dtype=torch.float64)
    mask, log_probs = prefix_mask(4, 2, 1), log_probs.requires_grad_()
    ppo = torch.autograd.grad(ppo_policy_loss(log_probs, log_probs.detach(), advantages, mask, 0.2), log_probs)
    reinforce = torch.autograd.grad(reinforce_loss(log_probs, advantages, mask), log_probs)
    assert_near(ppo[0], reinforce[0], 1e-14)


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",
    [
        (
            1.5,
            2.0,
            -2.4,
            0.0,
        ),  # good and already more probable: the gain is cut at 1.2, nothing pulls further
        (1.5, -2.0, 3.0, 3.0),  # bad and more probable: the full loss, pull it back
        (0.5, 2.0, -1.0, -1.0),  # good but less probable: the full loss, push it up
        (0.5, -2.0, 1.6, 0.0),  # bad and already less probable: cut at 0.8
        (1.1, 2.0, -2.2, -2.2),  # inside the clip range nothing is cut
        (0.9, -2.0, 1.8, 1.8),
    ],
)
def test_the_four_quadrants_of_clipping(ratio, advantage, loss, slope):
    """The minimum of the clipped and the plain term: only what would make the loss too good is cut off."""
    log_probs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.zeros(1, 1), torch.tensor([[advantage]])
    value = ppo_policy_loss(log_probs, old, advantages, everywhere(1, 1), clip_eps=0.2)
    assert_near(value, loss, 1e-12)
    assert_near(torch.autograd.grad(value, log_probs)[0], [[slope]], 1e-12)


def test_without_a_clip_range_it_is_importance_sampling():
    """The old policy's expectation of ratio * A is the new policy's expectation of A, by enumeration."""
    logits, old = two_policies()
    policy, advantages = logits.detach().log_softmax(-1), torch.randn(5, dtype=torch.float64)
    losses = torch.stack(
        [
            ppo_policy_loss(*(x[i].view(1, 1) for x in (policy, old, advantages)), everywhere(1, 1), math.inf)
            for i in range(5)
        ]
    )
    assert_near((old.exp() * losses).sum(), -(policy.exp() * advantages).sum(), 1e-14)


@pytest.mark.parametrize("advantage, expected", [(0.0, 0.0), (1.0, -1.2)])
def test_an_exploding_ratio_gives_no_nan(advantage, expected):
    """exp(1e4) is inf and inf * 0 is NaN: one token without advantage would wipe out the whole batch."""
    log_probs = torch.tensor([[1e4]], requires_grad=True)
    loss = ppo_policy_loss(log_probs, torch.zeros(1, 1), torch.tensor([[advantage]]), everywhere(1, 1), 0.2)
    assert_near(loss, expected)
    assert torch.autograd.grad(loss, log_probs)[0] == 0
    assert (torch.tensor(1e4).exp() * 0).isnan()  # the naive form


def test_an_exploding_ratio_of_a_bad_token_is_large_but_finite():
    loss = ppo_policy_loss(torch.tensor([[1e4]]), torch.zeros(1, 1), -torch.ones(1, 1), everywhere(1, 1), 0.2)
    assert loss.isfinite() and loss > 1e30


@pytest.mark.parametrize("clip_eps", [-0.1, math.nan])
def test_a_clip_range_must_not_be_negative(clip_eps):
    x, mask = torch.zeros(1, 1), everywhere(1, 1)
    with pytest.raises(ValueError, match="clip_eps"):
        ppo_policy_loss(x, x, x, mask, clip_eps)
    with pytest.raises(ValueError, match="clip_eps"):
        ppo_value_loss(x, x, x, mask, clip_eps)


# --------------------------------------------------------------------------------------------- the value loss


def test_without_clipping_it_is_half_the_mean_squared_error():
    values, returns = torch.tensor([[1.0, 5.0], [2.0, 9.0]]), torch.tensor([[3.0, 4.0], [2.0, 0.0]])
    loss = ppo_value_loss(values, torch.full((2, 2), 77.0), returns, prefix_mask(2, 1))
    assert_near(loss, (4 + 1 + 0) / 3 / 2)


@pytest.mark.parametrize(
    "value, target, loss, slope",
    [
        (2.0, 3.0, (0.5 - 3) ** 2 / 2, 0.0),  # moved further than eps towards the return: counts as 0.5 only
        (2.0, -1.0, (2 + 1) ** 2 / 2, 3.0),  # moved away from it: the full error, pull it back
        (0.3, 3.0, (0.3 - 3) ** 2 / 2, -2.7),  # inside the range
        (-2.0, 3.0, (-2 - 3) ** 2 / 2, -5.0),
        (-2.0, -3.0, (-0.5 + 3) ** 2 / 2, 0.0),
    ],
)
def test_clipping_takes_the_worse_of_two_errors(value, target, loss, slope):
    """The old value is 0 and eps 1/2: a step of the value model is not rewarded beyond 1/2."""
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    result = ppo_value_loss(values, torch.zeros(1, 1), torch.tensor([[target]]), everywhere(1, 1), 0.5)
    assert_near(result, loss, 1e-12)
    assert_near(torch.autograd.grad(result, values)[0], [[slope]], 1e-12)


def test_where_the_value_model_has_not_moved_clipping_changes_nothing():
    values, returns = torch.randn(2, 3, 4, dtype=torch.float64)
    mask = prefix_mask(4, 2, 0)
    plain = ppo_value_loss(values, values, returns, mask)
    for clip_eps in (0.0, 0.2, math.inf):
        assert_near(ppo_value_loss(values, values, returns, mask, clip_eps), plain, 1e-14)


# --------------------------------------------------------------------------------------------------- the loop

PROMPTS = ["w2 w3", "w4", "w5 w6 w7", "w8", "w9 w2"]


def count_w5(prompts, responses):
    """A reward that is easy to earn: one for each w5."""
    return torch.tensor([float(response.split().count("w5")) for response in responses])


def config(**changes) -> PPOConfig:
    defaults = {
        "steps": 3,
        "batch_size": 5,
        "epochs": 2,
        "minibatches": 2,
        "learning_rate": 1e-2,
        "value_warmup": 0,
        "warmup": 1,
        "decay": 2,
        "max_new_tokens": 5,
    }
    return PPOConfig(**(defaults | changes))


def test_ppo_earns_more_reward():
    model = tiny_llama()
    settings = config(steps=25, epochs=4, beta=0.01, batch_size=40)
    log = train_ppo(model, TOKENIZER, PROMPTS * 8, count_w5, settings, progress=False)
    assert [line["step"] for line in log] == list(range(25))
    assert log[0]["kl"] == pytest.approx(0, abs=1e-5)  # nothing has moved before the first step
    assert log[0]["score"] < 0.7 and log[-1]["score"] > 2 * log[0]["score"] + 1
    assert log[-1]["kl"] > 0.5


def test_a_large_beta_holds_the_policy_at_the_reference():
    kl = []
    for beta in (0.01, 10.0):
        settings = config(steps=15, epochs=4, beta=beta, batch_size=40)
        log = train_ppo(tiny_llama(), TOKENIZER, PROMPTS * 8, count_w5, settings, progress=False)
        kl.append(log[-1]["kl"])
    assert abs(kl[1]) < 0.3 * kl[0]


def sum_of_words(prompts, responses):
    """A reward that differs from response to response."""
    return torch.tensor([float(sum(TOKENIZER.encode(r, add_special_tokens=False))) for r in responses])


def recorded_run(**changes):
    """What the policy loss was called with, each time: (log_probs, old_log_probs, advantages, mask)."""
    calls = []

    def policy_loss_fn(log_probs, old_log_probs, advantages, mask, clip_eps):
        calls.append([x.detach().clone() for x in (log_probs, old_log_probs, advantages, mask)])
        return ppo_policy_loss(log_probs, old_log_probs, advantages, mask, clip_eps)

    train_ppo(
        tiny_llama(dtype=torch.float64),
        TOKENIZER,
        PROMPTS,
        sum_of_words,
        config(**changes),
        policy_loss_fn=policy_loss_fn,
        progress=False,
    )
    return calls


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_ratio_is_1_before_the_first_step_and_not_throughout_the_first_epoch(temperature):
    """The second minibatch of the first epoch already meets a policy that has moved."""
    first, second, *_ = recorded_run(steps=1, temperature=temperature)
    assert_near(first[0], first[1], 1e-6)
    assert (second[0] - second[1])[second[3]].abs().max() > 1e-3


def test_advantages_are_whitened_over_the_whole_batch_and_not_over_a_minibatch():
    calls = recorded_run(steps=1, epochs=1, minibatches=2)
    advantages = torch.cat([advantages[mask] for _, _, advantages, mask in calls])
    assert_near(advantages.mean(), 0.0, 1e-5)
    assert_near(advantages.var(), 1.0, 1e-4)
    assert abs(calls[0][2][calls[0][3]].mean()) > 1e-3


def test_the_value_model_learns_alone_at_first():
    calls = recorded_run(steps=3, value_warmup=2)
    assert len(calls) == 4  # two epochs of two minibatches, in the last iteration only


def test_a_response_without_eos_pays_the_penalty():
    scores = []

    def rewards_fn(score, *args):
        scores.append(score)
        return shaped_rewards(score, *args)

    def constant(prompts, responses):
        finished.extend(response.endswith("<eos>") for response in responses)
        return torch.ones(len(responses))

    finished: list[bool] = []
    settings = config(steps=4, missing_eos_penalty=3.0, max_new_tokens=4)
    train_ppo(tiny_llama(std=0.02), TOKENIZER, PROMPTS, constant, settings, rewards_fn=rewards_fn, progress=False)
    assert 0 < sum(finished) < len(finished)
    assert torch.cat(scores).tolist() == [1.0 if f else -2.0 for f in finished]


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_padding_with_eos_trains_the_same_policy(pad_is_eos):
    """Prompts of unequal length are padded on the left, responses on the right; masks say what is real."""
    model = tiny_llama(dtype=torch.float64)
    log = train_ppo(model, ToyTokenizer(pad_is_eos), PROMPTS, count_w5, config(), progress=False)
    other = tiny_llama(dtype=torch.float64)
    other_log = train_ppo(other, ToyTokenizer(), PROMPTS, count_w5, config(), progress=False)
    assert log == other_log and torch.equal(weights_of(model), weights_of(other))


def test_a_students_four_functions_drive_the_training_with_the_settings():
    called = {}

    def watched(function):
        def call(*args):
            called[function.__name__] = args[4:] if function is shaped_rewards else args[3:]
            return function(*args)

        return call

    settings = config(steps=1, beta=0.11, gamma=0.98, lam=0.8, clip_eps=0.3, value_clip_eps=0.7)
    train_ppo(
        tiny_llama(),
        TOKENIZER,
        PROMPTS,
        count_w5,
        settings,
        rewards_fn=watched(shaped_rewards),
        advantages_fn=watched(gae),
        policy_loss_fn=watched(ppo_policy_loss),
        value_loss_fn=watched(ppo_value_loss),
        progress=False,
    )
    assert called["shaped_rewards"] == (0.11,) and called["gae"] == (0.98, 0.8)
    assert called["ppo_policy_loss"][1:] == (0.3,) and called["ppo_value_loss"][1:] == (0.7,)


def test_the_temperature_is_the_policys_everywhere():
    """Near 0 the samples are greedy; and policy and reference agree at first, so they are read alike."""
    log_ratios, responses = [], []

    def rewards_fn(scores, log_probs, ref_log_probs, mask, beta):
        log_ratios.append((log_probs - ref_log_probs)[mask].abs().max().item())
        return shaped_rewards(scores, log_probs, ref_log_probs, mask, beta)

    def reward_fn(prompts, texts):
        responses.extend(zip(prompts, texts, strict=True))
        return torch.zeros(len(texts))

    settings = config(steps=1, temperature=0.001)
    train_ppo(tiny_llama(), TOKENIZER, PROMPTS, reward_fn, settings, rewards_fn=rewards_fn, progress=False)
    assert log_ratios == [0.0]
    for prompt, response in responses:
        greedy = sample(
            tiny_llama(),
            [TOKENIZER.encode(prompt, add_special_tokens=False)],
            max_new_tokens=5,
            eos_token_id=EOS,
            pad_token_id=PAD,
            temperature=0,
        )
        assert TOKENIZER.decode(greedy.responses()[0]) == response


def test_the_reference_and_the_value_models_backbone_are_copies():
    """Training the policy must not move what it is compared with."""
    model, ref_model, value_model = tiny_llama(), tiny_llama(2), ValueModel(tiny_llama(3))
    ref_before, value_before = weights_of(ref_model), weights_of(value_model)
    train_ppo(
        model,
        TOKENIZER,
        PROMPTS,
        count_w5,
        config(),
        ref_model=ref_model,
        value_model=value_model,
        progress=False,
    )
    assert torch.equal(weights_of(ref_model), ref_before)
    assert not torch.equal(weights_of(value_model), value_before)


class Killed(Exception):
    pass


def test_a_run_killed_in_the_middle_ends_with_the_same_model(tmp_path):
    settings = config(steps=7, save_every=2, value_warmup=1)
    whole = tiny_llama()
    expected = train_ppo(whole, TOKENIZER, PROMPTS, count_w5, settings, progress=False)
    calls = 0

    def dies_in_step_5(prompts, responses):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Killed
        return count_w5(prompts, responses)

    run = {"checkpoint": tmp_path / "ppo.pt", "progress": False}
    with pytest.raises(Killed):
        train_ppo(tiny_llama(), TOKENIZER, PROMPTS, dies_in_step_5, settings, **run)
    resumed = tiny_llama()
    log = train_ppo(resumed, TOKENIZER, PROMPTS, count_w5, settings, **run)
    assert torch.equal(weights_of(resumed), weights_of(whole))
    assert log == expected


def test_what_cannot_be_trained_on_is_refused():
    with pytest.raises(ValueError, match="no prompts"):
        train_ppo(tiny_llama(), TOKENIZER, [], count_w5, config(), progress=False)
    with pytest.raises(ValueError, match="iteration 0: reward_fn returned a score that is not finite"):
        train_ppo(
            tiny_llama(),
            TOKENIZER,
            PROMPTS,
            lambda p, r: torch.full((5,), math.nan),
            config(),
            progress=False,
        )


def test_values_are_those_of_the_state_before_each_token():
    """V_t must not see token t: the column of the last prompt token belongs to the first response token."""
    value_model = ValueModel(tiny_llama(dtype=torch.float64))
    value_model.head.weight.data.normal_()
    samples = sample(
        tiny_llama(std=0.02),
        [[2, 3], [4], [5, 6, 7]],
        max_new_tokens=4,
        eos_token_id=EOS,
        pad_token_id=PAD,
        generator=torch.Generator().manual_seed(0),
    )
    values = response_values(value_model, samples)
    assert values.shape == samples.response_ids.shape
    for b, prompt in enumerate([[2, 3], [4], [5, 6, 7]]):
        response = samples.responses()[b]
        for t in range(len(response)):
            alone = value_model(torch.tensor([prompt + response[:t]]))[0, -1]
            assert_near(values[b, t], alone, 1e-6)


# ---------------------------------------------------------------------- TRL 1.12: the same, but for two masks


def test_whitening_is_trls():
    golden = GOLDEN["whiten"]
    x, mask = torch.tensor(golden["x"]), torch.tensor(golden["mask"]).bool()
    assert golden["made_by"]["trl"] == "1.12.0"
    assert_near(whiten(x, mask)[mask], torch.tensor(golden["whitened"])[mask], 1e-6)
    kept = torch.tensor(golden["whitened_keeping_the_mean"])
    assert_near(whiten(x, mask, shift_mean=False)[mask], kept[mask], 1e-6)


UPDATE = GOLDEN["ppo_update"]
TEMPERATURE = UPDATE["settings"]["temperature"]  # .7 in TRL: sampling, old and new log-probs all have it


def golden(name: str) -> torch.Tensor:
    return torch.tensor(UPDATE[name])


def golden_masks():
    """The response tokens, and TRL's second mask, which has one position more where there is room."""
    return ~golden("padding_mask").bool(), ~golden("padding_mask_p1").bool()


def golden_samples() -> Samples:
    mask, _ = golden_masks()
    prompts = golden("queries")
    return Samples(
        prompts,
        prompts != PAD,
        golden("responses"),
        mask,
        golden("logprobs"),
        golden("contain_eos_token").bool(),
    )


def test_trl_takes_the_same_tokens_for_the_response():
    """Up to EOS included, or up to the length limit. Rows of 1 to 6 tokens, one of them never ended."""
    mask, longer = golden_masks()
    ids = golden("responses")
    for b in range(8):
        length = int(mask[b].sum())
        assert UPDATE["contain_eos_token"][b] == (ids[b, length - 1] == EOS)
        assert longer[b].sum() == min(length + 1, 6)
    assert sorted(mask.sum(1).tolist()) == [1, 1, 1, 2, 2, 3, 5, 6]


def test_old_log_probs_and_values_are_trls():
    mask, longer = golden_masks()
    samples, before = golden_samples(), UPDATE["weights_before"]
    for name, expected in (("policy", "logprobs"), ("ref_model", "ref_logprobs")):
        log_probs = response_log_probs(golden_llama(before[name]), samples, TEMPERATURE)
        assert_near(log_probs[mask], golden(expected)[mask], 1e-5)
    values = response_values(golden_scorer(ValueModel, before["value_model"]), samples)
    assert_near(values[mask], golden("values")[mask], 1e-5)


def test_kl_and_missing_eos_penalty_are_trls():
    mask, _ = golden_masks()
    assert_near(kl_estimate(golden("logprobs"), golden("ref_logprobs"))[mask], golden("kl")[mask], 1e-6)
    assert UPDATE["settings"]["missing_eos_penalty"] == 1.0  # subtracted from the score, as train_ppo does


def trl_quantities(mask):
    """Rewards, advantages and returns by our functions, with the mask that is asked for."""
    s = UPDATE["settings"]
    rewards = shaped_rewards(golden("scores"), golden("logprobs"), golden("ref_logprobs"), mask, s["kl_coef"])
    return rewards, *gae(rewards, golden("values"), mask, s["gamma"], s["lam"])


def test_rewards_advantages_and_returns_are_trls_with_trls_longer_mask():
    """TRL puts the score one position past EOS, where log-probabilities are filled with equal numbers."""
    mask, longer = golden_masks()
    rewards, advantages, returns = trl_quantities(longer)
    assert_near(rewards, golden("rewards"), 1e-6)
    assert_near(returns[longer], golden("returns")[longer], 1e-5)
    assert_near(whiten(advantages, mask), golden("advantages"), 1e-5)


def test_with_our_mask_the_score_arrives_one_position_earlier():
    """So TRL discounts the score once more, and asks the value model about one state more, after EOS."""
    mask, longer = golden_masks()
    rewards, advantages, _ = trl_quantities(mask)
    ended = longer.sum(1) > mask.sum(1)
    assert ended.sum() == 7
    last = mask.sum(1) - 1
    rows = torch.arange(8)
    difference = (rewards - golden("rewards"))[rows, last]
    assert_near(difference[ended], golden("scores")[ended], 1e-5)
    assert_near(difference[~ended], torch.zeros(1), 1e-6)
    assert (whiten(advantages, mask) - golden("advantages"))[mask].abs().max() > 0.1


def run_update(mask, longer):
    """TRL's whole update in plain lines: four epochs of two minibatches, one optimizer for both models."""
    s, before, samples = UPDATE["settings"], UPDATE["weights_before"], golden_samples()
    policy = golden_llama(before["policy"])
    value_model = golden_scorer(ValueModel, before["value_model"])
    value_model.head.bias.requires_grad_(False)  # TRL's value head has none
    _, advantages, returns = trl_quantities(longer)
    advantages = whiten(advantages, mask)
    optimizer = torch.optim.AdamW(
        [*policy.parameters(), *value_model.parameters()],
        lr=s["learning_rate"],
        betas=s["betas"],
        eps=s["eps"],
        weight_decay=s["weight_decay"],
    )
    policy_losses, value_losses, ratios = [], [], []
    for order in UPDATE["orders"]:
        for rows in torch.tensor(order).chunk(2):
            part = samples.rows(rows)
            log_probs = response_log_probs(policy, part, TEMPERATURE)
            values = response_values(value_model, part)
            old = golden("logprobs")[rows]
            policy_loss = ppo_policy_loss(log_probs, old, advantages[rows], mask[rows], s["cliprange"])
            value_loss = ppo_value_loss(
                values, golden("values")[rows], returns[rows], longer[rows], s["cliprange_value"]
            )
            optimizer.zero_grad()
            (policy_loss + s["vf_coef"] * value_loss).backward()
            optimizer.step()
            policy_losses.append(policy_loss.item())
            value_losses.append(value_loss.item())
            ratios.append((log_probs - old)[mask[rows]].exp())
    return policy, value_model, policy_losses, value_losses, ratios


def test_a_whole_update_is_trls():
    """Eight optimizer steps end at TRL's weights, with TRL's losses on the way."""
    policy, value_model, policy_losses, value_losses, ratios = run_update(*golden_masks())
    assert_near(policy_losses, golden("policy_losses").flatten(), 1e-6)
    assert_near(value_losses, golden("value_losses").flatten(), 2e-6)
    assert_near(ratios[0], torch.ones(len(ratios[0])), 1e-5)  # 1 before the first step
    assert (ratios[1] - 1).abs().max() > 1e-3  # and not throughout the first epoch
    clipped = [((r - 1).abs() > 0.2).any() for r in ratios]
    assert any(clipped), "the clip range was never left, so clipping was not compared"
    after = UPDATE["weights_after"]
    assert_near(weights_of(policy), weights_of(golden_llama(after["policy"])), 1e-6)
    expected = golden_scorer(ValueModel, after["value_model"])
    assert_near(value_model.head.weight, expected.head.weight, 1e-6)
    trained = [name for name, _ in expected.backbone.named_parameters() if name != "lm_head.weight"]
    ours, theirs = dict(value_model.backbone.named_parameters()), dict(expected.backbone.named_parameters())
    for name in trained:
        assert_near(ours[name], theirs[name], 1e-6)


def test_and_with_our_masks_it_is_another_one():
    """The two conventions are a real difference, not a matter of rounding."""
    mask, _ = golden_masks()
    policy, _, _, value_losses, _ = run_update(mask, mask)
    assert (torch.tensor(value_losses) - golden("value_losses").flatten()).abs().max() > 0.01
    assert (weights_of(policy) - weights_of(golden_llama(UPDATE["weights_after"]["policy"]))).abs().max() > 1e-3
