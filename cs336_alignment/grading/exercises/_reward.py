"""Toy inputs of the exercises on reward models."""

import math

import torch
from torch import Tensor

from cs336_alignment.grading.inputs import integer, uniform


def scores(g, pairs: int, spread: float = 3.0, level: float = 0.0, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """chosen, rejected: (pairs,) each, `spread` around `level`."""
    chosen, rejected = (level + uniform(g, -spread, spread, pairs, dtype=torch.float64) for _ in range(2))
    return chosen.to(dtype), rejected.to(dtype)


def right_padded(g, rows: int, width: int) -> Tensor:
    """Masks (rows, width) of a response after a prompt and before padding, each with two tokens or more; row 0
    reaches the end, row 1 ends well before it."""
    ends = torch.randint(3, width + 1, (rows,), generator=g)
    ends[0], ends[1] = width, integer(g, 3, width - 2)
    starts = 1 + (torch.rand(rows, generator=g) * (ends - 2)).long()
    positions = torch.arange(width)
    return (positions >= starts[:, None]) & (positions < ends[:, None])


def left_padded(g, rows: int, width: int) -> Tensor:
    """The same where padding and prompt come first: every response ends in the last column."""
    starts = torch.randint(1, width - 1, (rows,), generator=g)
    return (torch.arange(width) >= starts[:, None]).clone()


def in_pieces(g, rows: int, width: int) -> Tensor:
    """Masks of conversations: every response is interrupted by another prompt, and the last ones end early too."""
    mask = right_padded(g, rows, width)
    mask[:, :] = False
    for row in range(rows):
        first, gap, second = integer(g, 1, 2), integer(g, 1, 2), integer(g, 2, 3)
        start = integer(g, 1, width - first - gap - second - 1)
        mask[row, start : start + first] = True
        mask[row, start + first + gap : start + first + gap + second] = True
    return mask


def with_empty_rows(mask: Tensor) -> Tensor:
    """The same with the second row, and the last of four or more, without a response token."""
    mask = mask.clone()
    mask[1] = False
    if len(mask) >= 4:
        mask[-1] = False
    return mask


def garbage_beside(mask: Tensor, values: Tensor) -> Tensor:
    """NaN and infinities at every position but the last of each row's response."""
    columns = torch.arange(mask.shape[1])
    last = torch.where(mask, columns, -1).max(1).values
    bad = torch.tensor([math.nan, math.inf, -math.inf], dtype=values.dtype)[columns % 3]
    return torch.where(columns == last[:, None], values, bad)


def predictions(g, bins: int, low: float = 0.0) -> tuple[Tensor, Tensor]:
    """confidence (N,) float32 and correct (N,) bool, in bins of equal width from `low` to 1; every third one of the
    bins in the middle stays empty.

    No confidence lies near an edge. Each bin holds both right and wrong predictions, their numbers differ, the first
    bin is right too often and the last one too seldom: so all ways to average give different numbers.
    """
    used = [b for b in range(bins) if b >= bins * low - 1e-9]
    used = [b for i, b in enumerate(used) if b in (used[0], used[-1]) or i % 3 != 2]
    confidence, correct = [], []
    for i, b in enumerate(used):
        size = 3 + (2 * i + integer(g, 0, 1)) % 5
        confidence.append((b + uniform(g, 0.1, 0.9, size, dtype=torch.float64)) / bins)
        mostly = b != used[-1] and (i % 2 == 0)
        right = torch.full((size,), mostly)
        right[0] = not mostly
        correct.append(right)
    order = torch.randperm(sum(map(len, confidence)), generator=g)
    return torch.cat(confidence)[order].float(), torch.cat(correct)[order]


def on_the_edges(g, bins: int) -> tuple[Tensor, Tensor]:
    """confidence and correct (a probability here) for 2, 4 or 8 bins, whose edges floating point has exactly, with
    confidences on all edges, 0 and 1 among them. The gap of an edge's prediction has the sign of the bin above, so
    it matters much which bin it falls into."""
    confidence, gap = [0.0], [0.3]
    for b in range(bins):
        sign = 1 if b % 2 == 0 else -1
        for _ in range(2):
            confidence.append((b + uniform(g, 0.4, 0.6, 1, dtype=torch.float64).item()) / bins)
            gap.append(sign * uniform(g, 0.5, 0.7, 1, dtype=torch.float64).item() / (bins + 1))
        confidence.append((b + 1) / bins)
        gap.append(-sign * 0.3 / bins if b < bins - 1 else -0.3)
    order = torch.randperm(len(gap), generator=g)
    confidence, gap = torch.tensor(confidence, dtype=torch.float64), torch.tensor(gap, dtype=torch.float64)
    correct = (confidence + gap).clamp(0, 1)
    return confidence[order].float(), correct[order].float()
