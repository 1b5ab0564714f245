import math

import torch

from cs336_alignment.grading.exercise import Case, Exercise, Mistake
from cs336_alignment.grading.inputs import integer, uniform
from cs336_alignment.sft import sft_loss


def problem(g, rows, longest):
    """Log-probabilities and the mask of a ragged batch: prompts first, padding last."""
    positions = torch.arange(longest)
    starts = torch.randint(0, 3, (rows, 1), generator=g)
    ends = starts + 1 + torch.randint(0, longest - 3, (rows, 1), generator=g)
    starts[0], ends[0], starts[-1], ends[-1] = 1, 2, 1, longest - 1  # one of length 1, one of nearly all
    return uniform(g, -6, -0.01, rows, longest), (positions >= starts) & (positions < ends)


def garbage(g, rows=3, longest=6):
    log_probs, mask = problem(g, rows, longest)
    odd = torch.tensor([math.nan, math.inf, -math.inf])
    return torch.where(mask, log_probs, odd[torch.randint(0, 3, mask.shape, generator=g)]), mask


def an_empty_row(g, rows=4, longest=6):
    log_probs, mask = problem(g, rows, longest)
    mask[1] = False
    return log_probs, mask


def nothing(g):
    log_probs, mask = problem(g, 2, 5)
    return log_probs, mask & False


def by_rows(log_probs, mask):
    total = count = 0.0
    for row, m in zip(log_probs, mask):
        total, count = total - row[m].sum(), count + m.sum()
    return total / max(count, 1)


def as_dot_product(log_probs, mask):
    weights = mask.double() / mask.sum().clamp(min=1)
    return -torch.dot(log_probs.double().masked_fill(~mask, 0.0).flatten(), weights.flatten())


def kept(log_probs, mask):
    x = log_probs[mask]
    return x.neg().mean() if x.numel() else x.sum()


def rows_of(log_probs, mask):
    """Sums and numbers of tokens of the rows."""
    return torch.where(mask, log_probs, 0.0).sum(1), mask.sum(1)


EXERCISE = Exercise(
    name="sft_loss",
    assignment="a1_sft",
    order=5,
    points=5,
    minutes=5,
    lecture="02_sft_mechanics",
    equation="2.4",
    parameters=("log_probs", "response_mask"),
    reference=sft_loss,
    cases=(
        Case(
            "responses of different lengths",
            "minus the mean log-probability of all response tokens of the batch, each with the same weight",
            lambda g: [problem(g, 3, 6), problem(g, 4, 7)],
            1,
            visible=True,
        ),
        Case(
            "garbage and empty rows",
            "what is behind the mask never matters; a batch without response tokens has the loss 0",
            lambda g: [garbage(g), an_empty_row(g), nothing(g)],
            1,
            visible=True,
        ),
        Case(
            "other batches",
            "right for any batch, also where a row has one response token and another nearly nothing else",
            lambda g: [problem(g, integer(g, 2, 6), integer(g, 5, 9)), problem(g, 5, 8), problem(g, 3, 12)],
            1,
        ),
        Case(
            "gradient",
            "differentiable: the gradient is -1 / N at each of the N response tokens and 0 elsewhere",
            lambda g: [problem(g, 3, 6), garbage(g, 4, 7), an_empty_row(g)],
            1,
            gradients=(0,),
        ),
        Case(
            "other garbage, other empty rows",
            "finite whatever is behind the mask; a row without response tokens takes no part in the mean",
            lambda g: [garbage(g, 4, 8), an_empty_row(g, 5, 7), nothing(g), an_empty_row(g, 3, 6)],
            1,
        ),
    ),
    mistakes=(
        Mistake("The minus sign is missing: the loss falls as log-probabilities rise.", lambda x, m: -sft_loss(x, m)),
        Mistake(
            "You average within each response first; every token of the batch must have the same weight.",
            lambda x, m: -(rows_of(x, m)[0] / rows_of(x, m)[1].clamp(min=1)).mean(),
            "2.8",
        ),
        Mistake(
            "You average within each response first; every token of the batch must have the same weight.",
            lambda x, m: -(rows_of(x, m)[0] / rows_of(x, m)[1]).mean(),
            "2.8",
        ),
        Mistake("This is the sum over the tokens; take their mean.", lambda x, m: -rows_of(x, m)[0].sum()),
        Mistake(
            "You divide by the number of responses; divide by the number of response tokens.",
            lambda x, m: -rows_of(x, m)[0].mean(),
        ),
        Mistake(
            "You divide by the number of all positions, prompt and padding included.",
            lambda x, m: -rows_of(x, m)[0].sum() / m.numel(),
        ),
        Mistake("The mask is not used: prompt and padding are in the loss.", lambda x, m: -x.mean()),
        Mistake("The mask is inverted.", lambda x, m: sft_loss(x, ~m)),
        Mistake(
            "The mask is shifted once more; it fits the log-probabilities already.",
            lambda x, m: sft_loss(x[:, :-1], m[:, 1:]),
            "2.2",
        ),
        Mistake(
            "What is behind the mask gets through: 0 * NaN is NaN. Use your masked_mean.",
            lambda x, m: -(x * m).sum() / m.sum().clamp(min=1),
        ),
        Mistake("A batch without response tokens must have the loss 0, not 0 / 0.", lambda x, m: -x[m].mean()),
        Mistake("One number for the whole batch: no mean for each row.", lambda x, m: -rows_of(x, m)[0] / m.sum(1)),
        Mistake("This is the perplexity, exp of the loss.", lambda x, m: sft_loss(x, m).exp()),
        Mistake(
            "The arguments are log-probabilities already: no second logarithm.",
            lambda x, m: -torch.where(m, x.abs().log(), 0.0).sum() / m.sum().clamp(min=1),
        ),
    ),
    wrong=(
        lambda x, m: sft_loss(x.detach(), m),
        lambda x, m: sft_loss(x.clamp(min=-5), m),
    ),
    unusual=(by_rows, as_dot_product, kept),
    stripped=("sft.sft_loss", "tokens.masked_mean"),
)
