"""Supervised fine-tuning: maximum likelihood on demonstrations, where only the response counts.

The loss first, then one training loop. Lecture 02 derives it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cs336_alignment.distributed import add_gradients, added_up, is_sharded, my_rows
from cs336_alignment.models import autocast
from cs336_alignment.optimize import (
    Run,
    make_optimizer,
    optimizer_step,
    shuffled_batch,
    step_generator,
    warmup_stable_decay,
)
from cs336_alignment.speed import length_sorted_parts
from cs336_alignment.tokens import (
    masked_mean,
    masked_token_log_probs,
    select_rows,
    token_log_probs,
    tokenize_prompt_and_output,
)


def sft_loss(log_probs: Tensor, response_mask: Tensor) -> Tensor:
    """Minus the mean log-probability of the response tokens of the batch (equation 2.4).

    log_probs, response_mask: (B, S) -> scalar; 0 with gradient 0 if no token counts. A token mean: a long
    response weighs more than a short one. A loop that accumulates gradients over micro-batches must weigh
    each by its share of the tokens, or ragged batches give another gradient (lecture 02).
    """
    return -masked_mean(log_probs, response_mask)


def demonstration_log_probs(model, batch: dict[str, Tensor]) -> Tensor:
    """log-probabilities of a batch's response labels, 0 elsewhere: {"input_ids", ...} each (B, S) -> (B, S).

    The plain form. `speed.response_only_log_probs` gives the same and leaves out what no response token needs.
    """
    return masked_token_log_probs(model(batch["input_ids"]), batch["labels"], batch["response_mask"])


@dataclass
class SFTConfig:
    steps: int = 600
    batch_size: int = 32  # demonstrations a step
    accumulation: int = 1  # micro-batches that a step is split into; the result is the same, the memory less
    learning_rate: float = 1e-3
    warmup: int = 20  # steps
    decay: int = 400  # steps at the end over which the learning rate falls to 0
    replay_rows: int = 8  # rows of pre-training text mixed into a step, if there is any: prevents forgetting
    eval_every: int = 50  # steps between two measurements of the held-out loss
    save_every: int = 100  # steps between two checkpoints
    seed: int = 0


def train_sft(
    model,
    tokenizer,
    demonstrations: list[dict],
    config: SFTConfig,
    *,
    held_out: list[dict] = (),
    replay: Tensor | None = None,
    loss_fn: Callable = sft_loss,
    log_probs_fn: Callable = demonstration_log_probs,
    part_tokens: int | None = None,
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Fine-tunes `model` in place on demonstrations {"prompt", "response"} and returns the log.

    replay: (N, L) token ids of pre-training text; `config.replay_rows` of them join each step with their own
    next-token loss, so that the model keeps what it knows. held_out: demonstrations whose loss is logged.
    For speed: log_probs_fn=speed.response_only_log_probs; part_tokens cuts a step's batch into micro-batches of
    rows of similar length, at most so many tokens each, instead of `config.accumulation` equal ones.
    Raises: ValueError if there is nothing to train on, or a whole batch has no response token.
    """
    device = next(model.parameters()).device
    data = _tokenize(demonstrations, tokenizer)
    if part_tokens and is_sharded(model.parameters()):
        raise ValueError("part_tokens gives each process another number of micro-batches; sharded ones must keep step")
    optimizer = make_optimizer(model, config.learning_rate)
    run = Run("SFT", config, checkpoint, progress, model=model, optimizer=optimizer)
    for step in run:
        rows = shuffled_batch(len(demonstrations), config.batch_size, step, config.seed)
        batch = select_rows(data, my_rows(rows, config.accumulation))
        tokens = data["response_mask"][rows].sum()  # of the whole batch, whatever part of it is this process's
        if tokens == 0:
            raise ValueError(f"step {step}: no demonstration of the batch has a response token")
        loss = 0.0
        parts = torch.arange(len(batch["labels"])).chunk(config.accumulation)
        if part_tokens:
            parts = length_sorted_parts(batch["response_mask"], part_tokens)
        for rows in parts:
            micro = {name: x.to(device) for name, x in select_rows(batch, rows).items()}
            share = micro["response_mask"].sum().item() / tokens.item()
            with autocast(device):
                log_probs = log_probs_fn(model, micro)
            micro_loss = share * loss_fn(log_probs, micro["response_mask"])
            micro_loss.backward()
            loss += micro_loss.item()
        if replay is not None and config.replay_rows:
            rng = step_generator(config.seed, step)
            chosen = torch.randint(len(replay), (config.replay_rows,), generator=rng)
            text = replay[my_rows(chosen)].to(device)
            with autocast(device):
                log_probs = token_log_probs(model(text[:, :-1]), text[:, 1:])
            replay_loss = sft_loss(log_probs, torch.ones_like(log_probs, dtype=torch.bool))
            (len(text) / len(chosen) * replay_loss).backward()
        add_gradients(model)
        factor = warmup_stable_decay(step, config.steps, config.warmup, config.decay)
        grad_norm = optimizer_step(optimizer, config.learning_rate * factor)
        metrics = {"loss": added_up(torch.tensor(loss, dtype=torch.float64)), "grad_norm": grad_norm}
        if held_out and (step % config.eval_every == 0 or step + 1 == config.steps):
            metrics["held_out_loss"] = held_out_loss(model, tokenizer, held_out)
        run.record(step, **metrics)
    return run.log


@torch.no_grad()
def held_out_loss(model, tokenizer, demonstrations: list[dict], batch_size: int = 64) -> float:
    """Mean negative log-probability of a response token over all demonstrations, in nats."""
    device = next(model.parameters()).device
    data = _tokenize(demonstrations, tokenizer)
    total = tokens = 0.0
    for rows in torch.arange(len(demonstrations)).split(batch_size):
        batch = {name: x.to(device) for name, x in select_rows(data, rows).items()}
        with autocast(device):
            log_probs = masked_token_log_probs(model(batch["input_ids"]), batch["labels"], batch["response_mask"])
        count = batch["response_mask"].sum().item()
        total += sft_loss(log_probs, batch["response_mask"]).item() * count
        tokens += count
    return total / max(tokens, 1)


def _tokenize(demonstrations: list[dict], tokenizer) -> dict[str, Tensor]:
    if not demonstrations:
        raise ValueError("no demonstrations to train on")
    prompts, responses = zip(*((d["prompt"], d["response"]) for d in demonstrations))
    return tokenize_prompt_and_output(list(prompts), list(responses), tokenizer)
