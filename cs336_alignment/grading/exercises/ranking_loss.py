import torch
from torch import Tensor

from cs336_alignment.grading.exercise import Case, Exercise, Mistake
from cs336_alignment.grading.inputs import uniform


def ranking_loss(scores: Tensor) -> Tensor:
    left = scores.flip(-1).logcumsumexp(-1).flip(-1)
    return (left - scores).sum(-1).mean()


def problem(g, rows, answers, spread=3.0):
    return (uniform(g, -spread, spread, rows, answers),)


def place_by_place(scores):
    places = range(scores.shape[1] - 1)
    return -sum(scores[:, k:].log_softmax(1)[:, 0] for k in places).mean()


def all_pairs(scores):
    gaps = scores[:, :, None] - scores[:, None, :]
    better = torch.ones(gaps.shape[1:]).triu(1).bool()
    return -torch.nn.functional.logsigmoid(gaps[:, better]).mean()


EXERCISE = Exercise(
    name="ranking_loss",
    assignment="a2_reward",
    order=8,
    points=0,
    minutes=15,
    lecture="08_reward_models",
    equation="8.7",
    parameters=("scores",),
    reference=ranking_loss,
    cases=(
        Case(
            "two answers and four",
            "the mean over the prompts of minus the log-probability of the whole ranking",
            lambda g: [problem(g, 3, 2), problem(g, 3, 4)],
            0,
            visible=True,
        ),
        Case(
            "large scores",
            "finite for scores in the hundreds",
            lambda g: [problem(g, 4, 4, 400.0), problem(g, 3, 5, 400.0)],
            0,
            visible=True,
        ),
        Case(
            "gradient",
            "differentiable",
            lambda g: [problem(g, 2, 4), problem(g, 3, 5)],
            0,
            visible=True,
            gradients=(0,),
        ),
    ),
    mistakes=(
        Mistake(
            "Each place is won among the answers that are still left; yours compete with all of them every time.",
            lambda s: -s.log_softmax(1).sum(1).mean(),
        ),
        Mistake("The order is turned around: column 0 is the best answer.", lambda s: ranking_loss(s.flip(1))),
        Mistake(
            "This is the probability of the winner alone; the other places count too.",
            lambda s: -s.log_softmax(1)[:, 0].mean(),
        ),
        Mistake("These are InstructGPT's pairs (8.8), not the ranking's probability.", all_pairs, "8.8"),
        Mistake(
            "Sum the places of a prompt; take the mean over the prompts alone.", lambda s: ranking_loss(s) / s.shape[1]
        ),
        Mistake("Take the mean over the prompts, not the sum.", lambda s: ranking_loss(s) * len(s)),
        Mistake("The minus sign is missing.", lambda s: -ranking_loss(s)),
        Mistake(
            "exp overflows here: use logsumexp, log_softmax or logcumsumexp.",
            lambda s: (s.exp().flip(1).cumsum(1).flip(1).log() - s).sum(1).mean(),
        ),
    ),
    unusual=(
        place_by_place,
        lambda s: torch.stack([torch.logsumexp(s[:, k:], 1) - s[:, k] for k in range(s.shape[1])]).sum(0).mean(),
    ),
)
