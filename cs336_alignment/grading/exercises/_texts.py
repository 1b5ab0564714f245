"""Prompts, outputs and a tokenizer for the exercises of a1_sft."""

import torch

from cs336_alignment.grading.inputs import integer
from cs336_alignment.grading.probe import ToyTokenizer

WORDS = "name two three colours fruits red blue plum pear hat ice cream is not . where does she live".split()
VOCABULARY = ("<unk>", *WORDS, "ice cream", "<s>", "<end>", "<pad>")


def tokenizer(g: torch.Generator, pad: str | None = "<pad>") -> ToyTokenizer:
    """The vocabulary in an order of its own, so that no id can be known beforehand; the first entry is <unk>."""
    order = 1 + torch.randperm(len(VOCABULARY) - 1, generator=g)
    return ToyTokenizer((VOCABULARY[0], *(VOCABULARY[i] for i in order.tolist())), pad)


def text(g: torch.Generator, least: int, most: int) -> str:
    """Words at random, never "ice" and "cream" in a row."""
    plain = [word for word in WORDS if word not in ("ice", "cream")]
    return " ".join(plain[integer(g, 0, len(plain) - 1)] for _ in range(integer(g, least, most)))


def texts(g: torch.Generator, pairs: int) -> tuple[list[str], list[str]]:
    """Prompts, and outputs that end in <end>, of different lengths: whatever the pad id hides shows in some row."""
    prompts = [text(g, 1, 6) for _ in range(pairs)]
    outputs = [f"{text(g, 1, 5)} <end>" for _ in range(pairs)]
    outputs[0], outputs[-1] = "hat <end>", f"{text(g, 4, 5)} <end>"  # so rows differ in length
    prompts[0], prompts[-1] = text(g, 1, 2), text(g, 4, 6)
    return prompts, outputs
