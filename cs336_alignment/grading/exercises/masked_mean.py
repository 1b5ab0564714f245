import math

import torch

from cs336_alignment.grading.exercise import FLOAT64, Case, Exercise, Mistake
from cs336_alignment.grading.inputs import integer, uniform
from cs336_alignment.tokens import masked_mean


def problem(g, *shape, dim=None, dtype=torch.float32, low=-3.0, high=3.0):
    """Values and a mask with both True and False along every dimension; dim is left out of the call if None."""
    x = uniform(g, low, high, *shape, dtype=dtype)
    mask = torch.rand(*shape, generator=g) < 0.6
    flat = mask.view(-1, shape[-1])
    flat[:, 0], flat[:, -1] = True, False  # no row is empty or full
    flat[0] = True  # one is full, so rows differ in number
    return (x, mask) if dim is None else (x, mask, dim)


def garbage(g, *shape, dim=None):
    """NaN and both infinities behind the mask."""
    x, mask, *rest = problem(g, *shape, dim=dim)
    odd = torch.tensor([math.nan, math.inf, -math.inf])
    hidden = odd[torch.randint(0, 3, x.shape, generator=g)]
    return torch.where(mask, x, hidden), mask, *rest


def empty_rows(g, rows, columns, dim=1):
    """Some rows that no position counts in, besides others; along dim 0 columns of that kind."""
    x, mask, _ = problem(g, rows, columns, dim=dim)
    (mask if dim == 1 else mask.T)[1] = False
    return x, mask, dim


def nothing(g):
    x, mask = problem(g, 3, 4)
    return x, mask & False


def half(g, dtype):
    return problem(g, 20, 40, dtype=dtype, low=200.0, high=400.0)


def wide(x):
    return x if x.dtype == torch.float64 else x.float()


def in_a_loop(x, mask, dim=None):
    if dim is None:
        kept = wide(x)[mask]
        return kept.sum() / max(len(kept), 1)
    rows, masks = wide(x).movedim(dim, -1), mask.movedim(dim, -1)
    means = [
        row[m].mean() if m.any() else row[m].sum()
        for row, m in zip(rows.reshape(-1, rows.shape[-1]), masks.reshape(-1, rows.shape[-1]))
    ]
    return torch.stack(means).reshape(rows.shape[:-1])


def with_nan_to_num(x, mask, dim=None):
    kept = wide(x).masked_fill(~mask, 0)
    if dim is None:
        kept, mask, dim = kept.flatten(), mask.flatten(), 0
    return torch.nan_to_num(kept.sum(dim) / mask.sum(dim))


def with_weights(x, mask, dim=None):
    """In float64, each position times its share; dimension 0 is the one averaged over."""
    x, mask = (t.flatten() if dim is None else t.movedim(dim, 0) for t in (x, mask))
    share = mask.double() / mask.sum(0).clamp(min=1)
    return torch.einsum("i...,i...->...", torch.where(mask, x.double(), 0.0), share)


def wrongly(total=None, count=None, fill=None, convert=wide):
    """The right function with one thing changed."""
    fill = fill or (lambda x, mask: torch.where(mask, x, 0.0))
    total = total or (lambda x, mask, dim: x.sum() if dim is None else x.sum(dim))
    count = count or (lambda mask, dim: (mask.sum() if dim is None else mask.sum(dim)).clamp(min=1))

    def function(x, mask, dim=None):
        x = fill(convert(x), mask)
        return total(x, mask, dim) / count(mask, dim)

    return function


def plain_count(mask, dim):
    return mask.sum() if dim is None else mask.sum(dim)


def row_means(x, mask, dim=None):
    return masked_mean(x, mask, dim) if dim is not None else masked_mean(x, mask, -1).mean()


NAN = "What is behind the mask gets through: 0 * NaN is NaN, and 0 * inf too. Replace it with torch.where."

EXERCISE = Exercise(
    name="masked_mean",
    assignment="a1_sft",
    order=4,
    points=7,
    minutes=15,
    lecture="02_sft_mechanics",
    equation="2.4",
    parameters=("x", "mask", "dim"),
    reference=masked_mean,
    cases=(
        Case(
            "over everything",
            "one number: the mean over the positions where the mask is True",
            lambda g: [problem(g, 3, 5), problem(g, 2, 3, 4)],
            1,
            visible=True,
        ),
        Case(
            "along a dimension",
            "with dim, a mean for each slice along that dimension, over its own True positions",
            lambda g: [problem(g, 3, 5, dim=1), problem(g, 4, 3, dim=0)],
            1,
            visible=True,
        ),
        Case(
            "garbage and empty rows",
            "NaN and inf behind the mask never matter; the mean over no position is 0",
            lambda g: [garbage(g, 3, 5), garbage(g, 3, 5, dim=1), empty_rows(g, 4, 5), nothing(g)],
            1,
            visible=True,
        ),
        Case(
            "other shapes and other empty rows",
            "right for any shape and any dimension, negative ones included; 0 for an empty row or column",
            lambda g: [
                problem(g, integer(g, 2, 4), integer(g, 3, 6), dim=-1),
                problem(g, 2, 3, 4, dim=1),
                garbage(g, 5, 4, dim=0),
                garbage(g, 4, 6),
                empty_rows(g, 4, 5, dim=0),
                empty_rows(g, 5, 4),
                nothing(g),
            ],
            1,
        ),
        Case(
            "gradient",
            "differentiable by x, with gradient 0 behind the mask and in empty rows, whatever is there",
            lambda g: [problem(g, 3, 4), garbage(g, 4, 5, dim=1), empty_rows(g, 4, 3), nothing(g)],
            1,
            gradients=(0,),
        ),
        Case(
            "half precision",
            "converted to float32 first: a sum of hundreds of numbers in the hundreds is infinite in float16",
            lambda g: [half(g, torch.float16), half(g, torch.bfloat16)],
            1,
        ),
        Case(
            "double precision",
            "float64 stays float64",
            lambda g: [problem(g, 3, 5, dtype=torch.float64), problem(g, 60, 4, dim=1, dtype=torch.float64)],
            1,
            tolerance=FLOAT64,
        ),
    ),
    mistakes=(
        Mistake(
            "You divide by the number of all positions; divide by the number of True ones.",
            wrongly(count=lambda mask, dim: mask.numel() if dim is None else mask.shape[dim]),
        ),
        Mistake("This is the sum; divide by the number of True positions.", wrongly(count=lambda mask, dim: 1)),
        Mistake("The mask is not used.", lambda x, mask, dim=None: x.mean() if dim is None else x.mean(dim)),
        Mistake("The mask is inverted.", lambda x, mask, dim=None: masked_mean(x, ~mask, dim)),
        Mistake(
            "Without dim this averages the means of the rows; each position must have the same weight.",
            row_means,
            "2.8",
        ),
        Mistake("dim is ignored.", lambda x, mask, dim=None: masked_mean(x, mask)),
        Mistake(
            "The averaged dimension is kept with size 1: leave keepdim out.",
            lambda x, mask, dim=None: (
                masked_mean(x, mask, dim) if dim is None else masked_mean(x, mask, dim)[..., None]
            ),
        ),
        Mistake(
            "With dim, divide by the count along that dimension, not by the count of the whole mask.",
            wrongly(count=lambda mask, dim: mask.sum().clamp(min=1)),
        ),
        Mistake(NAN, wrongly(fill=lambda x, mask: x * mask)),
        Mistake(
            "The mean over no position is 0 / 0 = NaN; it must be 0: clamp the count to at least 1.",
            wrongly(count=plain_count),
        ),
        Mistake(
            "The mean over no position must be 0: the small number in the count is added everywhere.",
            wrongly(count=lambda mask, dim: plain_count(mask, dim) + 1),
        ),
        Mistake(
            "Both at once: 0 * NaN is NaN, and an empty mask is 0 / 0. Use torch.where and clamp the count.",
            wrongly(fill=lambda x, mask: x * mask, count=plain_count),
        ),
    ),
    wrong=(
        lambda x, mask, dim=None: masked_mean(x.detach(), mask, dim),
        lambda x, mask, dim=None: masked_mean(x.float(), mask, dim),
        wrongly(convert=lambda x: x),
    ),
    unusual=(in_a_loop, with_nan_to_num, with_weights),
    stripped=("tokens.masked_mean",),
)
