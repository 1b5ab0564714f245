"""Token-level bookkeeping: prompts and responses become padded tensors, logits become log-probabilities.

This file is about positions and masks; it knows no model and no loss. Two rules hold in the whole package:

* Masks are boolean, True where a position counts. What lies behind a mask never matters, neither to a value
  nor to a gradient, even if it is inf or NaN. Every function therefore *replaces* masked entries before it
  computes with them (`fill_masked`): multiplying by zero would not do, because 0 * NaN = NaN.
* Half precision comes in, float32 goes out. float64 stays float64.

Shapes: B sequences, S label positions, V vocabulary.
"""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """bfloat16 and float16 (and integers) become float32; float32 and float64 are returned as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def fill_masked(mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in at least float32, with 0 wherever `mask` is False.

    The gradient of a masked entry is exactly 0, whatever the entry was. All shapes must be that of `mask`.

    Raises: TypeError if the mask is not boolean, ValueError if a shape differs.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"a mask must be boolean, got {mask.dtype}; convert it with mask.bool()")
    for x in tensors:
        if x.shape != mask.shape:
            raise ValueError(f"shape {tuple(x.shape)} does not match the mask's shape {tuple(mask.shape)}")
    return tuple(torch.where(mask, at_least_float32(x), 0.0) for x in tensors)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` over the positions where `mask` is True; 0 with gradient 0 where there are none.

    x, mask: same shape. dim: the dimension to average over, all of them if None.
    Raises: as `fill_masked`.
    """
    (x,) = fill_masked(mask, x)
    if dim is None:
        return x.sum() / mask.sum().clamp(min=1)
    return x.sum(dim) / mask.sum(dim).clamp(min=1)


def tokenize_prompt_and_output(prompts: list[str], outputs: list[str], tokenizer) -> dict[str, Tensor]:
    """Prompts and outputs as one right-padded batch with labels and a mask over the output's labels.

    Prompt and output are encoded apart, without special tokens, and joined; so a token never straddles the
    border. For EOS to be learned it must be part of `outputs`; the mask then covers it.

    tokenizer: anything with `encode(text, add_special_tokens=False)` and `pad_token_id`.
    Returns `input_ids`, `labels` (B, S) int64 and `response_mask` (B, S) bool with S = longest joined
    sequence - 1. `labels[:, t]` is the token after `input_ids[:, t]` (the shift by one, equation 2.2), and
    `response_mask[:, t]` says whether that label belongs to the output.

    Raises: ValueError if the lists are empty or differ in length, if a prompt has no token (the first output
    token would have nothing to be predicted from), or if the tokenizer has no pad token.
    """
    if len(prompts) != len(outputs):
        raise ValueError(f"{len(prompts)} prompts but {len(outputs)} outputs; they must come in pairs")
    if not prompts:
        raise ValueError("no prompts: a batch needs at least one")
    pad = tokenizer.pad_token_id
    if pad is None:
        raise ValueError("the tokenizer has no pad_token_id; set one, e.g. tokenizer.pad_token = tokenizer.eos_token")
    rows, prompt_lengths = [], []
    for i, (prompt, output) in enumerate(zip(prompts, outputs)):
        prompt_ids = list(tokenizer.encode(prompt, add_special_tokens=False))
        if not prompt_ids:
            raise ValueError(f"prompt {i} ({prompt!r}) has no tokens; the first output token needs a context")
        prompt_lengths.append(len(prompt_ids))
        rows.append(prompt_ids + list(tokenizer.encode(output, add_special_tokens=False)))

    ids, attention_mask = collate(rows, pad)
    # The mask comes from lengths, not from `ids != pad`: pad and EOS may be the same token.
    is_output = attention_mask & (torch.arange(ids.shape[1]) >= torch.tensor(prompt_lengths).unsqueeze(1))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": is_output[:, 1:]}


def collate(rows: list[list[int]], pad_token_id: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Rows of token ids as one padded tensor (B, longest) and its mask, True on the real tokens."""
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    positions = torch.arange(longest)
    if side == "right":
        mask = positions < lengths.unsqueeze(1)
    elif side == "left":
        mask = positions >= longest - lengths.unsqueeze(1)
    else:
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    ids = torch.full(mask.shape, pad_token_id)
    ids[mask] = torch.tensor([token for row in rows for token in row], dtype=torch.long)
    return ids, mask


def select_rows(batch: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """Some rows of a tokenized batch, without the columns behind the last response token of any of them."""
    mask = batch["response_mask"][index]
    used = int(mask.any(dim=0).nonzero().max()) + 1 if mask.any() else 1
    return {name: x[index][:, :used] for name, x in batch.items()}


def token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """log p(label) at every position: the label's logit minus the log-sum-exp of all (equation 2.3).

    logits (..., V), labels (...) integer -> (...). Does not shift: position t of the logits must already
    predict `labels[t]`. Finite for finite logits of any size.

    Raises: ValueError if the shapes do not fit or a label is no index into V.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} need labels {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}"
        )
    vocabulary = logits.shape[-1]
    # On a GPU the check would stall the stream; there torch's own assertion catches it.
    if labels.device.type == "cpu" and labels.numel() and not (0 <= labels.min() and labels.max() < vocabulary):
        raise ValueError(
            f"labels must lie in [0, {vocabulary}), got {int(labels.min())} to {int(labels.max())}; "
            "mask ignored positions instead of marking them with -100"
        )
    log_probs = at_least_float32(logits).log_softmax(dim=-1)
    return log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def sequence_log_probs(model, batch: dict[str, Tensor]) -> Tensor:
    """log pi(y | x) of each sequence: the sum of its response tokens' log-probabilities (equation 2.1).

    model: called as `model(input_ids)`; returns logits (B, S, V), or an object with `.logits` as Hugging
    Face models do. An `attention_mask` in the batch is passed on; the right-padded batches of
    `tokenize_prompt_and_output` need none, since a causal model never looks right.
    batch: `input_ids`, `labels`, `response_mask`, each (B, S), on the model's device.
    Returns (B,). A sum, not a mean: DPO's derivation needs the probability of the whole response.
    Raises: TypeError if the mask is not boolean; otherwise as `token_log_probs`.
    """
    extra = {"attention_mask": batch["attention_mask"]} if "attention_mask" in batch else {}
    output = model(batch["input_ids"], **extra)
    logits = getattr(output, "logits", output)
    return masked_token_log_probs(logits, batch["labels"], batch["response_mask"]).sum(dim=1)


def masked_token_log_probs(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """`token_log_probs` where the mask is True, 0 elsewhere: (B, S, V), (B, S), (B, S) -> (B, S).

    The logits may also be given at those positions only, (N, V), in the order of `logits[mask]`.
    Raises: TypeError if the mask is not boolean, ValueError as `token_log_probs`.
    """
    if mask.dtype != torch.bool:  # integers would index rows instead of selecting positions
        raise TypeError(f"response_mask must be boolean, got {mask.dtype}; convert it with mask.bool()")
    # Only response positions enter the softmax: cheaper, and whatever the others hold stays out of the gradient.
    log_probs = token_log_probs(logits if logits.dim() == mask.dim() else logits[mask], labels[mask])
    return log_probs.new_zeros(mask.shape).masked_scatter(mask, log_probs)


def pack(documents: list[list[int]], block_size: int) -> Tensor:
    """Joins documents end to end and cuts the stream into rows of `block_size` tokens: no padding at all.

    The standard way to pre-train: (N, block_size) int64; an incomplete last row is dropped.
    Raises: ValueError if the documents do not fill one row.
    """
    stream = torch.tensor([token for document in documents for token in document], dtype=torch.long)
    rows = len(stream) // block_size
    if rows == 0:
        raise ValueError(f"{len(stream)} tokens do not fill one row of {block_size}; use a smaller block_size")
    return stream[: rows * block_size].view(rows, block_size)
