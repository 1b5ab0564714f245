import torch

from cs336_alignment.evaluate import expected_calibration_error
from cs336_alignment.grading.exercise import Case, Exercise, Mistake
from cs336_alignment.grading.exercises._reward import on_the_edges, predictions
from cs336_alignment.grading.inputs import integer, uniform


def problem(g, bins: int, low: float = 0.0):
    return *predictions(g, bins, low), bins


def soft(g, bins: int):
    """The exact probability of being correct, where one knows it."""
    confidence, correct = predictions(g, bins)
    return confidence, torch.where(correct, uniform(g, 0.7, 1, len(correct)), uniform(g, 0, 0.3, len(correct))), bins


def edges(g, bins: int):
    return *on_the_edges(g, bins), bins


def needed(confidence, correct):
    """The errors that the statement asks for."""
    if confidence.shape != correct.shape or len(confidence) == 0 or confidence.min() < 0 or confidence.max() > 1:
        raise ValueError("shapes or confidences")


def bin_by_bin(confidence, correct, bins=10):
    needed(confidence, correct)
    total, ends = 0.0, torch.linspace(0, 1, bins + 1)
    for b in range(bins):
        inside = (confidence <= ends[b + 1]) & ((confidence > ends[b]) if b else torch.ones_like(correct, dtype=bool))
        if inside.any():
            gap = correct[inside].float().mean() - confidence[inside].mean()
            total += inside.sum() / len(confidence) * gap.abs()
    return total


def with_ceil(confidence, correct, bins=10):
    needed(confidence, correct)
    index = ((confidence.double() * bins).ceil().long() - 1).clamp(min=0)
    gaps = {}
    for b, c, y in zip(index.tolist(), confidence.tolist(), correct.tolist()):
        gaps[b] = gaps.get(b, 0.0) + float(y) - c
    return sum(map(abs, gaps.values())) / len(confidence)


def with_one_hot(confidence, correct, bins=10):
    needed(confidence, correct)
    index = torch.searchsorted(torch.linspace(0, 1, bins + 1)[1:-1], confidence.float())
    member = torch.nn.functional.one_hot(index, bins).double()
    return torch.einsum("n,nb->b", correct.double() - confidence.double(), member).abs().sum() / len(index)


def upper(confidence, bins):
    """The right bins: each holds its upper end, the first 0 too."""
    return torch.bucketize(confidence, torch.linspace(0, 1, bins + 1)[1:-1])


def lower(confidence, bins):
    return torch.bucketize(confidence, torch.linspace(0, 1, bins + 1)[1:-1], right=True)


def wrongly(index=upper, total=lambda gap, share: (share * gap.abs()).sum(), middle=False, kept=lambda c: c >= 0):
    """Another way to bin, or to put the gaps of the bins together."""

    def function(confidence, correct, bins=10):
        where, y, gaps, shares = index(confidence, bins), correct.double(), [], []
        for b in where.unique().tolist():
            inside = (where == b) & kept(confidence)
            if not inside.any():
                continue
            mean = (b + 0.5) / bins if middle else confidence[inside].double().mean()
            gaps.append(y[inside].mean() - mean)
            shares.append(inside.double().mean())
        return total(torch.stack(gaps), torch.stack(shares)).item()

    return function


def mean_over_all_bins(confidence, correct, bins=10):
    return wrongly(total=lambda gap, share: gap.abs().sum())(confidence, correct, bins) / bins


def equal_counts(confidence, bins):
    """Bins that hold equally many predictions."""
    return confidence.argsort().argsort() * bins // len(confidence)


def between_extremes(confidence, bins):
    """Bins from the smallest confidence to the largest."""
    return torch.bucketize(confidence, torch.linspace(confidence.min().item(), confidence.max().item(), bins + 1)[1:-1])


def with_empty_bins(confidence, correct, bins=10):
    """0 / 0 in an empty bin."""
    where = upper(confidence, bins)
    parts = [
        (where == b).double().mean()
        * (correct[where == b].double().mean() - confidence[where == b].double().mean()).abs()
        for b in range(bins)
    ]
    return torch.stack(parts).sum().item()


EXERCISE = Exercise(
    name="expected_calibration_error",
    assignment="a2_reward",
    order=7,
    points=10,
    minutes=20,
    lecture="08_reward_models",
    equation="8.10",
    parameters=("confidence", "correct", "bins"),
    reference=expected_calibration_error,
    cases=(
        Case(
            "some predictions",
            "the sum over the bins of their share of the predictions times |accuracy - mean confidence|",
            lambda g: [problem(g, 10), problem(g, 5)],
            2,
            visible=True,
        ),
        Case(
            "a reward model's confidences",
            "right where bins are empty: max(p, 1 - p) is never below one half",
            lambda g: [problem(g, 10, low=0.5), problem(g, 20, low=0.5)],
            1,
            visible=True,
        ),
        Case(
            "on the edges",
            "a bin holds its upper end, and the first one holds 0 too",
            lambda g: [edges(g, 4), edges(g, 2)],
            1,
            visible=True,
        ),
        Case(
            "other sizes and bins",
            "right for any number of predictions and bins",
            lambda g: [problem(g, bins) for bins in (integer(g, 3, 6), 10, 15)] + [problem(g, 10, low=0.5)],
            3,
        ),
        Case(
            "on the edges, other bins",
            "a bin holds its upper end, and the first one holds 0 too",
            lambda g: [edges(g, 8), edges(g, 2), edges(g, 4)],
            1,
        ),
        Case(
            "exact probabilities",
            "`correct` may be a number between 0 and 1: the probability of being correct",
            lambda g: [soft(g, 10), soft(g, 6)],
            1,
        ),
        Case(
            "bad input",
            "two shapes, an empty batch, and a confidence outside [0, 1] raise ValueError",
            lambda g: [
                problem(g, 10),
                (predictions(g, 10)[0], predictions(g, 10)[1][:, None], 10),
                (torch.zeros(0), torch.zeros(0, dtype=torch.bool), 10),
                (torch.tensor([0.2, 1.4]), torch.tensor([False, True]), 10),
                (torch.tensor([-0.1, 0.4]), torch.tensor([False, True]), 10),
            ],
            1,
        ),
    ),
    mistakes=(
        Mistake(
            "Every bin counts the same in yours; weigh it by its share of the predictions.",
            wrongly(total=lambda gap, share: gap.abs().mean()),
        ),
        Mistake("Every bin counts the same in yours; weigh it by its share of the predictions.", mean_over_all_bins),
        Mistake(
            "The weights are missing: each bin's gap is multiplied by its share of the predictions.",
            wrongly(total=lambda gap, share: gap.abs().sum()),
        ),
        Mistake(
            "This is the largest gap (the maximum calibration error); ECE is their weighted mean.",
            wrongly(total=lambda gap, share: gap.abs().max()),
        ),
        Mistake(
            "You square the gaps; ECE takes their absolute values.",
            wrongly(total=lambda gap, share: (share * gap**2).sum()),
        ),
        Mistake(
            "You square the gaps; ECE takes their absolute values.",
            wrongly(total=lambda gap, share: (share * gap**2).sum().sqrt()),
        ),
        Mistake(
            "The absolute value is missing: bins that are too sure and bins that are not sure enough cancel.",
            wrongly(total=lambda gap, share: (share * gap).sum()),
        ),
        Mistake(
            "The bins are missing: this is one gap for all predictions together.",
            wrongly(total=lambda gap, share: (share * gap).sum().abs()),
        ),
        Mistake(
            "The absolute value is taken of each prediction; take it of each bin's mean gap.",
            lambda confidence, correct, bins=10: (correct.double() - confidence).abs().mean().item(),
        ),
        Mistake(
            "This is the Brier score, a mean of squares, not ECE.",
            lambda confidence, correct, bins=10: ((correct.double() - confidence) ** 2).mean().item(),
        ),
        Mistake(
            "The mean confidence of a bin is the mean of what is in it, not the middle of the bin.",
            wrongly(middle=True),
        ),
        Mistake("`bins` is ignored.", lambda confidence, correct, bins=10: wrongly()(confidence, correct, 10)),
        Mistake("Your bins hold equally many predictions; here they have equal width.", wrongly(index=equal_counts)),
        Mistake(
            "Your bins reach from the smallest confidence to the largest; here they reach from 0 to 1.",
            wrongly(index=between_extremes),
        ),
        Mistake("An empty bin gives 0 / 0, which is NaN: leave it out.", with_empty_bins),
        Mistake("Your bins hold their lower ends; here they hold their upper ends.", wrongly(index=lower)),
        Mistake(
            "Your bins hold their lower ends, and a confidence of exactly 1 falls into none.",
            wrongly(index=lower, kept=lambda c: c < 1),
        ),
        Mistake("A confidence of exactly 0 falls into none of your bins.", wrongly(kept=lambda c: c > 0)),
    ),
    wrong=(
        wrongly(),  # right but for bad input
        lambda confidence, correct, bins=10: wrongly()(confidence, correct > 0.5, bins),
        lambda confidence, correct, bins=10: wrongly()(confidence, correct, bins + 1),
    ),
    unusual=(bin_by_bin, with_ceil, with_one_hot),
    stripped=("evaluate.expected_calibration_error",),
)
