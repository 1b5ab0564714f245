import torch

from cs336_alignment.grading.exercise import FLOAT64, Case, Exercise, Mistake
from cs336_alignment.grading.inputs import distribution, integer, number, uniform


def exact_policy_gradient(logits, ref_log_probs, rewards, beta):
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    difference = torch.where(probs > 0, log_probs - ref_log_probs, 0.0)
    shaped = rewards - beta * difference
    return probs * (shaped - (probs * shaped).sum(-1, keepdim=True))


def problem(g, *shape, beta=None, dtype=torch.float32):
    logits = 1.5 * torch.randn(*shape, generator=g, dtype=torch.float64)
    rewards = uniform(g, -2, 2, *shape, dtype=dtype)
    beta = number(g, 0.1, 0.8) if beta is None else beta
    return logits.to(dtype), distribution(g, *shape, dtype=dtype), rewards, beta


def far_apart(g, *shape):
    """Logits around 1000, and some two thousand below: their exponentials are inf and 0."""
    logits, *rest = problem(g, *shape)
    logits = logits + 1000
    logits[..., integer(g, 0, shape[-1] - 1)] = -1000.0
    return logits, *rest


def impossible(g, *shape):
    """In each row one response that the policy never gives; in some of them pi_ref does not give it either."""
    logits, ref, *rest = problem(g, *shape)
    column = integer(g, 0, shape[-1] - 1)
    logits[..., column] = -torch.inf
    ref[..., ::2, column] = -torch.inf
    return logits, ref, *rest


def by_autograd(logits, ref, rewards, beta):
    leaf = logits.detach().clone().requires_grad_(True)
    log_probs = leaf.log_softmax(-1)
    possible = leaf > -torch.inf
    terms = torch.where(possible, rewards - beta * (log_probs - ref), 0.0)
    return torch.autograd.grad((log_probs.exp() * terms).sum(), leaf)[0]


def response_by_response(logits, ref, rewards, beta):
    """The definition: each response's probability times its shaped reward times its score, summed."""
    flat = [x.reshape(-1, x.shape[-1]).double() for x in (logits, ref, rewards)]
    out = torch.zeros_like(flat[0])
    for row, (logit, q, r) in enumerate(zip(*flat)):
        p = torch.softmax(logit, -1)
        for y in range(len(p)):
            if p[y] > 0:
                value = r[y] - beta * (torch.log_softmax(logit, -1)[y] - q[y])
                score = -p.clone()
                score[y] += 1
                out[row] += p[y] * value * score
    return out.reshape(logits.shape).to(logits.dtype)


def with_the_jacobian(logits, ref, rewards, beta):
    p = logits.softmax(-1)
    log_ratio = torch.nan_to_num(logits - logits.logsumexp(-1, keepdim=True) - ref, 0.0, 0.0, 0.0)
    jacobian = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    return torch.einsum("...ij,...j->...i", jacobian, rewards - beta * log_ratio)


def wrongly(shaped=None, gradient=None, log_softmax=lambda x: x.log_softmax(-1), guard=True):
    """The right function with one thing changed."""
    shaped = shaped or (lambda lp, ref, r, beta: r - beta * (lp - ref))
    gradient = gradient or (lambda p, R: p * (R - (p * R).sum(-1, keepdim=True)))

    def function(logits, ref, rewards, beta):
        log_probs = log_softmax(logits)
        probs = log_probs.exp()
        value = shaped(log_probs, ref, rewards, beta)
        return gradient(probs, torch.where(probs > 0, value, 0.0) if guard else value)

    return function


EXERCISE = Exercise(
    name="exact_policy_gradient",
    assignment="a3_ppo",
    order=1,
    points=10,
    minutes=20,
    lecture="10_policy_gradients",
    equation="10.14",
    parameters=("logits", "ref_log_probs", "rewards", "beta"),
    reference=exact_policy_gradient,
    cases=(
        Case(
            "a few prompts",
            "pi(k) times (shaped reward of k minus its mean under pi), where the shaped reward is "
            "r - beta log(pi / pi_ref)",
            lambda g: [problem(g, 3, 5, beta=0.5), problem(g, 2, 4, beta=0.2)],
            2,
            visible=True,
        ),
        Case(
            "without a penalty",
            "with beta = 0 the gradient of the expected reward alone: pi(k) (r(k) - J)",
            lambda g: [problem(g, 3, 4, beta=0.0), problem(g, 2, 6, beta=0.0)],
            1,
            visible=True,
        ),
        Case(
            "large logits",
            "finite for logits around 1000 and -1000: log_softmax, no exp of a logit and no log of a softmax",
            lambda g: [far_apart(g, 3, 5), far_apart(g, 2, 4)],
            1,
            visible=True,
        ),
        Case(
            "impossible responses",
            "a logit of -inf: that response's gradient is 0, and it disturbs no other, whatever pi_ref says of it",
            lambda g: [impossible(g, 4, 5), impossible(g, 3, 4)],
            1,
            visible=True,
        ),
        Case(
            "other shapes",
            "the last dimension enumerates responses; one prompt, many, or a table of prompts",
            lambda g: [problem(g, integer(g, 4, 9)), problem(g, 5, 3), problem(g, 2, 3, 4), problem(g, 2, 3, beta=0.0)],
            3,
        ),
        Case(
            "large logits and impossible responses",
            "finite, whatever the logits",
            lambda g: [far_apart(g, 4, 6), impossible(g, 4, 6), impossible(g, 2, 2, 5)],
            1,
        ),
        Case(
            "double precision",
            "float64 stays float64",
            lambda g: [problem(g, 3, 5, dtype=torch.float64) for _ in range(2)],
            1,
            tolerance=FLOAT64,
        ),
    ),
    mistakes=(
        Mistake(
            "The KL penalty is missing: the reward to use is r - beta log(pi / pi_ref).",
            wrongly(lambda lp, ref, r, beta: r),
        ),
        Mistake(
            "The penalty has the wrong sign: moving away from pi_ref costs.",
            wrongly(lambda lp, ref, r, beta: r + beta * (lp - ref)),
        ),
        Mistake("beta is missing.", wrongly(lambda lp, ref, r, beta: r - (lp - ref))),
        Mistake(
            "The reference's log-probability is missing: this rewards entropy, not closeness to pi_ref.",
            wrongly(lambda lp, ref, r, beta: r - beta * lp),
        ),
        Mistake(
            "log pi counts twice, as if the shaped reward were differentiated together with log pi (the forgotten "
            "detach). The gradient of the penalty's own log pi has expectation 0.",
            equation="10.15",
            function=lambda logits, ref, r, beta: (
                wrongly()(logits, ref, r, beta) + beta * wrongly(lambda lp, q, r, b: -lp)(logits, ref, r, beta)
            ),
        ),
        Mistake(
            "The mean is not subtracted: probabilities sum to 1, so raising one lowers the others.",
            wrongly(gradient=lambda p, R: p * R),
            "10.5",
        ),
        Mistake(
            "You subtract the plain mean over the responses; it must be the mean under pi, J.",
            wrongly(gradient=lambda p, R: p * (R - R.mean(-1, keepdim=True))),
            "10.5",
        ),
        Mistake(
            "The factor pi(k) is missing: a response that is never given is never learned.",
            wrongly(gradient=lambda p, R: R - (p * R).sum(-1, keepdim=True)),
            "10.5",
        ),
        Mistake(
            "The sign is wrong: this is the gradient of the loss -J; the exercise asks for that of J.",
            wrongly(gradient=lambda p, R: -p * (R - (p * R).sum(-1, keepdim=True))),
        ),
        Mistake(
            "exp of a logit overflows: use torch.log_softmax.",
            wrongly(log_softmax=lambda x: (x.exp() / x.exp().sum(-1, keepdim=True)).log()),
        ),
        Mistake(
            "The log of a softmax is -inf where the softmax underflows, and 0 times inf is NaN: use torch.log_softmax, "
            "and torch.where for what is impossible.",
            wrongly(log_softmax=lambda x: x.softmax(-1).log(), guard=False),
        ),
        Mistake(
            "Where pi = 0 the log-ratio is infinite, and 0 times inf is NaN: replace it with torch.where before you "
            "multiply.",
            wrongly(guard=False),
        ),
        Mistake(
            "The softmax runs over the prompts; it belongs over the last dimension, the responses.",
            wrongly(log_softmax=lambda x: x.log_softmax(0)),
        ),
        Mistake(
            "You average over the prompts: each prompt has a gradient of its own.",
            lambda logits, ref, r, beta: (
                exact_policy_gradient(logits, ref, r, beta) / max(1, logits.numel() // logits.shape[-1])
            ),
        ),
    ),
    wrong=(
        wrongly(lambda lp, ref, r, beta: r - beta * (lp - ref) - beta, lambda p, R: p * (R - (p * R).sum(-1).mean())),
        wrongly(lambda lp, ref, r, beta: r - beta * (ref - lp).exp()),
        wrongly(gradient=lambda p, R: p * R * (1 - p)),
    ),
    unusual=(by_autograd, response_by_response, with_the_jacobian),
    stripped=("exact.objective", "exact.kl_divergence"),
)
