"""The enumerable corner: its responses, the tree that computes them once, and four ways to its known optimum.

The model is untrained: what is tested is the way from wherever a policy starts. That the table sums to 1,
and that KL(pi||pi*) = (J* - J) / beta there, is in test_exact.py.
"""

import copy
import inspect
from collections import Counter
from dataclasses import replace

import pytest
import torch
from toys import assert_near, weights_of

from cs336_alignment import corner as corner_runs
from cs336_alignment.corner import (
    CornerProblem,
    FitConfig,
    PrefixTree,
    corner_ppo_config,
    exact_gradient,
    sample_pairs,
    tempered,
)
from cs336_alignment.exact import (
    TabularPolicy,
    corner_log_probs,
    corner_node_log_probs,
    kl_divergence,
    objective,
)
from cs336_alignment.generate import Samples, response_log_probs, sample
from cs336_alignment.models import Llama, ModelConfig, RestrictedVocabulary, frozen_copy
from cs336_alignment.ppo import train_ppo
from cs336_alignment.reward import bradley_terry_prob
from cs336_alignment.words import CATEGORIES, CORNER_WORDS
from cs336_alignment.world import SMALL, Corner, World

SEEDS = range(3)


@pytest.fixture(scope="module")
def corner() -> Corner:
    return World(SMALL).corner()


@pytest.fixture(scope="module")
def model(corner) -> Llama:
    """Small and in float64, with a policy far from uniform."""
    torch.manual_seed(0)
    shape = ModelConfig(
        len(corner.world.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return Llama(shape).double().requires_grad_(False)


@pytest.fixture(scope="module")
def problem(corner) -> CornerProblem:
    """The same in float32 and nearly uniform: what training starts from."""
    return CornerProblem.of(untrained(corner), corner)


def untrained(corner) -> Llama:
    torch.manual_seed(0)
    shape = ModelConfig(len(corner.world.tokenizer), hidden_size=48, intermediate_size=128, num_hidden_layers=2)
    return Llama(shape)


def teacher_forced(model, corner, prompt: int, rows: list[int]) -> Samples:
    """Responses of the table as if they had been sampled: <end> is there unless the limit cut it off."""
    ids = [[corner.action_ids[a] for a in corner.responses[row]] for row in rows]
    ids = [(row + corner.action_ids[-1:])[: corner.max_new_tokens] for row in ids]
    padded = torch.tensor([row + [0] * (corner.max_new_tokens - len(row)) for row in ids])
    mask = torch.arange(corner.max_new_tokens) < torch.tensor([len(row) for row in ids])[:, None]
    prompts = torch.tensor([corner.prompt_ids[prompt]] * len(rows))
    return Samples(prompts, torch.ones_like(prompts, dtype=torch.bool), padded, mask, mask * 0.0, mask.any(1))


# ---------------------------------------------------------------------------------------------- what it holds


def test_there_are_1885_responses_to_each_of_nine_prompts(corner):
    assert len(corner.prompts) == 9 == len(set(corner.prompts))
    assert len(corner.responses) == 1885 == len(set(corner.responses))
    assert Counter(map(len, corner.responses)) == {0: 1, 1: 12, 2: 144, 3: 1728}
    assert len({corner.text(response) for response in corner.responses}) == 1885
    assert len(set(corner.action_ids)) == 13 and corner.action_ids[-1] == corner.world.tokenizer.eos_token_id
    assert len({len(ids) for ids in corner.prompt_ids}) == 1  # the tree needs prompts of one length


def test_its_rewards_are_the_towns(corner):
    """ "name two colours": the rows of a few answers, marked by hand."""
    prompt = next(i for i, text in enumerate(corner.prompts) if "name two colours" in text)
    marked = {
        ("red", "blue"): 2,
        ("blue", "red"): 2,
        ("red",): 1,
        (): 0,
        ("red", "red"): 0.5,
        ("red", "horse"): 0,
        ("horse", "cow", "pear"): -2,
        ("red", "blue", "green"): 1.5,
        ("red", "red", "red"): 0,
    }
    for answer, reward in marked.items():
        words = tuple(CORNER_WORDS.index(word) for word in answer)
        assert corner.rewards[prompt, corner.responses.index(words)] == reward
    assert corner.rewards.max() == 2
    assert (corner.rewards == 2).sum(1).tolist() == [4, 4 * 3, 4 * 3 * 2] * 3


def test_three_words_count_as_finished(corner):
    """The length limit ends a response here, with or without <end>."""
    prompt = corner.prompts[2]
    assert "three" in prompt
    given = corner.reward([prompt] * 2, ["red blue green", "red blue green <end>"])
    assert given.tolist() == [2, 2]


@pytest.mark.parametrize("config", [None, SMALL])
def test_the_corner_is_the_same_in_towns_of_all_sizes(config, corner):
    other = (World() if config is None else World(config)).corner()
    assert other.prompt_ids == corner.prompt_ids and torch.equal(other.rewards, corner.rewards)
    assert set(CORNER_WORDS) == {w for c in ("colours", "animals", "fruits") for w in CATEGORIES[c][:4]}


# ------------------------------------------------------------------------------------------- the same numbers


def test_the_table_is_what_teacher_forcing_gives_one_by_one(corner, model):
    table = corner_log_probs(model, corner)
    assert_near(table.exp().sum(1), torch.ones(9), 1e-6)
    policy = RestrictedVocabulary(model, corner.action_ids)
    rows = [0, 1, 12, 13, 156, 157, 1884, *torch.randint(1885, (20,)).tolist()]
    for prompt in range(9):
        one_by_one = response_log_probs(policy, teacher_forced(model, corner, prompt, rows)).sum(1)
        assert_near(table[prompt, rows], one_by_one, 1e-5)
    assert table.std() > 1  # nothing near uniform, where all mistakes would look alike


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_sampling_from_the_tree_is_sampling_from_the_model(corner, model, temperature):
    plain, tree = RestrictedVocabulary(model, corner.action_ids), PrefixTree(model, corner)
    prompts = corner.prompt_ids * 20
    drawn = [
        sample(
            policy, prompts, max_new_tokens=3, eos_token_id=corner.action_ids[-1], pad_token_id=0,
            temperature=temperature, generator=torch.Generator().manual_seed(1),
        )
        for policy in (plain, tree)
    ]  # fmt: skip
    assert drawn[0].responses() == drawn[1].responses()
    assert len(set(map(tuple, drawn[0].responses()))) > (5 if temperature else 1)
    assert set(map(len, drawn[0].responses())) >= {2, 3} or temperature == 0
    assert_near(drawn[1].log_probs, drawn[0].log_probs, 1e-5)
    if temperature:
        assert_near(response_log_probs(tree, drawn[1], temperature), drawn[1].log_probs, 1e-5)


def test_samples_come_as_often_as_the_table_says(corner, model):
    """The first word and the end, over 4,000 samples of one prompt, within four standard errors."""
    tree, n = PrefixTree(model, corner), 4000
    samples = sample(
        tree, [corner.prompt_ids[4]] * n, max_new_tokens=3, eos_token_id=corner.action_ids[-1],
        pad_token_id=0, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    probs = corner_node_log_probs(model, corner)[4, 0].exp()
    first = Counter(row[0] for row in samples.responses())
    for action, p in zip(corner.action_ids, probs.tolist(), strict=True):
        assert abs(first[action] / n - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_the_trees_gradient_is_the_models(corner, model):
    """Of a weighted sum of log-probabilities of ragged responses to several prompts."""
    gradients = []
    for wrap in (lambda m: RestrictedVocabulary(m, corner.action_ids), lambda m: PrefixTree(m, corner)):
        weights = Llama(model.config).double()
        weights.load_state_dict(model.state_dict())
        policy, total = wrap(weights), 0.0
        for prompt in (0, 5):
            samples = teacher_forced(model, corner, prompt, [0, 3, 40, 156, 157, 1000, 1884])
            total = total + (response_log_probs(policy, samples).sum(1) * torch.arange(1.0, 8.0)).sum()
        total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in weights.parameters()]))
    assert gradients[0].abs().max() > 0.1
    assert_near(gradients[1], gradients[0], 1e-5)


# --------------------------------------------------------------------------------------------- the way to pi*


def test_the_gap_is_1_at_the_reference_and_0_at_the_optimum(problem):
    assert problem.gap(problem.ref_log_probs) == 1
    assert problem.gap(problem.optimum) == pytest.approx(0, abs=1e-6)
    assert problem.value(problem.ref_log_probs) == pytest.approx(
        (problem.ref_log_probs.exp() * problem.rewards).sum(1).mean().item(), abs=1e-5
    )
    halfway = (problem.ref_log_probs + problem.optimum).mul(0.5).log_softmax(-1)
    j = objective(halfway, problem.ref_log_probs, problem.rewards, problem.beta).mean()
    j_best = objective(problem.optimum, problem.ref_log_probs, problem.rewards, problem.beta).mean()
    j_ref = problem.rewards.mul(problem.ref_log_probs.exp()).sum(1).mean()
    assert problem.gap(halfway) == pytest.approx(((j_best - j) / (j_best - j_ref)).item(), abs=1e-5)


def test_a_table_reaches_the_optimum_by_the_exact_gradient(problem, corner):
    table = TabularPolicy(corner_node_log_probs(untrained(corner), corner))
    settings = FitConfig(steps=150, learning_rate=0.1, decay=100)
    policy, log = exact_gradient(table, problem, settings, progress=False)
    assert log[0]["gap"] == pytest.approx(1, abs=1e-4) and log[0]["loss"] == pytest.approx(
        -problem.value(problem.ref_log_probs).item(), abs=1e-5
    )
    assert problem.gap(policy()) < 0.003
    assert kl_divergence(policy(), problem.optimum).mean() < 0.05


def test_a_table_reaches_it_by_dpo_from_soft_labels(problem, corner):
    """P(first preferred) = sigma(r1 - r2) and pairs that cover the table: what is left is under 1 %."""
    table = TabularPolicy(corner_node_log_probs(untrained(corner), corner))
    pairs = sample_pairs(problem, [problem.ref_log_probs, problem.optimum], 40_000, seed=0)
    settings = FitConfig(steps=250, learning_rate=0.1, decay=200)
    policy, log = corner_runs.dpo(table, problem, pairs, settings, progress=False)
    assert log[0]["gap"] == pytest.approx(1, abs=1e-4)
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert problem.gap(policy().detach()) < 0.01


def test_with_another_beta_dpo_goes_to_another_optimum(problem, corner):
    table = TabularPolicy(corner_node_log_probs(untrained(corner), corner))
    pairs = sample_pairs(problem, [problem.ref_log_probs, problem.optimum], 40_000, seed=0)
    settings = FitConfig(steps=250, learning_rate=0.1, decay=200)
    policy, _ = corner_runs.dpo(table, problem, pairs, settings, beta=0.8, progress=False)
    cautious = replace(problem, beta=0.8)
    assert cautious.gap(policy().detach()) < 0.06 < 0.12 < problem.gap(policy().detach())


def test_a_network_gets_much_closer_by_each_method(problem, corner):
    """In a few seconds, from an untrained model; what a minute gives is in the demo."""
    model = untrained(corner)
    before = weights_of(model)
    pairs = sample_pairs(problem, [problem.ref_log_probs, problem.optimum], 9000, seed=0)
    settings = FitConfig(steps=20, learning_rate=4e-3, decay=10)
    ppo_settings = replace(
        corner_ppo_config(seed=0), steps=12, batch_size=288, epochs=2, learning_rate=5e-3,
        value_learning_rate=5e-3, value_warmup=2, warmup=2, decay=6, eval_every=6,
    )  # fmt: skip
    runs = {
        "exact": exact_gradient(model, problem, settings, progress=False),
        "dpo": corner_runs.dpo(model, problem, pairs, settings, progress=False),
        "ppo": corner_runs.ppo(model, problem, ppo_settings, progress=False),
    }
    for name, (policy, log) in runs.items():
        gaps = [line["gap"] for line in log if "gap" in line]
        assert gaps[0] == pytest.approx(1, abs=1e-3), name
        assert gaps[-1] < 0.55, name
        # and the gap in the log is that of the policy that came back, but for the last step of `fit`
        with torch.no_grad():
            assert problem.gap(corner_log_probs(policy, corner)) == pytest.approx(gaps[-1], abs=0.05), name
    assert torch.equal(weights_of(model), before)  # each trained a copy


def test_ppo_takes_beta_and_the_length_limit_from_the_problem(problem, corner, monkeypatch):
    seen = []
    train_ppo = corner_runs.train_ppo
    monkeypatch.setattr(corner_runs, "train_ppo", lambda *a, **k: seen.append(a[4]) or train_ppo(*a, **k))
    settings = replace(corner_ppo_config(), steps=1, batch_size=36, beta=0.0, max_new_tokens=1)
    corner_runs.ppo(untrained(corner), problem, settings, progress=False)
    assert [(config.beta, config.max_new_tokens) for config in seen] == [(problem.beta, 3)]


def test_ppo_trains_with_the_functions_it_is_given(problem, corner):
    """Each of the four is called, and a policy loss that is always 0 leaves the policy where it was."""
    names = ("rewards_fn", "advantages_fn", "policy_loss_fn", "value_loss_fn")
    defaults, called = inspect.signature(train_ppo).parameters, []

    def noting(name):
        def function(*arguments):
            called.append(name)
            result = defaults[name].default(*arguments)
            return 0.0 * result if name == "policy_loss_fn" else result

        return function

    functions = {name: noting(name) for name in names}
    settings = replace(corner_ppo_config(), steps=2, batch_size=36, value_warmup=0, epochs=1, eval_every=1)
    model = untrained(corner)
    policy, _ = corner_runs.ppo(model, problem, settings, progress=False, **functions)
    assert called == ["rewards_fn", "advantages_fn", "value_loss_fn", "policy_loss_fn"] * 2
    assert torch.equal(weights_of(policy), weights_of(model))


# ------------------------------------------------------------------------------------------------ comparisons


@pytest.mark.parametrize("seed", SEEDS)
def test_pairs_are_drawn_evenly_from_the_behaviours(problem, seed):
    """Two behaviours that never say the same: rows of the table's first and second half, equally often."""
    halves = torch.full((2, 9, 1885), -torch.inf)
    halves[0, :, :900], halves[1, :, 900:] = 0.0, 0.0
    pairs = sample_pairs(problem, list(halves.log_softmax(-1)), 9 * 400, seed)
    assert pairs.prompt.bincount().tolist() == [400] * 9
    for side in (pairs.first, pairs.second):
        assert ((side < 900).view(9, 400).sum(1) == 200).all()
    mixed = ((pairs.first < 900) != (pairs.second < 900)).double().mean()
    assert abs(mixed - 0.5) < 4 * (0.25 / 3600) ** 0.5  # the two sides are shuffled apart
    again = sample_pairs(problem, list(halves.log_softmax(-1)), 9 * 400, seed)
    assert torch.equal(again.first, pairs.first) and torch.equal(again.second, pairs.second)


def test_pairs_come_as_often_as_their_behaviour_says_them(problem):
    pairs = sample_pairs(problem, [problem.optimum], 9 * 3000, seed=0)
    best = (problem.optimum.exp() * (problem.rewards == 2)).sum(1).mean().item()
    drawn = (problem.rewards[pairs.prompt, pairs.first] == 2).double().mean().item()
    assert abs(drawn - best) < 4 * (best * (1 - best) / len(pairs.first)) ** 0.5


def test_soft_labels_are_the_probability_and_hard_ones_are_drawn_with_it(problem):
    soft = sample_pairs(problem, [problem.ref_log_probs], 9 * 1500, seed=0)
    r1, r2 = problem.rewards[soft.prompt, soft.first], problem.rewards[soft.prompt, soft.second]
    assert_near(soft.p_first, bradley_terry_prob(r1, r2))
    hard = sample_pairs(problem, [problem.ref_log_probs], 9 * 1500, seed=0, temperature=0.5)
    assert torch.equal(hard.first, soft.first)  # the same pairs, labelled otherwise
    assert set(hard.p_first.tolist()) == {0.0, 1.0}
    p = bradley_terry_prob(r1 / 0.5, r2 / 0.5)
    for low in (0.0, 0.25, 0.5, 0.75):
        bin_ = (p >= low) & (p <= low + 0.25)
        error = (p[bin_] * (1 - p[bin_])).sum().sqrt() / bin_.sum()
        assert (hard.p_first[bin_].mean() - p[bin_].mean()).abs() < 4 * error + 1e-6


def test_a_comparison_counts_once_whichever_side_comes_first(problem, corner):
    """DPO on pairs with sides and label swapped: the same loss and the same policy."""
    table = TabularPolicy(corner_node_log_probs(untrained(corner), corner))
    pairs = sample_pairs(problem, [problem.ref_log_probs], 900, seed=0, temperature=1.0)
    swapped = corner_runs.Pairs(pairs.prompt, pairs.second, pairs.first, 1 - pairs.p_first)
    settings = FitConfig(steps=5, learning_rate=0.01, decay=2)
    (one, log), (other, other_log) = (
        corner_runs.dpo(table, problem, p, settings, progress=False) for p in (pairs, swapped)
    )
    assert_near(one(), other(), 1e-4)
    assert log[-1]["loss"] == pytest.approx(other_log[-1]["loss"], abs=1e-6)
    assert log[-1]["loss"] < log[0]["loss"]


def test_a_tempered_policy_keeps_the_order_and_flattens_the_odds():
    log_probs = torch.tensor([[0.5, 0.3, 0.2], [0.98, 0.01, 0.01]], dtype=torch.float64).log()
    flat = tempered(log_probs, 2.0)
    assert_near(flat.exp().sum(-1), [1.0, 1.0], 1e-12)
    assert_near(flat[:, 0] - flat[:, 1], (log_probs[:, 0] - log_probs[:, 1]) / 2, 1e-12)
    assert_near(tempered(log_probs, 1.0), log_probs, 1e-12)


def test_only_a_frozen_tree_is_kept_and_training_forgets_it(corner, model):
    """The reference policy's tree is computed once; a policy that learns is computed anew, and after it too."""
    reference = frozen_copy(PrefixTree(model, corner))
    assert reference.tree() is reference.tree()
    learner = copy.deepcopy(reference).requires_grad_(True)
    with torch.no_grad():
        before = learner.tree()
        for weight in learner.parameters():
            weight.mul_(1.1)
        after = frozen_copy(learner).tree()
        assert (before - reference.tree()).abs().max() < 1e-12
        assert (after - learner.tree()).abs().max() < 1e-12
        assert (after - reference.tree()).abs().max() > 1e-3
