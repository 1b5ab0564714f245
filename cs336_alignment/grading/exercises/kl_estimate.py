import torch

from cs336_alignment.grading.exercise import FLOAT64, Case, Exercise, Mistake
from cs336_alignment.grading.exercises._rollouts import near, token_log_probs
from cs336_alignment.grading.inputs import integer
from cs336_alignment.ppo import kl_estimate


def problem(g, rows, longest, *kind, spread=1.5, dtype=torch.float32):
    log_probs = token_log_probs(g, rows, longest, dtype=dtype)
    return log_probs, near(g, log_probs, spread), *kind


def three(g, rows, longest, **kwargs):
    return [problem(g, rows, longest, kind, **kwargs) for kind in ("k1", "k2", "k3")]


def through_ratios(log_probs, ref, kind="k1"):
    """k2 and k3 as Schulman writes them, with the ratio of pi_ref to pi."""
    log_r = ref.float() - log_probs.float() if log_probs.dtype == torch.float16 else ref - log_probs
    r = log_r.exp()
    if kind not in ("k1", "k2", "k3"):
        raise ValueError(kind)
    return {"k1": -log_r, "k2": log_r.square() / 2, "k3": (r - 1) - log_r}[kind]


def in_double(log_probs, ref, kind="k1"):
    d = log_probs.double() - ref.double()
    match kind:
        case "k1":
            return d
        case "k2":
            return 0.5 * d * d
        case "k3":
            return torch.special.expm1(-d) + d
    raise ValueError(f"no {kind}")


def token_by_token(log_probs, ref, kind="k1"):
    if kind not in {"k1", "k2", "k3"}:
        raise ValueError("kind")
    rows = []
    for p, q in zip(log_probs, ref):
        p, q = (x if x.dtype == torch.float64 else x.to(torch.float32) for x in (p, q))
        d = torch.stack([a - b for a, b in zip(p, q)])
        rows.append(d if kind == "k1" else d.pow(2).mul(0.5) if kind == "k2" else torch.exp(-d) - 1.0 + d)
    return torch.stack(rows)


def wrongly(k1=None, k2=None, k3=None, after=lambda x: x, convert=True, names=("k1", "k2", "k3")):
    """The right function with one thing changed; k1, k2, k3 are functions of d = log pi - log pi_ref."""
    functions = (k1 or (lambda d: d), k2 or (lambda d: d**2 / 2), k3 or (lambda d: (-d).exp() - 1 + d))

    def function(log_probs, ref, kind="k1"):
        if kind not in names:
            raise ValueError(kind)
        if convert and log_probs.dtype == torch.float16:
            log_probs, ref = log_probs.float(), ref.float()
        return after(functions[names.index(kind)](log_probs - ref))

    return function


EXERCISE = Exercise(
    name="kl_estimate",
    assignment="a3_ppo",
    order=4,
    points=10,
    minutes=15,
    lecture="09_rlhf_objective",
    equation="9.7",
    parameters=("log_probs", "ref_log_probs", "kind"),
    reference=kl_estimate,
    cases=(
        Case(
            "k1",
            "k1 of every token: log pi - log pi_ref, also where no kind is given",
            lambda g: [problem(g, 2, 4, "k1"), problem(g, 3, 3)],
            1,
            visible=True,
        ),
        Case(
            "k2",
            "k2 of every token: half the square of log pi - log pi_ref",
            lambda g: [problem(g, 2, 4, "k2"), problem(g, 3, 3, "k2")],
            1,
            visible=True,
        ),
        Case(
            "k3",
            "k3 of every token: with d = log pi - log pi_ref, exp(-d) - 1 + d, which is never negative",
            lambda g: [problem(g, 2, 4, "k3"), problem(g, 3, 3, "k3")],
            1,
            visible=True,
        ),
        Case(
            "another kind, and half precision",
            "ValueError for any other kind; float16 is converted to float32 before anything is computed",
            lambda g: [problem(g, 2, 2, "k4"), *three(g, 4, 6, spread=4.0, dtype=torch.float16)],
            1,
            visible=True,
        ),
        Case(
            "other sizes",
            "right for any batch, near to pi_ref and far from it",
            lambda g: three(g, integer(g, 2, 5), integer(g, 3, 8)) + three(g, 3, 4, spread=5.0),
            3,
        ),
        Case(
            "gradient",
            "differentiable by the log-probabilities: nothing is detached",
            lambda g: three(g, 3, 4),
            1,
            gradients=(0,),
        ),
        Case(
            "half precision, and other kinds",
            "float16 is converted first; ValueError for a kind that there is not",
            lambda g: [
                *three(g, 5, 8, spread=4.0, dtype=torch.float16),
                problem(g, 2, 3, "k0"),
                problem(g, 2, 3, "kl"),
            ],
            1,
        ),
        Case(
            "double precision",
            "float64 stays float64",
            lambda g: three(g, 4, 4, dtype=torch.float64),
            1,
            tolerance=FLOAT64,
        ),
    ),
    mistakes=(
        Mistake(
            "k1 has the wrong sign: a penalty with it would be a bonus for moving away from pi_ref.",
            wrongly(k1=lambda d: -d),
        ),
        Mistake(
            "k3's ratio is upside down: for samples of pi it is pi_ref / pi, so exp(-d) with d = log pi - log pi_ref.",
            wrongly(k3=lambda d: d.exp() - 1 - d),
        ),
        Mistake(
            "The ratio of k3 and its logarithm do not belong together: exp(-d) - 1 + d, with the same d.",
            wrongly(k3=lambda d: d.exp() - 1 + d),
        ),
        Mistake(
            "k3's last term has the wrong sign: exp(-d) - 1 + d is never negative.",
            wrongly(k3=lambda d: (-d).exp() - 1 - d),
        ),
        Mistake("k3 lacks its - 1: it must be 0 where pi = pi_ref.", wrongly(k3=lambda d: (-d).exp() + d)),
        Mistake(
            "This is exp(-d) - 1 without + d: its mean is 0 and says nothing.", wrongly(k3=lambda d: (-d).exp() - 1)
        ),
        Mistake(
            "d = log pi_ref - log pi throughout: the sign of every d is wrong. These are samples of pi.",
            wrongly(k1=lambda d: -d, k3=lambda d: d.exp() - 1 - d),
        ),
        Mistake("k2 lacks the factor 1/2.", wrongly(k2=lambda d: d**2)),
        Mistake("k2 and k3 are swapped.", wrongly(k2=lambda d: (-d).exp() - 1 + d, k3=lambda d: d**2 / 2)),
        Mistake(
            "One number for each token: no mean over the batch.",
            wrongly(after=torch.mean),
        ),
        Mistake("One number for each token: no sum over the response.", wrongly(after=lambda x: x.sum(-1))),
        Mistake(
            "k1 may be negative for a token; cut off at 0 (or made positive) its mean is no longer the KL.",
            wrongly(k1=torch.relu),
        ),
        Mistake(
            "k1 may be negative for a token; cut off at 0 (or made positive) its mean is no longer the KL.",
            wrongly(k1=torch.abs),
        ),
        Mistake(
            "The tokens are samples of pi already: do not weigh them with pi once more.",
            lambda lp, ref, kind="k1": lp.exp() * wrongly()(lp, ref, kind),
        ),
        Mistake("Half precision must be converted to float32 before the difference is taken.", wrongly(convert=False)),
        Mistake(
            "Another kind must raise ValueError.",
            lambda lp, ref, kind="k1": wrongly()(lp, ref, kind if kind in ("k1", "k2") else "k3"),
        ),
    ),
    wrong=(
        lambda lp, ref, kind="k1": wrongly()(lp.detach(), ref, kind),
        wrongly(k3=lambda d: d.clamp(-1, 1).neg().exp() - 1 + d),
        wrongly(after=lambda x: x.clamp(max=3.0)),
    ),
    unusual=(through_ratios, in_double, token_by_token),
    stripped=("ppo.kl_estimate",),
)
