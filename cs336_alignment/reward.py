"""Reward modelling: a scalar score learned from comparisons, by the model of Bradley and Terry (1952).

The losses first, then one training loop. Lecture 08 derives them. Stiennon et al. 2020 (arXiv 2009.01325) and
InstructGPT (Ouyang et al. 2022, arXiv 2203.02155, equation 1) use the same loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cs336_alignment.distributed import add_gradients, averaged, my_rows
from cs336_alignment.models import autocast
from cs336_alignment.optimize import (
    Run,
    make_optimizer,
    optimizer_step,
    shuffled_batch,
    warmup_stable_decay,
)
from cs336_alignment.tokens import at_least_float32, collate


def bradley_terry_prob(r1: Tensor, r2: Tensor) -> Tensor:
    """P(y1 is preferred to y2) = sigma(r1 - r2) (equation 8.1). Shapes broadcast; only the difference counts."""
    return torch.sigmoid(at_least_float32(torch.as_tensor(r1)) - at_least_float32(torch.as_tensor(r2)))


def reward_model_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float | None = None, center_coef: float = 0.0
) -> Tensor:
    """Negative log-likelihood of the comparisons: mean of -log sigma(chosen - rejected - margin) (8.3).

    chosen, rejected: scores (B,). margin: how much better the chosen one is said to be, (B,) or a number
    (Llama 2, arXiv 2307.09288, equation 2). center_coef weighs the mean of (chosen + rejected)^2, which pins
    down the level that comparisons leave free (Eisenstein et al. 2023, arXiv 2312.09244) (8.4).
    Returns a scalar, 0 for an empty batch. Raises: ValueError if the shapes differ.
    """
    if chosen.shape != rejected.shape:
        raise ValueError(f"chosen {tuple(chosen.shape)} and rejected {tuple(rejected.shape)} must have one shape")
    chosen, rejected = at_least_float32(chosen), at_least_float32(rejected)
    difference = chosen - rejected
    if margin is not None:
        margin = torch.as_tensor(margin, dtype=difference.dtype, device=difference.device)
        if margin.dim() and margin.shape != difference.shape:
            raise ValueError(f"margin {tuple(margin.shape)} must be a number or have shape {tuple(difference.shape)}")
        difference = difference - margin
    # logsigmoid, not log(sigmoid): the latter is -inf from a difference of about -100 on.
    losses = -F.logsigmoid(difference) + center_coef * (chosen + rejected) ** 2
    return losses.sum() / max(losses.numel(), 1)


@dataclass
class RewardConfig:
    steps: int = 330
    batch_size: int = 32  # pairs a step
    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    warmup: int = 20  # steps
    decay: int = 200  # steps
    center_coef: float = 0.01  # pulls the mean score to 0; comparisons alone leave it free
    eval_every: int = 50
    save_every: int = 100
    seed: int = 0


def train_reward_model(
    model,
    tokenizer,
    preferences: list[dict],
    config: RewardConfig,
    *,
    held_out: list[dict] = (),
    loss_fn: Callable = reward_model_loss,
    scores_fn: Callable | None = None,
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Trains a `RewardModel` in place on preferences {"prompt", "chosen", "rejected"} and returns the log.

    `loss_fn` is called as loss_fn(chosen, rejected, center_coef=...). held_out: pairs whose accuracy is
    logged. scores_fn: how token ids are scored, by default `score_tokens`; for speed, speed.shared_prompt_scores.
    Raises: ValueError if there are no preferences.
    """
    device = next(model.parameters()).device
    if not preferences:
        raise ValueError("no preferences to train on")
    prompts = [tokenizer.encode(pair["prompt"], add_special_tokens=False) for pair in preferences]
    chosen, rejected = (
        [tokenizer.encode(pair[side], add_special_tokens=False) for pair in preferences]
        for side in ("chosen", "rejected")
    )
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay)
    run = Run("reward model", config, checkpoint, progress, model=model, optimizer=optimizer)
    for step in run:
        batch = shuffled_batch(len(preferences), config.batch_size, step, config.seed)
        rows = my_rows(batch).tolist()
        share = len(rows) / len(batch)  # 1 where there is one process
        # One forward for both sides: the same weights see them, and a step costs one pass.
        answers = [chosen[i] for i in rows] + [rejected[i] for i in rows]
        scores_fn = scores_fn or score_tokens
        scores = scores_fn(model, [prompts[i] for i in rows] * 2, answers, tokenizer.pad_token_id, device)
        chosen_scores, rejected_scores = scores.chunk(2)
        loss = loss_fn(chosen_scores, rejected_scores, center_coef=config.center_coef)
        (share * loss).backward()
        add_gradients(model)
        factor = warmup_stable_decay(step, config.steps, config.warmup, config.decay)
        grad_norm = optimizer_step(optimizer, config.learning_rate * factor)
        accuracy = (chosen_scores > rejected_scores).float().mean()
        metrics = averaged({"loss": loss, "accuracy": accuracy}, share) | {"grad_norm": grad_norm}
        if held_out and (step % config.eval_every == 0 or step + 1 == config.steps):
            asked = [pair["prompt"] for pair in held_out]
            better, worse = (
                score(model, tokenizer, asked, [pair[side] for pair in held_out]) for side in ("chosen", "rejected")
            )
            metrics["held_out_accuracy"] = (better > worse).float().mean()
        run.record(step, **metrics)
    return run.log


@torch.no_grad()
def score(model, tokenizer, prompts: list[str], responses: list[str], batch_size: int = 128) -> Tensor:
    """The reward model's scores of the responses, (B,) float32 on the CPU."""
    device = next(model.parameters()).device
    prompt_ids, response_ids = (
        [tokenizer.encode(text, add_special_tokens=False) for text in texts] for texts in (prompts, responses)
    )
    scores = []
    for start in range(0, len(prompt_ids), batch_size):
        part = slice(start, start + batch_size)
        scores.append(score_tokens(model, prompt_ids[part], response_ids[part], tokenizer.pad_token_id, device).cpu())
    return torch.cat(scores)


def score_tokens(
    model, prompts: list[list[int]], responses: list[list[int]], pad_token_id: int, device: torch.device
) -> Tensor:
    """Scores of token ids, (B,) float32 on `device`, padded on the right."""
    ids, mask = collate([p + r for p, r in zip(prompts, responses)], pad_token_id)
    starts = torch.tensor([len(p) for p in prompts]).unsqueeze(1)
    extra = {}
    if getattr(model, "likelihood", None) is not None:
        extra["response_mask"] = (mask & (torch.arange(ids.shape[1]) >= starts)).to(device)
    with autocast(device):
        return model(ids.to(device), mask.to(device), **extra).float()
