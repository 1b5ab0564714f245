import torch

from cs336_alignment.dpo import dpo_gradient_weight
from cs336_alignment.grading.exercise import FLOAT64, Case, Exercise, Mistake
from cs336_alignment.grading.exercises.preference_prob import problem
from cs336_alignment.grading.inputs import integer


def h_of(pc, pr, rc, rr, beta):
    return beta * ((pc - rc) - (pr - rr))


def from_autograd(pc, pr, rc, rr, beta):
    h = h_of(pc, pr, rc, rr, beta).detach().requires_grad_(True)
    return -torch.autograd.grad(torch.nn.functional.logsigmoid(h).sum(), h)[0] * -1


EXERCISE = Exercise(
    name="dpo_gradient_weight",
    assignment="a4_dpo",
    order=7,
    points=10,
    minutes=10,
    lecture="12_dpo",
    equation="12.8",
    parameters=("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "beta"),
    reference=dpo_gradient_weight,
    cases=(
        Case(
            "three pairs",
            "sigma(-h): near 1 where the implicit rewards rank the pair wrongly, near 0 where rightly",
            lambda g: [problem(g, 3, 0.5), problem(g, 4, 0.1)],
            3,
            visible=True,
        ),
        Case(
            "far from the reference",
            "between 0 and 1 at any h, never NaN",
            lambda g: [problem(g, 24, 1.0, 400.0), problem(g, 16, 0.5, 500.0)],
            1,
            visible=True,
        ),
        Case(
            "other sizes and betas",
            "one weight for each pair, right for any batch and beta",
            lambda g: [problem(g, integer(g, 2, 9), beta) for beta in (0.02, 0.4, 3.0)] + [problem(g, 24, 1.0, 400.0)],
            4,
        ),
        Case(
            "double precision",
            "float64 stays float64",
            lambda g: [problem(g, 4, dtype=torch.float64) for _ in range(2)],
            2,
            tolerance=FLOAT64,
        ),
    ),
    mistakes=(
        Mistake(
            "The sign is wrong: sigma(h) is large where the pair is ranked rightly; the weight is sigma(-h).",
            lambda *x: torch.sigmoid(h_of(*x)),
        ),
        Mistake(
            "beta stands before the sum in the gradient; it is no part of the weight.",
            lambda *x: x[4] * torch.sigmoid(-h_of(*x)),
        ),
        Mistake(
            "beta is missing inside sigma.", lambda pc, pr, rc, rr, beta: torch.sigmoid(-h_of(pc, pr, rc, rr, 1.0))
        ),
        Mistake(
            "You divide by beta; h multiplies by it.",
            lambda pc, pr, rc, rr, beta: torch.sigmoid(-h_of(pc, pr, rc, rr, 1 / beta)),
        ),
        Mistake("pi_ref is missing from h.", lambda pc, pr, rc, rr, beta: torch.sigmoid(-beta * (pc - pr)), "12.5"),
        Mistake(
            "This is sigma'(h) = sigma(h) sigma(-h); differentiate log sigma(h), not sigma(h).",
            lambda *x: torch.sigmoid(-h_of(*x)) * torch.sigmoid(h_of(*x)),
        ),
        Mistake(
            "The minus sign of the gradient is no part of the weight: the weight is positive.",
            lambda *x: -torch.sigmoid(-h_of(*x)),
        ),
        Mistake("One weight for each pair: no mean over the batch.", lambda *x: torch.sigmoid(-h_of(*x)).mean()),
        Mistake("The weights of a batch need not sum to one: no softmax.", lambda *x: (-h_of(*x)).softmax(0)),
        Mistake(
            "This is the loss of each pair, -log sigma(h), not its derivative.",
            lambda *x: -torch.nn.functional.logsigmoid(h_of(*x)),
        ),
        Mistake("The weight is a probability, sigma(-h), not a yes or no.", lambda *x: (h_of(*x) < 0).float()),
        Mistake(
            "exp overflows for very negative h, and inf / inf is NaN: use torch.sigmoid.",
            lambda *x: torch.exp(-h_of(*x)) / (1 + torch.exp(-h_of(*x))),
        ),
    ),
    wrong=(lambda *x: torch.sigmoid(-h_of(*x)).clamp(0.1, 0.9),),
    unusual=(
        from_autograd,
        lambda *x: 1 - torch.sigmoid(h_of(*x)),
        lambda *x: 1 / (1 + torch.exp(h_of(*x))),
    ),
    stripped=("dpo.dpo_gradient_weight", "dpo._preference_logit"),
)
