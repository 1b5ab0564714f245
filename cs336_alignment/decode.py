"""A Llama laid out for sampling: the same probabilities, with a third of the operations for each new token.

`sample(for_sampling(model), ...)` instead of `sample(model, ...)`. One new token is so little arithmetic that a small
model spends its time on starting operations, so there are fewer of them here: queries, keys and values come from one
matrix product, gate and up projection from another, the norms' weights are multiplied into the matrices that follow,
rotary positions are one complex product, and the residual is added by the matrix product itself.

On a GPU what is left is the time to start each operation. There the cache is static: its memory and every tensor that
a step reads stay where they are, all positions are attended to under a mask, and the step is captured as a CUDA graph
once in each call of `sample` and replayed for each further token. Rows that have finished are computed along to the
end. On a CPU the same static step is tested without the graph; nobody has run the captured one on a GPU yet.

Under bfloat16 autocast the residual is bfloat16 too, where the plain model adds up in float32: on a small model (four
layers, width 128, CPU) its log-probabilities are then some .012 nats a token from those of `response_log_probs`, and
.07 at most; the plain sampler's are .005 and .02.

The weights are copied: make it anew after an optimizer step. The plain form is `models.Llama`; a test holds the two
together. No gradient goes through it. What this file is not: a sampler; that is `generate.sample`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cs336_alignment.models import Llama, check_length, device_of, positions_from_mask, visible_keys


class JointCache:
    """Keys and values of every layer, (B, 2 H, max_length, D), the values behind the keys; written in place."""

    def __init__(self, layers: int, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype):
        self.layers = [torch.empty(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.max_length = shape[2]
        self.length = 0

    def batch_select_indices(self, rows: Tensor) -> None:
        """Keep only these sequences."""
        self.layers = [layer[rows] for layer in self.layers]


class StaticCache(JointCache):
    """A cache whose step can be captured: everything that a step reads or writes has one place in memory."""

    def __init__(self, layers: int, shape: tuple[int, int, int, int], hidden_size: int, like: Tensor):
        super().__init__(layers, shape, like.device, like.dtype)
        for memory in self.layers:
            memory.zero_()  # what is masked still enters a product, and 0 * NaN = NaN
        batch, _, length, _ = shape
        self.tokens = torch.zeros(batch, dtype=torch.long, device=like.device)
        self.positions = torch.zeros(batch, dtype=torch.long, device=like.device)
        self.slot = torch.zeros(1, dtype=torch.long, device=like.device)  # the column that the new token takes
        self.visible = torch.zeros((batch, 1, 1, length), dtype=torch.bool, device=like.device)
        self.output = like.new_zeros((batch, hidden_size))
        self.rows = torch.arange(batch, device=like.device)  # the places of the sequences that are still wanted
        self.graph: torch.cuda.CUDAGraph | None = None

    def batch_select_indices(self, rows: Tensor) -> None:
        """Keep only these sequences: the others are computed along, since a graph writes to the places it knows."""
        self.rows = self.rows[rows]


def interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection, so that the two features that turn together are neighbours.

    Both are reordered alike, so every product of a query and a key stays what it was.
    """
    heads = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


class SamplingLlama(nn.Module):
    """The interface of `models.Llama` without gradients; `for_sampling` makes one."""

    @torch.no_grad()
    def __init__(self, model: Llama, static: bool):
        super().__init__()
        self.static = static
        self.plain = model
        self.config = config = model.config
        self.training = model.training
        self.kv_heads, self.head_dim = config.num_key_value_heads, config.head_dim
        kind = model.model.embed_tokens.weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        # A norm is x / sqrt(|x|^2 + d eps) times sqrt(d) times its weights; the latter two go into what follows it.
        scale, floor = config.hidden_size**0.5, (config.hidden_size * config.rms_norm_eps) ** 0.5

        def laid_out(norm: nn.Module | None, *matrices: Tensor) -> Tensor:
            joined = torch.cat(matrices)
            joined = joined if norm is None else joined * (norm.weight * scale)
            return joined.t().contiguous().to(dtype or joined.dtype)

        self.blocks = []
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            q, k = (interleaved(x.weight, self.head_dim) for x in (attention.q_proj, attention.k_proj))
            qkv = laid_out(block.input_layernorm, q, k, attention.v_proj.weight)
            gate_up = laid_out(block.post_attention_layernorm, mlp.gate_proj.weight, mlp.up_proj.weight)
            self.blocks.append(
                (qkv, laid_out(None, attention.o_proj.weight), gate_up, laid_out(None, mlp.down_proj.weight))
            )
        self.floor = self.blocks[0][0].new_tensor(floor)
        self.output = laid_out(model.model.norm, model.lm_head.weight)
        # Angles as complex numbers: turned for the queries and keys, left alone (1 + 0i) for the values.
        cos, sin = model.rope[0], model.rope[1]
        half = self.head_dim // 2
        wide = torch.float64 if model.rope.dtype == torch.float64 else torch.float32
        self.turn = torch.complex(cos[:, half:].to(wide), sin[:, half:].to(wide))  # (positions, D / 2)
        turned = config.num_attention_heads + config.num_key_value_heads
        self.is_turned = torch.arange(turned + config.num_key_value_heads, device=cos.device)[:, None] < turned

    @property
    def vocab_size(self) -> int:
        return self.plain.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.plain.hidden_size

    @property
    def max_positions(self) -> int:
        return self.plain.max_positions

    def new_cache(self, batch_size: int, max_length: int) -> JointCache:
        shape = (batch_size, 2 * self.kv_heads, max_length, self.head_dim)
        if self.static:
            return StaticCache(len(self.blocks), shape, self.hidden_size, self.output)
        return JointCache(len(self.blocks), shape, self.output.device, self.output.dtype)

    def normed(self, x: Tensor) -> Tensor:
        """x / sqrt(|x|^2 + d eps), for x (N, d)."""
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self.floor)

    @torch.inference_mode()
    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: JointCache | None = None,
    ) -> Tensor:
        """As `models.Llama.hidden`, (B, S) -> (B, S, d), before the last norm's weights: `head` holds them."""
        batch, size = input_ids.shape
        cache = cache or self.new_cache(batch, size)
        past = cache.length
        total = past + size
        if total > cache.max_length:
            raise ValueError(f"{total} positions do not fit a cache made for {cache.max_length}")
        if position_ids is None:
            check_length(total, self.max_positions, attention_mask)
            if attention_mask is not None:
                position_ids = positions_from_mask(attention_mask)[:, past:]
        if isinstance(cache, StaticCache):
            real = True if attention_mask is None else attention_mask[:, None, None, past:total].bool()
            cache.visible[cache.rows, ..., past:total] = real
            if size == 1:
                cache.tokens[cache.rows] = input_ids[:, 0]
                cache.positions[cache.rows] = past if position_ids is None else position_ids[:, 0]
                cache.slot.fill_(past)
                self.run_static_step(cache)
                cache.length = total
                return cache.output[cache.rows, None]
        if attention_mask is not None and size == 1 and attention_mask.dim() == 2:
            visible = attention_mask.bool()[:, None, None, :]
        else:
            visible = visible_keys(attention_mask, past, size, input_ids.device)
        turn = self.turn[past:total] if position_ids is None else self.turn[position_ids.flatten()]
        turn = torch.where(self.is_turned, turn[:, None], 1.0)  # (S or B S, heads, D / 2)
        turn = turn.view(1 if position_ids is None else batch, size, *turn.shape[1:])
        heads, kept = self.config.num_attention_heads, -2 * self.kv_heads
        grouped, causal = heads != self.kv_heads, visible is None and size > 1

        x = F.embedding(input_ids.flatten(), self.plain.model.embed_tokens.weight).to(self.output.dtype)
        for (qkv, out, gate_up, down), memory in zip(self.blocks, cache.layers):
            projected = self.projected(x, qkv, turn)
            memory[:, :, past:total] = projected[:, kept:]
            keys, values = memory[:, :, :total].split(self.kv_heads, dim=1)
            attended = F.scaled_dot_product_attention(
                projected[:, :heads], keys, values, attn_mask=visible, is_causal=causal, enable_gqa=grouped
            )
            x = torch.addmm(x, attended.transpose(1, 2).reshape(batch * size, -1), out)
            gate, up = (self.normed(x) @ gate_up).chunk(2, dim=-1)
            x = torch.addmm(x, F.silu(gate).mul_(up), down)
        cache.length = total
        return self.normed(x).view(batch, size, -1)

    def static_step(self, cache: StaticCache) -> None:
        """One new token for each row, from `cache.tokens` to `cache.output`: always the same operations on the same
        memory. The plain step is `hidden`."""
        heads, kept = self.config.num_attention_heads, -2 * self.kv_heads
        batch = len(cache.tokens)
        turn = torch.where(self.is_turned, self.turn[cache.positions][:, None], 1.0)[:, None]  # (B, 1, heads, D / 2)
        x = F.embedding(cache.tokens, self.plain.model.embed_tokens.weight).to(self.output.dtype)
        for (qkv, out, gate_up, down), memory in zip(self.blocks, cache.layers):
            projected = self.projected(x, qkv, turn)
            memory.index_copy_(2, cache.slot, projected[:, kept:].to(memory.dtype))
            keys, values = memory.split(self.kv_heads, dim=1)
            attended = F.scaled_dot_product_attention(
                projected[:, :heads], keys, values, attn_mask=cache.visible, enable_gqa=heads != self.kv_heads
            )
            x = torch.addmm(x, attended.reshape(batch, -1), out)
            gate, up = (self.normed(x) @ gate_up).chunk(2, dim=-1)
            x = torch.addmm(x, F.silu(gate).mul_(up), down)
        cache.output.copy_(self.normed(x))

    def run_static_step(self, cache: StaticCache) -> None:
        """The static step: on a GPU captured when it first runs on this memory, and replayed after that."""
        if cache.output.device.type != "cuda":
            return self.static_step(cache)
        with torch.cuda.device(cache.output.device):  # not always the current one
            if cache.graph is None:
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):  # a first run outside the graph, as capturing asks for
                    self.static_step(cache)
                torch.cuda.current_stream().wait_stream(side)
                cache.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(cache.graph):
                    self.static_step(cache)
            cache.graph.replay()

    def projected(self, x: Tensor, qkv: Tensor, turn: Tensor) -> Tensor:
        """Queries, keys and values of x (B S, d), turned to their positions: (B, heads, S, D)."""
        projected = (self.normed(x) @ qkv).view(-1, *turn.shape[1:3], self.head_dim // 2, 2)
        projected = torch.view_as_complex(projected.to(turn.real.dtype)) * turn
        return torch.view_as_real(projected).flatten(-2).transpose(1, 2).to(x.dtype)

    @torch.inference_mode()
    def head(self, hidden: Tensor) -> Tensor:
        """(..., d) -> logits (..., V)."""
        return hidden @ self.output


def for_sampling(model: nn.Module, static: bool | None = None) -> nn.Module:
    """The model laid out for `generate.sample`, with its weights of now; any other model than a `Llama` as it is.

    static: whether the cache is a static one, by default on a GPU only.
    """
    if not isinstance(model, Llama):
        return model
    return SamplingLlama(
        model, torch.cuda.is_available() and device_of(model).type == "cuda" if static is None else static
    )
