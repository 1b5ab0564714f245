import torch
import torch.nn.functional as F

from cs336_alignment.dpo import dpo_loss
from cs336_alignment.grading.exercise import Case, Exercise, Mistake
from cs336_alignment.grading.exercises.preference_prob import problem
from cs336_alignment.grading.inputs import integer, number, uniform


def smoothed(g, pairs, eps=None, **kwargs):
    return *problem(g, pairs, **kwargs), eps if eps is not None else number(g, 0.05, 0.4)


def h_of(pc, pr, rc, rr, beta):
    return beta * ((pc - rc) - (pr - rr))


def fitting(eps, *log_probs):
    """The errors that the statement asks for."""
    if len({x.shape for x in log_probs}) != 1 or not ((torch.as_tensor(eps) >= 0) & (torch.as_tensor(eps) <= 1)).all():
        raise ValueError("shapes or label_smoothing")


def with_softplus(pc, pr, rc, rr, beta, label_smoothing=0.0):
    fitting(label_smoothing, pc, pr, rc, rr)
    h = h_of(*(x.float() for x in (pc, pr, rc, rr)), beta)
    return (F.softplus(-h) + label_smoothing * h).mean()


def in_a_loop(pc, pr, rc, rr, beta, label_smoothing=0.0):
    fitting(label_smoothing, pc, pr, rc, rr)
    eps = torch.as_tensor(label_smoothing).expand(len(pc))
    total = 0.0
    for a, b, c, d, e in zip(pc.double(), pr.double(), rc.double(), rr.double(), eps):
        h = beta * (a - c) - beta * (b - d)
        total = total - (1 - e) * F.logsigmoid(h) - e * F.logsigmoid(-h)
    return total / len(pc)


def as_cross_entropy(pc, pr, rc, rr, beta, label_smoothing=0.0):
    fitting(label_smoothing, pc, pr, rc, rr)
    h = h_of(*(x.float() for x in (pc, pr, rc, rr)), beta)
    target = 1 - torch.as_tensor(label_smoothing, dtype=h.dtype).expand_as(h)
    return F.binary_cross_entropy_with_logits(h, target)


def wrongly(loss_of_h_and_eps, reduce=torch.mean):
    """A wrong loss from what it does with h and eps."""
    return lambda pc, pr, rc, rr, beta, eps=0.0: reduce(loss_of_h_and_eps(h_of(pc, pr, rc, rr, beta), eps))


def right(h, eps):
    return -(1 - eps) * F.logsigmoid(h) - eps * F.logsigmoid(-h)


EXERCISE = Exercise(
    name="dpo_loss",
    assignment="a4_dpo",
    order=6,
    points=15,
    minutes=20,
    lecture="12_dpo",
    equation="12.6",
    parameters=("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "beta", "label_smoothing"),
    reference=dpo_loss,
    cases=(
        Case(
            "a few pairs",
            "the mean over the pairs of -log sigma(h)",
            lambda g: [problem(g, 3, 0.5), problem(g, 5, 0.1)],
            2,
            visible=True,
        ),
        Case(
            "label smoothing",
            "with smoothing eps: the mean of -(1 - eps) log sigma(h) - eps log sigma(-h) (12.7)",
            lambda g: [smoothed(g, 4, 0.1, beta=0.5), smoothed(g, 3, 0.3, beta=1.0)],
            2,
            visible=True,
        ),
        Case(
            "far from the reference",
            "finite where |h| is in the hundreds: log(sigmoid(h)) would be -inf",
            lambda g: [problem(g, 24, 1.0, 400.0), problem(g, 16, 0.5, 500.0)],
            1,
            visible=True,
        ),
        Case(
            "other sizes and betas",
            "right for any batch and beta",
            lambda g: [problem(g, integer(g, 1, 9), beta) for beta in (0.02, 0.4, 3.0)],
            3,
        ),
        Case(
            "gradient",
            "differentiable by the policy's and the reference's log-probabilities",
            lambda g: [smoothed(g, 4, eps) for eps in (0.0, 0.2)],
            2,
            visible=True,
            gradients=(0, 1, 2, 3),
        ),
        Case(
            "soft labels",
            "label_smoothing may be a tensor (B,): one eps for each pair",
            lambda g: [smoothed(g, 4, uniform(g, 0, 1, 4)), smoothed(g, 2, uniform(g, 0, 1, 2))],
            2,
        ),
        Case(
            "far from the reference, smoothed",
            "finite, with a finite gradient, at any h",
            lambda g: [smoothed(g, 16, 0.1, beta=1.0, spread=400.0) for _ in range(2)],
            1,
            gradients=(0, 1),
        ),
        Case(
            "half precision",
            "float16 log-probabilities are converted to float32 before anything is computed",
            lambda g: [problem(g, 8, dtype=torch.float16) for _ in range(2)],
            1,
        ),
        Case(
            "bad input",
            "tensors of different shapes, or eps outside [0, 1], raise ValueError",
            lambda g: [problem(g, 3), problem(g, 3)[:3] + problem(g, 1)[3:], smoothed(g, 3, 1.5)],
            1,
        ),
    ),
    mistakes=(
        Mistake("You sum over the pairs; the loss is their mean.", wrongly(right, torch.sum)),
        Mistake("One number for each pair: take the mean over the batch.", wrongly(right, lambda x: x)),
        Mistake("Chosen and rejected are swapped.", wrongly(lambda h, eps: right(-h, eps))),
        Mistake("The minus sign is missing: the loss is -log sigma(h).", wrongly(lambda h, eps: -right(h, eps))),
        Mistake(
            "pi_ref is missing: h compares log-ratios to the reference, not log-probabilities.",
            equation="12.5",
            function=lambda pc, pr, rc, rr, beta, eps=0.0: right(beta * (pc - pr), eps).mean(),
        ),
        Mistake(
            "The sign of the reference is wrong: its log-probabilities are subtracted.",
            equation="12.5",
            function=lambda pc, pr, rc, rr, beta, eps=0.0: right(beta * ((pc + rc) - (pr + rr)), eps).mean(),
        ),
        Mistake(
            "beta is missing.",
            equation="12.5",
            function=lambda pc, pr, rc, rr, beta, eps=0.0: right((pc - rc) - (pr - rr), eps).mean(),
        ),
        Mistake(
            "beta multiplies the loss; it belongs inside the sigmoid.",
            equation="12.5",
            function=lambda pc, pr, rc, rr, beta, eps=0.0: beta * right((pc - rc) - (pr - rr), eps).mean(),
        ),
        Mistake(
            "You divide by beta; h multiplies by it.",
            equation="12.5",
            function=lambda pc, pr, rc, rr, beta, eps=0.0: right(((pc - rc) - (pr - rr)) / beta, eps).mean(),
        ),
        Mistake("label_smoothing is ignored.", wrongly(lambda h, eps: -F.logsigmoid(h)), "12.7"),
        Mistake(
            "eps and 1 - eps are swapped.",
            wrongly(lambda h, eps: right(h, 1 - eps) if isinstance(eps, float) and eps else right(h, eps)),
            "12.7",
        ),
        Mistake(
            "This smooths towards one half (eps / 2 for each side, as in classification); here eps is the whole "
            "probability that the label is wrong.",
            wrongly(lambda h, eps: right(h, eps / 2)),
            "12.7",
        ),
        Mistake(
            "log(sigmoid(h)) is -inf for very negative h: use torch.nn.functional.logsigmoid.",
            wrongly(lambda h, eps: -(1 - eps) * torch.sigmoid(h).log() - eps * torch.sigmoid(-h).log()),
        ),
        Mistake(
            "log(sigmoid(h)) is -inf for very negative h: use torch.nn.functional.logsigmoid.",
            lambda pc, pr, rc, rr, beta, eps=0.0: (
                -torch.sigmoid(h_of(pc, pr, rc, rr, beta)).log().mean()
                if isinstance(eps, float) and eps == 0
                else right(h_of(pc, pr, rc, rr, beta), eps).mean()
            ),
        ),
        Mistake(
            "This is -sigma(h); its logarithm is missing.",
            wrongly(lambda h, eps: -(1 - eps) * h.sigmoid() - eps * (-h).sigmoid()),
        ),
        Mistake(
            "This is IPO's squared loss, not DPO's.",
            lambda pc, pr, rc, rr, beta, eps=0.0: ((((pc - rc) - (pr - rr)) - 1 / (2 * beta)) ** 2).mean(),
        ),
        Mistake("This is a hinge loss, not the log-sigmoid.", wrongly(lambda h, eps: torch.relu(1 - h))),
    ),
    wrong=(
        lambda pc, pr, rc, rr, beta, eps=0.0: right(h_of(pc.detach(), pr, rc, rr, beta), eps).mean(),
        lambda pc, pr, rc, rr, beta, eps=0.0: right(h_of(pc, pr, rc, rr, beta).clamp(-20, 20), eps).mean(),
        wrongly(lambda h, eps: right(h, float(eps) if not isinstance(eps, torch.Tensor) else eps.mean())),
        wrongly(right, torch.median),
    ),
    unusual=(with_softplus, in_a_loop, as_cross_entropy),
    stripped=("dpo.dpo_loss", "dpo._preference_logit"),
)
