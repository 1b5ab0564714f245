"""Sampling: token ids in, token ids and their log-probabilities out.

A sampler for reinforcement learning must be able to say exactly how probable each sampled token was. Here the
log-probabilities are those of the distribution that was sampled from (no top-k or top-p, which would cut it),
and `response_log_probs` computes them again in one teacher-forced pass: the same numbers, with a gradient.

Prompts stand right-aligned in a batch (padding on the left), so that all responses start in one column:

    prompt_ids     . . 5 9    response_ids     7 3 E .     "." is padding, E the end-of-sequence token
    prompt_mask    0 0 1 1    response_mask    1 1 1 0     masks, never ids, say what is real: "." may be E

B prompts of at most P tokens, responses of at most T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cs336_alignment.models import device_of
from cs336_alignment.tokens import at_least_float32, collate, token_log_probs


@dataclass
class Samples:
    """B prompts of at most P tokens and their responses of at most T."""

    prompt_ids: Tensor  # (B, P), padded on the left
    prompt_mask: Tensor  # (B, P) bool
    response_ids: Tensor  # (B, T), padded on the right
    response_mask: Tensor  # (B, T) bool, True on the EOS too where one was sampled
    log_probs: Tensor  # (B, T) float32, of each sampled token; 0 behind the mask
    finished: Tensor  # (B,) bool: EOS was sampled; False: the response hit the length limit

    @property
    def input_ids(self) -> Tensor:
        """(B, P + T): prompts and responses side by side."""
        return torch.cat([self.prompt_ids, self.response_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """(B, P + T) bool."""
        return torch.cat([self.prompt_mask, self.response_mask], dim=1)

    def rows(self, index: Tensor) -> Samples:
        """Some of the rows: a minibatch."""
        return Samples(*(getattr(self, f.name)[index] for f in fields(self)))

    def responses(self) -> list[list[int]]:
        """The response tokens of each row, EOS included where there is one."""
        ids_of_rows, mask_of_rows = self.response_ids.cpu(), self.response_mask.cpu()
        return [ids[mask].tolist() for ids, mask in zip(ids_of_rows, mask_of_rows, strict=True)]


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int,
    pad_token_id: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Samples:
    """One sampled response to each prompt, until EOS or max_new_tokens.

    temperature 0 takes the most probable token; its log-probabilities are then those at temperature 1. The
    result is a function of the model, the prompts and the generator's state (it lives on the model's device).
    Raises: ValueError for no prompts, an empty prompt, an id the model does not have, lengths that do not
    fit, and a model that returns NaN.
    """
    check_request(model, prompts, max_new_tokens, temperature)
    device = device_of(model)
    prompt_ids, prompt_mask = (x.to(device) for x in collate(prompts, pad_token_id, side="left"))
    batch, width = prompt_ids.shape
    response_ids = torch.full((batch, max_new_tokens), pad_token_id, device=device)
    response_mask = torch.zeros((batch, max_new_tokens), dtype=torch.bool, device=device)
    log_probs = torch.zeros((batch, max_new_tokens), device=device)
    finished = torch.zeros(batch, dtype=torch.bool, device=device)

    # What is still being computed: rows of the batch, their last tokens, real columns and prompt lengths.
    # Prompts of one length need neither mask nor positions. A row that has finished is computed along and
    # thrown away until half of them have: leaving rows out costs a copy of the cache.
    rows, tokens = torch.arange(batch, device=device), prompt_ids
    padded = any(len(prompt) < width for prompt in prompts)
    mask = torch.cat([prompt_mask, torch.ones_like(response_mask)], dim=1) if padded else None
    lengths = prompt_mask.sum(1, keepdim=True)
    positions = None
    cache = model.new_cache(batch, width + max_new_tokens)
    was_training = model.training
    model.eval()  # dropout would make the log-probs those of another network
    try:
        for t in range(max_new_tokens):
            hidden = model.hidden(tokens, None if mask is None else mask[:, : width + t], positions, cache)
            logits = model.head(hidden[:, -1]).float()
            # Drawn for finished rows as well: what one row says must not depend on when another one stops.
            uniform = torch.rand(batch, generator=generator, device=device, dtype=torch.float64)
            if temperature > 0:
                logits = logits / temperature
                chosen = draw(logits, uniform[rows])
            else:
                chosen = logits.argmax(-1)
            alive = ~finished[rows]
            response_ids[rows, t] = torch.where(alive, chosen, pad_token_id)
            response_mask[rows, t] = alive
            log_probs[rows, t] = torch.where(alive, token_log_probs(logits, chosen), 0.0)
            finished[rows] |= chosen == eos_token_id

            unfinished = int((~finished).sum())
            if unfinished == 0:
                break
            tokens, positions = chosen[:, None], lengths + t if padded else None
            if 2 * unfinished <= len(rows):
                keep = (~finished[rows]).nonzero()[:, 0]
                cache.batch_select_indices(keep)
                rows, tokens, lengths = rows[keep], tokens[keep], lengths[keep]
                if padded:
                    mask, positions = mask[keep], positions[keep]
    finally:
        model.train(was_training)
    if log_probs.isnan().any():
        raise ValueError("the model's logits are NaN: training has diverged; go back to an earlier checkpoint")
    used = t + 1
    return Samples(
        prompt_ids,
        prompt_mask,
        response_ids[:, :used],
        response_mask[:, :used],
        log_probs[:, :used],
        finished,
    )


def check_request(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, temperature: float) -> None:
    """Raises ValueError, with what to do, for what `sample` cannot do."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: ask for at least one token")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}: it must be 0 (greedy) or more")
    if len(prompts) == 0:
        raise ValueError("no prompts: give at least one")
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty: the first token needs something to follow, for example an EOS token")
    smallest, largest = min(map(min, prompts)), max(map(max, prompts))
    if smallest < 0 or largest >= model.vocab_size:
        raise ValueError(
            f"prompts hold token ids from {smallest} to {largest}, the model has {model.vocab_size} tokens: "
            "use the tokenizer that belongs to the model"
        )
    longest = max(map(len, prompts))
    if model.max_positions is not None and longest + max_new_tokens > model.max_positions:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the model's "
            f"{model.max_positions} positions: shorten the prompt or lower max_new_tokens"
        )


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token for each row of logits (B, V), from one number in [0, 1) for each, uniform (B,); gives (B,).

    Cuts [0, 1) into pieces as long as the probabilities and looks where the number falls. torch.multinomial
    draws V random numbers a row for the same, which on a CPU takes longer than a layer of a small model.
    """
    edges = logits.softmax(-1).double().cumsum(-1)  # float64: the pieces of a large vocabulary are small
    chosen = torch.searchsorted(edges, uniform[:, None] * edges[:, -1:], right=True)[:, 0]
    return chosen.clamp(max=logits.shape[-1] - 1)  # reached by NaN only, which `sample` reports


def response_log_probs(model: nn.Module, samples: Samples, temperature: float = 1.0) -> Tensor:
    """Log-probabilities (B, T) of the response tokens, with a gradient; 0 behind the mask.

    One pass over prompt and response; the output layer sees only the positions that predict a response token.
    At the temperature that `sample` used and with the same model this is `samples.log_probs` to rounding,
    unless the model has dropout and is in train mode: `sample` switches that off, this does not.
    Raises: ValueError for a temperature that is not above 0; greedy samples are scored at 1.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: it must be above 0; greedy samples are scored at 1")
    # Without padding on the left no mask is needed: nothing real sees the padding on the right.
    padded = not bool(samples.prompt_mask.all())
    hidden = model.hidden(samples.input_ids[:, :-1], samples.attention_mask[:, :-1] if padded else None)
    predicting = hidden[:, samples.prompt_ids.shape[1] - 1 :]  # one position before each response token
    mask = samples.response_mask
    logits = at_least_float32(model.head(predicting[mask])) / temperature
    real = token_log_probs(logits, samples.response_ids[mask])
    return real.new_zeros(mask.shape).masked_scatter(mask, real)


def generate_text(
    model: nn.Module,
    tokenizer,
    prompts: list[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
    name: str | None = None,
) -> list[str]:
    """Responses as text, in the order of the prompts.

    name: of a progress bar; without one none is shown.

    The text of EOS is kept: a response without it was cut off at max_new_tokens, and a reward function must
    see that. Raises: ValueError as `sample` does.
    """
    ids = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # neighbours of one length need little padding
    texts = [""] * len(ids)
    for start in tqdm(range(0, len(by_length), batch_size), desc=name, disable=name is None):
        rows = by_length[start : start + batch_size]
        samples = sample(
            model,
            [ids[i] for i in rows],
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            temperature=temperature,
            generator=generator,
        )
        for i, response in zip(rows, samples.responses(), strict=True):
            texts[i] = tokenizer.decode(response)
    return texts
