import torch

from cs336_alignment.grading.exercise import FLOAT64, Case, Exercise, Mistake
from cs336_alignment.grading.inputs import integer, number, uniform


def effective_sample_size(log_probs, old_log_probs):
    d = log_probs - old_log_probs
    return (2 * torch.logsumexp(d, 0) - torch.logsumexp(2 * d, 0)).exp()


def problem(g, n, spread=1.0, dtype=torch.float32, shift=0.0):
    old = uniform(g, -40, -5, n, dtype=torch.float64)
    new = old + uniform(g, -spread, spread, n, dtype=torch.float64) + shift
    return new.to(dtype), old.to(dtype)


def far(g, n):
    """All ratios overflow, or all underflow; they are of the same size."""
    return problem(g, n, shift=float(200 * (1 - 2 * integer(g, 0, 1))) + number(g, -5, 5))


def scaled(log_probs, old):
    d = (log_probs - old).double()
    w = (d - d.max()).exp()
    return w.sum() ** 2 / (w**2).sum()


def from_normalised(log_probs, old):
    w = (log_probs - old).softmax(0)
    return 1 / w.square().sum()


def in_a_loop(log_probs, old):
    d = [a - b for a, b in zip(log_probs.tolist(), old.tolist())]
    ratios = [torch.tensor(x - max(d), dtype=torch.float64).exp().item() for x in d]
    return torch.tensor(sum(ratios) ** 2 / sum(r * r for r in ratios))


EXERCISE = Exercise(
    name="effective_sample_size",
    assignment="a3_ppo",
    order=11,
    points=0,
    minutes=10,
    lecture="10_policy_gradients",
    equation="10.26",
    parameters=("log_probs", "old_log_probs"),
    reference=effective_sample_size,
    cases=(
        Case(
            "some responses",
            "(sum of the ratios)^2 / (sum of their squares): between 1 and N",
            lambda g: [problem(g, 5), problem(g, 8, 2.0), problem(g, 4, 0.0)],
            0,
            visible=True,
        ),
        Case(
            "ratios that overflow",
            "the same for ratios of e^200: a common factor cancels",
            lambda g: [far(g, 4), far(g, 6), far(g, 5), far(g, 3)],
            0,
            visible=True,
            tolerance=(1e-3, 1e-4),
        ),
        Case(
            "double precision",
            "float64 stays float64",
            lambda g: [problem(g, 9, dtype=torch.float64) for _ in range(2)],
            0,
            tolerance=FLOAT64,
        ),
    ),
    mistakes=(
        Mistake(
            "The ratios overflow: subtract the largest log-ratio first, or use logsumexp.",
            lambda lp, old: (lp - old).exp().sum() ** 2 / ((lp - old).exp() ** 2).sum(),
        ),
        Mistake(
            "The square of the sum is above, the sum of the squares below.",
            lambda lp, old: 1 / effective_sample_size(lp, old),
        ),
        Mistake(
            "This is the share of the samples; multiply by their number.",
            lambda lp, old: effective_sample_size(lp, old) / len(lp),
        ),
        Mistake(
            "These are log-ratios; the formula wants ratios.",
            lambda lp, old: (lp - old).sum() ** 2 / ((lp - old) ** 2).sum(),
        ),
    ),
    unusual=(scaled, from_normalised, in_a_loop),
)
