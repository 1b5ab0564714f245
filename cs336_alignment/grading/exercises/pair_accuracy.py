import torch

from cs336_alignment.evaluate import pair_accuracy
from cs336_alignment.grading.exercise import Case, Exercise, Mistake
from cs336_alignment.grading.inputs import integer, uniform


def problem(g, right: int, wrong: int, tied: int):
    """Scores of so many pairs that are ranked rightly, wrongly, and not at all, in random order."""
    chosen = uniform(g, -3, 3, right + wrong + tied)
    sign = torch.tensor([-1.0] * right + [1.0] * wrong + [0.0] * tied)
    rejected = chosen + sign * uniform(g, 0.1, 2, len(sign))
    order = torch.randperm(len(sign), generator=g)
    return chosen[order], rejected[order]


def close(g):
    """Scores in the hundreds that differ by little: no ties, however near."""
    chosen, rejected = problem(g, 5, 2, 1)
    return 500 + chosen / 1000, 500 + rejected / 1000


def needed(chosen, rejected):
    """The errors that the statement asks for."""
    if chosen.shape != rejected.shape or not chosen.numel():
        raise ValueError("shapes")


def with_sign(chosen, rejected):
    needed(chosen, rejected)
    return (1 + torch.sign(chosen - rejected)).mean() / 2


def by_counting(chosen, rejected):
    needed(chosen, rejected)
    pairs = list(zip(chosen.tolist(), rejected.tolist()))
    return (sum(a > b for a, b in pairs) + 0.5 * sum(a == b for a, b in pairs)) / len(pairs)


def by_heaviside(chosen, rejected):
    needed(chosen, rejected)
    return torch.heaviside(chosen - rejected, torch.tensor(0.5)).double().mean()


def share(x):
    return x.float().mean().item()


EXERCISE = Exercise(
    name="pair_accuracy",
    assignment="a2_reward",
    order=6,
    points=4,
    minutes=5,
    lecture="08_reward_models",
    equation="8.1",
    parameters=("chosen", "rejected"),
    reference=pair_accuracy,
    cases=(
        Case(
            "no ties",
            "the share of pairs with a higher score for the chosen answer, between 0 and 1",
            lambda g: [problem(g, 4, 2, 0), problem(g, 2, 5, 0)],
            1,
            visible=True,
        ),
        Case(
            "ties",
            "a pair with equal scores counts one half",
            lambda g: [problem(g, 4, 1, 2), problem(g, 0, 2, 3)],
            1,
            visible=True,
        ),
        Case(
            "other sizes",
            "right for any batch; scores that differ by little are no tie",
            lambda g: [
                problem(g, integer(g, 5, 9), integer(g, 1, 3), integer(g, 2, 4)),
                problem(g, integer(g, 0, 2), integer(g, 4, 6), 1),
                close(g),
            ],
            1,
        ),
        Case(
            "bad input",
            "scores of two shapes, also of shapes that broadcast, and an empty batch raise ValueError",
            lambda g: [
                problem(g, 3, 2, 1),
                (problem(g, 3, 1, 0)[0], problem(g, 3, 1, 0)[1][:, None]),
                (torch.zeros(0), torch.zeros(0)),
            ],
            1,
        ),
    ),
    mistakes=(
        Mistake("A tie counts nothing here; it should count one half.", lambda c, r: share(c > r)),
        Mistake("A tie counts as right here; it should count one half.", lambda c, r: share(c >= r)),
        Mistake(
            "You leave ties out; they stay in the number of pairs and count one half.",
            lambda c, r: share((c > r)[c != r]),
        ),
        Mistake("Chosen and rejected are swapped.", lambda c, r: share(c < r) + share(c == r) / 2),
        Mistake("Chosen and rejected are swapped.", lambda c, r: share(c < r)),
        Mistake(
            "This is the number of pairs; divide by how many there are.",
            lambda c, r: (c > r).sum().item() + (c == r).sum().item() / 2,
        ),
        Mistake("This is a number of pairs, and without the ties' halves.", lambda c, r: (c > r).sum().item()),
        Mistake("A share between 0 and 1, not per cent.", lambda c, r: 100 * (share(c > r) + share(c == r) / 2)),
        Mistake(
            "This is the mean probability; count who wins, not with which probability.",
            lambda c, r: torch.sigmoid(c - r).mean().item(),
        ),
        Mistake(
            "This is wins minus losses; a coin should get 0.5, not 0.", lambda c, r: torch.sign(c - r).mean().item()
        ),
        Mistake("One number for the batch: take the mean.", lambda c, r: (c > r).float() + (c == r).float() / 2),
        Mistake(
            "You compare the two means, not pair by pair.",
            lambda c, r: float(c.mean() > r.mean()) + float(c.mean() == r.mean()) / 2,
        ),
    ),
    wrong=(
        lambda c, r: share(c > r) + share(c == r) / 2,
        lambda c, r: share((c - r) > 0.05) + share((c - r).abs() <= 0.05) / 2,
    ),
    unusual=(with_sign, by_counting, by_heaviside),
    stripped=("evaluate.pair_accuracy",),
)
