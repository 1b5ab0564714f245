import torch
from torch import Tensor

from cs336_alignment.grading.exercise import Case, Exercise, Mistake
from cs336_alignment.grading.exercises.preference_prob import problem


def ipo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    ratio = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    return ((ratio - 1 / (2 * beta)) ** 2).mean()


EXERCISE = Exercise(
    name="ipo_loss",
    assignment="a4_dpo",
    order=10,
    points=0,
    minutes=10,
    lecture="12_dpo",
    equation="12.18",
    parameters=("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "beta"),
    reference=ipo_loss,
    cases=(
        Case(
            "a few pairs",
            "the mean of (log-ratio of chosen - log-ratio of rejected - 1 / (2 beta))^2",
            lambda g: [problem(g, 3, 0.5), problem(g, 5, 0.1)],
            0,
            visible=True,
        ),
        Case(
            "gradient",
            "differentiable",
            lambda g: [problem(g, 4, 0.5) for _ in range(2)],
            0,
            visible=True,
            gradients=(0, 1),
        ),
    ),
    mistakes=(
        Mistake(
            "The target is 1 / (2 beta), not 1 / beta.",
            lambda pc, pr, rc, rr, beta: ((((pc - rc) - (pr - rr)) - 1 / beta) ** 2).mean(),
        ),
        Mistake(
            "The log-ratios are not multiplied by beta in this form of the loss.",
            lambda pc, pr, rc, rr, beta: ((beta * ((pc - rc) - (pr - rr)) - 1 / (2 * beta)) ** 2).mean(),
        ),
        Mistake(
            "The target is missing: the loss pulls the difference to 1 / (2 beta), not to 0.",
            lambda pc, pr, rc, rr, beta: (((pc - rc) - (pr - rr)) ** 2).mean(),
        ),
        Mistake(
            "This is DPO's loss.",
            lambda pc, pr, rc, rr, beta: -torch.nn.functional.logsigmoid(beta * ((pc - rc) - (pr - rr))).mean(),
        ),
    ),
    unusual=(lambda pc, pr, rc, rr, beta: torch.square(pc - pr - rc + rr - 0.5 / beta).sum() / len(pc),),
)
