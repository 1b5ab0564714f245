"""Measuring policies and reward models: rewards and KL come with their standard errors.

Nothing here knows the town: rewards, refusals and right answers are given as functions or tensors.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cs336_alignment.generate import generate_text, response_log_probs, sample
from cs336_alignment.models import autocast
from cs336_alignment.ppo import kl_estimate
from cs336_alignment.tokens import at_least_float32


def mean_and_error(x: Tensor) -> tuple[float, float]:
    """Mean and standard error of the mean of independent values (N,). The error of one value is infinite.

    Raises: ValueError if there are no values.
    """
    if x.numel() == 0:
        raise ValueError("no values to average")
    x = at_least_float32(x).flatten()
    error = x.std().item() / math.sqrt(len(x)) if len(x) > 1 else math.inf
    return x.mean().item(), error


def pair_accuracy(chosen: Tensor, rejected: Tensor) -> float:
    """Share of pairs that the scores rank as the label does; (B,), (B,). A tie counts one half.

    With ties at one half, a constant score gets exactly the 0.5 that a coin gets.
    Raises: ValueError if the shapes differ or there are no pairs.
    """
    if chosen.shape != rejected.shape or chosen.numel() == 0:
        raise ValueError(f"need as many chosen as rejected scores, got {tuple(chosen.shape)}, {tuple(rejected.shape)}")
    return ((chosen > rejected).double() + (chosen == rejected).double() / 2).mean().item()


def win_rate(rewards: Tensor, baseline_rewards: Tensor) -> float:
    """Share of prompts on which one policy's reward beats another's; a tie counts one half. (B,), (B,)."""
    return pair_accuracy(rewards, baseline_rewards)


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 10) -> float:
    """Sum over bins of (share of predictions) * |accuracy - mean confidence| (Guo et al. 2017, arXiv 1706.04599).

    confidence (N,) in [0, 1], correct (N,) bool or 0/1. The bins have equal width and hold their upper end;
    the first holds 0 too. Raises: ValueError if shapes differ, N = 0, or a confidence is no probability.
    """
    if confidence.shape != correct.shape or confidence.numel() == 0:
        raise ValueError(f"need one correctness a confidence, got {tuple(confidence.shape)}, {tuple(correct.shape)}")
    confidence, correct = at_least_float32(confidence).flatten(), correct.flatten()
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError("a confidence must lie in [0, 1]")
    # The edges in the confidences' own precision: a float32 0.3 is not in the bin above the float64 0.3.
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device).to(confidence.dtype)
    index = torch.bucketize(confidence, edges[1:-1])
    gap = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    gap = gap.index_add(0, index, correct.double() - confidence.double())  # share * (accuracy - confidence), times N
    return (gap.abs().sum() / len(confidence)).item()


@dataclass
class Evaluation:
    """What a policy answered to some prompts, and what it is worth."""

    prompts: list[str]
    responses: list[str]  # with the EOS token where the policy ended them
    rewards: Tensor  # (N,)
    kl: Tensor  # (N,): log pi(y|x) - log pi_ref(y|x) of the sampled response; its mean estimates the KL
    lengths: Tensor  # (N,) in tokens, EOS included
    finished: Tensor  # (N,) bool

    def summary(self) -> dict[str, float]:
        """Means and standard errors, for a log or a table."""
        reward, reward_se = mean_and_error(self.rewards)
        kl, kl_se = mean_and_error(self.kl)
        return {
            "reward": reward,
            "reward_se": reward_se,
            "kl": kl,
            "kl_se": kl_se,
            "length": self.lengths.float().mean().item(),
            "finished": self.finished.float().mean().item(),
        }


@torch.no_grad()
def evaluate_policy(
    model,
    tokenizer,
    prompts: list[str],
    reward_fn: Callable,
    *,
    ref_model=None,
    max_new_tokens: int,
    seed: int = 0,
    batch_size: int = 256,
) -> Evaluation:
    """Samples one response a prompt at temperature 1, scores it, and measures the KL to `ref_model` (0 without).

    reward_fn(prompts, responses) -> (N,), as in `train_ppo`. The same seed gives the same random numbers.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    parts = []
    for start in range(0, len(prompts), batch_size):
        ids = [tokenizer.encode(p, add_special_tokens=False) for p in prompts[start : start + batch_size]]
        with autocast(device):
            samples = sample(
                model,
                ids,
                max_new_tokens=max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                generator=generator,
            )
            ref = samples.log_probs if ref_model is None else response_log_probs(ref_model, samples)
        kl = kl_estimate(samples.log_probs, ref).sum(1)
        responses = [tokenizer.decode(row) for row in samples.responses()]
        parts.append((responses, kl.cpu(), samples.response_mask.sum(1).cpu(), samples.finished.cpu()))
    responses = [text for part in parts for text in part[0]]
    kl, lengths, finished = (torch.cat([part[i] for part in parts]) for i in (1, 2, 3))
    return Evaluation(prompts, responses, reward_fn(prompts, responses), kl, lengths, finished)


def refusal_rates(
    model, tokenizer, harmful: list[str], harmless: list[str], refuses: Callable, *, max_new_tokens: int
) -> dict[str, float]:
    """Share of harmful prompts refused (good) and of harmless look-alikes refused (over-refusal), greedy."""
    rates = {}
    for name, prompts in (("refusal", harmful), ("over_refusal", harmless)):
        answers = generate_text(model, tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=0.0)
        rates[name] = sum(map(refuses, answers)) / len(answers)
    return rates
