import torch

from cs336_alignment.grading.exercise import FLOAT64, Case, Exercise, Mistake
from cs336_alignment.grading.exercises._reward import scores
from cs336_alignment.grading.inputs import integer, uniform
from cs336_alignment.reward import bradley_terry_prob


def by_softmax(r1, r2):
    return torch.stack(torch.broadcast_tensors(r1, r2), -1).softmax(-1)[..., 0]


def table(g, rows, columns):
    """Some answers against others: a column and a row of scores."""
    return uniform(g, -3, 3, rows, 1), uniform(g, -3, 3, 1, columns)


EXERCISE = Exercise(
    name="bradley_terry_prob",
    assignment="a2_reward",
    order=1,
    points=5,
    minutes=5,
    lecture="08_reward_models",
    equation="8.1",
    parameters=("r1", "r2"),
    reference=bradley_terry_prob,
    cases=(
        Case(
            "a few pairs",
            "sigma of the difference of the two scores, one probability for each pair",
            lambda g: [scores(g, 3), scores(g, 4)],
            1,
            visible=True,
        ),
        Case(
            "large scores",
            "a probability, never NaN, whether scores differ by hundreds or are near each other in the thousands",
            lambda g: [scores(g, 24, spread=400.0), scores(g, 16, level=2000.0)],
            1,
            visible=True,
        ),
        Case(
            "other sizes",
            "right for any batch and any level of the scores",
            lambda g: [scores(g, integer(g, 2, 7)), scores(g, 5, level=-1500.0), scores(g, 24, spread=400.0)],
            1,
        ),
        Case(
            "everyone against everyone",
            "shapes (K, 1) and (1, L) broadcast to a table (K, L)",
            lambda g: [table(g, 4, 5), table(g, 3, 2)],
            1,
        ),
        Case(
            "gradient in double precision",
            "differentiable by both; float64 stays float64",
            lambda g: [scores(g, n, dtype=torch.float64) for n in (4, 6)],
            1,
            gradients=(0, 1),
            tolerance=FLOAT64,
        ),
    ),
    mistakes=(
        Mistake(
            "This is the probability that the *second* answer wins: r1 and r2 are swapped.",
            lambda r1, r2: torch.sigmoid(r2 - r1),
        ),
        Mistake("This is the difference itself; the probability is its sigmoid.", lambda r1, r2: r1 - r2),
        Mistake(
            "exp overflows for large scores, and inf / inf is NaN: take torch.sigmoid of the difference.",
            lambda r1, r2: r1.exp() / (r1.exp() + r2.exp()),
        ),
        Mistake(
            "The scores are logarithms of strengths: r1 / (r1 + r2) needs their exponentials first.",
            lambda r1, r2: r1 / (r1 + r2),
        ),
        Mistake("The scores are subtracted, not added.", lambda r1, r2: torch.sigmoid(r1 + r2)),
        Mistake("The second score is missing: only the difference counts.", lambda r1, r2: torch.sigmoid(r1)),
        Mistake(
            "One sigmoid of the difference; you combine two sigmoids.",
            lambda r1, r2: torch.sigmoid(r1) / (torch.sigmoid(r1) + torch.sigmoid(r2)),
        ),
        Mistake(
            "One sigmoid of the difference; you subtract two sigmoids.",
            lambda r1, r2: torch.sigmoid(r1) - torch.sigmoid(r2),
        ),
        Mistake("This is the log of the probability.", lambda r1, r2: torch.nn.functional.logsigmoid(r1 - r2)),
        Mistake("One probability for each pair: no mean over the batch.", lambda r1, r2: torch.sigmoid(r1 - r2).mean()),
        Mistake(
            "The softmax runs over the batch; it belongs over the two answers of a pair.",
            lambda r1, r2: (r1 - r2).softmax(0),
        ),
        Mistake(
            "This says who wins, not with which probability: leave the comparison or the rounding out.",
            lambda r1, r2: (r1 > r2).float(),
        ),
        Mistake(
            "This is the normal distribution function (Thurstone's model); Bradley-Terry has the logistic one.",
            lambda r1, r2: torch.special.ndtr(r1 - r2),
            "8.1c",
        ),
        Mistake(
            "tanh(x) is not the sigmoid: sigma(x) = (1 + tanh(x / 2)) / 2.",
            lambda r1, r2: (1 + torch.tanh(r1 - r2)) / 2,
        ),
        Mistake(
            "This is the chess players' scale (base 10, 400 points); here it is base e and one point.",
            lambda r1, r2: 1 / (1 + 10 ** ((r2 - r1) / 400)),
        ),
    ),
    wrong=(
        lambda r1, r2: torch.sigmoid((r1 - r2).clamp(-2, 2)),
        lambda r1, r2: torch.sigmoid(r1 - r2).detach(),
        lambda r1, r2: torch.sigmoid(r1.flatten() - r2.flatten()),
    ),
    unusual=(
        by_softmax,
        lambda r1, r2: 0.5 * (1 + torch.tanh(0.5 * (r1 - r2))),
        lambda r1, r2: 1 / (1 + torch.exp(r2 - r1)),
        lambda r1, r2: torch.exp(-torch.nn.functional.softplus(r2.double() - r1.double())),
    ),
    stripped=("reward.bradley_terry_prob",),
)
