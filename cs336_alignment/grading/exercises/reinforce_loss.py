import torch

from cs336_alignment.grading.exercise import FLOAT64, Case, Exercise, Mistake
from cs336_alignment.grading.exercises._rollouts import filled, mean_of, nothing, ragged, spoiled, token_log_probs
from cs336_alignment.grading.inputs import integer, number, uniform
from cs336_alignment.ppo import reinforce_loss


def problem(g, rows, longest, dtype=torch.float32, mask=None, empty=False):
    mask = ragged(g, rows, longest, empty) if mask is None else mask
    rows, longest = mask.shape
    advantages = uniform(g, -2, 3, rows, longest, dtype=dtype)
    return token_log_probs(g, rows, longest, dtype=dtype), advantages, mask


def precise(g):
    """Terms in the thousands that sum to a number between 1 and 2: float32 would lose its digits."""
    log_probs, advantages, mask = problem(g, 5, 6, torch.float64)
    advantages = 1000 * advantages
    rest = (log_probs * advantages)[mask].sum() - number(g, 1, 2)
    advantages[0, 0] -= rest / log_probs[0, 0]
    return log_probs, advantages, mask


def garbage(g, *size, **kwargs):
    log_probs, advantages, mask = problem(g, *size, **kwargs)
    return *spoiled(mask, log_probs, advantages), mask


def by_index(log_probs, advantages, mask):
    terms = log_probs[mask] * advantages[mask]
    return -terms.sum() / max(int(mask.sum()), 1)


def in_a_loop(log_probs, advantages, mask):
    total, count = 0.0 * log_probs[mask].sum().double(), 0
    for i in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            if mask[i, t]:
                total, count = total - log_probs[i, t].double() * advantages[i, t].double(), count + 1
    return total / count if count else total


def with_einsum(log_probs, advantages, mask):
    log_probs, advantages = filled(mask, log_probs, advantages)
    return torch.einsum("bt,bt->", log_probs, advantages) / -mask.sum().clamp(min=1)


def wrongly(term=lambda lp, adv: -lp * adv, reduce=mean_of):
    """The right loss of clean inputs, with one thing changed."""

    def function(log_probs, advantages, mask):
        return reduce(term(*filled(mask, log_probs, advantages)), mask)

    return function


def sequence_mean(x, mask):
    return ((x * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


EXERCISE = Exercise(
    name="reinforce_loss",
    assignment="a3_ppo",
    order=3,
    points=5,
    minutes=10,
    lecture="10_policy_gradients",
    equation="10.4",
    parameters=("log_probs", "advantages", "mask"),
    reference=reinforce_loss,
    cases=(
        Case(
            "a ragged batch",
            "minus the sum of log-probability times advantage over all response tokens, divided by their number",
            lambda g: [problem(g, 3, 4), problem(g, 4, 5)],
            1,
            visible=True,
        ),
        Case(
            "behind the mask",
            "NaN and inf behind the mask reach neither the value nor the gradient; without any response token the "
            "loss is 0",
            lambda g: [garbage(g, 3, 4), garbage(g, 4, 3, empty=True), garbage(g, 2, 3, mask=nothing(2, 3))],
            1,
            visible=True,
            gradients=(0,),
        ),
        Case(
            "other sizes",
            "right for any batch",
            lambda g: (
                [problem(g, integer(g, 2, 6), integer(g, 4, 8)) for _ in range(2)] + [problem(g, 4, 6, empty=True)]
            ),
            1,
        ),
        Case(
            "gradient",
            "differentiable by the log-probabilities, with gradient 0 behind the mask, whatever is there",
            lambda g: [problem(g, 3, 5), garbage(g, 5, 5, empty=True), garbage(g, 2, 2, mask=nothing(2, 2))],
            1,
            gradients=(0,),
        ),
        Case(
            "double precision",
            "float64 stays float64",
            lambda g: [precise(g) for _ in range(2)],
            1,
            tolerance=FLOAT64,
        ),
    ),
    mistakes=(
        Mistake(
            "You average over the tokens of each response first; (10.4) is the mean over all response tokens.",
            wrongly(reduce=sequence_mean),
        ),
        Mistake(
            "You sum over the tokens: divide by the number of response tokens.", wrongly(reduce=lambda x, m: x.sum())
        ),
        Mistake(
            "You divide by the number of responses; (10.4) divides by the number of response tokens.",
            wrongly(reduce=lambda x, m: x.sum() / len(x)),
        ),
        Mistake(
            "You divide by all positions, padding included: divide by the number of response tokens.",
            wrongly(reduce=lambda x, m: x.mean()),
        ),
        Mistake(
            "The sign is wrong: an optimizer minimises, so the loss is minus the objective.",
            wrongly(lambda lp, adv: lp * adv),
        ),
        Mistake("The advantages are missing.", wrongly(lambda lp, adv: -lp)),
        Mistake(
            "You multiply probabilities; the policy gradient needs their logarithms.",
            wrongly(lambda lp, adv: -lp.exp() * adv),
        ),
        Mistake("The mask is not used: the padding is in the mean.", lambda lp, adv, mask: -(lp * adv).mean()),
        Mistake(
            "0 times NaN is NaN: multiplying by the mask does not remove what stands behind it. Index with the mask, "
            "or use torch.where first.",
            lambda lp, adv, mask: -(lp * adv * mask).sum() / mask.sum().clamp(min=1),
        ),
        Mistake(
            "torch.where after the product hides NaN from the value but not from the gradient: replace what is behind "
            "the mask before you multiply, or index with the mask.",
            lambda lp, adv, mask: mean_of(-lp * adv, mask),
        ),
        Mistake(
            "Without a response token you divide by 0: the mean over nothing is 0 here.",
            lambda lp, adv, mask: -(lp[mask] * adv[mask]).mean(),
        ),
        Mistake(
            "Use the advantages as they come: do not subtract their mean here.",
            lambda lp, adv, mask: mean_of(-filled(mask, lp)[0] * (filled(mask, adv)[0] - mean_of(adv, mask)), mask),
        ),
        Mistake(
            "One number for the whole batch, not one for each response.",
            wrongly(reduce=lambda x, m: x.sum(1) / m.sum(1).clamp(min=1)),
        ),
    ),
    wrong=(
        lambda lp, adv, mask: reinforce_loss(lp.detach(), adv, mask),
        lambda lp, adv, mask: reinforce_loss(lp.float(), adv.float(), mask),
    ),
    unusual=(by_index, in_a_loop, with_einsum),
    stripped=("ppo.reinforce_loss",),
)
