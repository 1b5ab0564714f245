import math

import torch

from cs336_alignment.grading.exercise import Case, Exercise, Mistake
from cs336_alignment.grading.inputs import integer, token_batch
from cs336_alignment.grading.probe import SGD, ToyModel
from cs336_alignment.sft import sft_loss
from cs336_alignment.tokens import masked_token_log_probs, token_log_probs


def micro_batches(batch, size):
    rows = torch.arange(len(batch["labels"])).split(size)
    return [{name: x[index] for name, x in batch.items()} for index in rows]


def loss_of(model, batch, loss_fn=sft_loss):
    mask = batch["response_mask"]
    return loss_fn(masked_token_log_probs(model(batch["input_ids"]), batch["labels"], mask), mask)


def sft_train_step(model, batch, micro_batch_size, optimizer):
    tokens = batch["response_mask"].sum().item()
    if tokens == 0:
        raise ValueError("no response token in the batch")
    optimizer.zero_grad()
    total = 0.0
    for micro in micro_batches(batch, micro_batch_size):
        loss = micro["response_mask"].sum().item() / tokens * loss_of(model, micro)
        loss.backward()
        total += loss.item()
    optimizer.step()
    return {"loss": total, "tokens": tokens}


def problem(g, rows, size, lr=0.5, longest=9):
    """A batch of more rows than the model takes at once."""
    model = ToyModel(torch.randn(8, 8, generator=g), most_rows=size)
    return model, token_batch(g, rows, 8, longest), size, SGD(lr)


def an_empty_part(g, rows=5, size=2):
    """A whole micro-batch without response tokens, and one that is empty in part."""
    model, batch, *rest = problem(g, rows, size)
    batch["response_mask"] = batch["response_mask"].clone()
    batch["response_mask"][size : 2 * size] = False
    batch["response_mask"][0] = size == 1 and batch["response_mask"][0]
    return model, batch, *rest


def nothing(g, rows=3, size=2):
    model, batch, *rest = problem(g, rows, size)
    return model, batch | {"response_mask": batch["response_mask"] & False}, *rest


def garbage(g, rows=5, size=2):
    """What follows the padding token is NaN; no response position has read one. The labels there are -100."""
    model, batch, *rest = problem(g, rows, size)
    model.weight.data[-1] = math.nan
    return model, batch | {"labels": torch.where(batch["response_mask"], batch["labels"], -100)}, *rest


def by_sums(model, batch, micro_batch_size, optimizer):
    """The sum of each part is differentiated, and the gradient divided at the end."""
    mask = batch["response_mask"]
    if not mask.any():
        raise ValueError("empty")
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(mask), micro_batch_size):
        rows = slice(start, start + micro_batch_size)
        logits = model(batch["input_ids"][rows])[mask[rows]]
        nll = torch.nn.functional.cross_entropy(logits, batch["labels"][rows][mask[rows]], reduction="sum")
        nll.backward()
        total += nll.detach()
    for parameter in model.parameters():
        parameter.grad /= mask.sum()
    optimizer.step()
    return {"tokens": mask.sum(), "loss": total / mask.sum()}


def row_by_row(model, batch, micro_batch_size, optimizer):
    """Smaller parts than allowed, empty ones left out, gradients added by hand."""
    tokens = int(batch["response_mask"].sum())
    if tokens == 0:
        raise ValueError("empty")
    optimizer.zero_grad(set_to_none=True)
    grads, losses = [torch.zeros_like(p) for p in model.parameters()], []
    for micro in micro_batches(batch, 1):
        count = int(micro["response_mask"].sum())
        if count:
            loss = loss_of(model, micro)
            losses.append(loss.detach() * count / tokens)
            for grad, more in zip(grads, torch.autograd.grad(loss, list(model.parameters()))):
                grad += more * count / tokens
    for parameter, grad in zip(model.parameters(), grads):
        parameter.grad = grad
    optimizer.step()
    return {"loss": float(sum(losses)), "tokens": float(tokens), "rows": len(losses)}


def one_backward(model, batch, micro_batch_size, optimizer):
    """All graphs are kept to the end: no memory is saved, but the numbers are right."""
    mask = batch["response_mask"]
    if mask.sum() == 0:
        raise ValueError("empty")
    parts = [
        masked_token_log_probs(model(m["input_ids"]), m["labels"], m["response_mask"])
        for m in micro_batches(batch, micro_batch_size)
    ]
    loss = sft_loss(torch.cat(parts), mask)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"loss": loss.item(), "tokens": mask.sum().item()}


def share(micro, batch, parts):
    return micro["response_mask"].sum().item() / batch["response_mask"].sum().item()


def wrongly(
    weight=share, loss_fn=sft_loss, zero="first", step="last", sign=1.0, report=None, check=True, cut=micro_batches
):
    """The step with one thing changed. report(losses, weights, batch) replaces entries of the result."""

    def function(model, batch, micro_batch_size, optimizer):
        if check and not batch["response_mask"].any():
            raise ValueError("no response token in the batch")
        parts = cut(batch, micro_batch_size)
        losses, weights = [], []
        if zero == "first":
            optimizer.zero_grad()
        for micro in parts:
            if zero == "each":
                optimizer.zero_grad()
            loss = loss_of(model, micro, loss_fn)
            w = weight(micro, batch, parts) if batch["response_mask"].any() else 0.0
            (sign * w * loss).backward()
            losses.append(loss.item())
            weights.append(w)
            if step == "each":
                optimizer.step()
        if zero == "last":
            optimizer.zero_grad()
        if step == "last":
            optimizer.step()
        result = {
            "loss": sum(w * x for w, x in zip(weights, losses)),
            "tokens": batch["response_mask"].sum().item(),
        }
        return result | (report(losses, weights, batch) if report else {})

    return function


def equal(micro, batch, parts):
    return 1 / len(parts)


def by_rows(micro, batch, parts):
    return len(micro["labels"]) / len(batch["labels"])


def by_tokens(micro, batch, parts):
    """By all tokens that are not padding, the prompts' included."""
    return (micro["labels"] != 7).sum().item() / (batch["labels"] != 7).sum().item()


def full_parts(batch, size):
    """The rest that does not fill a micro-batch is left out."""
    return [part for part in micro_batches(batch, size) if len(part["labels"]) == size]


def sequence_mean(log_probs, mask):
    return -(log_probs.masked_fill(~mask, 0).sum(1) / mask.sum(1).clamp(min=1)).mean()


def naive_mean(log_probs, mask):
    return -log_probs[mask].mean()


def everything(model, batch, micro_batch_size, optimizer):
    """No micro-batches."""
    return sft_train_step(model, batch, len(batch["labels"]), optimizer)


def with_prompt(model, batch, micro_batch_size, optimizer):
    real = batch["labels"] != 7
    return sft_train_step(model, batch | {"response_mask": real}, micro_batch_size, optimizer)


def unselected(keep_labels):
    """Every position goes through the softmax, and the mask comes after it."""

    def function(model, batch, micro_batch_size, optimizer):
        mask = batch["response_mask"]
        if not mask.any():
            raise ValueError("empty")
        optimizer.zero_grad()
        total = 0.0
        for micro in micro_batches(batch, micro_batch_size):
            labels = micro["labels"] if keep_labels else micro["labels"].clamp(min=0)
            log_probs = token_log_probs(model(micro["input_ids"]), labels)
            loss = share(micro, batch, None) * sft_loss(log_probs, micro["response_mask"])
            loss.backward()
            total += loss.item()
        optimizer.step()
        return {"loss": total, "tokens": mask.sum().item()}

    return function


def whole_softmax(model, batch, micro_batch_size, optimizer):
    """Masks by multiplying."""
    mask = batch["response_mask"]
    if not mask.any():
        raise ValueError("empty")
    optimizer.zero_grad()
    total = 0.0
    for micro in micro_batches(batch, micro_batch_size):
        labels = micro["labels"].clamp(min=0)[..., None]
        terms = model(micro["input_ids"]).log_softmax(-1).gather(-1, labels)[..., 0]
        loss = -(terms * micro["response_mask"]).sum() / mask.sum()
        loss.backward()
        total += loss.item()
    optimizer.step()
    return {"loss": total, "tokens": mask.sum().item()}


SELECT = (
    "The mask comes too late: outside it labels may be -100 and logits NaN, and NaN comes back in the gradient. Select "
    "logits[mask] and labels[mask] before the softmax."
)
EQUAL = (
    "Micro-batches have equal weights; each must weigh its share of the response tokens, N_k / N, or ragged batches "
    "train something else."
)
UNCHANGED = "The weights do not change: zero_grad() belongs before the first backward(), step() behind the last one."

EXERCISE = Exercise(
    name="sft_train_step",
    assignment="a1_sft",
    order=7,
    points=10,
    minutes=25,
    lecture="02_sft_mechanics",
    equation="2.11",
    parameters=("model", "batch", "micro_batch_size", "optimizer"),
    reference=sft_train_step,
    cases=(
        Case(
            "one step",
            "the loss of the whole batch before the step, the number of its response tokens, and the weights after "
            "one step down its gradient, whatever the micro-batches are",
            lambda g: [problem(g, 5, 2), problem(g, 4, 1)],
            2,
            visible=True,
            after=(0,),
        ),
        Case(
            "an empty micro-batch, and garbage behind the mask",
            "a micro-batch without response tokens adds nothing; outside the mask labels may be -100 and logits NaN",
            lambda g: [an_empty_part(g), garbage(g), an_empty_part(g, 4, 1)],
            1,
            visible=True,
            after=(0,),
        ),
        Case(
            "nothing to learn from",
            "ValueError if the whole batch has no response token",
            lambda g: [problem(g, 3, 2), nothing(g)],
            1,
            visible=True,
            after=(0,),
        ),
        Case(
            "other batches",
            "right for any batch, micro-batch size and learning rate, also where the last micro-batch is smaller",
            lambda g: (
                [problem(g, 5, 2, lr) for lr in (0.05, 1.0)] + [problem(g, 6, 1), problem(g, 7, 3), problem(g, 3, 3)]
            ),
            3,
            after=(0,),
        ),
        Case(
            "other micro-batches without response tokens",
            "a micro-batch without response tokens adds nothing, also not NaN",
            lambda g: [an_empty_part(g, 7, 3), an_empty_part(g, 3, 1), an_empty_part(g, 6, 2)],
            1,
            after=(0,),
        ),
        Case(
            "garbage behind the mask",
            "what the model says outside the mask never matters, not even NaN, and labels there may be -100",
            lambda g: [garbage(g), garbage(g, 4, 3)],
            1,
            after=(0,),
        ),
        Case(
            "other batches to learn nothing from",
            "ValueError if the whole batch has no response token, and only then",
            lambda g: [nothing(g, integer(g, 1, 4), 1), problem(g, 2, 1), nothing(g, 4, 3), an_empty_part(g, 4, 2)],
            1,
            after=(0,),
        ),
    ),
    mistakes=(
        Mistake(EQUAL, wrongly(weight=equal)),
        Mistake(
            "The gradients of the micro-batches are added without weights; each must weigh its share of the response "
            "tokens, N_k / N.",
            wrongly(weight=lambda *_: 1.0),
        ),
        Mistake(
            "Micro-batches weigh their share of the rows; it must be their share of the response tokens.",
            wrongly(weight=by_rows),
        ),
        Mistake(
            "Micro-batches weigh their share of all tokens, prompts included; only response tokens count.",
            wrongly(weight=by_tokens),
        ),
        Mistake(
            "There is a step for every micro-batch; only one, behind the last of them.",
            wrongly(step="each"),
        ),
        Mistake(
            "There is a step for every micro-batch; only one, behind the last of them.",
            wrongly(step="each", zero="each"),
        ),
        Mistake(
            "zero_grad() for every micro-batch: only the last one's gradient is left. Call it once, before the first.",
            wrongly(zero="each"),
        ),
        Mistake(
            "Gradients of an earlier step are still there: call optimizer.zero_grad() before the first micro-batch.",
            wrongly(zero="never"),
        ),
        Mistake(UNCHANGED, wrongly(step="never")),
        Mistake(UNCHANGED, wrongly(zero="last")),
        Mistake("The step goes uphill: the loss must be minimised.", wrongly(sign=-1.0)),
        Mistake(
            "The loss is that of the last micro-batch; report that of the whole batch.",
            wrongly(report=lambda losses, weights, batch: {"loss": losses[-1]}),
        ),
        Mistake(
            "The reported loss is the plain mean of the micro-batches' losses; weigh them as the gradients.",
            wrongly(report=lambda losses, weights, batch: {"loss": sum(losses) / len(losses)}),
        ),
        Mistake(
            "The reported loss is the sum of the micro-batches' losses; weigh them as the gradients.",
            wrongly(report=lambda losses, weights, batch: {"loss": sum(losses)}),
        ),
        Mistake(
            '"tokens" counts all positions; count the response tokens.',
            wrongly(report=lambda losses, weights, batch: {"tokens": batch["labels"].numel()}),
        ),
        Mistake(
            "The rows that do not fill a last micro-batch are left out.",
            wrongly(cut=full_parts),
        ),
        Mistake(
            "The whole batch goes through the model at once; cut it into micro-batches of micro_batch_size rows.",
            everything,
        ),
        Mistake(
            "Each response is averaged by itself; every token of the batch must have the same weight.",
            equation="2.12",
            function=wrongly(loss_fn=sequence_mean, weight=by_rows),
        ),
        Mistake(SELECT, unselected(True), "2.3"),
        Mistake(SELECT, unselected(False), "2.3"),
        Mistake(SELECT, whole_softmax, "2.3"),
        Mistake("Prompt tokens are in the loss: use response_mask.", with_prompt, "2.4"),
        Mistake(
            "A micro-batch without response tokens gives 0 / 0, and NaN times its share of 0 is NaN: leave it out, or "
            "use a mean that is 0 there.",
            wrongly(loss_fn=naive_mean),
        ),
        Mistake(
            "A batch without a single response token must raise ValueError: a step on it would mean nothing.",
            wrongly(check=False),
        ),
    ),
    wrong=(
        lambda model, batch, size, optimizer: sft_train_step(
            model, batch | {"labels": batch["labels"].clamp(min=0).roll(-1, 1)}, size, optimizer
        ),
        wrongly(loss_fn=lambda log_probs, mask: sft_loss(log_probs.clamp(min=-3), mask)),
        wrongly(cut=lambda batch, size: micro_batches(batch, size)[:2]),
    ),
    unusual=(by_sums, row_by_row, one_backward),
    stripped=(
        "sft.train_sft",
        "sft.sft_loss",
        "tokens.masked_mean",
        "tokens.token_log_probs",
        "tokens.masked_token_log_probs",
    ),
)
