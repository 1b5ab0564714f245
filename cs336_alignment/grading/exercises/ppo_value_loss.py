import torch

from cs336_alignment.grading.exercise import FLOAT64, Case, Exercise, Mistake
from cs336_alignment.grading.exercises._rollouts import filled, mean_of, nothing, ragged, spoiled
from cs336_alignment.grading.inputs import integer, number, uniform
from cs336_alignment.ppo import ppo_value_loss


def problem(g, rows, longest, *clip_eps, dtype=torch.float32, mask=None, empty=False):
    """Values that have moved less and more than the clip allows, towards the return and away from it."""
    mask = ragged(g, rows, longest, empty) if mask is None else mask
    old = uniform(g, -2, 2, *mask.shape, dtype=dtype)
    moved = old + uniform(g, -0.8, 0.8, *mask.shape, dtype=dtype)
    return moved, old, old + uniform(g, -2, 2, *mask.shape, dtype=dtype), mask, *clip_eps


def far_from_zero(g):
    """Values around 1000 with errors around 1, of which float32 would keep four digits."""
    values, old, returns, mask = problem(g, 4, 6, dtype=torch.float64)
    return values + 1000, old + 1000, returns + 1000, mask


def garbage(g, *size, **kwargs):
    values, old, returns, mask, *clip_eps = problem(g, *size, **kwargs)
    return *spoiled(mask, values, old, returns), mask, *clip_eps


def checked(clip_eps):
    if clip_eps is not None and clip_eps < 0:
        raise ValueError("clip_eps")


def by_index(values, old_values, returns, mask, clip_eps=None):
    checked(clip_eps)
    v, old, target = values[mask], old_values[mask], returns[mask]
    losses = 0.5 * (v - target).pow(2)
    if clip_eps is not None:
        near = torch.min(torch.max(v, old - clip_eps), old + clip_eps)
        losses = torch.maximum(losses, 0.5 * (near - target).pow(2))
    return losses.sum() / max(1, losses.numel())


def from_the_distance(values, old_values, returns, mask, clip_eps=None):
    """The larger of the two squares is the square of the larger distance."""
    checked(clip_eps)
    v, old, target = (torch.where(mask, x.double(), 0.0) for x in (values, old_values, returns))
    distance = (v - target).abs()
    if clip_eps is not None:
        distance = torch.stack([distance, (old + (v - old).clamp(-clip_eps, clip_eps) - target).abs()]).amax(0)
    return (distance.square() * mask).sum() / (2 * mask.sum().clamp(min=1))


def in_a_loop(values, old_values, returns, mask, clip_eps=None):
    checked(clip_eps)
    total = 0.0 * values[mask].sum()
    for i, t in mask.nonzero().tolist():
        v, old, target = values[i, t], old_values[i, t], returns[i, t]
        loss = (v - target) ** 2
        if clip_eps is not None:
            clipped = v if abs((v - old).item()) <= clip_eps else old + clip_eps * torch.sign(v - old).detach()
            other = (clipped - target) ** 2
            loss = other if other > loss else loss
        total = total + loss / 2
    return total / max(1, int(mask.sum()))


def wrongly(
    clipped=lambda v, old, target, eps: old + (v - old).clamp(-eps, eps),
    choose=torch.maximum,
    error=lambda v, target: (v - target) ** 2 / 2,
    reduce=mean_of,
    check=checked,
    always=None,
):
    """The right loss of clean inputs, with one thing changed. always: the clip range where there is none."""

    def function(values, old_values, returns, mask, clip_eps=None):
        check(clip_eps)
        v, old, target = filled(mask, values, old_values, returns)
        losses, eps = error(v, target), always if clip_eps is None else clip_eps
        if eps is not None:
            losses = choose(losses, error(clipped(v, old, target, eps), target))
        return reduce(losses, mask)

    return function


def sequence_mean(x, mask):
    return ((x * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def clean_after(values, old_values, returns, mask, clip_eps=None):
    checked(clip_eps)
    losses = (values - returns) ** 2
    if clip_eps is not None:
        losses = torch.maximum(losses, (old_values + (values - old_values).clamp(-clip_eps, clip_eps) - returns) ** 2)
    return mean_of(losses / 2, mask)


def times_mask(values, old_values, returns, mask, clip_eps=None):
    checked(clip_eps)
    losses = (values - returns) ** 2
    if clip_eps is not None:
        losses = torch.maximum(losses, (old_values + (values - old_values).clamp(-clip_eps, clip_eps) - returns) ** 2)
    return (losses / 2 * mask).sum() / mask.sum().clamp(min=1)


EXERCISE = Exercise(
    name="ppo_value_loss",
    assignment="a3_ppo",
    order=9,
    points=5,
    minutes=15,
    lecture="11_ppo",
    equation="11.8",
    parameters=("values", "old_values", "returns", "mask", "clip_eps"),
    reference=ppo_value_loss,
    cases=(
        Case(
            "without a clip",
            "the mean over all response tokens of (V - R)^2 / 2",
            lambda g: [problem(g, 3, 4), problem(g, 4, 5, None)],
            1,
            visible=True,
        ),
        Case(
            "with a clip",
            "the mean of max((V - R)^2, (V_old + clamp(V - V_old, -eps, eps) - R)^2) / 2",
            lambda g: [problem(g, 3, 5, 0.2), problem(g, 4, 6, 0.3)],
            1,
            visible=True,
        ),
        Case(
            "behind the mask",
            "NaN and inf behind the mask reach neither the value nor the gradient; without any response token the "
            "loss is 0",
            lambda g: [garbage(g, 3, 4), garbage(g, 4, 3, 0.2, empty=True), garbage(g, 2, 3, mask=nothing(2, 3))],
            0.5,
            visible=True,
            gradients=(0,),
        ),
        Case(
            "other sizes",
            "right for any batch and clip range",
            lambda g: [
                problem(g, integer(g, 3, 6), integer(g, 4, 8), number(g, 0.1, 0.5)),
                problem(g, 5, 6),
                problem(g, 6, 6, 0.2, empty=True),
                problem(g, 4, 5, 0.0),
                problem(g, 6, 6, 0.1),
            ],
            1,
        ),
        Case(
            "gradient",
            "differentiable by the values; 0 where the clipped term is the larger one, and behind the mask",
            lambda g: [garbage(g, 5, 6, 0.2, empty=True), garbage(g, 4, 4), garbage(g, 3, 2, 0.1, mask=nothing(3, 2))],
            1,
            gradients=(0,),
        ),
        Case(
            "double precision, and a negative clip",
            "float64 stays float64; clip_eps < 0 raises ValueError",
            lambda g: [
                problem(g, 4, 6, 0.2, dtype=torch.float64),
                *(far_from_zero(g) for _ in range(3)),
                problem(g, 3, 3, -0.2),
            ],
            0.5,
            tolerance=FLOAT64,
        ),
    ),
    mistakes=(
        Mistake("The factor 1/2 is missing.", wrongly(error=lambda v, r: (v - r) ** 2)),
        Mistake(
            "You take the minimum of the two errors; take the maximum: a value may not profit from moving too far.",
            wrongly(choose=torch.minimum),
        ),
        Mistake("Only the clipped error is used; take the maximum of both.", wrongly(choose=lambda a, b: b)),
        Mistake("The clip is ignored.", wrongly(choose=lambda a, b: a)),
        Mistake(
            "You clip the values themselves to [-eps, eps]; it is their change since sampling that is clipped.",
            wrongly(clipped=lambda v, old, r, eps: v.clamp(-eps, eps)),
        ),
        Mistake(
            "V_old is missing from the clipped value: V_old + clamp(V - V_old, -eps, eps).",
            wrongly(clipped=lambda v, old, r, eps: (v - old).clamp(-eps, eps)),
        ),
        Mistake(
            "The clip is relative, as that of the ratio; here it is a distance in units of reward.",
            wrongly(clipped=lambda v, old, r, eps: old * (v / old).clamp(1 - eps, 1 + eps).nan_to_num(1.0)),
        ),
        Mistake("You take the absolute error; square it.", wrongly(error=lambda v, r: (v - r).abs() / 2)),
        Mistake("Without clip_eps there is no clip at all.", wrongly(always=0.2)),
        Mistake(
            "You average over the tokens of each response first; here it is the mean over all response tokens.",
            wrongly(reduce=sequence_mean),
        ),
        Mistake("You sum over the tokens: divide by their number.", wrongly(reduce=lambda x, m: (x * m).sum())),
        Mistake("You divide by all positions, padding included.", wrongly(reduce=lambda x, m: (x * m).mean())),
        Mistake(
            "The error is that of the old values; V is what learns.",
            lambda v, old, r, m, eps=None: wrongly()(old, v, r, m, eps),
        ),
        Mistake(
            "0 times NaN is NaN: multiplying by the mask does not remove what stands behind it. Index with the mask, "
            "or use torch.where first.",
            times_mask,
        ),
        Mistake(
            "torch.where on the finished terms hides NaN from the value but not from the gradient: replace what is "
            "behind the mask first, or index with the mask.",
            clean_after,
        ),
        Mistake(
            "Without a response token you divide by 0: the mean over nothing is 0 here.",
            wrongly(reduce=lambda x, m: x[m].mean()),
        ),
    ),
    wrong=(
        wrongly(check=lambda eps: None),
        lambda v, old, r, m, eps=None: wrongly()(v.float(), old.float(), r.float(), m, eps),
        lambda v, old, r, m, eps=None: wrongly()(v.detach(), old, r, m, eps),
        lambda v, old, r, m, eps=None: wrongly()(v, old, r, m, eps or None),
        wrongly(clipped=lambda v, old, r, eps: old + (v - old).clamp(max=eps)),
    ),
    unusual=(by_index, from_the_distance, in_a_loop),
    stripped=("ppo.ppo_value_loss",),
)
