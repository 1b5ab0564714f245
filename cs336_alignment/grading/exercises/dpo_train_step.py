import torch

from cs336_alignment.dpo import dpo_loss, implicit_reward
from cs336_alignment.grading.exercise import Case, Exercise, Mistake
from cs336_alignment.grading.inputs import number, token_batch, uniform
from cs336_alignment.grading.probe import SGD, ToyModel
from cs336_alignment.tokens import sequence_log_probs


def dpo_train_step(model, batch, ref_log_probs, beta, optimizer):
    chosen, rejected = sequence_log_probs(model, batch).chunk(2)
    ref_chosen, ref_rejected = ref_log_probs.chunk(2)
    loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    margins = implicit_reward(chosen, ref_chosen, beta) - implicit_reward(rejected, ref_rejected, beta)
    return {
        "loss": loss.item(),
        "accuracy": (margins > 0).float().mean().item(),
        "margin": margins.mean().item(),
    }


def problem(g, pairs, beta=None, lr=0.5):
    model = ToyModel(torch.randn(8, 8, generator=g))
    batch = token_batch(g, 2 * pairs, 8, 8)
    with torch.no_grad():
        ref = sequence_log_probs(model, batch)
    ref = ref + uniform(g, -2, 2, 2 * pairs)
    return model, batch, ref, beta or number(g, 0.2, 1.0), SGD(lr)


def wrongly(loss_fn=dpo_loss, split=lambda x: x.chunk(2), zero=True, step=True, sign=1.0, report=None, detach=False):
    """The step with one thing changed."""

    def function(model, batch, ref_log_probs, beta, optimizer):
        log_probs = sequence_log_probs(model, batch)
        chosen, rejected = split(log_probs.detach() if detach else log_probs)
        ref_chosen, ref_rejected = split(ref_log_probs)
        loss = loss_fn(chosen, rejected, ref_chosen, ref_rejected, beta)
        if zero:
            optimizer.zero_grad()
        (sign * loss).backward()
        if step:
            optimizer.step()
        margins = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        result = {"loss": loss.item(), "accuracy": (margins > 0).float().mean().item(), "margin": margins.mean().item()}
        return result | (report(chosen, rejected, ref_chosen, ref_rejected, beta) if report else {})

    return function


def step_before_backward(model, batch, ref_log_probs, beta, optimizer):
    chosen, rejected = sequence_log_probs(model, batch).chunk(2)
    ref_chosen, ref_rejected = ref_log_probs.chunk(2)
    loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
    optimizer.zero_grad()
    optimizer.step()
    loss.backward()
    margins = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return {"loss": loss.item(), "accuracy": (margins > 0).float().mean().item(), "margin": margins.mean().item()}


def zero_after_backward(model, batch, ref_log_probs, beta, optimizer):
    chosen, rejected = sequence_log_probs(model, batch).chunk(2)
    ref_chosen, ref_rejected = ref_log_probs.chunk(2)
    loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()
    margins = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return {"loss": loss.item(), "accuracy": (margins > 0).float().mean().item(), "margin": margins.mean().item()}


def measured_afterwards(model, batch, ref_log_probs, beta, optimizer):
    dpo_train_step(model, batch, ref_log_probs, beta, optimizer)
    with torch.no_grad():
        chosen, rejected = sequence_log_probs(model, batch).chunk(2)
    ref_chosen, ref_rejected = ref_log_probs.chunk(2)
    loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
    margins = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return {"loss": loss.item(), "accuracy": (margins > 0).float().mean().item(), "margin": margins.mean().item()}


def by_two_batches(model, batch, ref_log_probs, beta, optimizer):
    """Chosen and rejected in two forwards, gradients set to None, tensors returned."""
    half = len(ref_log_probs) // 2
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, half), slice(half, None))]
    chosen, rejected = (sequence_log_probs(model, part) for part in parts)
    h = beta * ((chosen - rejected) - (ref_log_probs[:half] - ref_log_probs[half:]))
    loss = torch.nn.functional.softplus(-h).mean()
    optimizer.zero_grad(set_to_none=False)
    loss.backward()
    optimizer.step()
    return {"margin": h.mean().detach(), "loss": loss.detach(), "accuracy": (h > 0).double().mean()}


def with_grad_function(model, batch, ref_log_probs, beta, optimizer):
    result = {}
    model.zero_grad()
    chosen, rejected = torch.split(sequence_log_probs(model, batch), len(ref_log_probs) // 2)
    ref_chosen, ref_rejected = torch.split(ref_log_probs, len(ref_log_probs) // 2)
    loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
    for p, grad in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))):
        p.grad = grad
    optimizer.step()
    result["margin"] = float((beta * (chosen - ref_chosen - rejected + ref_rejected)).mean())
    result["accuracy"] = sum(
        bool(a - c > b - d) for a, b, c, d in zip(chosen, rejected, ref_chosen, ref_rejected)
    ) / len(chosen)
    result["loss"], result["more"] = float(loss), "a further entry does no harm"
    return result


UNCHANGED = "The weights do not change: optimizer.step() belongs after backward(), and zero_grad() before it."

EXERCISE = Exercise(
    name="dpo_train_step",
    assignment="a4_dpo",
    order=9,
    points=10,
    minutes=15,
    lecture="12_dpo",
    equation="12.6",
    parameters=("model", "batch", "ref_log_probs", "beta", "optimizer"),
    reference=dpo_train_step,
    cases=(
        Case(
            "one step",
            "the loss before the step, and the weights after one step down its gradient",
            lambda g: [problem(g, 2, 0.5), problem(g, 3, 1.0)],
            3,
            visible=True,
            after=(0,),
        ),
        Case(
            "what it reports",
            "accuracy: the share of pairs whose implicit rewards rank them rightly; margin: the mean "
            "difference of the implicit rewards",
            lambda g: [problem(g, 4, 0.3) for _ in range(3)],
            1,
            visible=True,
        ),
        Case(
            "other batches",
            "right for any batch, beta and learning rate",
            lambda g: [problem(g, 3, lr=lr) for lr in (0.05, 0.5)] + [problem(g, 5)],
            4,
            after=(0,),
        ),
        Case(
            "a second batch of the same size",
            "gradients of an earlier step must not be left in the sum",
            lambda g: [problem(g, 4) for _ in range(2)],
            2,
            after=(0,),
        ),
    ),
    mistakes=(
        Mistake(
            "Gradients of the step before are still there: call optimizer.zero_grad() before backward.",
            wrongly(zero=False),
        ),
        Mistake(UNCHANGED, wrongly(step=False)),
        Mistake(UNCHANGED, step_before_backward),
        Mistake(UNCHANGED, zero_after_backward),
        Mistake("The step goes uphill: the loss must be minimised.", wrongly(sign=-1.0)),
        Mistake(
            "Chosen and rejected are swapped: the first half of the batch is chosen.",
            wrongly(split=lambda x: x.chunk(2)[::-1]),
        ),
        Mistake(
            "You take even rows as chosen and odd rows as rejected; the first half is chosen, the second rejected.",
            wrongly(split=lambda x: (x[::2], x[1::2])),
        ),
        Mistake(
            "The accuracy compares log-probabilities; compare implicit rewards.",
            equation="12.3",
            function=wrongly(report=lambda c, r, rc, rr, b: {"accuracy": (c > r).float().mean().item()}),
        ),
        Mistake(
            "The margin is without beta: it is the difference of the implicit rewards.",
            equation="12.3",
            function=wrongly(report=lambda c, r, rc, rr, b: {"margin": ((c - rc) - (r - rr)).mean().item()}),
        ),
        Mistake(
            "The margin is without pi_ref: it is the difference of the implicit rewards.",
            equation="12.3",
            function=wrongly(report=lambda c, r, rc, rr, b: {"margin": (b * (c - r)).mean().item()}),
        ),
        Mistake("These numbers are those after the step; report what you measured before it.", measured_afterwards),
        Mistake(
            "The pairs' losses are summed; take their mean.",
            wrongly(loss_fn=lambda c, r, rc, rr, b: len(c) * dpo_loss(c, r, rc, rr, b)),
        ),
    ),
    wrong=(
        wrongly(loss_fn=lambda c, r, rc, rr, b: dpo_loss(c, r.detach(), rc, rr, b)),
        wrongly(loss_fn=lambda c, r, rc, rr, b: dpo_loss(c.detach(), r, rc, rr, b)),
        wrongly(loss_fn=lambda c, r, rc, rr, b: dpo_loss(c, r, c.detach(), r.detach(), b)),
    ),
    unusual=(by_two_batches, with_grad_function),
    stripped=("dpo.dpo_loss", "dpo._preference_logit", "dpo.implicit_reward", "tokens.sequence_log_probs"),
)
