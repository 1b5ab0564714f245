import torch
from torch import Tensor

from cs336_alignment.dpo import implicit_reward
from cs336_alignment.exact import log_partition, optimal_policy
from cs336_alignment.grading.exercise import FLOAT64, Case, Exercise, Mistake
from cs336_alignment.grading.inputs import distribution, number, uniform


def recovered_reward(log_probs: Tensor, ref_log_probs: Tensor, log_z: Tensor, beta: float) -> Tensor:
    return implicit_reward(log_probs, ref_log_probs, beta) + beta * log_z.unsqueeze(-1)


def problem(g, *shape, beta=None, dtype=torch.float32):
    """pi* of some rewards, its reference and log Z: the function finds the rewards again."""
    ref, rewards, beta = (
        distribution(g, *shape, dtype=dtype),
        uniform(g, -2, 2, *shape, dtype=dtype),
        beta or number(g, 0.2, 2),
    )
    return optimal_policy(ref, rewards, beta), ref, log_partition(ref, rewards, beta), beta


EXERCISE = Exercise(
    name="recovered_reward",
    assignment="a4_dpo",
    order=4,
    points=5,
    minutes=5,
    lecture="12_dpo",
    equation="12.2",
    parameters=("log_probs", "ref_log_probs", "log_z", "beta"),
    reference=recovered_reward,
    cases=(
        Case(
            "one prompt",
            "beta log(pi / pi_ref) + beta log Z, which for pi* is the reward itself",
            lambda g: [problem(g, 5, beta=0.5), problem(g, 4, beta=2.0)],
            1,
            visible=True,
        ),
        Case(
            "several prompts",
            "each prompt has its own log Z, the same for all its responses",
            lambda g: [problem(g, 3, 3), problem(g, 2, 4)],
            1,
            visible=True,
        ),
        Case(
            "other sizes and betas",
            "right for any number of prompts and responses",
            lambda g: [problem(g, 4, 4), problem(g, 2, 3, 3), problem(g, 1, 6)],
            2,
        ),
        Case(
            "gradient in double precision",
            "differentiable by all three",
            gradients=(0, 1, 2),
            points=1,
            tolerance=FLOAT64,
            make=lambda g: [problem(g, 3, 4, dtype=torch.float64) for _ in range(2)],
        ),
    ),
    mistakes=(
        Mistake(
            "log Z is missing: this is the implicit reward, which is right only up to a constant for each prompt.",
            lambda p, ref, z, beta: beta * (p - ref),
        ),
        Mistake("beta log Z belongs here, not log Z.", lambda p, ref, z, beta: beta * (p - ref) + z.unsqueeze(-1)),
        Mistake("The sign of log Z is wrong.", lambda p, ref, z, beta: beta * (p - ref) - beta * z.unsqueeze(-1)),
        Mistake(
            "You divide by beta; solve (9.4) for r again.", lambda p, ref, z, beta: (p - ref + z.unsqueeze(-1)) / beta
        ),
        Mistake("beta is missing.", lambda p, ref, z, beta: p - ref + z.unsqueeze(-1)),
        Mistake(
            "log Z is added along the wrong dimension: it has no dimension of responses; use unsqueeze(-1).",
            lambda p, ref, z, beta: beta * (p - ref) + beta * z,
        ),
        Mistake(
            "The sign of the log-ratio is wrong.", lambda p, ref, z, beta: beta * (ref - p) + beta * z.unsqueeze(-1)
        ),
        Mistake(
            "Each prompt has its own log Z; you use their mean.",
            lambda p, ref, z, beta: beta * (p - ref) + beta * z.mean(),
        ),
        Mistake(
            "pi_ref is missing: the log-ratio is log pi - log pi_ref.",
            lambda p, ref, z, beta: beta * p + beta * z.unsqueeze(-1),
        ),
        Mistake(
            "log_z is a logarithm already: do not take its exponential.",
            lambda p, ref, z, beta: beta * (p - ref) + beta * z.exp().unsqueeze(-1),
        ),
    ),
    wrong=(),
    unusual=(
        lambda p, ref, z, beta: beta * (p - ref + z[..., None]),
        lambda p, ref, z, beta: beta * p - beta * ref + beta * z.reshape(*z.shape, 1).expand_as(p),
    ),
    stripped=("dpo.implicit_reward",),
)
