"""PPO for language models: policy-gradient losses on sampled responses (Schulman et al. 2017, arXiv 1707.06347).

The losses first, then one training loop. Lectures 10 and 11 derive them. B responses, T response positions;
`mask` is True on the tokens that were sampled, EOS included.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cs336_alignment.distributed import alone
from cs336_alignment.generate import Samples, response_log_probs, sample
from cs336_alignment.models import ValueModel, autocast, frozen_copy
from cs336_alignment.optimize import (
    Run,
    make_optimizer,
    optimizer_step,
    shuffled_batch,
    step_generator,
    warmup_stable_decay,
)
from cs336_alignment.tokens import at_least_float32, fill_masked, masked_mean


def _safe_exponent(x: Tensor) -> Tensor:
    """Clamps an exponent where exp would overflow: at 80.7 in float32, at 701 in float64.

    A log-ratio that large is a run that has already failed; but inf * 0 = NaN would hide by how much.
    Below the clamp nothing changes; above it the gradient is 0.
    """
    return x.clamp(max=math.log(torch.finfo(x.dtype).max) - 8)


def reinforce_loss(log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Token mean of -log pi(token) * advantage; its gradient estimates the policy gradient (equation 10.4).

    log_probs, advantages, mask: (B, T) -> scalar. Advantages are used as they come: detach them if they
    depend on the parameters. Williams 1992.
    """
    log_probs, advantages = fill_masked(mask, log_probs, advantages)
    return -masked_mean(log_probs * advantages, mask)


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, kind: str = "k1") -> Tensor:
    """Per-token estimate of KL(pi || pi_ref) from samples of pi (equation 9.7; Schulman 2020).

    With d = log_probs - ref_log_probs: k1 = d, unbiased, may be negative; k2 = d^2 / 2, biased, low variance;
    k3 = exp(-d) - 1 + d, unbiased, never negative. The exponent of k3 is clamped where it would overflow.
    Same shapes in and out. These are values: as losses their gradients differ (lecture 09).
    Raises: ValueError for another kind.
    """
    d = at_least_float32(log_probs) - at_least_float32(ref_log_probs)
    if kind == "k1":
        return d
    if kind == "k2":
        return d**2 / 2
    if kind == "k3":
        # expm1 keeps the digits that exp(-d) - 1 loses when pi is close to pi_ref.
        return torch.expm1(_safe_exponent(-d)) + d
    raise ValueError(f"kind must be 'k1', 'k2' or 'k3', got {kind!r}")


def shaped_rewards(scores: Tensor, log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Per-token rewards: -beta * k1 on every token, plus the score on the last response token (equation 11.4).

    scores (B,); the others (B, T) -> (B, T). The sum over a row is r(x, y) - beta log(pi(y|x) / pi_ref(y|x)).
    0 behind the mask; an empty row is all 0, its score unused.
    """
    log_probs, ref_log_probs = fill_masked(mask, log_probs, ref_log_probs)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores must have shape {tuple(mask.shape[:1])}, one a response, got {tuple(scores.shape)}")
    # Last: a response token after which no other follows.
    is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    score = torch.where(is_last, at_least_float32(scores).unsqueeze(1), 0.0)
    return score - beta * kl_estimate(log_probs, ref_log_probs, "k1")


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, arXiv 1506.02438) (equations 11.5, 11.6).

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, with V = A = 0 after the last
    response token: the episode is over there, nothing is bootstrapped, also when the length limit ended it.
    rewards, values, mask: (B, T) -> advantages, returns (B, T), returns = advantages + values; not whitened;
    0 behind the mask. Nothing is detached.

    Raises: ValueError if the mask is not a prefix of each row (the recursion runs over neighbours).
    """
    if mask.dim() != 2 or (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("the mask of gae must be (B, T) and a prefix of each row: response tokens, then padding")
    rewards, values = fill_masked(mask, rewards, values)
    next_value = next_advantage = torch.zeros_like(values[:, 0]) if mask.shape[1] else None
    advantages = []
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages.append(next_advantage)
    advantages = torch.stack(advantages[::-1], dim=1) if advantages else rewards
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scales to variance 1 over the whole batch, and to mean 0 if `shift_mean` (equation 11.7).

    x, mask: (B, T) -> (B, T), 0 behind the mask. The variance is unbiased (divided by n - 1); with fewer than
    two response tokens it counts as 0. 1e-8 is added to it, so equal entries give 0 and not NaN.
    """
    (x,) = fill_masked(mask, x)
    mean = masked_mean(x, mask)
    deviation = torch.where(mask, x - mean, 0.0)
    variance = (deviation**2).sum() / (mask.sum() - 1).clamp(min=1)
    whitened = deviation * (variance + 1e-8).rsqrt()
    return whitened if shift_mean else torch.where(mask, whitened + mean, 0.0)


def ppo_policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_eps: float
) -> Tensor:
    """Token mean of -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) (equation 11.2; paper equation 7).

    ratio = exp(log_probs - old_log_probs); its exponent is clamped where it would overflow.
    All (B, T) -> scalar. Raises: ValueError if clip_eps < 0.
    """
    _check_clip(clip_eps)
    log_probs, old_log_probs, advantages = fill_masked(mask, log_probs, old_log_probs, advantages)
    ratio = _safe_exponent(log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return -masked_mean(torch.minimum(ratio * advantages, clipped * advantages), mask)


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_eps: float | None = None
) -> Tensor:
    """Token mean of max((V - R)^2, (V_old + clamp(V - V_old, -eps, eps) - R)^2) / 2 (equation 11.8).

    Without `clip_eps`, the mean of (V - R)^2 / 2. All (B, T) -> scalar. Raises: ValueError if clip_eps < 0.
    """
    values, old_values, returns = fill_masked(mask, values, old_values, returns)
    squared = (values - returns) ** 2
    if clip_eps is not None:
        _check_clip(clip_eps)
        clipped = old_values + (values - old_values).clamp(-clip_eps, clip_eps)
        squared = torch.maximum(squared, (clipped - returns) ** 2)
    return masked_mean(squared, mask) / 2


def _check_clip(clip_eps: float) -> None:
    if not clip_eps >= 0:
        raise ValueError(f"clip_eps must not be negative, got {clip_eps}")


@dataclass
class PPOConfig:
    steps: int = 20  # iterations of sampling and updating
    batch_size: int = 48  # responses an iteration
    epochs: int = 4  # passes over them
    minibatches: int = 2  # optimizer steps a pass
    learning_rate: float = 1e-4  # of the policy
    value_learning_rate: float = 1e-3
    value_warmup: int = 3  # first iterations, in which only the value model learns
    warmup: int = 1  # iterations
    decay: int = 15  # iterations
    beta: float = 0.4  # units of reward that a nat of KL costs
    gamma: float = 1.0
    lam: float = 0.95
    clip_eps: float = 0.2
    value_clip_eps: float | None = 0.2
    whiten_advantages: bool = True
    max_new_tokens: int = 32
    temperature: float = 1.0
    missing_eos_penalty: float = 0.0  # subtracted from the score of a response that hit the length limit
    eval_every: int = 3  # iterations between two calls of evaluate_fn
    save_every: int = 5
    seed: int = 0


def train_ppo(
    model,
    tokenizer,
    prompts: list[str],
    reward_fn: Callable,
    config: PPOConfig,
    *,
    ref_model=None,
    value_model=None,
    rewards_fn: Callable = shaped_rewards,
    advantages_fn: Callable = gae,
    policy_loss_fn: Callable = ppo_policy_loss,
    value_loss_fn: Callable = ppo_value_loss,
    log_probs_fn: Callable = response_log_probs,
    values_fn: Callable | None = None,
    trust_sampler: bool = False,
    for_sampling: Callable | None = None,
    evaluate_fn: Callable | None = None,
    checkpoint: Path | str | None = None,
    progress: bool = True,
    name: str = "PPO",
) -> list[dict[str, float]]:
    """Trains the policy `model` in place against reward_fn(prompts, responses) -> scores (B,); returns the log.

    Responses reach `reward_fn` as text, with the EOS token where the policy ended them. ref_model: pi_ref, by
    default a copy of the policy as it comes. value_model: by default a new head on such a copy.
    evaluate_fn(model) -> dict is called every `config.eval_every` iterations and logged. name: of the progress bar.
    For speed: log_probs_fn=speed.response_only_sample_log_probs, values_fn=speed.response_only_values (by default
    `response_values`), and trust_sampler=True: the old log-probabilities are those that `sample` noted, instead of a
    second pass that finds the same ones again to rounding (not for a model with dropout). Rounding is much in
    bfloat16: up to some .02 nats a token, and .07 with for_sampling=decode.for_sampling, on a small model. The latter
    lays the policy out anew for each iteration's sampling.
    Raises: ValueError if there are no prompts, or a score is not finite.
    """
    device = next(model.parameters()).device
    if not prompts:
        raise ValueError("no prompts to train on")
    alone("PPO")
    prompt_ids = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    ref_model = ref_model or frozen_copy(model)
    value_model = value_model or ValueModel(copy.deepcopy(model)).to(device)
    values_fn = values_fn or response_values
    optimizer = make_optimizer(model, config.learning_rate)
    value_optimizer = make_optimizer(value_model, config.value_learning_rate)
    run = Run(
        name, config, checkpoint, progress,
        model=model, value_model=value_model, optimizer=optimizer, value_optimizer=value_optimizer,
    )  # fmt: skip
    for step in run:
        # 1. Sample responses and score them.
        rows = shuffled_batch(len(prompts), config.batch_size, step, config.seed).tolist()
        with autocast(device):
            samples = sample(
                for_sampling(model) if for_sampling else model,
                [prompt_ids[i] for i in rows],
                max_new_tokens=config.max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                temperature=config.temperature,
                generator=step_generator(config.seed, step, device),
            )
        responses = [tokenizer.decode(ids) for ids in samples.responses()]
        scores = reward_fn([prompts[i] for i in rows], responses).to(device).float()
        if not scores.isfinite().all():
            raise ValueError(f"iteration {step}: reward_fn returned a score that is not finite")
        scores = scores - config.missing_eos_penalty * ~samples.finished

        # 2. Everything the updates hold fixed: old log-probs and values, rewards, advantages.
        with torch.no_grad(), autocast(device):
            old_log_probs = samples.log_probs if trust_sampler else log_probs_fn(model, samples, config.temperature)
            ref_log_probs = log_probs_fn(ref_model, samples, config.temperature)
            old_values = values_fn(value_model, samples)
        mask = samples.response_mask
        rewards = rewards_fn(scores, old_log_probs, ref_log_probs, mask, config.beta)
        advantages, returns = advantages_fn(rewards, old_values, mask, config.gamma, config.lam)
        if config.whiten_advantages:
            advantages = whiten(advantages, mask)

        # 3. A few epochs of clipped updates on these samples.
        factor = warmup_stable_decay(step, config.steps, config.warmup, config.decay)
        clip_fractions = []
        for epoch in range(config.epochs):
            order = torch.randperm(len(rows), generator=step_generator(config.seed, step * config.epochs + epoch))
            for minibatch in order.to(device).chunk(config.minibatches):
                part = samples.rows(minibatch)
                with autocast(device):
                    values = values_fn(value_model, part)
                value_loss = value_loss_fn(
                    values, old_values[minibatch], returns[minibatch], part.response_mask, config.value_clip_eps
                )
                value_loss.backward()
                optimizer_step(value_optimizer, config.value_learning_rate * factor)
                if step < config.value_warmup:
                    continue
                with autocast(device):
                    log_probs = log_probs_fn(model, part, config.temperature)
                policy_loss = policy_loss_fn(
                    log_probs, old_log_probs[minibatch], advantages[minibatch], part.response_mask, config.clip_eps
                )
                policy_loss.backward()
                optimizer_step(optimizer, config.learning_rate * factor)
                with torch.no_grad():
                    ratio = (log_probs - old_log_probs[minibatch]).exp()
                    clip_fractions.append(
                        masked_mean(((ratio - 1).abs() > config.clip_eps).float(), part.response_mask)
                    )

        lengths = mask.sum(1).float()
        metrics = {
            "score": scores.mean(),
            "kl": kl_estimate(old_log_probs, ref_log_probs).sum(1).mean(),  # of whole responses, in nats
            "length": lengths.mean(),
            "finished": samples.finished.float().mean(),
            "value_loss": value_loss,
            "explained_variance": 1 - (returns - old_values)[mask].var() / returns[mask].var().clamp(min=1e-8),
            "clip_fraction": torch.stack(clip_fractions).mean() if clip_fractions else 0.0,
        }
        if evaluate_fn and (step % config.eval_every == 0 or step + 1 == config.steps):
            metrics |= evaluate_fn(model)
        run.record(step, **metrics)
    return run.log


def response_values(value_model, samples: Samples) -> Tensor:
    """V of the state before each response token, (B, T): the value model read one position earlier."""
    values = value_model(samples.input_ids, samples.attention_mask)
    start = samples.prompt_ids.shape[1] - 1
    return values[:, start : start + samples.response_ids.shape[1]]
