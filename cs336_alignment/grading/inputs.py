"""Random inputs for cases: of the size that real log-probabilities and rewards have, and the odd ones."""

import torch
from torch import Tensor


def uniform(generator: torch.Generator, low: float, high: float, *shape: int, dtype=torch.float32) -> Tensor:
    return (low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def integer(generator: torch.Generator, low: int, high: int) -> int:
    """From low to high, both possible."""
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def number(generator: torch.Generator, low: float, high: float) -> float:
    return uniform(generator, low, high, 1, dtype=torch.float64).item()


def distribution(generator: torch.Generator, *shape: int, dtype=torch.float32) -> Tensor:
    """Log-probabilities of distributions over the last dimension, uneven as those of language models are."""
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1).to(dtype)


def four_log_probs(generator: torch.Generator, pairs: int, spread: float = 3.0, dtype=torch.float32) -> list[Tensor]:
    """policy_chosen, policy_rejected, ref_chosen, ref_rejected, each (pairs,); the policy is near the reference."""
    ref = [uniform(generator, -40, -5, pairs, dtype=torch.float64) for _ in range(2)]
    policy = [x + uniform(generator, -spread, spread, pairs, dtype=torch.float64) for x in ref]
    return [x.to(dtype) for x in (*policy, *ref)]


def token_batch(generator: torch.Generator, rows: int, vocabulary: int, longest: int) -> dict[str, Tensor]:
    """A right-padded batch of prompts and responses of different lengths, as `tokenize_prompt_and_output` makes it;
    the last token of the vocabulary is the padding."""
    pad = vocabulary - 1
    lengths = torch.randint(4, longest + 1, (rows,), generator=generator)
    lengths[0], lengths[-1] = longest, 4
    ids = torch.randint(0, pad, (rows, longest), generator=generator)
    prompts = 1 + (torch.rand(rows, generator=generator) * (lengths - 2)).long()  # at least one token of each part
    positions = torch.arange(longest)
    ids[positions >= lengths[:, None]] = pad
    response = (positions >= prompts[:, None]) & (positions < lengths[:, None])
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": response[:, 1:]}
