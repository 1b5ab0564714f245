import torch

from cs336_alignment.grading.exercise import FLOAT64, Case, Exercise, Mistake
from cs336_alignment.grading.exercises._rollouts import filled, left, nothing, ragged, spoiled
from cs336_alignment.grading.inputs import integer, uniform
from cs336_alignment.ppo import whiten


def problem(g, rows, longest, *shift, spread=2.0, dtype=torch.float32, empty=False):
    mask = ragged(g, rows, longest, empty)
    x = uniform(g, -spread, 2 * spread, rows, longest, dtype=dtype)
    return x, mask, *shift


def garbage(g, rows, longest, *shift, change=lambda mask: mask):
    x, mask, *shift = problem(g, rows, longest, *shift, empty=True)
    mask = change(mask)
    return *spoiled(mask, x), mask, *shift


def equal(g, rows, longest, *shift):
    """The same number at every response token: a variance of 0."""
    mask = ragged(g, rows, longest)
    return *spoiled(mask, torch.full(mask.shape, integer(g, 1, 5) / 2)), mask, *shift


def single(g, *shift):
    """One response token in the whole batch."""
    mask = nothing(2, 3)
    mask[integer(g, 0, 1), 0] = True
    return *spoiled(mask, uniform(g, 0.5, 2, 2, 3)), mask, *shift


def by_index(x, mask, shift_mean=True):
    out = torch.zeros_like(x)
    tokens = x[mask]
    if len(tokens) < 2:
        if not shift_mean:
            out[mask] = tokens
        return out
    scaled = (tokens - tokens.mean()) / torch.sqrt(tokens.var() + 1e-8)
    out[mask] = scaled if shift_mean else scaled + tokens.mean()
    return out


def in_double(x, mask, shift_mean=True):
    y = torch.where(mask, x.double(), 0.0)
    n = int(mask.sum())
    mean = y.sum() / max(n, 1)
    variance = ((y - mean) ** 2 * mask).sum() / max(n - 1, 1)
    return torch.where(mask, (y - mean) / (variance + 1e-8) ** 0.5 + (0.0 if shift_mean else mean), 0.0)


def in_a_loop(x, mask, shift_mean=True):
    tokens = [x[i, t].item() for i, t in mask.nonzero().tolist()]
    n = len(tokens)
    mean = sum(tokens) / n if n else 0.0
    variance = sum((a - mean) ** 2 for a in tokens) / (n - 1) if n > 1 else 0.0
    out = torch.zeros_like(x)
    for (i, t), a in zip(mask.nonzero().tolist(), tokens):
        out[i, t] = (a - mean) * (variance + 1e-8) ** -0.5 + mean * (not shift_mean)
    return out


def wrongly(
    variance=lambda deviation, mask: (deviation**2).sum() / (mask.sum() - 1).clamp(min=1),
    mean=lambda x, mask: x.sum() / mask.sum().clamp(min=1),
    scale=lambda variance: (variance + 1e-8).rsqrt(),
    back=lambda whitened, x, mean, scale: whitened + mean,
    clean=True,
    after=lambda x, mask: torch.where(mask, x, 0.0),
):
    """The right function with one thing changed."""

    def function(x, mask, shift_mean=True):
        y = filled(mask, x)[0] if clean else x
        middle = mean(y, mask)
        deviation = torch.where(mask, y - middle, 0.0) if clean else (y - middle) * mask
        factor = scale(variance(deviation, mask))
        whitened = deviation * factor
        return after(whitened if shift_mean else back(whitened, y, middle, factor), mask)

    return function


def only_scaled(x, mask, shift_mean=True):
    """Divided by the standard deviation around the mean, which stays where it was."""
    y = filled(mask, x)[0]
    deviation = torch.where(mask, y - y.sum() / mask.sum().clamp(min=1), 0.0)
    return y * ((deviation**2).sum() / (mask.sum() - 1).clamp(min=1) + 1e-8).rsqrt()


EXERCISE = Exercise(
    name="whiten",
    assignment="a3_ppo",
    order=7,
    points=5,
    minutes=15,
    lecture="11_ppo",
    equation="11.7",
    parameters=("x", "mask", "shift_mean"),
    reference=whiten,
    cases=(
        Case(
            "a ragged batch",
            "(x - mean) / sqrt(variance + 1e-8), mean and unbiased variance over all response tokens of the batch; "
            "0 behind the mask",
            lambda g: [problem(g, 3, 4), problem(g, 4, 3, True), problem(g, 3, 4, spread=0.03)],
            1,
            visible=True,
        ),
        Case(
            "without the shift",
            "with shift_mean=False the mean is added back, as it was",
            lambda g: [problem(g, 3, 4, False), problem(g, 4, 3, False)],
            0.5,
            visible=True,
        ),
        Case(
            "nothing to divide by",
            "equal numbers and a single token give 0 (with shift_mean=False the mean), an empty batch 0; NaN behind "
            "the mask stays there",
            lambda g: [
                equal(g, 3, 3),
                single(g),
                single(g, False),
                garbage(g, 3, 4),
                (torch.ones(2, 2), nothing(2, 2)),
            ],
            0.5,
            visible=True,
        ),
        Case(
            "other sizes",
            "right for any batch, near 0 and far from it",
            lambda g: [
                problem(g, integer(g, 2, 6), integer(g, 3, 7)),
                problem(g, 4, 5, False),
                problem(g, 4, 5, spread=0.03),
                problem(g, 2, 3),
            ],
            1,
        ),
        Case(
            "odd batches",
            "equal numbers, a single token, empty rows, garbage behind any mask",
            lambda g: [
                equal(g, 3, 4),
                equal(g, 3, 2, False),
                single(g),
                single(g, False),
                garbage(g, 4, 5),
                garbage(g, 4, 5, False, change=left),
                (torch.full((2, 3), 7.0), nothing(2, 3), False),
            ],
            1,
        ),
        Case(
            "double precision",
            "float64 stays float64",
            lambda g: [problem(g, 4, 5, shift, dtype=torch.float64) for shift in (True, False)],
            1,
            tolerance=FLOAT64,
        ),
    ),
    mistakes=(
        Mistake(
            "The variance is divided by n; the unbiased one divides by n - 1.",
            wrongly(lambda d, m: (d**2).sum() / m.sum().clamp(min=1)),
        ),
        Mistake("You divide by the variance; divide by its square root.", wrongly(scale=lambda v: 1 / (v + 1e-8))),
        Mistake("The mean is not subtracted.", only_scaled),
        Mistake(
            "Each row is whitened for itself; mean and variance are those of the whole batch.",
            lambda x, m, shift_mean=True: torch.stack(
                [wrongly()(a[None], b[None], shift_mean)[0] for a, b in zip(x, m)]
            ),
        ),
        Mistake(
            "Padding counts as zeros: mean and variance are those of the response tokens alone.",
            lambda x, m, shift_mean=True: torch.where(
                m, wrongly()(filled(m, x)[0], torch.ones_like(m), shift_mean), 0.0
            ),
        ),
        Mistake(
            "shift_mean=False leaves the mean where it was: (x - mean) / s + mean, which is not x / s.",
            wrongly(back=lambda w, x, mean, scale: x * scale),
        ),
        Mistake("shift_mean is ignored: with False the mean is added back.", wrongly(back=lambda w, x, mean, scale: w)),
        Mistake(
            "The condition is the wrong way round: the mean comes back where shift_mean is False.",
            lambda x, m, shift_mean=True: wrongly()(x, m, not shift_mean),
        ),
        Mistake(
            "1e-8 is missing under the root: equal numbers must give 0, not NaN.",
            wrongly(scale=lambda v: v.rsqrt()),
        ),
        Mistake(
            "The number under the root is too large: small advantages are not brought to variance 1. It is 1e-8.",
            wrongly(scale=lambda v: (v + 1e-5).rsqrt()),
        ),
        Mistake(
            "The result behind the mask must be 0.", wrongly(after=lambda x, m: torch.where(m, x, x.sum() / m.sum()))
        ),
        Mistake(
            "0 times NaN is NaN: multiplying by the mask does not remove what stands behind it. Use torch.where.",
            wrongly(clean=False, mean=lambda x, m: (x * m).sum() / m.sum().clamp(min=1), after=lambda x, m: x * m),
        ),
        Mistake(
            "With a single token there is no n - 1 to divide by, and with none no mean: count at least 1.",
            lambda x, m, shift_mean=True: torch.where(
                m,
                (filled(m, x)[0] - x[m].mean()) * (x[m].var() + 1e-8).rsqrt() + (0.0 if shift_mean else x[m].mean()),
                0.0,
            ),
        ),
    ),
    wrong=(
        wrongly(variance=lambda d, m: d.abs().sum() ** 2 / (m.sum() - 1).clamp(min=1) ** 2),
        lambda x, m, shift_mean=True: wrongly()(x.float(), m, shift_mean),
        wrongly(after=lambda x, m: torch.where(m, x, 0.0).clamp(-1.5, 1.5)),
    ),
    unusual=(by_index, in_double, in_a_loop),
    stripped=("ppo.whiten",),
)
