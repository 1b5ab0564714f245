"""Batches of sampled responses for the exercises of a3_ppo."""

import math

import torch
from torch import Tensor

from cs336_alignment.grading.inputs import uniform


def ragged(g: torch.Generator, rows: int, longest: int, empty: bool = False) -> Tensor:
    """The mask of responses of different lengths, (rows, longest) bool, in any order: one response is as long as can
    be, one has a single token, and with `empty` one has none."""
    lengths = torch.randint(1, longest + 1, (rows,), generator=g)
    lengths[:2] = torch.tensor([longest, 1])
    if empty:
        lengths[2] = 0
    lengths = lengths[torch.randperm(rows, generator=g)]
    return torch.arange(longest) < lengths[:, None]


def nothing(rows: int, longest: int) -> Tensor:
    """The mask of a batch without a response token."""
    return torch.zeros(rows, longest, dtype=torch.bool)


def spoiled(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors with NaN, inf and -inf behind the mask, and with numbers between them: what is garbage in one tensor
    need not be so in another."""
    garbage = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 0.0])
    place = (~mask).flatten().cumsum(0).reshape(mask.shape) + 2  # the first one is a number in the first two tensors
    out = []
    for i, x in enumerate(tensors):
        kind = (place + i) % 5
        out.append(torch.where(mask | (kind > 2), x, garbage[kind].to(x.dtype)))
    return out


def left(mask: Tensor) -> Tensor:
    """The same responses with the padding before them."""
    return mask.flip(1)


def with_gaps(g: torch.Generator, mask: Tensor) -> Tensor:
    """The mask without some of its tokens; those of the first column stay as they are."""
    kept = torch.rand(mask.shape, generator=g) < 0.6
    kept[:, 0] = True
    return mask & kept


def token_log_probs(g: torch.Generator, *shape: int, dtype=torch.float32) -> Tensor:
    return uniform(g, -5, -0.05, *shape, dtype=dtype)


def near(g: torch.Generator, log_probs: Tensor, spread: float) -> Tensor:
    """Log-probabilities of another policy, at most `spread` away."""
    return (log_probs.double() + uniform(g, -spread, spread, *log_probs.shape, dtype=torch.float64)).to(log_probs.dtype)


def mean_of(x: Tensor, mask: Tensor) -> Tensor:
    """The token mean, for wrong answers that go wrong elsewhere."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def filled(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors with 0 behind the mask."""
    return [torch.where(mask, x, 0.0) for x in tensors]
