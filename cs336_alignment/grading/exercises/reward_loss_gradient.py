import torch
from torch import Tensor

from cs336_alignment.grading.exercise import FLOAT64, Case, Exercise, Mistake
from cs336_alignment.grading.exercises._reward import scores
from cs336_alignment.grading.exercises.reward_model_loss import full, margins
from cs336_alignment.grading.inputs import integer, number
from cs336_alignment.reward import reward_model_loss


def reward_loss_gradient(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float | None = None, center_coef: float = 0.0
) -> tuple[Tensor, Tensor]:
    difference = chosen - rejected - (0.0 if margin is None else margin)
    weight = torch.sigmoid(-difference) / len(chosen)
    level = 2 * center_coef * (chosen + rejected) / len(chosen)
    return level - weight, level + weight


def by_autograd(chosen, rejected, margin=None, center_coef=0.0):
    chosen, rejected = (x.detach().clone().requires_grad_(True) for x in (chosen, rejected))
    return list(torch.autograd.grad(reward_model_loss(chosen, rejected, margin, center_coef), (chosen, rejected)))


def pair_by_pair(chosen, rejected, margin=None, center_coef=0.0):
    up, down = torch.zeros_like(chosen), torch.zeros_like(rejected)
    for n in range(len(chosen)):
        m = 0.0 if margin is None else torch.as_tensor(margin).expand(len(chosen))[n]
        pull = 1 - torch.sigmoid(chosen[n] - rejected[n] - m)
        up[n] = (2 * center_coef * (chosen[n] + rejected[n]) - pull) / len(chosen)
        down[n] = (2 * center_coef * (chosen[n] + rejected[n]) + pull) / len(chosen)
    return up, down


def in_float64(chosen, rejected, margin=None, center_coef=0.0):
    c, r = chosen.double(), rejected.double()
    m = 0.0 if margin is None else margin
    weight = torch.exp(-torch.nn.functional.softplus(c - r - m))
    level = 2 * center_coef * (c + r)
    return (level - weight).div(len(c)), (weight + level).div(len(c))


def in_float32(*arguments):
    return reward_loss_gradient(*(x.float() if isinstance(x, Tensor) else x for x in arguments))


def wrongly(weight=lambda d: torch.sigmoid(-d), signs=(-1, 1), level=(2, 2), shift=-1, n=len):
    """The gradient with one thing changed."""

    def function(chosen, rejected, margin=None, center_coef=0.0):
        difference = chosen - rejected + (0.0 if margin is None else shift * torch.as_tensor(margin))
        pull, total = weight(difference), center_coef * (chosen + rejected)
        return tuple((sign * pull + k * total) / n(chosen) for sign, k in zip(signs, level))

    return function


EXERCISE = Exercise(
    name="reward_loss_gradient",
    assignment="a2_reward",
    order=3,
    points=8,
    minutes=15,
    lecture="08_reward_models",
    equation="8.3b",
    parameters=("chosen", "rejected", "margin", "center_coef"),
    reference=reward_loss_gradient,
    cases=(
        Case(
            "a few pairs",
            "a tuple: the derivatives by the chosen scores, -sigma(-difference) / B, and those by the rejected ones",
            lambda g: [scores(g, 3), scores(g, 5, level=4.0)],
            2,
            visible=True,
        ),
        Case(
            "margin and centering",
            "the margin moves the weight sigma(-(difference - margin)); centering adds the derivative of its square",
            lambda g: [(*scores(g, 4), margins(g, 4)), (*scores(g, 3, level=1.0), None, 0.2)],
            1,
            visible=True,
        ),
        Case(
            "far apart",
            "never NaN: the weight of a pair that is sure and right is 0, of one that is sure and wrong 1",
            lambda g: [scores(g, 24, spread=400.0), scores(g, 16, spread=500.0)],
            1,
            visible=True,
        ),
        Case(
            "other sizes, margins and coefficients",
            "right for any batch, with margin and centering together, and far apart",
            lambda g: [
                scores(g, integer(g, 2, 9)),
                full(g, integer(g, 3, 9)),
                (*scores(g, 6), number(g, 0.5, 2), 0.1),
                scores(g, 24, spread=400.0),
            ],
            3,
        ),
        Case(
            "double precision",
            "float64 stays float64",
            lambda g: [full(g, n, dtype=torch.float64) for n in (16, 24)],
            1,
            tolerance=FLOAT64,
        ),
    ),
    mistakes=(
        Mistake(
            "Both signs are wrong: this is the direction of descent; the gradient is its negative.",
            wrongly(signs=(1, -1), level=(-2, -2)),
        ),
        Mistake(
            "The two are swapped, or their signs are: more score for the chosen answer lowers the loss, so the "
            "derivative by it is negative.",
            wrongly(signs=(1, -1)),
        ),
        Mistake(
            "The weight of the rejected score has the wrong sign: the two derivatives are opposite.",
            wrongly(signs=(-1, -1)),
        ),
        Mistake("1 / B is missing: the loss is a mean over the pairs.", wrongly(n=lambda x: 1)),
        Mistake(
            "The weight is sigma(-difference), large where the pair is ranked wrongly; you have sigma(difference).",
            wrongly(weight=torch.sigmoid),
        ),
        Mistake(
            "This is the derivative of sigma, sigma(x) sigma(-x); differentiate log sigma.",
            wrongly(weight=lambda d: torch.sigmoid(d) * torch.sigmoid(-d)),
        ),
        Mistake(
            "This is 1 / sigma: the chain rule's second factor, the derivative of sigma, is missing.",
            wrongly(weight=lambda d: 1 / torch.sigmoid(d)),
        ),
        Mistake(
            "This is the loss of each pair; differentiate it.",
            wrongly(weight=lambda d: -torch.nn.functional.logsigmoid(d)),
        ),
        Mistake("The weight is a probability, not a yes or no.", wrongly(weight=lambda d: (d < 0).float())),
        Mistake(
            "exp overflows for very negative differences, and inf / inf is NaN: use torch.sigmoid.",
            wrongly(weight=lambda d: torch.exp(-d) / (1 + torch.exp(-d))),
        ),
        Mistake("The margin is ignored.", wrongly(shift=0), "8.3"),
        Mistake("The sign of the margin is wrong: it is subtracted from the difference.", wrongly(shift=1), "8.3"),
        Mistake("The centering is ignored.", wrongly(level=(0, 0)), "8.4"),
        Mistake("The factor 2 of the square's derivative is missing in the centering.", wrongly(level=(1, 1)), "8.4"),
        Mistake(
            "Centering pulls both scores the same way: its derivative has one sign for both.",
            wrongly(level=(2, -2)),
            "8.4",
        ),
        Mistake("The sign of the centering is wrong: it is a penalty.", wrongly(level=(-2, -2)), "8.4"),
        Mistake(
            "Two tensors are asked for, in a tuple; you return the chosen ones' derivative alone.",
            lambda *x: reward_loss_gradient(*x)[0],
        ),
        Mistake(
            "Return a tuple of two tensors (B,), not one tensor (2, B).",
            lambda *x: torch.stack(reward_loss_gradient(*x)),
        ),
        Mistake(
            "Each pair has a derivative of its own: do not average over the batch.",
            lambda *x: tuple(part.mean() for part in reward_loss_gradient(*x)),
        ),
    ),
    wrong=(
        wrongly(weight=lambda d: torch.sigmoid(-d).clamp(0.05, 0.95)),
        in_float32,
    ),
    unusual=(by_autograd, pair_by_pair, in_float64),
    stripped=("reward.reward_model_loss", "dpo.dpo_loss", "dpo.dpo_gradient_weight"),
)
