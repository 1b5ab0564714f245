"""Sampling: token ids in, token ids and their log-probabilities out.

A sampler for reinforcement learning must be able to say exactly how probable each sampled token was. Here the
log-probabilities are those of the distribution that was sampled from (no top-k or top-p, which would cut it), and
`response_log_probs` computes them again in one teacher-forced pass: the same numbers, with a gradient.

Prompts stand right-aligned in a batch (padding on the left), so that all responses start in the same column:

    prompt_ids     . . 5 9 | 7 3 E .     response_ids     "." padding, E end of sequence
    prompt_mask    0 0 1 1 | 1 1 1 0     response_mask    masks, never ids, say what is real: padding may be EOS
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import device_of


@dataclass
class Samples:
    """B prompts of at most P tokens and their responses of at most T."""

    prompt_ids: Tensor  # (B,P), padded on the left
    prompt_mask: Tensor  # (B,P) bool
    response_ids: Tensor  # (B,T), padded on the right
    response_mask: Tensor  # (B,T) bool, True on the EOS too where one was sampled
    log_probs: Tensor  # (B,T) float32, of each sampled token; 0 behind the mask
    finished: Tensor  # (B,) bool: EOS was sampled; False: the response hit the length limit

    @property
    def input_ids(self) -> Tensor:
        """(B, P + T): prompts and responses side by side."""
        return torch.cat([self.prompt_ids, self.response_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """(B, P + T) bool."""
        return torch.cat([self.prompt_mask, self.response_mask], dim=1)

    def responses(self) -> list[list[int]]:
        """The response tokens of each row, EOS included where there is one."""
        return [ids[mask].tolist() for ids, mask in zip(self.response_ids.cpu(), self.response_mask.cpu())]


def left_pad(
    prompts: list[list[int]], pad_token_id: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Ragged prompts -> ids (B,P) and mask (B,P), padding on the left."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor(
        [[pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device
    )
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]


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
    """Sample one response to each prompt until EOS or max_new_tokens.

    temperature 0 takes the most probable token; its log-probabilities are then those at temperature 1. The result
    is a function of the model, the prompts and the generator's state (the generator lives on the model's device).
    Raises ValueError for no prompts, an empty prompt, and lengths that do not fit.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: ask for at least one token")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}: it must be 0 (greedy) or more")
    if not prompts:
        raise ValueError("no prompts: give at least one")
    if not all(len(prompt) for prompt in prompts):
        raise ValueError(
            "a prompt is empty: the first token needs something to follow; start it with a BOS or EOS token"
        )
    device = device_of(model)
    prompt_ids, prompt_mask = left_pad(prompts, pad_token_id, device)
    batch, width = prompt_ids.shape
    if model.max_positions is not None and width + max_new_tokens > model.max_positions:
        raise ValueError(
            f"a prompt of {width} tokens and {max_new_tokens} new ones do not fit the model's {model.max_positions} "
            f"positions: shorten the prompt or lower max_new_tokens"
        )

    response_ids = torch.full((batch, max_new_tokens), pad_token_id, device=device)
    response_mask = torch.zeros((batch, max_new_tokens), dtype=torch.bool, device=device)
    log_probs = torch.zeros((batch, max_new_tokens), device=device)
    finished = torch.zeros(batch, dtype=torch.bool, device=device)
    # A row that has finished goes on being computed and is thrown away, so its new tokens need no mask of their own.
    padded = any(len(prompt) < width for prompt in prompts)
    mask = torch.cat([prompt_mask, torch.ones_like(response_mask)], dim=1) if padded else None
    lengths = prompt_mask.sum(1, keepdim=True)
    was_training = model.training
    model.eval()  # dropout would make the sampled log-probs those of another network
    cache = model.new_cache(batch, width + max_new_tokens)
    tokens, positions = prompt_ids, None
    try:
        for t in range(max_new_tokens):
            hidden = model.hidden(tokens, None if mask is None else mask[:, : width + t], positions, cache)
            logits = model.head(hidden[:, -1]).float()
            step_log_probs = F.log_softmax(logits / temperature if temperature > 0 else logits, dim=-1)
            chosen = draw(step_log_probs, generator) if temperature > 0 else step_log_probs.argmax(-1)
            alive = ~finished
            response_ids[:, t] = torch.where(alive, chosen, pad_token_id)
            response_mask[:, t] = alive
            log_probs[:, t] = torch.where(alive, step_log_probs.gather(1, chosen[:, None])[:, 0], 0.0)
            finished = finished | (chosen == eos_token_id)
            if finished.all():
                break
            tokens, positions = chosen[:, None], lengths + t if padded else None
    finally:
        model.train(was_training)
    used = t + 1
    return Samples(
        prompt_ids,
        prompt_mask,
        response_ids[:, :used],
        response_mask[:, :used],
        log_probs[:, :used],
        finished,
    )


def draw(log_probs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One index for each row of (B,V) log-probabilities, (B,).

    The index i with the smallest waiting time E_i / p_i, E_i exponential, is i with probability p_i. That is what
    torch.multinomial computes too, without its checks, for which a GPU would have to wait.
    """
    waiting = torch.empty_like(log_probs).exponential_(generator=generator)
    return (log_probs.exp() / waiting).argmax(-1)


def response_log_probs(model: nn.Module, samples: Samples, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of the response tokens given what is before them, (B,T), with a gradient; 0 behind the mask.

    One pass over prompt and response; only the columns that predict a response token go through the output layer.
    At the temperature of `sample` and with the same model this is `samples.log_probs` to rounding.
    """
    if temperature <= 0:
        raise ValueError(
            f"temperature is {temperature}: log-probs need one above 0 (greedy samples are scored at 1)"
        )
    width = samples.prompt_ids.shape[1]
    mask = None if bool(samples.prompt_mask.all()) else samples.attention_mask
    hidden = model.hidden(samples.input_ids[:, :-1], None if mask is None else mask[:, :-1])
    logits = model.head(hidden[:, width - 1 :]).float() / temperature
    log_probs = F.log_softmax(logits, dim=-1).gather(2, samples.response_ids[..., None])[..., 0]
    return torch.where(samples.response_mask, log_probs, 0.0)


def generate_text(
    model: nn.Module,
    tokenizer,
    prompts: list[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Responses as text, in the order of the prompts; the text of EOS is kept, so that its absence shows a cut-off."""
    ids = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    by_length = sorted(
        range(len(ids)), key=lambda i: len(ids[i])
    )  # neighbours of one length need little padding
    texts = [""] * len(ids)
    for start in range(0, len(by_length), batch_size):
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
        for i, response in zip(rows, samples.responses()):
            texts[i] = tokenizer.decode(response)
    return texts
