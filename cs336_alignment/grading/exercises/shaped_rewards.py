import torch

from cs336_alignment.grading.exercise import FLOAT64, Case, Exercise, Mistake
from cs336_alignment.grading.exercises._rollouts import (
    filled,
    left,
    near,
    ragged,
    spoiled,
    token_log_probs,
    with_gaps,
)
from cs336_alignment.grading.inputs import integer, number, uniform
from cs336_alignment.ppo import shaped_rewards


def problem(g, rows, longest, beta=None, dtype=torch.float32, empty=False, change=lambda mask: mask):
    mask = change(ragged(g, rows, longest, empty))
    log_probs = token_log_probs(g, rows, longest, dtype=dtype)
    scores = uniform(g, -2, 3, rows, dtype=dtype)
    return scores, log_probs, near(g, log_probs, 1.0), mask, number(g, 0.1, 0.9) if beta is None else beta


def garbage(g, rows, longest, **kwargs):
    """With a row without tokens, whose score is NaN."""
    scores, log_probs, ref, mask, beta = problem(g, rows, longest, empty=True, **kwargs)
    scores = torch.where(mask.any(1), scores, torch.nan)
    return scores, *spoiled(mask, log_probs, ref), mask, beta


def row_by_row(scores, log_probs, ref, mask, beta):
    out = torch.zeros_like(log_probs)
    for i in range(len(mask)):
        positions = mask[i].nonzero().flatten().tolist()
        for t in positions:
            out[i, t] = beta * (ref[i, t] - log_probs[i, t])
        if positions:
            out[i, positions[-1]] += scores[i]
    return out


def with_scatter(scores, log_probs, ref, mask, beta):
    rewards = torch.zeros_like(log_probs)
    rewards[mask] = -beta * (log_probs[mask] - ref[mask])
    some = mask.any(dim=1).nonzero().flatten()
    last = mask.shape[1] - 1 - mask[some].flip(1).int().argmax(dim=1)
    rewards[some, last] = rewards[some, last] + scores[some]
    return rewards


def with_positions(scores, log_probs, ref, mask, beta):
    positions = torch.arange(mask.shape[1]).expand(mask.shape)
    last = torch.where(mask, positions, -1).max(dim=1, keepdim=True).values
    is_last = mask & (positions == last)
    penalty = torch.where(mask, log_probs.double() - ref.double(), 0.0) * beta
    return torch.where(is_last, scores.double().unsqueeze(1), 0.0) - penalty


def last_of(mask):
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)


def wrongly(penalty=lambda d: d, score=None, place=last_of, clean=True, after=lambda rewards, *_: rewards):
    """The right function with one thing changed. penalty: of d = log pi - log pi_ref; place: where the score goes."""

    def function(scores, log_probs, ref, mask, beta):
        d = (filled(mask, log_probs)[0] - filled(mask, ref)[0]) if clean else log_probs - ref
        where = place(mask)
        each = torch.where(where, scores.unsqueeze(1), 0.0) if score is None else score(scores, mask)
        return after(each - beta * penalty(d), d, scores, mask, beta, where)

    return function


def at_lengths(scores, log_probs, ref, mask, beta):
    """The score at length - 1: right for a prefix, and at [-1] for an empty row."""
    rewards = -beta * torch.where(mask, log_probs - ref, 0.0)
    rewards[torch.arange(len(mask)), mask.sum(1) - 1] += scores
    return rewards


def at_lengths_of_some(scores, log_probs, ref, mask, beta):
    rewards = -beta * torch.where(mask, log_probs - ref, 0.0)
    some = mask.any(1).nonzero().flatten()
    rewards[some, mask[some].sum(1) - 1] += scores[some]
    return rewards


def one_later(mask):
    """One position behind the last token, or on it where the row is full."""
    place = torch.zeros_like(mask)
    for row, chosen in zip(mask, place):
        if row.any():
            chosen[min(len(row) - 1, int(row.nonzero().max()) + 1)] = True
    return place


EXERCISE = Exercise(
    name="shaped_rewards",
    assignment="a3_ppo",
    order=5,
    points=10,
    minutes=20,
    lecture="11_ppo",
    equation="11.4",
    parameters=("scores", "log_probs", "ref_log_probs", "mask", "beta"),
    reference=shaped_rewards,
    cases=(
        Case(
            "a ragged batch",
            "-beta (log pi - log pi_ref) on every response token, plus the score on the last one",
            lambda g: [problem(g, 3, 4, 0.5), problem(g, 4, 5, 0.1)],
            2,
            visible=True,
        ),
        Case(
            "behind the mask",
            "0 behind the mask, whatever stands there; a row without response tokens is all 0, whatever its score",
            lambda g: [garbage(g, 3, 4), garbage(g, 4, 3)],
            1,
            visible=True,
        ),
        Case(
            "padding before the response",
            "the score on the last True of each row, wherever it is",
            lambda g: [problem(g, 3, 4, change=left), problem(g, 4, 5, change=left)],
            1,
            visible=True,
        ),
        Case(
            "other sizes",
            "right for any batch and beta",
            lambda g: [problem(g, integer(g, 2, 6), integer(g, 4, 7)), problem(g, 5, 6), problem(g, 3, 4, beta=0.0)],
            3,
        ),
        Case(
            "garbage and empty rows",
            "what stands behind the mask never matters",
            lambda g: [garbage(g, 5, 5), garbage(g, 6, 3)],
            1,
        ),
        Case(
            "masks of any kind",
            "the mask may begin late and have gaps",
            lambda g: [
                garbage(g, 4, 6, change=left),
                problem(g, 5, 7, change=lambda mask: with_gaps(g, mask)),
                problem(g, 5, 5, empty=True),
            ],
            1,
        ),
        Case(
            "double precision",
            "float64 stays float64",
            lambda g: [problem(g, 4, 5, dtype=torch.float64) for _ in range(2)],
            1,
            tolerance=FLOAT64,
        ),
    ),
    mistakes=(
        Mistake(
            "The KL part has the wrong sign: a token that is more probable than under pi_ref pays.",
            wrongly(lambda d: -d),
        ),
        Mistake(
            "The score is on every token: the sum over a response would be its length times the score.",
            wrongly(place=lambda mask: mask),
        ),
        Mistake(
            "The score is in the last column, padding or not: it belongs on each row's own last response token.",
            wrongly(place=lambda mask: torch.arange(mask.shape[1]).expand(mask.shape) == mask.shape[1] - 1),
        ),
        Mistake(
            "The score is on the first response token; it comes with the last.",
            wrongly(place=lambda mask: mask & (mask.cumsum(1) == 1)),
        ),
        Mistake(
            "The score is one position behind the last response token (or there is one token too few before it): the "
            "last True of the mask is EOS itself.",
            wrongly(place=one_later),
        ),
        Mistake(
            "The score is shared out over the tokens; it comes with the last one.",
            wrongly(score=lambda s, m: torch.where(m, (s / m.sum(1).clamp(min=1)).unsqueeze(1), 0.0)),
        ),
        Mistake("beta is missing.", lambda s, lp, ref, m, beta: wrongly()(s, lp, ref, m, 1.0)),
        Mistake("The KL part is missing.", wrongly(lambda d: 0 * d)),
        Mistake(
            "beta multiplies the score too; it belongs to the KL part alone.",
            wrongly(
                after=lambda r, d, s, m, beta, w: beta * torch.where(w, s.nan_to_num(0.0).unsqueeze(1), 0.0) - beta * d
            ),
        ),
        Mistake(
            "The last token has the score but not its own KL part: add, do not replace.",
            wrongly(after=lambda r, d, s, m, beta, w: torch.where(w, s.unsqueeze(1), r)),
        ),
        Mistake(
            "The whole KL of the response is on the last token; each token pays for its own share.",
            wrongly(
                after=lambda r, d, s, m, beta, w: torch.where(w, s.unsqueeze(1) - beta * d.sum(1, keepdim=True), 0.0)
            ),
        ),
        Mistake(
            "This penalises with k3; as a reward it hardly penalises at all. Use k1.",
            wrongly(lambda d: torch.expm1(-d) + d),
            "11.10",
        ),
        Mistake("This penalises with k2; use k1.", wrongly(lambda d: d**2 / 2), "11.10"),
        Mistake("The KL part is cut off at 0: token by token it has either sign.", wrongly(torch.relu)),
        Mistake("What stands behind the mask is in the result: it must be 0 there.", wrongly(clean=False)),
        Mistake(
            "0 times NaN is NaN: multiplying by the mask does not remove what stands behind it. Use torch.where.",
            lambda s, lp, ref, m, beta: last_of(m) * s.unsqueeze(1) - beta * (lp - ref) * m,
        ),
        Mistake(
            "In a row without response tokens length - 1 is -1, which is the last column: such a row must be all 0.",
            at_lengths,
        ),
        Mistake(
            "The last response token is at length - 1 only if the response begins in column 0: look for the last True.",
            at_lengths_of_some,
        ),
    ),
    wrong=(
        wrongly(after=lambda r, d, s, m, beta, w: r - s[m.any(1)].mean() * w),
        lambda s, lp, ref, m, beta: wrongly()(s.float(), lp.float(), ref.float(), m, beta),
        wrongly(lambda d: d.clamp(-0.5, 0.5)),
    ),
    unusual=(row_by_row, with_scatter, with_positions),
    stripped=("ppo.shaped_rewards", "ppo.kl_estimate"),
)
