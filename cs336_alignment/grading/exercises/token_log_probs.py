import torch
import torch.nn.functional as F

from cs336_alignment.grading.exercise import FLOAT64, Case, Exercise, Mistake
from cs336_alignment.grading.inputs import integer
from cs336_alignment.tokens import token_log_probs


def problem(g, *shape, scale=2.0, dtype=torch.float32):
    """shape: (..., V)."""
    logits = scale * torch.randn(*shape, generator=g, dtype=torch.float64)
    return logits.to(dtype), torch.randint(0, shape[-1], shape[:-1], generator=g)


def large(g):
    return problem(g, 3, 4, 6, scale=10_000.0)


def bad_label(g, value):
    logits, labels = problem(g, 2, 4, 5)
    labels[integer(g, 0, 1), integer(g, 0, 3)] = value
    return logits, labels


def fewer_labels(g):
    """As many labels as positions less one: what is left when somebody shifts the labels alone."""
    logits, labels = problem(g, 2, 4, 5)
    return logits, labels[:, 1:]


def fitting(logits, labels):
    """The errors that the statement asks for."""
    if logits.shape[:-1] != labels.shape or not ((labels >= 0) & (labels < logits.shape[-1])).all():
        raise ValueError("shapes, or a label that is no token")


def with_cross_entropy(logits, labels):
    fitting(logits, labels)
    x = logits if logits.dtype == torch.float64 else logits.float()
    return -F.cross_entropy(x.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)


def with_logsumexp(logits, labels):
    fitting(logits, labels)
    x = logits.double()
    return x.gather(-1, labels[..., None])[..., 0] - x.logsumexp(-1)


def with_one_hot(logits, labels):
    fitting(logits, labels)
    x = logits if logits.dtype == torch.float64 else logits.float()
    x = x - x.amax(-1, keepdim=True)
    hot = F.one_hot(labels, x.shape[-1]).to(x.dtype)
    return torch.einsum("...v,...v->...", x, hot) - x.exp().sum(-1).log()


def in_a_loop(logits, labels):
    fitting(logits, labels)
    rows = (logits if logits.dtype == torch.float64 else logits.float()).reshape(-1, logits.shape[-1])
    terms = [row.log_softmax(0)[label] for row, label in zip(rows, labels.flatten().tolist())]
    return torch.stack(terms).reshape(labels.shape)


def wrongly(log_probs=lambda x: x.log_softmax(-1), pick=None, check=fitting, convert=True):
    """The right function with one thing changed."""
    pick = pick or (lambda terms, labels: terms.gather(-1, labels[..., None])[..., 0])

    def function(logits, labels):
        check(logits, labels)
        x = logits.float() if convert and logits.dtype in (torch.float16, torch.bfloat16) else logits
        return pick(log_probs(x), labels)

    return function


def shifted_again(terms, labels):
    return terms[..., :-1, :].gather(-1, labels[..., 1:, None])[..., 0]


def clamped(logits, labels):
    labels = labels.clamp(0, logits.shape[-1] - 1)
    return token_log_probs(logits, labels)


OVERFLOW = "exp overflows for large logits: use log_softmax, which takes the largest out first."

EXERCISE = Exercise(
    name="token_log_probs",
    assignment="a1_sft",
    order=3,
    points=8,
    minutes=15,
    lecture="02_sft_mechanics",
    equation="2.3",
    parameters=("logits", "labels"),
    reference=token_log_probs,
    cases=(
        Case(
            "a small batch",
            "at every position the label's logit minus the log-sum-exp of all logits there",
            lambda g: [problem(g, 2, 3, 5), problem(g, 3, 4, 6)],
            1,
            visible=True,
        ),
        Case(
            "large logits",
            "finite for logits in the ten thousands: log_softmax, not the log of softmax",
            lambda g: [large(g) for _ in range(2)],
            1,
            visible=True,
        ),
        Case(
            "half precision",
            "bfloat16 and float16 logits are converted to float32 before anything is computed",
            lambda g: [problem(g, 3, 4, 6, dtype=torch.bfloat16), problem(g, 3, 4, 6, dtype=torch.float16)],
            1,
            visible=True,
        ),
        Case(
            "bad input",
            "ValueError for a label that is no token (-100, say), and where the shapes do not fit",
            lambda g: [bad_label(g, -100), fewer_labels(g), bad_label(g, 5), problem(g, 2, 4, 5)],
            1,
            visible=True,
        ),
        Case(
            "other shapes",
            "right for any shape (..., V) of logits and for large ones",
            lambda g: [
                problem(g, integer(g, 2, 4), integer(g, 2, 5), integer(g, 4, 9)),
                problem(g, 4, 3, 4),
                problem(g, 5, 7),
                large(g),
            ],
            1,
        ),
        Case(
            "gradient",
            "differentiable by the logits",
            lambda g: [problem(g, 2, 3, 5), problem(g, 3, 2, 7)],
            1,
            gradients=(0,),
        ),
        Case(
            "double precision",
            "float64 stays float64",
            lambda g: [problem(g, 8, 10, 6, dtype=torch.float64) for _ in range(2)],
            1,
            tolerance=FLOAT64,
        ),
        Case(
            "more bad input, and half precision",
            "ValueError for labels outside the vocabulary and shapes that do not fit; half precision is converted",
            lambda g: (
                [bad_label(g, -1), bad_label(g, integer(g, 5, 9)), fewer_labels(g), bad_label(g, -100)]
                + [problem(g, 4, 6, 8, dtype=dtype) for dtype in (torch.bfloat16, torch.float16)]
            ),
            1,
        ),
    ),
    mistakes=(
        Mistake("These are logits: the log-softmax is missing.", wrongly(lambda x: x)),
        Mistake("These are probabilities; take their logarithms.", wrongly(lambda x: x.softmax(-1))),
        Mistake(
            "The sign is wrong: this is minus the log-probability, what cross_entropy returns.",
            wrongly(lambda x: -x.log_softmax(-1)),
        ),
        Mistake(
            "The softmax runs over the positions; it belongs over the vocabulary, the last dimension.",
            wrongly(lambda x: x.log_softmax(-2)),
        ),
        Mistake(
            "The softmax runs over the batch; it belongs over the vocabulary, the last dimension.",
            wrongly(lambda x: x.log_softmax(0)),
        ),
        Mistake(
            "The log of a softmax is -inf where the softmax underflows: use log_softmax.",
            wrongly(lambda x: x.softmax(-1).log()),
        ),
        Mistake(
            "The small number in log(softmax + eps) hides every smaller probability: use log_softmax.",
            wrongly(lambda x: (x.softmax(-1) + 1e-8).log()),
        ),
        Mistake(OVERFLOW, wrongly(lambda x: x - x.exp().sum(-1, keepdim=True).log())),
        Mistake(
            "You shift once more: the labels fit their positions already.",
            wrongly(pick=shifted_again),
            "2.2",
        ),
        Mistake(
            "This is the largest log-probability at each position, not the label's.",
            wrongly(pick=lambda terms, labels: terms.amax(-1)),
        ),
        Mistake(
            "One number for each position: no sum and no mean here.",
            wrongly(pick=lambda terms, labels: terms.gather(-1, labels[..., None]).mean()),
        ),
        Mistake(
            "One number for each position: no sum and no mean here.",
            wrongly(pick=lambda terms, labels: terms.gather(-1, labels[..., None])[..., 0].sum(-1)),
        ),
        Mistake(
            "The last dimension is kept with size 1: squeeze(-1) behind gather.",
            wrongly(pick=lambda terms, labels: terms.gather(-1, labels[..., None])),
        ),
        Mistake(
            "All log-probabilities are returned; pick the label's with gather.",
            wrongly(pick=lambda terms, labels: terms),
        ),
        Mistake(
            "Half precision has three digits: convert the logits to float32 first.",
            wrongly(convert=False),
        ),
        Mistake(
            "Bad labels must raise ValueError, not be clamped to the vocabulary.",
            lambda logits, labels: clamped(logits, labels),
        ),
        Mistake(
            "Check shapes and labels yourself and raise ValueError: gather raises another error at bad labels, and none "
            "where there are too few.",
            wrongly(check=lambda logits, labels: None),
        ),
        Mistake(
            "No error where there are fewer labels than positions: gather silently takes the first positions. Compare "
            "the shapes.",
            wrongly(
                check=lambda logits, labels: fitting(logits.new_zeros(*labels.shape, logits.shape[-1]), labels),
            ),
        ),
    ),
    wrong=(
        lambda logits, labels: token_log_probs(logits.detach(), labels),
        lambda logits, labels: token_log_probs(logits.float(), labels),
        wrongly(
            check=lambda logits, labels: fitting(logits, labels.clamp(min=0)),
            pick=lambda t, y: t.gather(-1, (y % t.shape[-1])[..., None])[..., 0],
        ),
    ),
    unusual=(with_cross_entropy, with_logsumexp, with_one_hot, in_a_loop),
    stripped=("tokens.token_log_probs", "tokens.masked_token_log_probs"),
)
