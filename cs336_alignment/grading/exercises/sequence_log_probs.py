import math

import torch

from cs336_alignment.grading.exercise import Case, Exercise, Mistake
from cs336_alignment.grading.inputs import integer, token_batch
from cs336_alignment.grading.probe import ToyModel
from cs336_alignment.tokens import sequence_log_probs


def problem(g, rows, vocabulary, longest, scale=1.0):
    weight = scale * torch.randn(vocabulary, vocabulary, generator=g)
    return ToyModel(weight), token_batch(g, rows, vocabulary, longest)


def ignored_labels(g):
    """Labels outside the mask are -100, as Hugging Face collators write them."""
    model, batch = problem(g, 4, 9, 9)
    return model, batch | {"labels": torch.where(batch["response_mask"], batch["labels"], -100)}


def garbage(g):
    """What follows the padding token is NaN; no response position has read one."""
    model, batch = ignored_labels(g)
    model.weight.data[-1] = math.nan
    return model, batch


def an_empty_row(g):
    model, batch = problem(g, 4, 9, 8)
    batch["response_mask"] = batch["response_mask"].clone()
    batch["response_mask"][1] = False
    return model, batch


def token_terms(model, batch):
    return model(batch["input_ids"]).log_softmax(-1).gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0]


def where_then_sum(model, batch):
    logits = model(batch["input_ids"])
    mask = batch["response_mask"]
    logits = torch.where(mask[..., None], logits, torch.zeros_like(logits))
    labels = batch["labels"].masked_fill(~mask, 0)
    terms = logits.gather(-1, labels[..., None])[..., 0] - logits.logsumexp(-1)
    return torch.where(mask, terms, torch.zeros_like(terms)).sum(-1)


def row_by_row(model, batch):
    sums = []
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["response_mask"]):
        logits = model(ids[None])[0][mask]
        sums.append(-torch.nn.functional.cross_entropy(logits.double(), labels[mask], reduction="sum"))
    return torch.stack(sums)


def with_cross_entropy(model, batch):
    mask = batch["response_mask"]
    labels = torch.where(mask, batch["labels"], torch.tensor(-100))
    logits = torch.where(mask[..., None], model(batch["input_ids"]), 0.0)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return -losses.sum(1)


EXERCISE = Exercise(
    name="sequence_log_probs",
    assignment="a4_dpo",
    order=8,
    points=10,
    minutes=15,
    lecture="02_sft_mechanics",
    equation="2.1",
    parameters=("model", "batch"),
    reference=sequence_log_probs,
    cases=(
        Case(
            "a ragged batch",
            "for each row the sum of the log-probabilities of its response tokens, and of no other",
            lambda g: [problem(g, 3, 7, 7), problem(g, 4, 9, 9)],
            2,
            visible=True,
        ),
        Case(
            "large logits",
            "finite for logits in the thousands: log_softmax, not log of softmax",
            lambda g: [problem(g, 3, 7, 7, scale=1000.0) for _ in range(2)],
            1,
            visible=True,
        ),
        Case(
            "other sizes",
            "right for any batch",
            lambda g: (
                [problem(g, integer(g, 2, 6), 11, integer(g, 6, 12)) for _ in range(2)]
                + [problem(g, 3, 7, 7, scale=1000.0)]
            ),
            2,
        ),
        Case(
            "gradient",
            "differentiable by the model's weights",
            lambda g: [problem(g, 3, 7, 7) for _ in range(2)],
            2,
            gradients=(0,),
        ),
        Case(
            "labels of -100",
            "labels outside the mask may be -100, and a row without response tokens has the sum 0",
            lambda g: [ignored_labels(g), an_empty_row(g)],
            1,
            visible=True,
        ),
        Case(
            "garbage behind the mask",
            "what the model says outside the mask never matters, not even NaN: select or use "
            "torch.where, since 0 * NaN is NaN",
            lambda g: [garbage(g) for _ in range(2)],
            2,
        ),
    ),
    mistakes=(
        Mistake(
            "You average over the response tokens; DPO needs the sum: the probability of the whole response.",
            lambda m, b: (token_terms(m, b) * b["response_mask"]).sum(1) / b["response_mask"].sum(1),
        ),
        Mistake(
            "The mask is not used: prompt and padding tokens are in the sum.", lambda m, b: token_terms(m, b).sum(1)
        ),
        Mistake(
            "One number for all rows: sum over the tokens of each row only.",
            lambda m, b: (token_terms(m, b) * b["response_mask"]).sum(),
        ),
        Mistake(
            "The labels are shifted already: you shift once more.",
            equation="2.2",
            function=lambda m, b: (
                m(b["input_ids"])[:, :-1].log_softmax(-1).gather(-1, b["labels"][:, 1:, None])[..., 0]
                * b["response_mask"][:, 1:]
            ).sum(1),
        ),
        Mistake(
            "You look up the probability of the token that was just read (input_ids); the label is the next one.",
            equation="2.2",
            function=lambda m, b: (
                m(b["input_ids"]).log_softmax(-1).gather(-1, b["input_ids"][..., None])[..., 0] * b["response_mask"]
            ).sum(1),
        ),
        Mistake(
            "These are logits: the log-softmax is missing.",
            equation="2.3",
            function=lambda m, b: (
                m(b["input_ids"]).gather(-1, b["labels"][..., None])[..., 0] * b["response_mask"]
            ).sum(1),
        ),
        Mistake(
            "These are probabilities; sum their logarithms.",
            equation="2.3",
            function=lambda m, b: (token_terms(m, b).exp() * b["response_mask"]).sum(1),
        ),
        Mistake(
            "The softmax runs over the positions; it belongs over the vocabulary, the last dimension.",
            equation="2.3",
            function=lambda m, b: (
                m(b["input_ids"]).log_softmax(1).gather(-1, b["labels"][..., None])[..., 0] * b["response_mask"]
            ).sum(1),
        ),
        Mistake(
            "The sign is wrong: this is the loss, minus the log-probability.",
            lambda m, b: -(token_terms(m, b) * b["response_mask"]).sum(1),
        ),
        Mistake(
            "The log of a softmax is -inf where the softmax underflows: use log_softmax.",
            equation="2.3",
            function=lambda m, b: torch.where(
                b["response_mask"],
                m(b["input_ids"]).softmax(-1).log().gather(-1, b["labels"].clamp(min=0)[..., None])[..., 0],
                0.0,
            ).sum(1),
        ),
        Mistake(
            "The mask is inverted: these are the prompt's and the padding's tokens.",
            lambda m, b: (token_terms(m, b) * ~b["response_mask"]).sum(1),
        ),
        Mistake(
            "The summed dimension is kept with size 1: leave keepdim out.",
            lambda m, b: torch.where(b["response_mask"], token_terms(m, b), 0.0).sum(1, keepdim=True),
        ),
    ),
    wrong=(
        lambda m, b: (token_terms(m, b) * b["response_mask"]).sum(1),
        lambda m, b: (token_terms(m, b) * b["response_mask"]).sum(1).detach(),
        lambda m, b: (
            m(b["input_ids"]).log_softmax(-1).gather(-1, b["labels"][..., None])[..., 0] * b["response_mask"]
        ).sum(1),
    ),
    unusual=(where_then_sum, row_by_row, with_cross_entropy),
    stripped=("tokens.sequence_log_probs", "tokens.masked_token_log_probs"),
)
