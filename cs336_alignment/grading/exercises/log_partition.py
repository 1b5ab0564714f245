import math

import torch

from cs336_alignment.exact import log_partition
from cs336_alignment.grading.exercise import FLOAT64, Case, Exercise, Mistake
from cs336_alignment.grading.inputs import distribution, integer, number, uniform


def problem(g, *shape, beta=None, dtype=torch.float32):
    return distribution(g, *shape, dtype=dtype), uniform(g, -2, 2, *shape, dtype=dtype), beta or number(g, 0.2, 2)


def large(g):
    return distribution(g, 2, 4), 1000 * uniform(g, 1, 3, 2, 4), 0.5


def impossible(g):
    calls = []
    for beta in (0.5, 1.5):
        ref, rewards, _ = problem(g, 2, 5)
        ref[0, 1] = ref[1, 3] = -math.inf
        calls.append((ref.log_softmax(-1), rewards, beta))
    return calls


def by_hand(ref_log_probs, rewards, beta):
    if beta <= 0:
        raise ValueError("beta")
    x = ref_log_probs + rewards / beta
    top = x.max(dim=-1, keepdim=True).values
    return ((x - top).exp().sum(-1, keepdim=True).log() + top).squeeze(-1)


def in_a_loop(ref_log_probs, rewards, beta):
    if not beta > 0:
        raise ValueError("beta")
    rows = (ref_log_probs + rewards / beta).reshape(-1, rewards.shape[-1])
    return torch.stack([torch.logsumexp(row, 0) for row in rows]).reshape(rewards.shape[:-1])


def in_float64(ref_log_probs, rewards, beta):
    if beta <= 0:
        raise ValueError(f"beta {beta}")
    return torch.logsumexp(ref_log_probs.double() + rewards.double() / beta, dim=-1)


EXERCISE = Exercise(
    name="log_partition",
    assignment="a4_dpo",
    order=1,
    points=10,
    minutes=10,
    lecture="09_rlhf_objective",
    equation="9.3",
    parameters=("ref_log_probs", "rewards", "beta"),
    reference=log_partition,
    cases=(
        Case(
            "one prompt",
            "log of the sum over responses of pi_ref(y) exp(r(y) / beta)",
            lambda g: [problem(g, 5, beta=0.5), problem(g, 4, beta=2.0)],
            2,
            visible=True,
        ),
        Case(
            "several prompts",
            "one number for each prompt: the sum runs over the last dimension alone",
            lambda g: [problem(g, 3, 4), problem(g, 2, 3, 5)],
            2,
            visible=True,
        ),
        Case(
            "large rewards",
            "finite for rewards in the thousands: log-sum-exp takes the maximum out before it exponentiates",
            lambda g: [large(g) for _ in range(2)],
            1,
            visible=True,
        ),
        Case(
            "other sizes and betas",
            "right for any number of prompts and responses, beta from .05 to 5, small and large rewards",
            lambda g: [problem(g, integer(g, 2, 4), integer(g, 2, 9), beta=b) for b in (0.05, 0.7, 5.0)] + [large(g)],
            2,
        ),
        Case(
            "gradient",
            "differentiable: the gradient by the rewards is pi* / beta",
            lambda g: [problem(g, 3, 4) for _ in range(2)],
            1,
            gradients=(0, 1),
        ),
        Case("impossible responses", "a response with pi_ref = 0 (log-probability -inf) adds nothing", impossible, 1),
        Case(
            "double precision and bad beta",
            "float64 stays float64; beta <= 0 raises ValueError",
            lambda g: [problem(g, 3, 6, dtype=torch.float64), problem(g, 2, 3, beta=-0.5)],
            1,
            tolerance=FLOAT64,
        ),
    ),
    mistakes=(
        Mistake(
            "You multiply the reward by beta; it is divided by beta.",
            lambda ref, r, beta: (ref + r * beta).logsumexp(-1),
        ),
        Mistake(
            "pi_ref is missing: this is the sum of exp(r / beta) alone.", lambda ref, r, beta: (r / beta).logsumexp(-1)
        ),
        Mistake("beta is missing: the reward has to be divided by it.", lambda ref, r, beta: (ref + r).logsumexp(-1)),
        Mistake("This is Z, not its logarithm.", lambda ref, r, beta: (ref + r / beta).logsumexp(-1).exp()),
        Mistake(
            "This is beta log Z; the function is to return log Z.",
            lambda ref, r, beta: beta * (ref + r / beta).logsumexp(-1),
        ),
        Mistake(
            "The sign of the reward is wrong: good responses must get more weight.",
            lambda ref, r, beta: (ref - r / beta).logsumexp(-1),
        ),
        Mistake(
            "You average over the responses; Z is a sum.",
            lambda ref, r, beta: (ref + r / beta).logsumexp(-1) - math.log(r.shape[-1]),
        ),
        Mistake(
            "You sum over the prompts too (or over the first dimension): only the last dimension enumerates responses.",
            lambda ref, r, beta: (ref + r / beta).flatten().logsumexp(0),
        ),
        Mistake(
            "You sum over the first dimension; the last one enumerates responses.",
            lambda ref, r, beta: (ref + r / beta).logsumexp(0),
        ),
        Mistake(
            "ref_log_probs are logarithms already: you use them as if they were probabilities.",
            lambda ref, r, beta: (ref * (r / beta).exp()).sum(-1),
        ),
        Mistake(
            "exp overflows: exp(r / beta) is infinite for large rewards. Stay in logarithms: torch.logsumexp.",
            lambda ref, r, beta: (ref.exp() * (r / beta).exp()).sum(-1).log(),
        ),
        Mistake(
            "The last dimension is kept with size 1: leave keepdim out.",
            lambda ref, r, beta: (ref + r / beta).logsumexp(-1, keepdim=True),
        ),
        Mistake(
            "This is the maximum over the responses; Z is a sum of exponentials.",
            lambda ref, r, beta: (ref + r / beta).max(-1).values,
        ),
    ),
    wrong=(
        lambda ref, r, beta: ((ref + r / beta).logsumexp(-1)).detach(),
        lambda ref, r, beta: (ref.clamp(min=-20) + (r / beta).clamp(max=30)).logsumexp(-1),
    ),
    unusual=(by_hand, in_a_loop, in_float64),
    stripped=("exact.log_partition", "exact._tilted"),
)
