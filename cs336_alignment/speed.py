"""The same numbers with less work: tricks for the training loops, each beside the plain form that it replaces.

* Only where a response token is predicted, the output layer and most of the last block: `response_only_log_probs`
  for `sft.demonstration_log_probs`, `response_only_sample_log_probs` for `generate.response_log_probs`,
  `response_only_values` for `ppo.response_values`, `last_token_scores` for `reward.score_tokens`.
* One pass over the prompt that the two responses of a pair have in common: `shared_prompt_log_probs` for
  `tokens.sequence_log_probs`, `shared_prompt_scores` for `reward.score_tokens`.
* Fewer passes over memory than torch's own norm makes on a CPU: `lean_norms` for `models.RMSNorm`.
* Most of the padding left out: `length_sorted_parts` for one padded batch.

A training loop takes one as an argument: `train_dpo(..., log_probs_fn=shared_prompt_log_probs)`; `lean_norms` is
called on a model once. Read the plain forms first. Values and gradients are those of the plain forms up to the order
in which numbers are added; a test holds each to that, on padded and ragged batches too. What this file is not: a
change to any method.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cs336_alignment.distributed import is_sharded
from cs336_alignment.generate import Samples
from cs336_alignment.models import RMSNorm, autocast, check_length, scalar_head
from cs336_alignment.tokens import at_least_float32, collate, masked_token_log_probs

# --------------------------------------------------------------- Only where the response is predicted


def hidden_where(model, input_ids: Tensor, wanted: Tensor) -> Tensor:
    """`model.hidden(input_ids)[wanted]` for a right-padded batch: (B, S), (B, S) bool -> (N, d)."""
    return model.hidden(input_ids, at=wanted.flatten().nonzero()[:, 0])


def response_only_log_probs(model, batch: dict[str, Tensor]) -> Tensor:
    """`sft.demonstration_log_probs`, (B, S), computing the last block and the output layer at response labels only."""
    mask = _response_mask(batch)
    return masked_token_log_probs(model.head(hidden_where(model, batch["input_ids"], mask)), batch["labels"], mask)


def response_only_sequence_log_probs(model, batch: dict[str, Tensor]) -> Tensor:
    """`tokens.sequence_log_probs`, (B,), in the same way."""
    return response_only_log_probs(model, batch).sum(dim=1)


def _response_mask(batch: dict[str, Tensor]) -> Tensor:
    mask = batch["response_mask"]
    if mask.dtype != torch.bool:  # integers would index rows instead of selecting positions
        raise TypeError(f"response_mask must be boolean, got {mask.dtype}; convert it with mask.bool()")
    return mask


def response_only_sample_log_probs(model, samples: Samples, temperature: float = 1.0) -> Tensor:
    """`generate.response_log_probs`, (B, T), in the same way."""
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: it must be above 0; greedy samples are scored at 1")
    mask = samples.response_mask
    logits = at_least_float32(model.head(_before_responses(model, samples))) / temperature
    return masked_token_log_probs(logits, samples.response_ids, mask)


def response_only_values(value_model, samples: Samples) -> Tensor:
    """`ppo.response_values`, (B, T), in the same way; 0 behind the mask."""
    values = scalar_head(value_model.head, _before_responses(value_model.backbone, samples))
    mask = samples.response_mask
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _before_responses(model, samples: Samples) -> Tensor:
    """Hidden states one position before each response token, (N, d)."""
    prompt = samples.prompt_ids.shape[1]
    wanted = F.pad(
        samples.response_mask, (prompt - 1, 0)
    )  # of the positions without the last one, which predicts nothing
    padded = not bool(samples.prompt_mask.all())
    attention_mask = samples.attention_mask[:, :-1] if padded else None
    return model.hidden(samples.input_ids[:, :-1], attention_mask, at=wanted.flatten().nonzero()[:, 0])


# -------------------------------------------------------------------- One pass over a pair's prompt


def shared_prompt_hidden(model, input_ids: Tensor, prompt_lengths: Tensor, wanted: Tensor) -> Tensor:
    """`model.hidden(input_ids)[wanted]` where row i and row B + i begin with the same prompt: (2B, S) -> (N, d).

    The rejected response is appended to the chosen sequence as a second branch of a tree:

        P P P C C R R R       a token of R sees the prompt and the R's before it, and no C;
        0 1 2 3 4 3 4 5       it stands at the position that it has in its own sequence.

    prompt_lengths (B,): tokens before the responses. wanted (2B, S) bool: the places whose hidden states to return.
    Raises: ValueError where the two prompts of a pair differ, or a sequence is longer than the model's positions.
    """
    pairs = len(input_ids) // 2
    chosen, rejected = input_ids[:pairs], input_ids[pairs:]
    starts, columns = prompt_lengths[:, None], torch.arange(input_ids.shape[1], device=input_ids.device)
    if len(input_ids) % 2 or ((chosen != rejected) & (columns < starts)).any():
        raise ValueError("row i and row B + i must be the chosen and the rejected response to one prompt")
    check_length(input_ids.shape[1], model.max_positions, None)
    # Columns of the first branch, prompt included, and of the second: up to the last one that is wanted.
    width = int(torch.maximum((wanted[:pairs] * (columns + 1)).max(), starts.max()))
    beyond = int((wanted[pairs:] * (columns + 1 - starts).clamp(min=0)).max())
    branch = torch.arange(beyond, device=input_ids.device)

    # Row i of the tree: the chosen row, then the rejected one from its response on.
    source = (starts + branch).clamp(max=input_ids.shape[1] - 1)
    tree = torch.cat([chosen[:, :width], rejected.gather(1, source)], dim=1)
    positions = torch.cat([columns[:width].expand(pairs, -1), source], dim=1)
    first = torch.ones(width, width, dtype=torch.bool, device=input_ids.device).tril()
    second = torch.ones(len(branch), len(branch), dtype=torch.bool, device=input_ids.device).tril()
    visible = torch.block_diag(first, second).bool().repeat(pairs, 1, 1)
    visible[:, width:, :width] = (columns[:width] < starts)[:, None]

    # Where each place of the two rows is in the tree: what lies in the prompt is computed once and read twice.
    row = torch.arange(pairs, device=input_ids.device)[:, None] * tree.shape[1]
    place = torch.cat([row + columns, row + torch.where(columns < starts, columns, width + columns - starts)])
    return model.hidden(tree, visible[:, None], positions, at=place[wanted])


def shared_prompt_token_log_probs(model, batch: dict[str, Tensor]) -> Tensor:
    """`sft.demonstration_log_probs` of pairs, (2B, S): the chosen rows, then the rejected rows, prompts in common."""
    mask = _response_mask(batch)
    first = torch.where(mask.any(1), mask.long().argmax(1), mask.shape[1])  # predicts a row's first response token
    prompt_lengths = (torch.minimum(*first.chunk(2)) + 1).clamp(max=mask.shape[1])
    hidden = shared_prompt_hidden(model, batch["input_ids"], prompt_lengths, mask)
    return masked_token_log_probs(model.head(hidden), batch["labels"], mask)


def shared_prompt_log_probs(model, batch: dict[str, Tensor]) -> Tensor:
    """`tokens.sequence_log_probs` of pairs, (2B,): the prompt that row i and row B + i share is computed once."""
    return shared_prompt_token_log_probs(model, batch).sum(dim=1)


# ---------------------------------------------------------------------------------- Rewards


def last_token_scores(
    model, prompts: list[list[int]], responses: list[list[int]], pad_token_id: int, device: torch.device
) -> Tensor:
    """`reward.score_tokens`, (B,), computing the last block only where the reward model reads it."""
    return _scores(model, prompts, responses, pad_token_id, device, shared=False)


def shared_prompt_scores(
    model, prompts: list[list[int]], responses: list[list[int]], pad_token_id: int, device: torch.device
) -> Tensor:
    """`reward.score_tokens`, (2B,), of pairs: row i and row B + i answer the same prompt, which is computed once."""
    return _scores(model, prompts, responses, pad_token_id, device, shared=True)


def _scores(model, prompts, responses, pad_token_id, device, shared: bool) -> Tensor:
    if is_sharded(model.parameters()):  # its parts are used here beside its `forward`, which puts them together
        raise ValueError("a sharded reward model is scored by reward.score_tokens only: leave scores_fn out")
    ids, mask = (x.to(device) for x in collate([p + r for p, r in zip(prompts, responses)], pad_token_id))
    starts = torch.tensor([len(p) for p in prompts], device=device)
    ends = torch.tensor([len(p) + len(r) for p, r in zip(prompts, responses)], device=device)
    columns = torch.arange(ids.shape[1], device=device)
    last = columns == ends[:, None] - 1
    # With `likelihood`, also the positions that predict a response token: each response token's left neighbour.
    predicting = mask & (columns >= starts[:, None] - 1) & ~last & (model.likelihood is not None)
    wanted = last | predicting
    with autocast(device):
        if shared:
            hidden = shared_prompt_hidden(model.backbone, ids, starts[: len(ids) // 2], wanted)
        else:
            hidden = hidden_where(model.backbone, ids, wanted)
        scores = scalar_head(model.head, hidden[last[wanted]])
        if model.likelihood is not None:
            labels = ids.roll(-1, dims=1)
            logits = model.backbone.head(hidden[predicting[wanted]])
            scores = model.with_likelihood(scores, masked_token_log_probs(logits, labels, predicting).sum(dim=1))
    return scores.float()


# -------------------------------------------------------------------------------------------- Norms


class _LeanRMSNorm(torch.autograd.Function):
    """n = x / sqrt(mean(x^2) + eps) and n * weight, with the derivative written out.

    With g the gradient of the output: d weight = sum of g n, and d x = (g w - n mean(g w n)) / sqrt(mean(x^2) + eps).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x * scale
        ctx.save_for_backward(normed, weight, scale)
        return normed * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        normed, weight, scale = ctx.saved_tensors
        product = grad * normed
        mean = (product @ weight).div_(-normed.shape[-1]).unsqueeze(-1)
        return torch.addcmul(grad * weight, normed, mean).mul_(scale), product.flatten(0, -2).sum(0), None


class LeanRMSNorm(RMSNorm):
    """`models.RMSNorm` in a third of the passes over memory, and with half as much kept for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast, or in half precision, in which torch's own norm computes inside in float32.
        if x.dtype != self.weight.dtype or x.dtype in (torch.bfloat16, torch.float16):
            return super().forward(x)
        return _LeanRMSNorm.apply(x, self.weight, self.eps)


def lean_norms(model: nn.Module) -> nn.Module:
    """Makes every `RMSNorm` of the model a `LeanRMSNorm`, in place; the parameters stay. Returns the model."""
    for module in model.modules():
        if type(module) is RMSNorm:
            module.__class__ = LeanRMSNorm
    return model


# ----------------------------------------------------------------------------------- Ragged lengths


def length_sorted_parts(response_mask: Tensor, tokens: int) -> list[Tensor]:
    """Cuts a batch into parts of rows of similar length, each at most `tokens` large when padded to its longest.

    response_mask (B, S) -> index tensors that together hold each row once, shortest rows first; a row is as long as
    its last response token stands. A step that adds up the parts' gradients, each weighed by its share of the
    response tokens, is the step on the whole batch, without most of its padding and with a fraction of its memory.
    A row longer than `tokens` is a part by itself.
    """
    lengths = (response_mask * torch.arange(1, response_mask.shape[1] + 1, device=response_mask.device)).amax(1)
    order = lengths.argsort(stable=True)
    parts, begin = [], 0
    for end in range(1, len(order) + 1):
        full = end == len(order) or (end + 1 - begin) * int(lengths[order[end]]) > tokens
        if full:
            parts.append(order[begin:end])
            begin = end
    return parts
