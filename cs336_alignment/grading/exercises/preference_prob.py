import torch
from torch import Tensor

from cs336_alignment.dpo import _preference_logit
from cs336_alignment.grading.exercise import FLOAT64, Case, Exercise, Mistake
from cs336_alignment.grading.inputs import four_log_probs, integer, number


def preference_prob(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    return torch.sigmoid(_preference_logit(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta))


def problem(g, pairs, beta=None, spread=3.0, dtype=torch.float32):
    return *four_log_probs(g, pairs, spread, dtype), beta or number(g, 0.1, 1.0)


def two_rewards(pc, pr, rc, rr, beta):
    first, second = beta * (pc - rc), beta * (pr - rr)
    top = torch.maximum(first, second)
    first, second = (first - top).exp(), (second - top).exp()
    return first / (first + second)


EXERCISE = Exercise(
    name="preference_prob",
    assignment="a4_dpo",
    order=5,
    points=5,
    minutes=5,
    lecture="12_dpo",
    equation="12.5",
    parameters=("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "beta"),
    reference=preference_prob,
    cases=(
        Case(
            "three pairs",
            "sigma of the difference of the two implicit rewards; Z(x) has cancelled",
            lambda g: [problem(g, 3, 0.5), problem(g, 4, 0.1)],
            1,
            visible=True,
        ),
        Case(
            "far from the reference",
            "a probability even where a log-ratio is in the hundreds: no NaN",
            lambda g: [problem(g, 24, 1.0, 400.0), problem(g, 16, 0.5, 500.0)],
            1,
            visible=True,
        ),
        Case(
            "other sizes and betas",
            "right for any batch",
            lambda g: [problem(g, integer(g, 2, 7)), problem(g, 1), problem(g, 24, 1.0, 400.0)],
            2,
        ),
        Case(
            "gradient in double precision",
            "differentiable by all four",
            gradients=(0, 1, 2, 3),
            points=1,
            tolerance=FLOAT64,
            make=lambda g: [problem(g, 4, dtype=torch.float64) for _ in range(2)],
        ),
    ),
    mistakes=(
        Mistake(
            "This is the probability that the *rejected* response wins: chosen and rejected are swapped.",
            lambda pc, pr, rc, rr, beta: torch.sigmoid(beta * ((pr - rr) - (pc - rc))),
        ),
        Mistake(
            "pi_ref is missing: the implicit reward is beta log(pi / pi_ref).",
            lambda pc, pr, rc, rr, beta: torch.sigmoid(beta * (pc - pr)),
        ),
        Mistake("beta is missing.", lambda pc, pr, rc, rr, beta: torch.sigmoid((pc - rc) - (pr - rr))),
        Mistake(
            "You divide by beta; the log-ratio is multiplied by it.",
            lambda pc, pr, rc, rr, beta: torch.sigmoid(((pc - rc) - (pr - rr)) / beta),
        ),
        Mistake(
            "This is h itself; the probability is sigma(h).",
            lambda pc, pr, rc, rr, beta: beta * ((pc - rc) - (pr - rr)),
        ),
        Mistake(
            "This is the log of the probability.",
            lambda pc, pr, rc, rr, beta: torch.nn.functional.logsigmoid(beta * ((pc - rc) - (pr - rr))),
        ),
        Mistake(
            "The rejected response is missing: only the difference of the two rewards decides.",
            lambda pc, pr, rc, rr, beta: torch.sigmoid(beta * (pc - rc)),
        ),
        Mistake(
            "exp overflows here; use torch.sigmoid of the difference.",
            lambda pc, pr, rc, rr, beta: (a := (beta * (pc - rc)).exp()) / (a + (beta * (pr - rr)).exp()),
        ),
        Mistake(
            "The sign of the reference is wrong: its log-probabilities are subtracted.",
            lambda pc, pr, rc, rr, beta: torch.sigmoid(beta * ((pc + rc) - (pr + rr))),
        ),
        Mistake(
            "One probability for each pair: no mean over the batch.",
            lambda pc, pr, rc, rr, beta: torch.sigmoid(beta * ((pc - rc) - (pr - rr))).mean(),
        ),
        Mistake(
            "This says who wins, not with which probability: leave the rounding out.",
            lambda pc, pr, rc, rr, beta: torch.sigmoid(beta * ((pc - rc) - (pr - rr))).round(),
        ),
    ),
    wrong=(lambda pc, pr, rc, rr, beta: torch.sigmoid((beta * ((pc - rc) - (pr - rr))).clamp(-2, 2)),),
    unusual=(
        two_rewards,
        lambda pc, pr, rc, rr, beta: torch.stack([beta * (pc - rc), beta * (pr - rr)], -1).softmax(-1)[..., 0],
        lambda pc, pr, rc, rr, beta: 0.5 * (1 + torch.tanh(0.5 * beta * (pc - pr - rc + rr))),
    ),
    stripped=("dpo._preference_logit",),
)
