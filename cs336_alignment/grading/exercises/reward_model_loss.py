import torch
import torch.nn.functional as F

from cs336_alignment.grading.exercise import FLOAT64, Case, Exercise, Mistake
from cs336_alignment.grading.exercises._reward import scores
from cs336_alignment.grading.inputs import integer, number, uniform
from cs336_alignment.reward import reward_model_loss


def margins(g, pairs, dtype=torch.float32):
    return uniform(g, 0.5, 3, pairs, dtype=dtype)


def full(g, pairs, dtype=torch.float32, **kwargs):
    """Scores with a margin for each pair and centering."""
    return *scores(g, pairs, level=1.0, dtype=dtype, **kwargs), margins(g, pairs, dtype), number(g, 0.05, 0.3)


def fitting(chosen, rejected, margin):
    """The errors that the statement asks for."""
    margin_fits = not isinstance(margin, torch.Tensor) or margin.dim() == 0 or margin.shape == chosen.shape
    if chosen.shape != rejected.shape or not margin_fits:
        raise ValueError("shapes")


def with_softplus(chosen, rejected, margin=None, center_coef=0.0):
    fitting(chosen, rejected, margin)
    chosen, rejected = (x.float() if x.dtype == torch.float16 else x for x in (chosen, rejected))
    shift = 0.0 if margin is None else margin
    return F.softplus(shift + rejected - chosen).mean() + center_coef * torch.mean((chosen + rejected).square())


def in_a_loop(chosen, rejected, margin=None, center_coef=0.0):
    fitting(chosen, rejected, margin)
    total = 0.0
    for n, (a, b) in enumerate(zip(chosen.double(), rejected.double())):
        m = 0.0 if margin is None else margin[n] if isinstance(margin, torch.Tensor) and margin.dim() else margin
        total = total + torch.logaddexp(torch.zeros(()).double(), m - (a - b)) + center_coef * (a + b) * (a + b)
    return total / len(chosen)


def as_cross_entropy(chosen, rejected, margin=None, center_coef=0.0):
    """A two-way classification: the chosen answer, less its margin, is class 0."""
    fitting(chosen, rejected, margin)
    chosen, rejected = chosen.to(torch.promote_types(chosen.dtype, torch.float32)), rejected.to(chosen.device)
    rejected = rejected.to(chosen.dtype)
    handicap = chosen if margin is None else chosen - margin
    loss = F.cross_entropy(torch.stack([handicap, rejected], 1), torch.zeros(len(chosen), dtype=torch.long))
    return loss + center_coef * (chosen**2 + 2 * chosen * rejected + rejected**2).mean()


def wrongly(loss=lambda d: -F.logsigmoid(d), center=lambda c, r: (c + r) ** 2, shift=lambda m: -m, reduce=torch.mean):
    """A wrong loss: what it does with the difference, the centering, the margin, and how it ends."""

    def function(chosen, rejected, margin=None, center_coef=0.0):
        difference = chosen - rejected
        if margin is not None:
            difference = difference + shift(torch.as_tensor(margin, dtype=difference.dtype))
        return reduce(loss(difference) + center_coef * center(chosen, rejected))

    return function


def margin_outside(chosen, rejected, margin=None, center_coef=0.0):
    loss = reward_model_loss(chosen, rejected, None, center_coef)
    return loss if margin is None else loss + torch.as_tensor(margin).mean()


def margin_times(chosen, rejected, margin=None, center_coef=0.0):
    difference = chosen - rejected if margin is None else margin * (chosen - rejected)
    return (-F.logsigmoid(difference) + center_coef * (chosen + rejected) ** 2).mean()


def margin_weighs(chosen, rejected, margin=None, center_coef=0.0):
    weight = 1.0 if margin is None else margin
    return (-weight * F.logsigmoid(chosen - rejected) + center_coef * (chosen + rejected) ** 2).mean()


def truth_of_the_margin(chosen, rejected, margin=None, center_coef=0.0):
    if margin:
        chosen = chosen - margin
    return wrongly()(chosen, rejected, None, center_coef)


def centers_the_mean(chosen, rejected, margin=None, center_coef=0.0):
    return reward_model_loss(chosen, rejected, margin) + center_coef * (chosen + rejected).mean() ** 2


def centers_the_sum(chosen, rejected, margin=None, center_coef=0.0):
    return reward_model_loss(chosen, rejected, margin) + center_coef * ((chosen + rejected) ** 2).sum()


def centers_what_is_left(chosen, rejected, margin=None, center_coef=0.0):
    """Centers the chosen score less its margin."""
    return wrongly()(chosen if margin is None else chosen - margin, rejected, None, center_coef)


EXERCISE = Exercise(
    name="reward_model_loss",
    assignment="a2_reward",
    order=2,
    points=12,
    minutes=20,
    lecture="08_reward_models",
    equation="8.3",
    parameters=("chosen", "rejected", "margin", "center_coef"),
    reference=reward_model_loss,
    cases=(
        Case(
            "a few pairs",
            "the mean over the pairs of -log sigma(chosen - rejected)",
            lambda g: [scores(g, 3), scores(g, 5, level=4.0)],
            2,
            visible=True,
        ),
        Case(
            "margin",
            "the margin, a number for each pair or one for all, is subtracted inside sigma",
            lambda g: [(*scores(g, 4), margins(g, 4)), (*scores(g, 3), 1.5)],
            1,
            visible=True,
        ),
        Case(
            "centering",
            "center_coef times the mean of (chosen + rejected)^2 is added (8.4)",
            lambda g: [(*scores(g, 4, level=1.0), None, c) for c in (0.01, 0.5)],
            1,
            visible=True,
        ),
        Case(
            "far apart",
            "finite where scores differ by hundreds: log(sigmoid(...)) would be -inf",
            lambda g: [scores(g, 24, spread=400.0), scores(g, 16, spread=500.0)],
            1,
            visible=True,
        ),
        Case(
            "other sizes, margins and coefficients",
            "right for any batch, with margin and centering together, and far apart",
            lambda g: [
                scores(g, integer(g, 2, 9)),
                full(g, integer(g, 2, 9)),
                (*scores(g, 6), number(g, 0.5, 2), 0.1),
                scores(g, 24, spread=400.0),
            ],
            3,
        ),
        Case(
            "gradient in double precision",
            "differentiable by both scores, the centering too; float64 stays float64",
            lambda g: [full(g, n, dtype=torch.float64) for n in (4, 6)],
            2,
            gradients=(0, 1),
            tolerance=FLOAT64,
        ),
        Case(
            "half precision",
            "float16 scores are converted to float32 before anything is computed from them",
            lambda g: (
                [scores(g, 8, dtype=torch.float16) for _ in range(3)]
                + [(*scores(g, 4, level=200.0, dtype=torch.float16), None, 0.01)]
            ),
            1,
        ),
        Case(
            "bad input",
            "scores of two shapes, also of shapes that broadcast, and a margin of a third shape raise ValueError",
            lambda g: [
                scores(g, 3),
                (scores(g, 3)[0], scores(g, 3)[1][:, None]),
                (scores(g, 4)[0], scores(g, 1)[1]),
                (*scores(g, 3), margins(g, 3)[:, None]),
            ],
            1,
        ),
    ),
    mistakes=(
        Mistake(
            "binary_cross_entropy of a sigmoid cuts the logarithm at -100: use logsigmoid of the difference.",
            lambda chosen, rejected, margin=None, center_coef=0.0: (
                F.binary_cross_entropy(
                    torch.sigmoid(chosen - rejected - (0 if margin is None else margin)), torch.ones_like(chosen)
                )
                + center_coef * ((chosen + rejected) ** 2).mean()
            ),
        ),
        Mistake("You sum over the pairs; the loss is their mean.", wrongly(reduce=torch.sum)),
        Mistake("One number for each pair: take the mean over the batch.", wrongly(reduce=lambda x: x)),
        Mistake("Chosen and rejected are swapped.", wrongly(loss=lambda d: -F.logsigmoid(-d))),
        Mistake("The minus sign is missing: the loss is -log sigma.", wrongly(loss=F.logsigmoid)),
        Mistake("This is -sigma; its logarithm is missing.", wrongly(loss=lambda d: -torch.sigmoid(d))),
        Mistake(
            "This is 1 - sigma, the probability of a mistake; likelihood wants -log sigma.",
            wrongly(loss=lambda d: torch.sigmoid(-d)),
            "8.2",
        ),
        Mistake(
            "log(sigmoid(x)) or log(1 + exp(-x)) is infinite for very negative x: use torch.nn.functional.logsigmoid.",
            wrongly(loss=lambda d: -torch.sigmoid(d).log()),
        ),
        Mistake(
            "A small constant inside the log caps the loss of the worst pairs and kills their gradient: use logsigmoid.",
            wrongly(loss=lambda d: -(torch.sigmoid(d) + 1e-8).log()),
        ),
        Mistake(
            "log(sigmoid(x)) or log(1 + exp(-x)) is infinite for very negative x: use torch.nn.functional.logsigmoid.",
            wrongly(loss=lambda d: (1 + torch.exp(-d)).log()),
        ),
        Mistake("This is a hinge loss, not the log-sigmoid.", wrongly(loss=lambda d: torch.relu(1 - d))),
        Mistake(
            "Each score has a sigmoid of its own; only the difference of a pair counts.",
            lambda c, r, margin=None, k=0.0: (
                -(
                    F.logsigmoid(c) + F.logsigmoid(-r)
                    if margin is None
                    else F.logsigmoid(c - margin) + F.logsigmoid(-r)
                ).mean()
                + k * ((c + r) ** 2).mean()
            ),
            "8.1",
        ),
        Mistake("The margin is ignored.", wrongly(shift=lambda m: 0 * m)),
        Mistake(
            "The sign of the margin is wrong: the chosen score must be ahead *by* the margin, so it is subtracted.",
            wrongly(shift=lambda m: m),
        ),
        Mistake("The margin is added to the loss; it belongs inside sigma.", margin_outside),
        Mistake("The margin multiplies the difference; it is subtracted from it.", margin_times),
        Mistake("The margin weighs the pairs; it is subtracted inside sigma.", margin_weighs),
        Mistake("The centering is ignored.", wrongly(center=lambda c, r: 0.0), "8.4"),
        Mistake(
            "You center the difference of the scores; it is their sum that comparisons leave free.",
            wrongly(center=lambda c, r: (c - r) ** 2),
            "8.4",
        ),
        Mistake(
            "You take chosen^2 + rejected^2, which also pulls the two scores together; square their sum.",
            wrongly(center=lambda c, r: c**2 + r**2),
            "8.4",
        ),
        Mistake("The square is missing in the centering.", wrongly(center=lambda c, r: c + r), "8.4"),
        Mistake(
            "You center the pair's mean score; here it is the sum, without the half.",
            wrongly(center=lambda c, r: ((c + r) / 2) ** 2),
            "8.4",
        ),
        Mistake("You square the batch's mean; take the mean of each pair's square.", centers_the_mean, "8.4"),
        Mistake("The centering is summed over the pairs; take its mean.", centers_the_sum, "8.4"),
        Mistake(
            "The sign of the centering is wrong: it is a penalty.", wrongly(center=lambda c, r: -((c + r) ** 2)), "8.4"
        ),
    ),
    wrong=(
        wrongly(),  # right but for bad input and half precision
        truth_of_the_margin,
        centers_what_is_left,
        wrongly(shift=lambda m: -m.mean()),
        wrongly(loss=lambda d: -F.logsigmoid(d.clamp(-20, 20))),
        wrongly(center=lambda c, r: (c + r).detach() ** 2),
    ),
    unusual=(with_softplus, in_a_loop, as_cross_entropy),
    stripped=("reward.reward_model_loss", "dpo.dpo_loss"),
)
