import torch

from cs336_alignment.grading.exercise import Case, Exercise, Mistake
from cs336_alignment.grading.exercises._rollouts import near, spoiled
from cs336_alignment.grading.inputs import number, token_batch, uniform
from cs336_alignment.grading.probe import SGD, ToyModel
from cs336_alignment.ppo import kl_estimate, ppo_policy_loss
from cs336_alignment.tokens import masked_mean, masked_token_log_probs


def log_probs_of(model, batch):
    return masked_token_log_probs(model(batch["input_ids"]), batch["labels"], batch["response_mask"])


def ppo_update(model, batch, old_log_probs, advantages, clip_eps, optimizer):
    mask = batch["response_mask"]
    log_probs = log_probs_of(model, batch)
    loss = ppo_policy_loss(log_probs, old_log_probs, advantages, mask, clip_eps)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    ratio = torch.where(mask, log_probs.detach() - old_log_probs, 0.0).exp()
    return {
        "loss": loss.item(),
        "clip_fraction": masked_mean(((ratio - 1).abs() > clip_eps).float(), mask).item(),
        "approx_kl": masked_mean(kl_estimate(old_log_probs, log_probs.detach(), "k3"), mask).item(),
    }


def problem(g, rows, clip_eps=None, lr=0.5, spread=0.6, longest=8):
    model = ToyModel(torch.randn(8, 8, generator=g))
    batch = token_batch(g, rows, 8, longest)
    with torch.no_grad():
        old = near(g, log_probs_of(model, batch), spread)
    advantages = uniform(g, -2, 2, *old.shape)
    clip_eps = number(g, 0.1, 0.3) if clip_eps is None else clip_eps
    return model, batch, old, advantages, clip_eps, SGD(lr)


def garbage(g, rows, **kwargs):
    """Behind the mask old log-probabilities and advantages are NaN or infinite, and labels are -100."""
    model, batch, old, advantages, *rest = problem(g, rows, **kwargs)
    mask = batch["response_mask"]
    batch = batch | {"labels": torch.where(mask, batch["labels"], -100)}
    return model, batch, *spoiled(mask, old, advantages), *rest


def by_index(model, batch, old_log_probs, advantages, clip_eps, optimizer):
    """Only the response tokens, as one long row; tensors returned."""
    mask = batch["response_mask"]
    new = model(batch["input_ids"])[mask].log_softmax(-1).gather(-1, batch["labels"][mask].unsqueeze(-1)).squeeze(-1)
    log_ratio, adv = new - old_log_probs[mask], advantages[mask]
    ratio = log_ratio.exp()
    loss = torch.max(-adv * ratio, -adv * ratio.clamp(1 - clip_eps, 1 + clip_eps)).mean()
    model.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        kl = (ratio - 1 - log_ratio).mean()
        clipped = ((ratio > 1 + clip_eps) | (ratio < 1 - clip_eps)).double().mean()
    return {"approx_kl": kl, "clip_fraction": clipped, "loss": loss.detach(), "ratio": ratio.detach()}


def with_grad_function(model, batch, old_log_probs, advantages, clip_eps, optimizer):
    mask, old = batch["response_mask"], torch.where(batch["response_mask"], old_log_probs, 0.0)
    adv = torch.where(mask, advantages, 0.0)
    logits = model(batch["input_ids"])
    labels = batch["labels"].masked_fill(~mask, 0)
    terms = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    ratio = torch.where(mask, terms - old, 0.0).exp()
    flat = ((adv > 0) & (ratio > 1 + clip_eps)) | ((adv < 0) & (ratio < 1 - clip_eps))
    bounded = torch.where(flat, ratio.detach().clamp(1 - clip_eps, 1 + clip_eps), ratio)
    count = mask.sum()
    loss = -(bounded * adv).sum() / count
    (gradient,) = torch.autograd.grad(loss, [model.weight])
    optimizer.zero_grad(set_to_none=True)
    model.weight.grad = gradient
    optimizer.step()
    outside = sum(abs(r - 1) > clip_eps for r in ratio[mask].tolist())
    return {
        "loss": float(loss),
        "clip_fraction": outside / int(count),
        "approx_kl": float((ratio[mask] - 1 - ratio[mask].log()).mean()),
    }


def with_the_packages_functions(model, batch, old_log_probs, advantages, clip_eps, optimizer):
    """The old log-probabilities cleaned first, and everything reported from detached double precision."""
    mask = batch["response_mask"]
    optimizer.zero_grad()
    log_probs = log_probs_of(model, batch)
    loss = ppo_policy_loss(log_probs, old_log_probs, advantages, mask, clip_eps)
    loss.backward()
    d = (log_probs.detach()[mask] - old_log_probs[mask]).double()
    report = {
        "loss": loss.detach().double(),
        "clip_fraction": ((d.exp() - 1).abs() > clip_eps).double().mean(),
        "approx_kl": (torch.expm1(d) - d).mean(),
    }
    optimizer.step()
    return report


def wrongly(
    loss_fn=ppo_policy_loss,
    zero="before",
    step="after",
    sign=1.0,
    fraction=lambda ratio, adv, eps: ((ratio - 1).abs() > eps).float(),
    kl=lambda d: d.exp() - 1 - d,
    fraction_of=masked_mean,
    whole=False,
    clean=True,
    late=False,
):
    """The update with one thing changed. d = log_probs - old_log_probs."""

    def function(model, batch, old_log_probs, advantages, clip_eps, optimizer):
        mask = batch["response_mask"]
        if whole:
            terms = (
                model(batch["input_ids"]).log_softmax(-1).gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0]
            )
            log_probs, mask = terms, torch.ones_like(mask)
        else:
            log_probs = log_probs_of(model, batch)
        old, adv = (torch.where(mask, x, 0.0) if clean else x for x in (old_log_probs, advantages))
        loss = loss_fn(log_probs, old, adv, mask, clip_eps)
        if zero == "before":
            optimizer.zero_grad()
        if step == "before":
            optimizer.step()
        (sign * loss).backward()
        if zero == "after":
            optimizer.zero_grad()
        if step == "after":
            optimizer.step()
        with torch.no_grad():
            seen = log_probs_of(model, batch) if late else log_probs
            d = seen - old if whole else torch.where(mask, seen - old, 0.0)
            return {
                "loss": loss.item(),
                "clip_fraction": fraction_of(fraction(d.exp(), adv, clip_eps), mask).item(),
                "approx_kl": masked_mean(kl(d), mask).item(),
            }

    return function


def unclean(log_probs, old, advantages, mask, clip_eps):
    ratio = (log_probs - old).exp()
    terms = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages)
    return -(terms * mask).sum() / mask.sum()


def sequence_mean_loss(log_probs, old, advantages, mask, clip_eps):
    rows = [
        ppo_policy_loss(*(x[i : i + 1] for x in (log_probs, old, advantages, mask)), clip_eps) for i in range(len(mask))
    ]
    return torch.stack(rows).mean()


UNCHANGED = "The weights do not change: optimizer.step() belongs after backward(), and zero_grad() before it."

EXERCISE = Exercise(
    name="ppo_update",
    assignment="a3_ppo",
    order=10,
    points=10,
    minutes=20,
    lecture="11_ppo",
    equation="11.2",
    parameters=("model", "batch", "old_log_probs", "advantages", "clip_eps", "optimizer"),
    reference=ppo_update,
    cases=(
        Case(
            "one update",
            "the loss before the step, and the weights after one step down its gradient",
            lambda g: [problem(g, 3, 0.2), problem(g, 4, 0.1)],
            2,
            visible=True,
            after=(0,),
        ),
        Case(
            "what it reports",
            "clip_fraction: the share of response tokens with |ratio - 1| > clip_eps; approx_kl: the mean over the "
            "response tokens of ratio - 1 - log ratio. With fresh samples both are 0",
            lambda g: [problem(g, 5, 0.2), problem(g, 4, 0.2), problem(g, 3, 0.2, spread=0.0)],
            1,
            visible=True,
        ),
        Case(
            "behind the mask",
            "labels of -100, and old log-probabilities and advantages of NaN or inf behind the mask, never matter",
            lambda g: [garbage(g, 4), garbage(g, 3)],
            1,
            visible=True,
            after=(0,),
        ),
        Case(
            "other minibatches",
            "right for any minibatch, clip range and learning rate",
            lambda g: [problem(g, 4, lr=lr) for lr in (0.05, 0.5)] + [problem(g, 6, longest=10)],
            4,
            after=(0,),
        ),
        Case(
            "garbage behind the mask",
            "what stands behind the mask never matters, neither to the step nor to the report",
            lambda g: [garbage(g, 5), garbage(g, 4, longest=9)],
            2,
            after=(0,),
        ),
    ),
    mistakes=(
        Mistake(
            "Gradients of the step before are still there: call optimizer.zero_grad() before backward.",
            wrongly(zero="never"),
        ),
        Mistake(UNCHANGED, wrongly(step="never")),
        Mistake(UNCHANGED, wrongly(step="before")),
        Mistake(UNCHANGED, wrongly(zero="after")),
        Mistake("The step goes uphill: the loss must be minimised.", wrongly(sign=-1.0)),
        Mistake(
            "The loss is not clipped.",
            wrongly(loss_fn=lambda lp, old, a, m, eps: ppo_policy_loss(lp, old, a, m, 1e9)),
        ),
        Mistake(
            "The ratio compares the new policy with itself: take the old log-probabilities that came with the batch.",
            wrongly(loss_fn=lambda lp, old, a, m, eps: ppo_policy_loss(lp, lp.detach(), a, m, eps)),
        ),
        Mistake(
            "New and old log-probabilities are swapped.",
            wrongly(loss_fn=lambda lp, old, a, m, eps: ppo_policy_loss(old, lp, a, m, eps)),
        ),
        Mistake(
            "The advantages are whitened here; use them as they come.",
            wrongly(
                loss_fn=lambda lp, old, a, m, eps: ppo_policy_loss(lp, old, (a - a[m].mean()) / a[m].std(), m, eps)
            ),
            "11.7",
        ),
        Mistake(
            "The loss is averaged over the tokens of each response first; it is the mean over all response tokens.",
            wrongly(loss_fn=sequence_mean_loss),
            "11.3",
        ),
        Mistake("The mask is not used: prompt and padding tokens count too.", wrongly(whole=True)),
        Mistake(
            "clip_fraction is the share of all positions; take that of the response tokens.",
            wrongly(fraction_of=lambda x, mask: x.mean()),
        ),
        Mistake(
            "clip_fraction counts every token outside the clip range, also where the minimum takes the unclipped term.",
            wrongly(fraction=lambda rho, a, eps: (((a > 0) & (rho > 1 + eps)) | ((a < 0) & (rho < 1 - eps))).float()),
        ),
        Mistake(
            "clip_fraction looks at one side only; a ratio below 1 - clip_eps counts too.",
            wrongly(fraction=lambda rho, a, eps: (rho - 1 > eps).float()),
        ),
        Mistake(
            "This approx_kl is k1, the mean of -log ratio; the exercise asks for ratio - 1 - log ratio.",
            wrongly(kl=lambda d: -d),
            "9.7",
        ),
        Mistake(
            "This approx_kl is the mean of log ratio, k1 with the wrong sign; the exercise asks for "
            "ratio - 1 - log ratio.",
            wrongly(kl=lambda d: d),
            "9.7",
        ),
        Mistake(
            "This approx_kl is k2; the exercise asks for ratio - 1 - log ratio.", wrongly(kl=lambda d: d**2 / 2), "9.7"
        ),
        Mistake(
            "The ratio in approx_kl is upside down: the samples are the old policy's, so it is new / old. With "
            'kl_estimate: kl_estimate(old_log_probs, log_probs, "k3").',
            wrongly(kl=lambda d: (-d).exp() - 1 + d),
            "9.7",
        ),
        Mistake(
            "The report is of the policy after the step; measure before it.",
            wrongly(late=True),
        ),
        Mistake(
            "0 times NaN is NaN: what stands behind the mask reached the loss. Index with the mask, or use torch.where "
            "first.",
            wrongly(loss_fn=unclean, clean=False),
        ),
    ),
    wrong=(
        wrongly(loss_fn=lambda lp, old, a, m, eps: m.sum() * ppo_policy_loss(lp, old, a, m, eps)),
        wrongly(loss_fn=lambda lp, old, a, m, eps: ppo_policy_loss(lp, old, a.abs(), m, eps)),
        wrongly(kl=lambda d: (d.exp() - 1 - d).clamp(max=0.01)),
        wrongly(loss_fn=lambda lp, old, a, m, eps: -masked_mean(lp * a, m)),
    ),
    unusual=(by_index, with_grad_function, with_the_packages_functions),
    stripped=("ppo.ppo_policy_loss", "ppo.kl_estimate"),
)
