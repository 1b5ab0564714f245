"""Training on the enumerable corner, where the distance to the best possible policy is known exactly.

Each function trains a copy of a policy towards the same optimum pi* and logs the gap
(J* - J(pi)) / (J* - J(pi_ref)): 1 at the start, 0 at pi*. PPO samples; the exact gradient does not; a table has
no network in the way; DPO sees only comparisons. So the differences say what each of these costs (lecture 12).
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cs336_alignment.dpo import dpo_loss
from cs336_alignment.exact import TabularPolicy, corner_log_probs, objective, optimal_policy, prefix_tree
from cs336_alignment.models import Llama, ModelConfig, ValueModel
from cs336_alignment.optimize import make_optimizer, optimizer_step, step_generator, warmup_stable_decay
from cs336_alignment.ppo import PPOConfig, train_ppo
from cs336_alignment.reward import bradley_terry_prob
from cs336_alignment.world import Corner


@dataclass
class CornerProblem:
    """Reference policy, rewards and beta, with everything that follows from them. Tables are (prompts, Y)."""

    corner: Corner
    beta: float
    ref_log_probs: Tensor
    rewards: Tensor

    @classmethod
    def of(cls, model, corner: Corner, beta: float = 0.2) -> "CornerProblem":
        with torch.no_grad():
            ref_log_probs = corner_log_probs(model, corner)
        return cls(corner, beta, ref_log_probs, corner.rewards.to(ref_log_probs.device))

    def value(self, log_probs: Tensor) -> Tensor:
        """J, averaged over the prompts (equation 9.1)."""
        return objective(log_probs, self.ref_log_probs, self.rewards, self.beta).mean()

    @property
    def optimum(self) -> Tensor:
        """log pi*, (prompts, Y)."""
        return optimal_policy(self.ref_log_probs, self.rewards, self.beta)

    def gap(self, log_probs: Tensor) -> float:
        """(J* - J) / (J* - J_ref): the share of the possible improvement that is missing (equations 9.5 and 9.6)."""
        best, start = self.value(self.optimum), self.value(self.ref_log_probs)
        return ((best - self.value(log_probs)) / (best - start)).item()


class PrefixTree(torch.nn.Module):
    """A model of the town restricted to the corner, that computes every prefix once, however many samples share it.

    The interface of `models.py`, so the package's own PPO trains it: `hidden` runs the whole prefix tree (1,458
    positions) and looks up what a row asks for. The numbers are those of the plain model with
    `RestrictedVocabulary`; a test compares them. A thousand samples then cost hardly more than a hundred.
    """

    def __init__(self, model, corner: Corner):
        super().__init__()
        self.model = model
        ids, sees = prefix_tree(corner, next(model.parameters()).device)
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("sees", sees, persistent=False)
        self.prompt_length = len(corner.prompt_ids[0])
        self.words = len(corner.action_ids) - 1
        self.register_buffer("actions", torch.tensor(corner.action_ids, device=ids.device), persistent=False)
        # action_of[token]: which word of the corner it is; 0 for all others, which nothing real ever follows.
        action_of = torch.zeros(model.vocab_size, dtype=torch.long, device=ids.device)
        action_of[self.actions[:-1]] = torch.arange(self.words, device=ids.device)
        self.register_buffer("action_of", action_of, persistent=False)
        self.vocab_size, self.hidden_size, self.max_positions = model.vocab_size, model.hidden_size, None
        self.frozen_tree: Tensor | None = None

    def tree(self) -> Tensor:
        """Hidden states of the whole tree; those of a frozen model (a reference policy) are computed once."""
        if any(p.requires_grad for p in self.model.parameters()):
            self.frozen_tree = None  # it will change
            return self.model.hidden(self.ids, attention_mask=self.sees)
        if self.frozen_tree is None:
            self.frozen_tree = self.model.hidden(self.ids, attention_mask=self.sees)
        return self.frozen_tree

    def new_cache(self, batch_size: int, max_length: int) -> "TreeCache":
        return TreeCache(self.tree())

    def hidden(self, input_ids: Tensor, attention_mask=None, position_ids=None, cache=None) -> Tensor:
        """(B, S) ids of a corner prompt and up to three words -> (B, S, d)."""
        new = input_ids.shape[1]
        if cache is None:
            tree = self.tree()
        else:
            tree, input_ids = cache.tree, cache.append(input_ids)
        start = self.prompt_length
        prompt = (input_ids[:, None, :start] == self.ids[:, :start]).all(-1).long().argmax(1)
        words = self.action_of[input_ids[:, start:]]
        columns = [torch.arange(start, device=input_ids.device).expand(len(prompt), -1)]
        if words.shape[1] > 0:
            columns.append(start + words[:, :1])
        if words.shape[1] > 1:
            columns.append(start + self.words + words[:, :1] * self.words + words[:, 1:2])
        if words.shape[1] > 2:  # nothing follows a third word: what stands there is never used
            columns.append(torch.zeros_like(words[:, 2:]))
        columns = torch.cat(columns, dim=1)
        return tree[prompt[:, None], columns][:, -new:]

    def head(self, hidden: Tensor) -> Tensor:
        """(..., d) -> logits (..., V), -inf but for the 13 actions; only their rows of the output layer are used."""
        logits = F.linear(hidden, self.model.lm_head.weight[self.actions])
        return logits.new_full((*hidden.shape[:-1], self.vocab_size), -torch.inf).index_copy(-1, self.actions, logits)

    def forward(self, input_ids: Tensor, attention_mask=None, position_ids=None, cache=None) -> Tensor:
        return self.head(self.hidden(input_ids, attention_mask, position_ids, cache))


class TreeCache:
    """What sampling has said so far, and the tree that was computed once for all of it."""

    def __init__(self, tree: Tensor):
        self.tree = tree
        self.ids: Tensor | None = None

    def append(self, ids: Tensor) -> Tensor:
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids], dim=1)
        return self.ids

    def batch_select_indices(self, rows: Tensor) -> None:
        self.ids = self.ids[rows]


def corner_ppo_config(seed: int = 0, beta: float = 0.2) -> PPOConfig:
    """PPO settings for the corner; `benchmarks/results/corner.md` says how far they get.

    The value model learns alone first: while it is wrong, every advantage is. One minibatch holds all responses,
    because a step through the prefix tree costs the same however many there are. Advantages are not whitened: at
    the optimum r - beta log(pi / pi_ref) is the same for every response, so they vanish by themselves there, and
    whitening would blow the remaining noise up to variance 1.
    """
    return PPOConfig(
        steps=95,
        batch_size=1152,
        epochs=2,
        minibatches=1,
        learning_rate=8e-4,
        value_learning_rate=3e-3,
        value_warmup=10,
        warmup=20,
        decay=70,
        beta=beta,
        lam=1.0,
        whiten_advantages=False,
        max_new_tokens=3,
        eval_every=6,
        seed=seed,
    )


def ppo(model, problem: CornerProblem, config: PPOConfig, progress: bool = True, **functions: Callable):
    """The package's own PPO on the corner; returns the trained policy and the log, with `gap` and `cpu_seconds`.

    functions: rewards_fn, advantages_fn, policy_loss_fn and value_loss_fn, as in `ppo.train_ppo`.
    """
    corner, started = problem.corner, time.process_time()
    policy = PrefixTree(copy.deepcopy(model).requires_grad_(True), corner)

    def evaluate(policy: PrefixTree) -> dict:
        with torch.no_grad():
            gap = problem.gap(corner_log_probs(policy.model, corner))
        return {"gap": gap, "cpu_seconds": time.process_time() - started}

    # A small value model of its own: it has 9 * 157 states to tell apart, and no language to know.
    shape = ModelConfig(policy.vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        value_model = ValueModel(PrefixTree(Llama(shape).to(problem.rewards.device), corner))
    config = replace(config, beta=problem.beta, max_new_tokens=corner.max_new_tokens)
    prompts = corner.prompts * -(-config.batch_size // len(corner.prompts))
    log = train_ppo(
        policy, corner.world.tokenizer, prompts, corner.reward, config,
        value_model=value_model, evaluate_fn=evaluate, progress=progress, name="corner, PPO",
        **functions,
    )  # fmt: skip
    return policy.model, log


@dataclass
class FitConfig:
    """Gradient descent on a loss of the whole table: every step sees everything, so nothing is sampled."""

    steps: int = 150
    learning_rate: float = 1e-3
    warmup: int = 5
    decay: int = 100


def fit(
    policy,
    problem: CornerProblem,
    loss_of: Callable[[Tensor], Tensor],
    config: FitConfig,
    progress: bool = True,
    name: str = "corner",
):
    """Minimises loss_of(log_probs) over a copy of `policy`, a model of the town or a `TabularPolicy`.

    Returns the policy and the log of `loss` and `gap`.
    """
    policy = copy.deepcopy(policy).requires_grad_(True)
    tabular = isinstance(policy, TabularPolicy)
    optimizer = make_optimizer(policy, config.learning_rate)
    log, started = [], time.process_time()
    for step in tqdm(range(config.steps), desc=name, disable=not progress):
        log_probs = policy() if tabular else corner_log_probs(policy, problem.corner)
        loss = loss_of(log_probs)
        loss.backward()
        factor = warmup_stable_decay(step, config.steps, config.warmup, config.decay)
        optimizer_step(optimizer, config.learning_rate * factor)
        seconds = time.process_time() - started
        log.append({"step": step, "loss": loss.item(), "gap": problem.gap(log_probs.detach()), "cpu_seconds": seconds})
    return policy, log


def exact_gradient(policy, problem: CornerProblem, config: FitConfig, progress: bool = True):
    """Ascends the objective itself, by its exact gradient: what PPO would do with infinitely many samples."""
    return fit(policy, problem, lambda log_probs: -problem.value(log_probs), config, progress, "corner, exact gradient")


@dataclass
class Pairs:
    """Comparisons of enumerated responses: indices into the table, and P(first is preferred)."""

    prompt: Tensor  # (N,)
    first: Tensor  # (N,)
    second: Tensor  # (N,)
    p_first: Tensor  # (N,): sigma(r1 - r2) as a soft label, or 0 / 1 drawn from sigma((r1 - r2) / temperature)


def tempered(log_probs: Tensor, temperature: float) -> Tensor:
    """The distribution p^(1/temperature), renormalised: above 1 it says more often what p hardly ever says."""
    return (log_probs / temperature).log_softmax(dim=-1)


def sample_pairs(
    problem: CornerProblem, behaviours: list[Tensor], n: int, seed: int, temperature: float | None = None
) -> Pairs:
    """`n` pairs, spread evenly over the prompts, each response drawn from one of the behaviour tables in turn.

    temperature None gives soft labels; otherwise one-bit labels of an annotator with that temperature.
    DPO fixes the policy only relative to what the pairs hold. From a peaked pi_ref alone, a network drifts to
    responses that no pair contains; with `tempered(pi_ref, 2)` among the behaviours it does not (lecture 12).
    """
    generator = step_generator(seed, 0, problem.rewards.device)
    prompts = len(problem.rewards)
    each = -(-n // prompts)
    sides = []
    for _ in range(2):
        share = -(-each // len(behaviours))
        drawn = torch.cat([torch.multinomial(t.exp(), share, True, generator=generator) for t in behaviours], dim=1)
        order = torch.randperm(drawn.shape[1], generator=generator, device=drawn.device)
        sides.append(drawn[:, order][:, :each].flatten())
    prompt = torch.arange(prompts, device=problem.rewards.device).repeat_interleave(each)
    first, second = sides
    r1, r2 = problem.rewards[prompt, first], problem.rewards[prompt, second]
    if temperature is None:
        p_first = bradley_terry_prob(r1, r2)
    else:
        p_first = torch.bernoulli(bradley_terry_prob(r1 / temperature, r2 / temperature), generator=generator)
    return Pairs(prompt, first, second, p_first)


def dpo(
    policy,
    problem: CornerProblem,
    pairs: Pairs,
    config: FitConfig,
    beta: float | None = None,
    progress: bool = True,
    loss_fn: Callable = dpo_loss,
):
    """Full-batch DPO on the pairs. With one-bit labels of temperature T, pi* is the optimum for beta / T (12.13).

    loss_fn: as in `dpo.train_dpo`.
    """
    beta = problem.beta if beta is None else beta
    first, second = (pairs.prompt, pairs.first), (pairs.prompt, pairs.second)
    ref_first, ref_second = problem.ref_log_probs[first], problem.ref_log_probs[second]

    def loss_of(log_probs: Tensor) -> Tensor:
        return loss_fn(log_probs[first], log_probs[second], ref_first, ref_second, beta, 1 - pairs.p_first)

    return fit(policy, problem, loss_of, config, progress, "corner, DPO")
