"""Direct preference optimization: the policy is its own reward model (Rafailov et al. 2023, arXiv 2305.18290).

The losses first, then one training loop. Lecture 12 derives them. All log-probabilities are sums over response
tokens, as in the paper; averaging them is a different method (IPO and SimPO do so on purpose).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cs336_alignment.distributed import add_gradients, added_up, averaged, my_rows, my_turns, same_start
from cs336_alignment.models import autocast
from cs336_alignment.optimize import (
    Run,
    make_optimizer,
    optimizer_step,
    shuffled_batch,
    warmup_stable_decay,
)
from cs336_alignment.tokens import (
    at_least_float32,
    select_rows,
    sequence_log_probs,
    tokenize_prompt_and_output,
)


def implicit_reward(policy_log_probs: Tensor, ref_log_probs: Tensor, beta: float) -> Tensor:
    """beta (log pi(y|x) - log pi_ref(y|x)): the reward for which pi is optimal, up to beta log Z(x) (12.3).

    (B,), (B,) -> (B,).
    """
    return beta * (at_least_float32(policy_log_probs) - at_least_float32(ref_log_probs))


def _preference_logit(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    """h, the difference of the two implicit rewards; Z(x) has cancelled (equation 12.5)."""
    if not beta >= 0:
        raise ValueError(f"beta must not be negative, got {beta}: it weighs the KL penalty")
    shapes = {tuple(x.shape) for x in (policy_chosen, policy_rejected, ref_chosen, ref_rejected)}
    if len(shapes) != 1:
        raise ValueError(f"the four log-probabilities must have one shape (B,), got {sorted(shapes)}")
    return implicit_reward(policy_chosen, ref_chosen, beta) - implicit_reward(policy_rejected, ref_rejected, beta)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float | Tensor = 0.0,
) -> Tensor:
    """Mean of -(1 - eps) log sigma(h) - eps log sigma(-h) (12.6; with eps 12.7; paper equation 7).

    All (B,), sums over response tokens. label_smoothing: eps, a number or (B,) in [0, 1], the probability
    that the label is wrong (Mitchell 2023, "conservative DPO"); with soft labels, P(chosen wins) = 1 - eps.
    Returns a scalar, 0 for an empty batch.
    Raises: ValueError if shapes differ, beta < 0 or eps lies outside [0, 1].
    """
    h = _preference_logit(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    eps = torch.as_tensor(label_smoothing, dtype=h.dtype, device=h.device)
    if eps.dim() and eps.shape != h.shape:
        raise ValueError(f"label_smoothing {tuple(eps.shape)} must be a number or have shape {tuple(h.shape)}")
    if not ((eps >= 0) & (eps <= 1)).all():
        raise ValueError("label_smoothing is a probability: it must lie in [0, 1]")
    # A label that is impossible adds nothing, even where h is infinite: 0 * inf would be NaN.
    losses = -torch.where(eps < 1, (1 - eps) * F.logsigmoid(h), 0.0)
    losses = losses - torch.where(eps > 0, eps * F.logsigmoid(-h), 0.0)
    return losses.sum() / max(losses.numel(), 1)


def dpo_gradient_weight(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    """w = sigma(-h): how wrong the implicit rewards rank the pair, (B,), in (0, 1) (equation 12.8).

    The gradient of `dpo_loss` is -(beta / B) sum of w (grad log pi(y_w) - grad log pi(y_l)).
    Raises: as `dpo_loss`.
    """
    return torch.sigmoid(-_preference_logit(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta))


@dataclass
class DPOConfig:
    steps: int = 150
    batch_size: int = 32  # pairs a step
    learning_rate: float = 1e-4
    warmup: int = 10  # steps
    decay: int = 120  # steps
    beta: float = 0.7  # units of reward that a nat of KL costs: larger stays closer to pi_ref
    label_smoothing: float = 0.0
    nll_coef: float = 0.0  # weight of the chosen responses' own loss per token (Pang et al. 2024), 0 is plain DPO
    eval_every: int = 25  # steps between two calls of evaluate_fn
    save_every: int = 50
    seed: int = 0


def train_dpo(
    model,
    tokenizer,
    preferences: list[dict],
    config: DPOConfig,
    *,
    ref_model=None,
    loss_fn: Callable = dpo_loss,
    log_probs_fn: Callable = sequence_log_probs,
    evaluate_fn: Callable | None = None,
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Trains the policy `model` in place on preferences {"prompt", "chosen", "rejected"}; returns the log.

    A pair with "p_chosen" has a soft label: label_smoothing is then 1 - p_chosen for that pair. ref_model:
    pi_ref, by default the policy as it comes; its log-probabilities are computed once, before training.
    `loss_fn` is called as loss_fn(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta,
    label_smoothing). For speed: log_probs_fn=speed.shared_prompt_log_probs. evaluate_fn(model) -> dict is called
    every `config.eval_every` steps and logged.
    Raises: ValueError if there are no preferences, or a whole batch has no response token.
    """
    device = next(model.parameters()).device
    if not preferences:
        raise ValueError("no preferences to train on")
    prompts = [pair["prompt"] for pair in preferences]
    # Rows 0..N-1 are the chosen responses, N..2N-1 the rejected ones.
    data = tokenize_prompt_and_output(
        prompts + prompts,
        [pair["chosen"] for pair in preferences] + [pair["rejected"] for pair in preferences],
        tokenizer,
    )
    smoothing = torch.tensor(
        [1 - pair["p_chosen"] if "p_chosen" in pair else config.label_smoothing for pair in preferences]
    )
    if not data["response_mask"].any():
        raise ValueError("no response has a token: nothing to train on")
    # A resumed run's policy has moved on already, so the reference must be taken before the checkpoint is read. Each
    # process scores a part of the data: with the same weights.
    same_start(ref_model or model)
    ref_log_probs = reference_log_probs(ref_model or model, data, log_probs_fn=log_probs_fn)
    optimizer = make_optimizer(model, config.learning_rate)
    run = Run("DPO", config, checkpoint, progress, model=model, optimizer=optimizer)
    for step in run:
        pairs = shuffled_batch(len(preferences), config.batch_size, step, config.seed)
        if not data["response_mask"][torch.cat([pairs, pairs + len(preferences)])].any():
            raise ValueError(f"step {step}: no response of the batch has a token")
        chosen_tokens = data["response_mask"][pairs].sum()  # of the whole batch; a process may have a part of it
        share, pairs = len(my_rows(pairs)) / len(pairs), my_rows(pairs)
        rows = torch.cat([pairs, pairs + len(preferences)])
        batch = {name: x.to(device) for name, x in select_rows(data, rows).items()}
        with autocast(device):
            log_probs = log_probs_fn(model, batch)
        policy_chosen, policy_rejected = log_probs.chunk(2)
        ref_chosen, ref_rejected = ref_log_probs[rows].to(device).chunk(2)
        loss = loss_fn(
            policy_chosen, policy_rejected, ref_chosen, ref_rejected, config.beta, smoothing[pairs].to(device)
        )
        (share * loss + config.nll_coef * -policy_chosen.sum() / chosen_tokens.to(device)).backward()
        add_gradients(model)
        factor = warmup_stable_decay(step, config.steps, config.warmup, config.decay)
        grad_norm = optimizer_step(optimizer, config.learning_rate * factor)
        with torch.no_grad():
            chosen_rewards = implicit_reward(policy_chosen, ref_chosen, config.beta)
            rejected_rewards = implicit_reward(policy_rejected, ref_rejected, config.beta)
        metrics = {
            "loss": loss,
            "accuracy": (chosen_rewards > rejected_rewards).float().mean(),
            "margin": (chosen_rewards - rejected_rewards).mean(),
            "chosen_log_prob": policy_chosen.mean(),
            "rejected_log_prob": policy_rejected.mean(),
        }
        metrics = averaged(metrics, share) | {"grad_norm": grad_norm}
        if evaluate_fn and (step % config.eval_every == 0 or step + 1 == config.steps):
            metrics |= evaluate_fn(model)
        run.record(step, **metrics)
    return run.log


@torch.no_grad()
def reference_log_probs(
    model, data: dict[str, Tensor], batch_size: int = 128, log_probs_fn: Callable = sequence_log_probs
) -> Tensor:
    """`log_probs_fn` of a whole tokenized data set, chosen rows first, in batches; (2N,) on the CPU.

    `sequence_log_probs` takes rows as they come; another function may need both rows of a pair in one batch.
    """
    device = next(model.parameters()).device
    size = len(data["labels"])
    batches = torch.arange(size).split(batch_size)
    if log_probs_fn is not sequence_log_probs:
        batches = [torch.cat([pairs, pairs + size // 2]) for pairs in torch.arange(size // 2).split(batch_size // 2)]
    log_probs = None
    for rows, mine in my_turns(batches):
        batch = {name: x.to(device) for name, x in select_rows(data, rows).items()}
        with autocast(device):
            found = log_probs_fn(model, batch).cpu()
        log_probs = found.new_zeros(size) if log_probs is None else log_probs
        if mine:
            log_probs[rows] = found
    return added_up(log_probs)
