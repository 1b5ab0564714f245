"""What several test files use: a toy tokenizer, a model of a few hundred weights, TRL's golden values."""

import json
from pathlib import Path

import torch

from cs336_alignment.models import Llama, ModelConfig, RewardModel, ValueModel

PAD, EOS = 0, 1
VOCABULARY = 12
GOLDEN = json.loads((Path(__file__).parent / "golden" / "trl.json").read_text(encoding="utf-8"))


class ToyTokenizer:
    """ "w5 w3 <eos>" is [5, 3, 1]. With `pad_is_eos` padding is 1 as well, as in many real tokenizers."""

    def __init__(self, pad_is_eos: bool = False):
        self.eos_token, self.eos_token_id = "<eos>", EOS
        self.pad_token_id = EOS if pad_is_eos else PAD

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Like Hugging Face tokenizers it adds special tokens unless it is told not to."""
        ids = [EOS if word == self.eos_token else int(word[1:]) for word in text.split()]
        return [VOCABULARY - 1, *ids] if add_special_tokens else ids

    def decode(self, ids) -> str:
        return " ".join(self.eos_token if i == EOS else f"w{int(i)}" for i in ids)


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, vocabulary: int = VOCABULARY, std: float = 0.3):
    """One layer, hidden size 8. In float64 two ways to compute the same thing agree to 1e-12."""
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=std,
    )
    return Llama(config).to(dtype)


def assert_near(actual, expected, tolerance: float = 1e-6) -> None:
    """Equal shapes, and no entry further away than `tolerance`. (torch.testing takes seconds to import.)"""
    actual, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (actual, expected))
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    distance = (actual - expected).abs()
    assert (distance <= tolerance).all(), f"{distance.max()} from the expected value\n{actual}\n{expected}"


def weights_of(model) -> torch.Tensor:
    """All weights in one vector."""
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def golden_llama(weights: dict[str, list]) -> Llama:
    """Our Llama with the weights that a golden value was computed with."""
    model = Llama(ModelConfig(**GOLDEN["config"]))
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    return model


def golden_scorer(kind: type[RewardModel] | type[ValueModel], weights: dict[str, list]):
    """Our reward or value model with TRL's weights: a Llama without output layer, a `score` without bias."""
    weights = dict(weights)
    score = torch.tensor(weights.pop("score.weight"))
    weights["lm_head.weight"] = torch.zeros(VOCABULARY, 8).tolist()
    model = kind(golden_llama(weights))
    model.head.weight.data.copy_(score)
    return model
