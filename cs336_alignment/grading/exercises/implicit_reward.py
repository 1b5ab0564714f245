import torch

from cs336_alignment.dpo import implicit_reward
from cs336_alignment.grading.exercise import FLOAT64, Case, Exercise, Mistake
from cs336_alignment.grading.inputs import four_log_probs, number


def problem(g, rows, beta=None, dtype=torch.float32):
    policy, _, ref, _ = four_log_probs(g, rows, dtype=dtype)
    return policy, ref, beta or number(g, 0.05, 2)


def long(g):
    policy, ref, _ = problem(g, 3)
    return 100 * policy, 100 * ref, 0.5


EXERCISE = Exercise(
    name="implicit_reward",
    assignment="a4_dpo",
    order=3,
    points=5,
    minutes=5,
    lecture="12_dpo",
    equation="12.3",
    parameters=("policy_log_probs", "ref_log_probs", "beta"),
    reference=implicit_reward,
    cases=(
        Case(
            "four responses",
            "beta times (log pi - log pi_ref)",
            lambda g: [problem(g, 4, 0.1), problem(g, 3, 2.0)],
            1,
            visible=True,
        ),
        Case(
            "long responses",
            "finite for log-probabilities of -2,000: probabilities themselves would be 0",
            lambda g: [long(g) for _ in range(2)],
            1,
            visible=True,
        ),
        Case(
            "other sizes and betas",
            "right for any batch and for responses of any length",
            lambda g: [problem(g, 2), problem(g, 6), long(g)],
            1,
        ),
        Case("gradient", "differentiable by both", lambda g: [problem(g, 4) for _ in range(2)], 1, gradients=(0, 1)),
        Case(
            "double precision",
            "float64 stays float64",
            lambda g: [problem(g, 4, dtype=torch.float64) for _ in range(2)],
            1,
            tolerance=FLOAT64,
        ),
    ),
    mistakes=(
        Mistake(
            "The sign is wrong: a response that the policy likes better than pi_ref does has a positive reward.",
            lambda policy, ref, beta: beta * (ref - policy),
        ),
        Mistake("beta is missing.", lambda policy, ref, beta: policy - ref),
        Mistake(
            "You divide by beta; the log-ratio is multiplied by it.", lambda policy, ref, beta: (policy - ref) / beta
        ),
        Mistake("pi_ref is missing: this is beta log pi.", lambda policy, ref, beta: beta * policy),
        Mistake(
            "This is the ratio of the probabilities; the reward is beta times its logarithm.",
            lambda policy, ref, beta: beta * (policy - ref).exp(),
        ),
        Mistake(
            "The exponentials of log-probabilities this small are 0: subtract the logarithms instead.",
            lambda policy, ref, beta: beta * (policy.exp() / ref.exp()).log(),
        ),
        Mistake(
            "You subtract the batch's mean; the reward of a response does not depend on the others.",
            lambda policy, ref, beta: beta * ((policy - ref) - (policy - ref).mean()),
        ),
        Mistake(
            "One reward for each response: do not sum over the batch.",
            lambda policy, ref, beta: (beta * (policy - ref)).sum(),
        ),
        Mistake(
            "The arguments are logarithms already: the log of the ratio is their difference.",
            lambda policy, ref, beta: beta * (policy / ref).log(),
        ),
    ),
    wrong=(lambda policy, ref, beta: beta * (policy - ref.detach()),),
    unusual=(
        lambda policy, ref, beta: beta * policy - beta * ref,
        lambda policy, ref, beta: torch.stack([beta * (p - q) for p, q in zip(policy, ref)]),
        lambda policy, ref, beta: (torch.stack([policy, -ref]) * beta).sum(0),
    ),
    stripped=("dpo.implicit_reward",),
)
