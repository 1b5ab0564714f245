import math

import torch

from cs336_alignment.exact import optimal_policy
from cs336_alignment.grading.exercise import FLOAT64, LARGE, Case, Exercise, Mistake
from cs336_alignment.grading.exercises.log_partition import impossible, problem
from cs336_alignment.grading.inputs import distribution, integer, uniform


def large(g):
    return distribution(g, 2, 4), 1000 + 20 * uniform(g, 1, 3, 2, 4), 2.0


def by_bayes(ref_log_probs, rewards, beta):
    if beta <= 0:
        raise ValueError("beta must be positive")
    x = ref_log_probs + rewards / beta
    return x - torch.logsumexp(x, dim=-1, keepdim=True)


def log_of_softmax(ref_log_probs, rewards, beta):
    if beta <= 0:
        raise ValueError("beta must be positive")
    x = ref_log_probs.double() + rewards.double() / beta
    x = x - x.max(-1, keepdim=True)[0]
    return x - x.exp().sum(-1, keepdim=True).log()


EXERCISE = Exercise(
    name="optimal_policy",
    assignment="a4_dpo",
    order=2,
    points=10,
    minutes=10,
    lecture="09_rlhf_objective",
    equation="9.4",
    parameters=("ref_log_probs", "rewards", "beta"),
    reference=optimal_policy,
    cases=(
        Case(
            "one prompt",
            "log pi_ref(y) + r(y) / beta - log Z",
            lambda g: [problem(g, 5, beta=0.5), problem(g, 4, beta=2.0)],
            2,
            visible=True,
        ),
        Case(
            "several prompts",
            "each prompt's probabilities sum to one by themselves",
            lambda g: [problem(g, 3, 4), problem(g, 2, 3, 5)],
            2,
            visible=True,
        ),
        Case(
            "large rewards",
            "finite for rewards in the thousands: no exp of a large number on the way",
            lambda g: [large(g) for _ in range(2)],
            1,
            visible=True,
            tolerance=LARGE,
        ),
        Case(
            "other sizes and betas",
            "right for any number of prompts and responses, beta from .05 to 5, small and large rewards",
            lambda g: [problem(g, integer(g, 2, 4), integer(g, 2, 9), beta=b) for b in (0.05, 0.7, 5.0)] + [large(g)],
            2,
            tolerance=LARGE,
        ),
        Case(
            "gradient",
            "differentiable by reference and rewards",
            lambda g: [problem(g, 3, 4) for _ in range(2)],
            1,
            gradients=(0, 1),
        ),
        Case(
            "impossible responses",
            "a response that pi_ref never gives stays impossible, whatever its reward: -inf",
            impossible,
            1,
        ),
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
            "These are probabilities; the function is to return their logarithms.",
            lambda ref, r, beta: (ref + r / beta).softmax(-1),
        ),
        Mistake(
            "Not normalised: log Z is missing, so the probabilities do not sum to one.",
            lambda ref, r, beta: ref + r / beta,
        ),
        Mistake(
            "You subtract Z where log Z belongs.",
            lambda ref, r, beta: ref + r / beta - (ref + r / beta).logsumexp(-1, keepdim=True).exp(),
        ),
        Mistake("pi_ref is missing: this is the softmax of r / beta.", lambda ref, r, beta: (r / beta).log_softmax(-1)),
        Mistake(
            "You multiply the reward by beta; it is divided by beta.",
            lambda ref, r, beta: (ref + r * beta).log_softmax(-1),
        ),
        Mistake("beta is missing: the reward has to be divided by it.", lambda ref, r, beta: (ref + r).log_softmax(-1)),
        Mistake(
            "The sign of the reward is wrong: good responses must become more probable.",
            lambda ref, r, beta: (ref - r / beta).log_softmax(-1),
        ),
        Mistake(
            "You normalise over the first dimension; the last one enumerates responses.",
            lambda ref, r, beta: (ref + r / beta).log_softmax(0),
        ),
        Mistake(
            "exp overflows: exp(r / beta) is infinite for large rewards. Stay in logarithms.",
            lambda ref, r, beta: ((w := ref.exp() * (r / beta).exp()) / w.sum(-1, keepdim=True)).log(),
        ),
        Mistake(
            "ref_log_probs are logarithms already: you take their exponential as an exponent once more.",
            lambda ref, r, beta: (ref.exp() + r / beta).log_softmax(-1),
        ),
        Mistake(
            "You normalise over all prompts together; each prompt has probabilities of its own that sum to one.",
            lambda ref, r, beta: (ref + r / beta).flatten().log_softmax(0).reshape(r.shape),
        ),
    ),
    wrong=(
        lambda ref, r, beta: (ref + r / beta).log_softmax(-1).detach(),
        lambda ref, r, beta: (ref + r / beta).log_softmax(-1).clamp(min=-20),
        lambda ref, r, beta: (ref.clamp(min=math.log(1e-4)) + r / beta).log_softmax(-1),
    ),
    unusual=(by_bayes, log_of_softmax),
    stripped=("exact.optimal_policy", "exact._tilted"),
)
