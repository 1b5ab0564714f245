"""Language models behind one interface: a small Llama of our own, and any transformers causal LM.

What every model here can do (B sequences, S positions, V vocabulary, d hidden size):

    model(input_ids (B, S), attention_mask=None, position_ids=None, cache=None) -> logits (B, S, V)
    model.hidden(the same arguments, at=None) -> (B, S, d)       and model.head(hidden) -> logits
    model.new_cache(batch_size, max_length)             a key-value cache, filled in place when passed
    model.vocab_size, model.hidden_size, model.max_positions

`attention_mask` (B, S) is True on real tokens, padding on either side. A batch padded on the right needs
none: under causal attention nothing real sees what stands behind it. With a cache it covers all positions so
far. A mask of shape (B, 1, S, S) says which keys each query sees: for trees of shared prefixes. `at` (N,) are
places b * S + t whose hidden states alone are wanted, (N, d): the last block then does no more than these need.

The parameter names are those of transformers' LlamaForCausalLM, so that state dicts go both ways, and the
logits are the same. What this file is not: a place for losses, sampling or training.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import inspect
import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cs336_alignment.distributed import is_first, whole_state
from cs336_alignment.tokens import token_log_probs

# -------------------------------------------------------------------------------- Where and in what precision


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto" is the first CUDA device where there is one, else the CPU; anything else is taken at its word.

    Raises: ValueError for a name torch does not know and for a device this machine does not have.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"unknown device {device!r}: use 'auto', 'cpu', 'cuda' or 'cuda:0'") from None
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise ValueError(f"{str(device)!r} asked for, but torch sees {seen} CUDA devices: use 'auto' or 'cpu'")
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {str(device)!r}: use 'auto', 'cpu', 'cuda' or 'cuda:0'")
    return resolved


def autocast(device: str | torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 matrix products on a GPU, nothing at all on a CPU, where float32 is as fast and exact."""
    if torch.device(device).type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def device_of(model: nn.Module) -> torch.device:
    """The device that a model's parameters are on."""
    return next(model.parameters()).device


# ---------------------------------------------------------------------------------------------------- A Llama


@dataclass(frozen=True)
class ModelConfig:
    """A Llama's shape, with the field names of transformers' LlamaConfig."""

    vocab_size: int
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None  # None: one for each attention head
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 512
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02  # standard deviation of the initial weights

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}: change one of them or give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embeddings turn pairs of features")

    def to_dict(self) -> dict:
        """The content of a config.json that transformers reads."""
        fields = dataclasses.asdict(self)
        return fields | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "dtype": "float32",
        }

    @classmethod
    def from_dict(cls, values: dict) -> ModelConfig | None:
        """From the content of a config.json; None where it asks for something `Llama` does not compute."""
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        plain = (
            values.get("model_type") == "llama"
            and values.get("hidden_act", "silu") == "silu"
            and not values.get("attention_bias", False)
            and not values.get("mlp_bias", False)
            and not values.get("quantization_config")
            and rope.get("rope_type", rope.get("type", "default")) == "default"
        )
        if not plain:
            return None
        defaults = {
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "max_position_embeddings": 2048,
        }  # LlamaConfig's
        known = {f.name for f in dataclasses.fields(cls)}
        given = {k: v for k, v in values.items() if k in known and v is not None}
        if "rope_theta" in rope:
            given["rope_theta"] = rope["rope_theta"]
        return cls(**(defaults | given))


class KVCache:
    """Keys and values of every layer for all positions so far, in memory taken once and written in place."""

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int, device: torch.device, dtype: torch.dtype):
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.max_length = max_length
        self.length = 0  # positions filled; the model moves it on when the last layer has written

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, H, S, D) behind what is there; return all so far, (B, H, length + S, D) each."""
        end = self.length + keys.shape[2]
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def batch_select_indices(self, rows: Tensor) -> None:
        """Keep only these sequences; the name is that of transformers' caches."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]


def rope_table(config: ModelConfig) -> Tensor:
    """Cosines and sines for rotary position embeddings, (2, max_position_embeddings, head_dim D).

    Features i and i + D/2 are turned together by the angle position * theta^(-2i/D) (Su et al. 2021, arXiv
    2104.09864, equations 15 and 34; the paper pairs neighbours, Llama checkpoints pair halves). The first
    half of the sines carries the minus sign of the rotation.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequency = 1.0 / (config.rope_theta**half)
    angle = torch.arange(config.max_position_embeddings).float()[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (B, S, H, D) by its position; cos and sin (B or 1, S, 1, D)."""
    left, right = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([right, left], dim=-1), sin)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; several query heads may share a key-value head (GQA)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        queries, keys = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KVCache | None,
        layer: int,
        at: Tensor | None = None,
    ) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_proj(x).view(heads), *rope).transpose(1, 2)
        k = rotate(self.k_proj(x).view(heads), *rope).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if self.groups > 1:
            k, v = k.repeat_interleave(self.groups, dim=1), v.repeat_interleave(self.groups, dim=1)
        # Without a mask the kernel masks causally by itself; a single new position sees all there is anyway.
        causal = mask is None and q.shape[2] > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.o_proj(places(out.transpose(1, 2).flatten(2), at))


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (Shazeer 2020, arXiv 2002.05202, eq. 6)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KVCache | None,
        layer: int,
        at: Tensor | None = None,
    ) -> Tensor:
        x = places(x, at) + self.self_attn(self.input_layernorm(x), rope, mask, cache, layer, at)
        return x + self.mlp(self.post_attention_layernorm(x))


def places(x: Tensor, at: Tensor | None) -> Tensor:
    """x (B, S, d) at the places b * S + t in `at` (N,), giving (N, d); x itself where `at` is None."""
    return x if at is None else x.flatten(0, 1).index_select(0, at)


class Decoder(nn.Module):
    """The parameters under the prefix `model.` of a Llama state dict."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """A Llama (Touvron et al. 2023, arXiv 2302.13971, section 2.2); torch's global seed sets its weights."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.register_buffer("rope", rope_table(config), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:  # the norms start at one
                nn.init.normal_(parameter, std=config.initializer_range)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def max_positions(self) -> int:
        return self.config.max_position_embeddings

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """Room for max_length positions of batch_size sequences, on the model's device."""
        weight = self.model.embed_tokens.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        return KVCache(self.config, batch_size, max_length, weight.device, dtype)

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """input_ids (B, S) -> the normed output of the last layer, (B, S, d), or (N, d) with `at`; arguments as above.

        Raises: ValueError where the model's positions or the cache are too few.
        """
        past = 0 if cache is None else cache.length
        size, total = input_ids.shape[1], past + input_ids.shape[1]
        if cache is not None and total > cache.max_length:
            raise ValueError(f"{total} positions do not fit a cache made for {cache.max_length}")
        if position_ids is None:
            check_length(total, self.max_positions, attention_mask)
            if attention_mask is not None:
                position_ids = positions_from_mask(attention_mask)[:, past:]
        visible = visible_keys(attention_mask, past, size, input_ids.device)

        rope = self.rope[:, None, past:total] if position_ids is None else self.rope[:, position_ids]
        x = self.model.embed_tokens(input_ids)
        cos, sin = rope.unsqueeze(-2).unbind(0)  # (B or 1, S, 1, D), the same for every layer
        for layer, block in enumerate(self.model.layers):
            last = layer + 1 == len(self.model.layers)
            x = block(x, (cos, sin), visible, cache, layer, at if last else None)
        if cache is not None:
            cache.length = total
        return self.model.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """(..., d) -> logits (..., V)."""
        return self.lm_head(hidden)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """input_ids (B, S) -> logits (B, S, V)."""
        return self.head(self.hidden(input_ids, attention_mask, position_ids, cache))


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """Position of each token among the real ones, (B, S), for padding on either side.

    In a (B, 1, S, S) mask a token's position is the number of others it sees: its depth in a tree.
    """
    if attention_mask.dim() == 4:
        return (attention_mask[:, 0].sum(-1) - 1).clamp(min=0)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def check_length(length: int, max_positions: int | None, attention_mask: Tensor | None) -> None:
    """Raises ValueError for a sequence that is too long; a tree may be, its branches share positions."""
    tree = attention_mask is not None and attention_mask.dim() == 4
    if max_positions is not None and length > max_positions and not tree:
        raise ValueError(
            f"a sequence of {length} tokens is longer than the model's {max_positions} positions "
            f"(max_position_embeddings): cut the text or use a model with more"
        )


def visible_keys(attention_mask: Tensor | None, past: int, size: int, device: torch.device) -> Tensor | None:
    """Which of the past + size keys the last `size` queries see, (B, 1, size, past + size).

    None stands for plain causal attention, which needs no mask.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask.bool()
    if attention_mask is None and (past == 0 or size == 1):
        return None
    query = torch.arange(past, past + size, device=device)[:, None]
    key = torch.arange(past + size, device=device)
    if attention_mask is None:
        return (key <= query)[None, None]
    # A padded query sees itself: over nothing at all, some attention kernels return NaN, and 0 * NaN is NaN.
    return ((key <= query) & attention_mask.bool()[:, None, None, :]) | (key == query)


# --------------------------------------------------------------------------------- Any transformers causal LM


class HFCausalLM(nn.Module):
    """A transformers causal language model behind the interface at the top of this file."""

    def __init__(self, hf_model: nn.Module):
        super().__init__()
        self.hf_model = hf_model
        self.config = hf_model.config.get_text_config()
        self.takes_positions = "position_ids" in inspect.signature(self.decoder.forward).parameters
        self.train(hf_model.training)  # a new module is in train mode; this one is what it wraps

    @property
    def decoder(self) -> nn.Module:
        return self.hf_model.get_decoder()

    @property
    def vocab_size(self) -> int:
        return self.hf_model.get_output_embeddings().weight.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.hf_model.get_output_embeddings().weight.shape[1]

    @property
    def max_positions(self) -> int | None:
        """None where the configuration names no limit."""
        return getattr(self.config, "max_position_embeddings", None)

    def new_cache(self, batch_size: int, max_length: int):
        """transformers' own cache; it grows, so neither argument is needed."""
        from transformers import DynamicCache

        return DynamicCache(config=self.config)

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache=None,
        at: Tensor | None = None,
    ) -> Tensor:
        """input_ids (B, S) -> the decoder's last hidden state, (B, S, d), or (N, d) with `at`."""
        past = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            check_length(past + input_ids.shape[1], self.max_positions, attention_mask)
            if attention_mask is not None:  # transformers itself would count padding on the left as positions
                position_ids = positions_from_mask(attention_mask)[:, past:]
        extra = {}
        if position_ids is not None and self.takes_positions:
            extra["position_ids"] = position_ids
        if attention_mask is not None:
            extra["attention_mask"] = attention_mask
        output = self.decoder(input_ids=input_ids, past_key_values=cache, use_cache=cache is not None, **extra)
        return places(output.last_hidden_state, at)

    def head(self, hidden: Tensor) -> Tensor:
        """(..., d) -> logits (..., V), with what some families add: Cohere and Granite scale, Gemma caps."""
        logits = self.hf_model.get_output_embeddings()(hidden)
        if scale := getattr(self.config, "logit_scale", None):
            logits = logits * scale
        if scale := getattr(self.config, "logits_scaling", None):
            logits = logits / scale
        if cap := getattr(self.config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache=None,
    ) -> Tensor:
        """input_ids (B, S) -> logits (B, S, V), a plain tensor."""
        return self.head(self.hidden(input_ids, attention_mask, position_ids, cache))


# -------------------------------------------------------------------------------------------- Heads and views


def scalar_head(head: nn.Linear, hidden: Tensor) -> Tensor:
    """(..., d) -> (...), in float32 under autocast too: scores are compared; bfloat16 has three digits."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(head.weight.dtype)).squeeze(-1)


class RewardModel(nn.Module):
    """A scalar for a whole sequence: a linear read-out of the hidden state at its last real token.

    The read-out starts at zero: without `likelihood` every reward is 0 and the first loss exactly log 2. It
    has no bias, which a difference of rewards could not learn. (Stiennon et al. 2020, arXiv 2009.01325, start
    from a small random read-out instead.)

    likelihood: if not None, the score is that read-out plus a learned multiple, which starts at `likelihood`, of
    the log-probability that the backbone itself gives the response. A large model can see at the last token
    whether an answer is true; a small one cannot, though its next-token probabilities know (lecture 08).
    """

    LIKELIHOOD_SCALE = 10.0  # the parameter is the multiple / 10: one rate then suits it and the weights

    def __init__(self, backbone: nn.Module, likelihood: float | None = None):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.hidden_size, 1, bias=False, device=device_of(backbone), dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        self.likelihood = None
        if likelihood is not None:
            start = torch.tensor(likelihood / self.LIKELIHOOD_SCALE, device=device_of(backbone), dtype=torch.float32)
            self.likelihood = nn.Parameter(start)
        self.train(backbone.training)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, response_mask: Tensor | None = None
    ) -> Tensor:
        """input_ids (B, S), attention_mask (B, S), padding on either side -> scores (B,).

        response_mask (B, S): True on the response's tokens; only a model with `likelihood` needs it.

        The last token is found in the mask, never by its id: where EOS is the padding too, a search for the
        first padding token would stop before the EOS that belongs to the text.
        Raises: ValueError for a row without a real token, and for a response_mask that is needed and missing.
        """
        hidden = self.backbone.hidden(input_ids, attention_mask)
        if attention_mask is None:
            scores = scalar_head(self.head, hidden[:, -1])
        elif not bool(attention_mask.any(-1).all()):
            raise ValueError("a row of attention_mask has no real token: nothing to score; drop that row")
        else:
            last = last_real_position(attention_mask)
            scores = scalar_head(self.head, hidden[torch.arange(len(last), device=last.device), last])
        if self.likelihood is None:
            return scores
        if response_mask is None:
            raise ValueError("a reward model with `likelihood` needs response_mask (B, S): which tokens to score")
        mask = response_mask[:, 1:]
        log_probs = token_log_probs(self.backbone.head(hidden[:, :-1][mask]), input_ids[:, 1:][mask])
        log_probs = log_probs.new_zeros(mask.shape).masked_scatter(mask, log_probs).sum(dim=1)  # equation 2.1
        return self.with_likelihood(scores, log_probs)

    def with_likelihood(self, scores: Tensor, log_probs: Tensor) -> Tensor:
        """The read-out (B,) and the responses' log-probabilities (B,) together, for a model with `likelihood`."""
        return scores + self.LIKELIHOOD_SCALE * self.likelihood * log_probs


def last_real_position(attention_mask: Tensor) -> Tensor:
    """(B, S) -> (B,): the last True of each row; with padding on the left `mask.sum(1) - 1` is wrong."""
    columns = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
    return (attention_mask.long() * columns).argmax(-1)


class ValueModel(nn.Module):
    """A scalar at every position: what the policy can expect to earn from there on. It starts at zero."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.hidden_size, 1, device=device_of(backbone), dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.train(backbone.training)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """input_ids (B, S) -> values (B, S); those at padding mean nothing."""
        return scalar_head(self.head, self.backbone.hidden(input_ids, attention_mask, position_ids))


class RestrictedVocabulary(nn.Module):
    """The same model, allowed to say only some tokens: all other logits are -inf. Parameters are shared."""

    def __init__(self, model: nn.Module, token_ids: list[int]):
        super().__init__()
        if not token_ids or min(token_ids) < 0 or max(token_ids) >= model.vocab_size:
            raise ValueError(f"token_ids must be one or more ids from 0 to {model.vocab_size - 1}")
        self.model = model
        forbidden = torch.ones(model.vocab_size, dtype=torch.bool)
        forbidden[list(token_ids)] = False
        self.register_buffer("forbidden", forbidden.to(device_of(model)), persistent=False)
        self.train(model.training)

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.model.hidden_size

    @property
    def max_positions(self) -> int | None:
        return self.model.max_positions

    def new_cache(self, batch_size: int, max_length: int):
        return self.model.new_cache(batch_size, max_length)

    def hidden(self, *args, **kwargs) -> Tensor:
        return self.model.hidden(*args, **kwargs)

    def head(self, hidden: Tensor) -> Tensor:
        return self.model.head(hidden).masked_fill(self.forbidden, -torch.inf)

    def forward(self, *args, **kwargs) -> Tensor:
        return self.head(self.hidden(*args, **kwargs))


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that never learns, in eval mode: the reference policy."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def count_parameters(model: nn.Module) -> int:
    """Numbers in the model; a tied embedding counts once."""
    return sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------------------------------------------ Files


def load_model(
    path_or_hub_id: str | os.PathLike, device: str | torch.device = "auto", dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, object]:
    """A local folder or a Hugging Face hub id -> (model in eval mode on the device, tokenizer).

    A folder with a plain Llama (no bias, no rope scaling) is read into our own `Llama`, anything else into
    `HFCausalLM`. A tokenizer without a padding token gets EOS for that: nothing here looks at padding ids.
    Raises: ValueError, with what to do, for a folder without a model, a hub id that cannot be fetched, and a
    tokenizer that is missing, has no EOS or has more tokens than the model.
    """
    device = resolve_device(device)
    name = os.fspath(path_or_hub_id)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{name} holds no config.json: give a folder that save_model or save_pretrained wrote")
        source = str(folder)
    elif folder.exists() or name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        raise ValueError(f"{name} is not a folder: give the folder that holds config.json, or a hub id like 'gpt2'")
    else:
        source = name
    from transformers import AutoModelForCausalLM, AutoTokenizer  # slow to import, so only here

    try:
        model = _read_llama(folder, dtype) if folder.is_dir() else None
        if model is None:
            model = HFCausalLM(AutoModelForCausalLM.from_pretrained(source, dtype=dtype))
        tokenizer = AutoTokenizer.from_pretrained(source)
    except OSError as error:
        if folder.is_dir():
            raise ValueError(f"{name} does not hold a model with its tokenizer: {error}") from error
        raise ValueError(
            f"{name!r} is no local folder and cannot be fetched from the Hugging Face hub: check name and "
            f"network, or download it elsewhere and give its folder ({_first_line(error)})"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name} has no eos_token: set one and save it again")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    check_vocabulary(model, tokenizer)
    return model.to(device).eval(), tokenizer


def check_vocabulary(model: nn.Module, tokenizer) -> None:
    """Raises: ValueError where the tokenizer can produce ids the model has no embedding for."""
    if len(tokenizer) > model.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {model.vocab_size}: they do not belong "
            f"together; give the tokenizer the model was trained with"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read_llama(folder: Path, dtype: torch.dtype) -> Llama | None:
    """Our Llama from config.json and model.safetensors; None where the folder holds anything else."""
    try:
        config = ModelConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / 'config.json'} is not JSON ({error}): write the model again") from error
    weights = folder / "model.safetensors"
    if config is None or not weights.is_file():
        return None
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(weights)
        if config.tie_word_embeddings and "model.embed_tokens.weight" in state:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model = Llama(config)
        model.load_state_dict(state)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{weights} does not fit its config.json: {error}") from error
    return model.to(dtype)


def save_model(model: nn.Module, tokenizer, folder: str | os.PathLike) -> None:
    """Write config.json, model.safetensors and the tokenizer's files, the layout that transformers reads.

    `tokenizer` is anything with `save_pretrained(folder)`, or None for the weights alone. Of several processes all
    must call this, and the first writes.
    """
    folder, whole = Path(folder), whole_state(model)
    if not is_first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, HFCausalLM):
        prefix = "hf_model."
        model.hf_model.save_pretrained(folder, state_dict={k.removeprefix(prefix): v for k, v in whole.items()})
    elif isinstance(model, Llama):
        from safetensors.torch import save_file

        config = model.config.to_dict()
        if tokenizer is not None:
            config |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
            config["bos_token_id"] = getattr(tokenizer, "bos_token_id", None)
        state = {k: v.detach().cpu().contiguous() for k, v in whole.items()}
        if model.config.tie_word_embeddings:
            del state["lm_head.weight"]  # the embedding's memory: safetensors writes none twice
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(state, folder / "model.safetensors.part", metadata={"format": "pt"})
        os.replace(folder / "model.safetensors.part", folder / "model.safetensors")
    else:
        raise ValueError(f"save_model writes a Llama or an HFCausalLM, not a {type(model).__name__}")
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def settings_digest(*settings) -> str:
    """A short hash of settings (anything JSON can hold): what carries it was made with them."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def save_progress(path: str | os.PathLike, **state) -> None:
    """Write step, model, optimizer, log, ... to one file, whole or not at all, so a killed run can go on.

    Modules and optimizers are stored by their `state_dict()`; the rest must be tensors and plain Python.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()}
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        torch.save(plain, part)
        os.replace(part, path)  # atomic: a reader sees the old file or the new one
    finally:
        part.unlink(missing_ok=True)


def load_progress(path: str | os.PathLike) -> dict | None:
    """What `save_progress` wrote, tensors on the CPU; None where there is no such file yet.

    Raises: ValueError for a file that is not one.
    """
    if not Path(path).is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read ({_first_line(error)}): delete it to start that run again") from error
