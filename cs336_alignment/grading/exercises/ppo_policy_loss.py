import torch

from cs336_alignment.grading.exercise import Case, Exercise, Mistake
from cs336_alignment.grading.exercises._rollouts import (
    filled,
    mean_of,
    near,
    nothing,
    ragged,
    spoiled,
    token_log_probs,
)
from cs336_alignment.grading.inputs import integer, number, uniform
from cs336_alignment.ppo import ppo_policy_loss


def problem(g, rows, longest, clip_eps=0.2, dtype=torch.float32, spread=0.6, mask=None, empty=False):
    """Ratios inside and outside the clip, with advantages of either sign."""
    mask = ragged(g, rows, longest, empty) if mask is None else mask
    old = token_log_probs(g, *mask.shape, dtype=dtype)
    return near(g, old, spread), old, uniform(g, -2, 2, *mask.shape, dtype=dtype), mask, clip_eps


def four_quadrants(g, clip_eps=0.2, dtype=torch.float32):
    """Every side of the clip with either sign of the advantage, in each row: whatever is wrong there shows."""
    signs = torch.tensor([[1.0, 1, 1, -1, -1, -1, 1, -1]]).repeat(4, 1).to(dtype)
    low, high = 1.5 * clip_eps, 3.0 * clip_eps + 0.1
    far = uniform(g, low, high, 4, 8, dtype=dtype)
    inside = uniform(g, -0.5 * clip_eps, 0.5 * clip_eps, 4, 8, dtype=dtype)
    d = torch.where(torch.tensor([1, 0, 0, 1, 0, 0, 0, 0]).bool(), far, inside)  # ratio above 1 + eps
    d = torch.where(torch.tensor([0, 1, 0, 0, 1, 0, 0, 0]).bool(), -far, d)  # below 1 - eps
    old = token_log_probs(g, 4, 8, dtype=dtype)
    mask = torch.arange(8) < torch.tensor([8, 7, 6, integer(g, 4, 5)])[:, None]
    return old + d, old, signs * uniform(g, 0.5, 2, 4, 8, dtype=dtype), mask, clip_eps


def precise(g):
    """Log-probabilities around -1000, whose differences are all that counts: float32 would keep four digits of them."""
    log_probs, old, *rest = problem(g, 5, 6, dtype=torch.float64)
    return log_probs - 1000, old - 1000, *rest


def garbage(g, *size, **kwargs):
    log_probs, old, advantages, mask, clip_eps = problem(g, *size, **kwargs)
    return *spoiled(mask, log_probs, old, advantages), mask, clip_eps


def run_away(g, rows, longest):
    """Log-ratios of 200 and -200, where the advantage is positive or exactly 0."""
    log_probs, old, advantages, mask, clip_eps = problem(g, rows, longest, number(g, 0.1, 0.3))
    far = torch.rand(mask.shape, generator=g) < 0.4
    far[:, 0] = True
    sign = torch.where(torch.rand(mask.shape, generator=g) < 0.6, 1.0, -1.0)
    sign[0, 0] = sign[1, 0] = 1.0
    log_probs = torch.where(far, old + 200 * sign, log_probs)
    advantages = torch.where(far, advantages.abs() + 0.1, advantages)
    advantages[0, 0] = 0.0
    advantages[1, 0] = 1.0
    return log_probs, old, advantages, mask, clip_eps


def in_float(x):
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def case_by_case(log_probs, old, advantages, mask, clip_eps):
    """The four quadrants as they stand in the lecture."""
    if clip_eps < 0:
        raise ValueError("clip_eps")
    lp, q, adv = (in_float(x)[mask] for x in (log_probs, old, advantages))
    ratio = torch.exp((lp - q).clamp(max=30.0))
    flat = ((adv > 0) & (ratio > 1 + clip_eps)) | ((adv < 0) & (ratio < 1 - clip_eps))
    bound = torch.where(adv > 0, 1 + clip_eps, 1 - clip_eps)
    objective = torch.where(flat, bound * adv, ratio * adv)
    return -objective.sum() / mask.sum().clamp(min=1)


def as_a_maximum(log_probs, old, advantages, mask, clip_eps):
    if not clip_eps >= 0:
        raise ValueError(clip_eps)
    lp, q, adv = (torch.where(mask, x.double(), 0.0) for x in (log_probs, old, advantages))
    ratio = (lp - q).clamp(-50, 50).exp()
    losses = torch.max(-adv * ratio, -adv * torch.clamp(ratio, 1.0 - clip_eps, 1.0 + clip_eps))
    return (losses * mask).sum() / max(1, int(mask.sum()))


def in_a_loop(log_probs, old, advantages, mask, clip_eps):
    if clip_eps < 0:
        raise ValueError("clip_eps")
    total = 0.0 * in_float(log_probs)[mask].sum()
    for i, t in mask.nonzero().tolist():
        d = in_float(log_probs)[i, t] - in_float(old)[i, t]
        ratio = torch.minimum(d, torch.full_like(d, 40.0)).exp()
        adv = in_float(advantages)[i, t]
        total = total - torch.minimum(ratio * adv, ratio.clamp(1 - clip_eps, 1 + clip_eps) * adv)
    return total / max(1, len(mask.nonzero()))


def checked(clip_eps):
    if clip_eps < 0:
        raise ValueError("clip_eps")


def wrongly(
    ratio=lambda d: d.clamp(max=60).exp(),
    term=None,
    clip=lambda ratio, eps: ratio.clamp(1 - eps, 1 + eps),
    reduce=mean_of,
    check=checked,
    convert=in_float,
    differ=lambda lp, old, mask: lp - old,
):
    """The right loss of clean inputs, with one thing changed."""
    term = term or (lambda rho, clipped, adv: -torch.minimum(rho * adv, clipped * adv))

    def function(log_probs, old, advantages, mask, clip_eps):
        check(clip_eps)
        lp, q, adv = (filled(mask, convert(x))[0] for x in (log_probs, old, advantages))
        rho = ratio(differ(lp, q, mask))
        return reduce(term(rho, clip(rho, clip_eps), adv), mask)

    return function


def sequence_mean(x, mask):
    return ((x * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def clean_after(log_probs, old, advantages, mask, clip_eps):
    """The mask is applied with torch.where, but only to the finished terms."""
    checked(clip_eps)
    ratio = (in_float(log_probs) - in_float(old)).clamp(max=60).exp()
    adv = in_float(advantages)
    return mean_of(-torch.minimum(ratio * adv, ratio.clamp(1 - clip_eps, 1 + clip_eps) * adv), mask)


def times_mask(log_probs, old, advantages, mask, clip_eps):
    checked(clip_eps)
    ratio = (in_float(log_probs) - in_float(old)).clamp(max=60).exp()
    adv = in_float(advantages)
    terms = -torch.minimum(ratio * adv, ratio.clamp(1 - clip_eps, 1 + clip_eps) * adv)
    return (terms * mask).sum() / mask.sum().clamp(min=1)


EXERCISE = Exercise(
    name="ppo_policy_loss",
    assignment="a3_ppo",
    order=8,
    points=10,
    minutes=25,
    lecture="11_ppo",
    equation="11.2",
    parameters=("log_probs", "old_log_probs", "advantages", "mask", "clip_eps"),
    reference=ppo_policy_loss,
    cases=(
        Case(
            "inside and outside the clip",
            "the mean over all response tokens of -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A), where ratio is "
            "exp(log_probs - old_log_probs)",
            lambda g: [four_quadrants(g), problem(g, 4, 5, 0.1), problem(g, 3, 4, 0.3)],
            2,
            visible=True,
        ),
        Case(
            "behind the mask",
            "NaN and inf behind the mask reach neither the value nor the gradient; without any response token the "
            "loss is 0",
            lambda g: [garbage(g, 3, 4), garbage(g, 4, 3, empty=True), garbage(g, 2, 3, mask=nothing(2, 3))],
            1,
            visible=True,
            gradients=(0,),
        ),
        Case(
            "a policy that ran away",
            "finite, with a finite gradient, where the log-ratio is 200 and the advantage is positive or 0: clamp the "
            "log-ratio before exp",
            lambda g: [run_away(g, 3, 4), run_away(g, 4, 4)],
            1,
            visible=True,
            gradients=(0,),
        ),
        Case(
            "other sizes",
            "right for any batch and clip range",
            lambda g: [
                problem(g, integer(g, 3, 6), integer(g, 4, 8), number(g, 0.1, 0.4)),
                four_quadrants(g, 0.1),
                four_quadrants(g, 0.3),
                problem(g, 5, 6, 0.0, empty=True),
            ],
            2,
        ),
        Case(
            "gradient",
            "where the policy has moved beyond the clip in the direction the advantage asked for, the gradient is 0; "
            "where it moved the other way it is that of the plain surrogate",
            lambda g: [four_quadrants(g), four_quadrants(g, number(g, 0.05, 0.3)), run_away(g, 4, 6)],
            1,
            gradients=(0,),
        ),
        Case(
            "garbage and empty rows",
            "what stands behind the mask never matters, not even to the gradient",
            lambda g: [garbage(g, 4, 6, empty=True), garbage(g, 5, 4), garbage(g, 3, 2, mask=nothing(3, 2))],
            1,
            gradients=(0,),
        ),
        Case(
            "half precision, and a negative clip",
            "float16 is converted to float32 before anything is computed; clip_eps < 0 raises ValueError",
            lambda g: [problem(g, 3, 4, dtype=torch.float16) for _ in range(8)] + [problem(g, 3, 3, -0.1)],
            1,
        ),
        Case(
            "double precision",
            "float64 stays float64",
            lambda g: [four_quadrants(g, dtype=torch.float64), precise(g), precise(g)],
            1,
            tolerance=(1e-6, 1e-7),  # 1 + clip_eps may well be a float32 number
        ),
    ),
    mistakes=(
        Mistake(
            "You take the maximum of the two; PPO takes the minimum, the worse one.",
            wrongly(term=lambda rho, c, a: -torch.maximum(rho * a, c * a)),
        ),
        Mistake("The clip is missing.", wrongly(term=lambda rho, c, a: -rho * a), "11.1"),
        Mistake(
            "Only the clipped term is used: a token that moved the wrong way gets no gradient to come back. Take the "
            "minimum with the unclipped term.",
            wrongly(term=lambda rho, c, a: -c * a),
        ),
        Mistake(
            "The minimum is taken of the ratios, before the advantage is multiplied: with a negative advantage that is "
            "the wrong one.",
            wrongly(term=lambda rho, c, a: -torch.minimum(rho, c) * a),
        ),
        Mistake(
            "The sign is wrong: an optimizer minimises, so the loss is minus the objective.",
            wrongly(term=lambda rho, c, a: torch.minimum(rho * a, c * a)),
        ),
        Mistake("The ratio is upside down: it is pi / pi_old.", wrongly(ratio=lambda d: (-d).clamp(max=60).exp())),
        Mistake(
            "The ratio is exp of the difference of the log-probabilities; the exp is missing.",
            wrongly(ratio=lambda d: d),
        ),
        Mistake(
            "You clip the log-ratio to [-eps, eps]; it is the ratio that is clipped to [1 - eps, 1 + eps].",
            wrongly(clip=lambda rho, eps: rho.log().clamp(-eps, eps).exp()),
        ),
        Mistake(
            "The ratio is clipped on one side only: to [1 - eps, 1 + eps].",
            wrongly(clip=lambda rho, eps: rho.clamp(max=1 + eps)),
        ),
        Mistake(
            "The ratio is clipped to [-eps, eps]; it is around 1.", wrongly(clip=lambda rho, eps: rho.clamp(-eps, eps))
        ),
        Mistake(
            "The ratio of whole responses stands before every token; PPO has a ratio for each token.",
            wrongly(differ=lambda lp, old, mask: (lp - old).sum(1, keepdim=True).expand_as(lp)),
        ),
        Mistake(
            "You average over the tokens of each response first; here it is the mean over all response tokens.",
            wrongly(reduce=sequence_mean),
            "11.3",
        ),
        Mistake("You sum over the tokens: divide by their number.", wrongly(reduce=lambda x, m: (x * m).sum())),
        Mistake("You divide by all positions, padding included.", wrongly(reduce=lambda x, m: (x * m).mean())),
        Mistake(
            "This is REINFORCE, log pi times the advantage: the ratio is missing.",
            lambda lp, old, a, m, eps: mean_of(-filled(m, in_float(lp))[0] * filled(m, in_float(a))[0], m),
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
            "exp overflows for a large log-ratio, and inf times 0 is NaN: clamp the log-ratio before exp.",
            wrongly(ratio=torch.exp),
        ),
        Mistake(
            "Without a response token you divide by 0: the mean over nothing is 0 here.",
            wrongly(reduce=lambda x, m: x[m].mean()),
        ),
    ),
    wrong=(
        wrongly(convert=lambda x: x),
        wrongly(convert=torch.Tensor.float),
        wrongly(check=lambda eps: None),
        lambda lp, old, a, m, eps: wrongly()(lp.detach(), old, a, m, eps),
        wrongly(ratio=lambda d: d.clamp(-0.5, 0.5).exp()),
    ),
    unusual=(case_by_case, as_a_maximum, in_a_loop),
    stripped=("ppo.ppo_policy_loss",),
)
