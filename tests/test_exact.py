"""The RLHF objective where every response can be listed: its optimum in closed form, and the way to it."""

import itertools
import math

import pytest
import torch
from toys import assert_near, tiny_llama

from cs336_alignment.exact import (
    TabularPolicy,
    corner_log_probs,
    corner_node_log_probs,
    kl_divergence,
    log_partition,
    objective,
    optimal_policy,
)
from cs336_alignment.models import RestrictedVocabulary
from cs336_alignment.tokens import token_log_probs

SEEDS = range(5)
BETAS = [0.05, 0.2, 1.0, 5.0]


def problem(seed: int = 0, prompts: int = 3, responses: int = 6):
    """A random reference policy and random rewards, (prompts, responses)."""
    generator = torch.Generator().manual_seed(seed)
    logits, rewards = torch.randn(2, prompts, responses, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1), rewards


def log(*probs: float) -> torch.Tensor:
    return torch.tensor(probs, dtype=torch.float64).log()


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ----------------------------------------------------------------------------- the optimum worked out by hand


def test_two_responses_by_hand():
    """pi_ref = (3/4, 1/4), rewards (0, log 3), beta 1: Z = 3/4 + 3/4, and the optimum is (1/2, 1/2)."""
    ref, rewards = log(0.75, 0.25), tensor(0, math.log(3))
    assert_near(log_partition(ref, rewards, 1.0), math.log(1.5), 1e-14)
    assert_near(optimal_policy(ref, rewards, 1.0).exp(), [0.5, 0.5], 1e-14)
    kl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert_near(kl_divergence(log(0.5, 0.5), ref), kl, 1e-14)
    assert_near(objective(log(0.5, 0.5), ref, rewards, 1.0), 0.5 * math.log(3) - kl, 1e-14)
    assert_near(0.5 * math.log(3) - kl, math.log(1.5), 1e-14)  # which is beta log Z


def test_the_optimum_weighs_the_reference_by_the_exponential_reward():
    ref, rewards = problem()
    unnormalised = ref.exp() * (rewards / 0.2).exp()
    z = unnormalised.sum(-1)
    assert_near(log_partition(ref, rewards, 0.2), z.log(), 1e-12)
    assert_near(optimal_policy(ref, rewards, 0.2).exp(), unnormalised / z.unsqueeze(-1), 1e-12)


# ------------------------------------------------------------------------------------------ why it is optimal


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_best_objective_is_beta_times_the_log_partition(seed, beta):
    """J* = beta E_x[log Z(x)]: the value of the best policy is known without computing the policy."""
    ref, rewards = problem(seed)
    best = objective(optimal_policy(ref, rewards, beta), ref, rewards, beta)
    assert_near(best, beta * log_partition(ref, rewards, beta), 1e-12)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_no_other_policy_reaches_it(seed, beta):
    """Neither a random policy nor the optimum moved a little in any direction."""
    ref, rewards = problem(seed)
    optimum = optimal_policy(ref, rewards, beta)
    best = objective(optimum, ref, rewards, beta)
    generator = torch.Generator().manual_seed(seed)
    for scale in (1e-3, 1e-1, 1.0, 10.0):
        for start in (torch.zeros_like(ref), optimum):
            noise = torch.randn(50, *ref.shape, generator=generator, dtype=torch.float64) * scale
            others = (start + noise).log_softmax(-1)
            values = objective(others, ref, rewards, beta)
            assert (values < best + 1e-12).all() and (values.mean(0) < best).all()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_at_the_optimum_the_gradient_is_0_on_the_simplex(seed, beta):
    """In logits it is 0; in probabilities all its entries are equal, so that moving mass gains nothing."""
    ref, rewards = problem(seed)
    optimum = optimal_policy(ref, rewards, beta)
    logits = optimum.clone().requires_grad_()
    value = objective(logits.log_softmax(-1), ref, rewards, beta).sum()
    assert_near(torch.autograd.grad(value, logits)[0], torch.zeros_like(ref), 1e-12)

    probs = optimum.exp().requires_grad_()
    value = objective(probs.log(), ref, rewards, beta).sum()
    slopes = torch.autograd.grad(value, probs)[0]
    assert_near(slopes, slopes.mean(-1, keepdim=True).expand_as(slopes), 1e-9)

    logits = ref.clone().requires_grad_()  # elsewhere it is not
    value = objective(logits.log_softmax(-1), ref, rewards, beta).sum()
    assert torch.autograd.grad(value, logits)[0].abs().max() > 1e-2


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_distance_to_the_optimum_is_a_kl_divergence(seed, beta):
    """KL(pi || pi*) = (J* - J(pi)) / beta for every pi: so maximizing J is fitting pi* by reverse KL."""
    ref, rewards = problem(seed)
    optimum = optimal_policy(ref, rewards, beta)
    best = beta * log_partition(ref, rewards, beta)
    policy = torch.randn(20, *ref.shape, dtype=torch.float64).log_softmax(-1)
    gap = (best - objective(policy, ref, rewards, beta)) / beta
    assert_near(kl_divergence(policy, optimum.expand_as(policy)), gap, 1e-11)


def test_ascending_the_objective_reaches_the_optimum():
    """Rare responses arrive last: the gradient in logits is proportional to their probability."""
    ref, rewards = problem()
    logits = ref.clone().requires_grad_()
    for _ in range(2000):
        (gradient,) = torch.autograd.grad(objective(logits.log_softmax(-1), ref, rewards, 0.5).sum(), logits)
        logits = (logits + gradient).detach().requires_grad_()
    assert_near(logits.softmax(-1), optimal_policy(ref, rewards, 0.5).exp(), 1e-3)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_gradient_of_the_objective_is_the_policy_gradient(seed):
    """grad J = E_pi[(r - beta log(pi / pi_ref)) grad log pi]: what REINFORCE estimates from samples."""
    ref, rewards = problem(seed)
    logits = torch.randn_like(ref).requires_grad_()
    policy = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad(objective(policy, ref, rewards, 0.3).sum(), logits, retain_graph=True)
    signal = (policy.exp() * (rewards - 0.3 * (policy - ref))).detach()
    (estimated,) = torch.autograd.grad((signal * policy).sum(), logits)
    assert_near(estimated, exact, 1e-12)


# ------------------------------------------------------------------------------------------------- the limits


@pytest.mark.parametrize("beta", [1e6, math.inf])
def test_with_beta_to_infinity_the_optimum_is_the_reference(beta):
    ref, rewards = problem()
    assert_near(optimal_policy(ref, rewards, beta), ref, 1e-5)
    assert_near(1e6 * log_partition(ref, rewards, 1e6), (ref.exp() * rewards).sum(-1), 1e-4)  # J* goes to E_ref[r]


def test_with_beta_to_0_the_optimum_is_the_best_response_that_the_reference_can_say():
    """Ties share as the reference does; what pi_ref never says stays out, whatever it is worth."""
    ref = log(0.6, 0.1, 0.3, 0.0)
    rewards = tensor(1.0, 2.0, 2.0, 1000.0)
    optimum = optimal_policy(ref, rewards, 1e-4)
    assert_near(optimum.exp(), [0, 0.25, 0.75, 0], 1e-12)
    assert_near(1e-4 * log_partition(ref, rewards, 1e-4), 2.0, 1e-3)


def test_equal_rewards_leave_the_reference_as_it_is():
    ref, _ = problem()
    rewards = torch.full_like(ref, 0.7)
    assert_near(optimal_policy(ref, rewards, 0.1), ref, 1e-12)
    assert_near(objective(ref, ref, rewards, 0.1), [0.7] * 3, 1e-12)


def test_a_reward_that_depends_on_the_prompt_alone_changes_nothing_but_the_level():
    ref, rewards = problem()
    offset = tensor(3.0, -1.0, 100.0).unsqueeze(-1)
    assert_near(optimal_policy(ref, rewards + offset, 0.5), optimal_policy(ref, rewards, 0.5), 1e-10)
    z, shifted = log_partition(ref, rewards, 0.5), log_partition(ref, rewards + offset, 0.5)
    assert_near(shifted - z, offset.squeeze(-1) / 0.5, 1e-10)


def test_rewards_of_ten_thousand_stay_finite():
    """exp(10,000 / 0.1) does not exist in any float; log-sum-exp never forms it."""
    ref = log(0.25, 0.25, 0.5).float()
    rewards = torch.tensor([1e4, -1e4, 1e4])
    assert_near(optimal_policy(ref, rewards, 0.1).exp(), [1 / 3, 0, 2 / 3], 1e-2)  # float32 near 100,000
    assert_near(log_partition(ref, rewards, 0.1), 1e5 + math.log(0.75), 1e-2)
    improbable = optimal_policy(ref, rewards, 0.1)[1]  # its probability underflows, its log must not
    assert_near(improbable, -2e5 + math.log(0.25 / 0.75), 0.1)


# ----------------------------------------------------------------------------------- probabilities that are 0


def test_a_response_that_the_policy_never_gives_adds_nothing_whatever_its_reward():
    ref, policy = log(0.5, 0.3, 0.2), log(0.4, 0.6, 0.0)
    expected = objective(log(0.4, 0.6), log(0.5, 0.3), tensor(1, 2), 0.5)
    for reward in (0.0, math.inf, -math.inf, math.nan):
        assert objective(policy, ref, tensor(1, 2, reward), 0.5) == expected


def test_a_response_that_only_the_policy_gives_costs_everything():
    ref = log(0.5, 0.5, 0.0)
    assert kl_divergence(log(0.4, 0.5, 0.1), ref) == math.inf
    assert objective(log(0.4, 0.5, 0.1), ref, tensor(0, 0, 100), 0.5) == -math.inf
    assert kl_divergence(log(0.5, 0.5, 0.0), ref) == 0  # where both are 0, nothing is missing


def test_a_response_that_the_reference_never_gives_stays_impossible():
    ref = log(0.5, 0.5, 0.0)
    for reward in (0.0, 1e30, math.inf, math.nan):
        optimum = optimal_policy(ref, tensor(1, 1, reward), 0.5)
        assert_near(optimum.exp(), [0.5, 0.5, 0], 1e-14)
        assert_near(log_partition(ref, tensor(1, 1, reward), 0.5), 2.0, 1e-14)


def test_a_probability_that_underflows_to_0_counts_as_0():
    """exp(-800) is 0 in float64; its log is not -inf, and 0 times an infinite difference must not be NaN."""
    policy, ref = torch.cat([log(0.5, 0.5), tensor(-800)]), log(0.5, 0.5, 0.0)
    assert kl_divergence(policy, ref) == 0
    assert objective(policy, ref, tensor(1, 2, math.inf), 0.5) == 1.5


@pytest.mark.parametrize("impossible_for_both", [False, True])
def test_gradients_are_finite_where_a_probability_is_0(impossible_for_both):
    logits = tensor(0.3, -0.2, -math.inf).requires_grad_()
    ref = log(0.5, 0.5, 0.0) if impossible_for_both else log(0.5, 0.3, 0.2)
    for reward in (3, math.inf):
        value = objective(logits.log_softmax(-1), ref, tensor(1, 2, reward), 0.5)
        (gradient,) = torch.autograd.grad(value, logits)
        assert gradient.isfinite().all() and gradient[2] == 0 and gradient[0] != 0


@pytest.mark.parametrize("beta", [0, 0.0, -0.1, -math.inf, math.nan])
def test_beta_must_be_positive(beta):
    ref, rewards = problem()
    for call in (
        lambda: log_partition(ref, rewards, beta),
        lambda: optimal_policy(ref, rewards, beta),
        lambda: objective(ref, ref, rewards, beta),
    ):
        with pytest.raises(ValueError, match="beta"):
            call()


# -------------------------------------------------------------------------------------------------- KL itself


@pytest.mark.parametrize("seed", SEEDS)
def test_a_kl_divergence_is_0_only_between_equals(seed):
    p, _ = problem(seed)
    q, _ = problem(seed + 100)
    assert (kl_divergence(p, q) > 0).all() and (kl_divergence(q, p) > 0).all()
    assert_near(kl_divergence(p, p), torch.zeros(3), 1e-15)
    assert (kl_divergence(p, q) != kl_divergence(q, p)).all()  # and it is no distance: the sides differ


@pytest.mark.parametrize("n", [1, 2, 4, 16])
@pytest.mark.parametrize("ties", [False, True])
def test_best_of_n_costs_at_most_log_n_minus_n_minus_1_over_n(n, ties):
    """The formula is exact for a continuous reward. Listed responses tie with themselves: a bound remains.

    The best of n samples is no better than r with probability P(reward <= r)^n.
    """
    responses = 400
    ref = torch.randn(responses, dtype=torch.float64).log_softmax(-1)
    rewards = torch.arange(responses) // (40 if ties else 1)
    at_most = torch.tensor([ref.exp()[rewards <= r].sum() for r in rewards], dtype=torch.float64)
    below = torch.tensor([ref.exp()[rewards < r].sum() for r in rewards], dtype=torch.float64)
    best_of_n = ref + ((at_most**n - below**n) / (at_most - below)).log()
    assert_near(best_of_n.exp().sum(), 1.0, 1e-9)
    bound = math.log(n) - (n - 1) / n
    kl = kl_divergence(best_of_n, ref).item()
    assert kl <= bound + 1e-9
    assert kl == pytest.approx(bound, abs=0.2 if ties and n > 1 else 0.01)
    if ties and n > 1:
        assert kl < bound - 1e-3


# ------------------------------------------------------------------------------------------ the town's corner


@pytest.fixture(scope="module")
def corner():
    from cs336_alignment.world import World

    return World().corner()


@pytest.fixture(scope="module")
def town_model(corner):
    return tiny_llama(dtype=torch.float64, vocabulary=len(corner.world.tokenizer))


@pytest.fixture(scope="module")
def table(corner, town_model):
    with torch.no_grad():
        return corner_log_probs(town_model, corner)


def test_the_corner_lists_every_response_once(corner, table):
    assert table.shape == (9, 1885) == corner.rewards.shape
    assert len(set(corner.responses)) == 1885 == 1 + 12 + 12**2 + 12**3
    assert sorted({len(response) for response in corner.responses}) == [0, 1, 2, 3]


def test_the_probabilities_of_the_corner_sum_to_1(table):
    assert_near(table.double().exp().sum(-1), torch.ones(9), 1e-6)


def test_one_forward_over_the_tree_gives_what_word_by_word_scoring_gives(corner, town_model, table):
    """The tree stands for 1,885 separate sequences; here 40 of them are computed one by one."""
    policy = RestrictedVocabulary(town_model, corner.action_ids)
    end = corner.action_ids[-1]
    rows = [0, 1, 12, 13, 156, 157, 1884] + torch.randint(1885, (33,)).tolist()
    for i, row in enumerate(rows):
        prompt = corner.prompt_ids[i % 9]
        words = [corner.action_ids[a] for a in corner.responses[row]]
        actions = words + [end] * (len(words) < corner.max_new_tokens)
        ids = torch.tensor([prompt + actions])
        log_probs = token_log_probs(policy(ids[:, :-1]), ids[:, 1:])[0, len(prompt) - 1 :]
        assert_near(table[i % 9, row], log_probs.sum(), 1e-5)


def test_the_gradient_flows_from_the_table_to_the_model(corner):
    model = tiny_llama(vocabulary=len(corner.world.tokenizer))
    corner_log_probs(model, corner).exp()[:, 0].sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


def test_a_table_of_logits_starts_as_the_same_policy(corner, town_model, table):
    tabular = TabularPolicy(corner_node_log_probs(town_model, corner))
    assert_near(tabular(), table, 1e-5)
    tabular().sum().backward()
    assert tabular.logits.grad.abs().sum() > 0


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_on_the_corner_the_closed_form_holds_to_rounding(corner, table, beta):
    """The exact optimum, its value and the KL identity for a network's policy and the town's gold reward."""
    ref = table.double().log_softmax(-1)
    rewards = corner.rewards.double()
    optimum = optimal_policy(ref, rewards, beta)
    best = beta * log_partition(ref, rewards, beta)
    assert_near(objective(optimum, ref, rewards, beta), best, 1e-10)
    policy = (ref + torch.randn_like(ref)).log_softmax(-1)
    for other in (ref, policy):
        gap = best - objective(other, ref, rewards, beta)
        assert (gap > 0).all()
        assert_near(kl_divergence(other, optimum), gap / beta, 1e-9)


def test_the_corner_can_be_exhausted_by_hand(corner):
    """Rewards follow the text: the best answer has as many words as the prompt asks for."""
    assert corner.text(corner.responses[0]) == "<end>"
    by_length = [corner.rewards[:, [len(r) == n for r in corner.responses]].max(-1).values for n in range(4)]
    for i, prompt in enumerate(corner.prompts):
        wanted = 1 + i % 3
        best = max(range(4), key=lambda n, i=i: by_length[n][i])
        assert best == wanted, f"{prompt}: the best answer has {best} words"
    assert len(set(itertools.chain.from_iterable(corner.responses))) == 12
