"""What both sides of the comparison share: the model's shape and weights, the texts, and the clock.

Everything is a function of a seed, so that separate processes in separate environments build the same thing. This
file needs torch alone: it is imported where TRL is and the course's other packages are not.
"""

import contextlib
import math
import os
import random
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PAD, EOS, FIRST_WORD = 0, 1, 2


@dataclass(frozen=True)
class Setting:
    """One profile. The CPU one is that of the course's design: small enough that two cores measure it in minutes."""

    device: str = "cpu"
    vocab_size: int = 768
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    max_position_embeddings: int = 512
    prompt_tokens: int = 32
    response_tokens: int = 32  # EOS included
    batch_size: int = 32  # sequences, or pairs
    learning_rate: float = 1e-4
    beta: float = 0.3  # of DPO
    kl_coef: float = 0.2  # of PPO
    steps: int = 4  # measured in each process
    warmup: int = 1  # steps before these, not measured
    ppo_steps: int = 2  # the same for PPO, whose steps are long
    ppo_epochs: int = 4
    new_tokens: int = 32  # of the sampler
    ragged_median: int = 150  # tokens; log-normal
    ragged_sigma: float = 0.7
    ragged_cap: int = 512
    packed_rows: int = 12  # rows of the cap that TRL's packing gets a step: about as many tokens as 32 ragged ones
    part_tokens: int = 2048  # our micro-batches of rows of similar length

    def shape(self) -> dict:
        """The model's fields, with the names that transformers' LlamaConfig uses too."""
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        shape = {name: getattr(self, name) for name in (*names, "max_position_embeddings")}
        return shape | {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}


PROFILES = {
    "cpu": Setting(),
    "gpu": Setting(
        device="cuda", vocab_size=32_768, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, prompt_tokens=128, response_tokens=128, steps=20, warmup=5,
    ),
}  # fmt: skip


def autocast(setting: Setting) -> contextlib.AbstractContextManager:
    """The precision in which everyone computes: float32 on a CPU, bfloat16 products on a GPU.

    Without torch's cache of cast weights, which would outlive an optimizer step taken inside.
    """
    if setting.device == "cpu":
        return contextlib.nullcontext()
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)


def weights(setting: Setting, seed: int) -> dict[str, Tensor]:
    """A Llama's state dict, float32: normal matrices, norms around one.

    Seed 1 is the policy, 2 its reference, 3 the reward model, 4 the value model.
    """
    generator = torch.Generator().manual_seed(seed)
    d, wide = setting.hidden_size, setting.intermediate_size
    shapes = {"model.embed_tokens.weight": (setting.vocab_size, d), "model.norm.weight": (d,)}
    for layer in range(setting.num_hidden_layers):
        name = f"model.layers.{layer}."
        shapes |= {f"{name}self_attn.{x}_proj.weight": (d, d) for x in "qkvo"}
        shapes |= {f"{name}mlp.{x}_proj.weight": (wide, d) for x in ("gate", "up")}
        shapes |= {f"{name}mlp.down_proj.weight": (d, wide)}
        shapes |= {f"{name}{x}_layernorm.weight": (d,) for x in ("input", "post_attention")}
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        state[name] = noise * 0.04 if len(shape) > 1 else 1 + 0.1 * noise
    return state


def score_weights(setting: Setting, seed: int) -> Tensor:
    """(1, d): the read-out of a reward or value model."""
    return torch.randn((1, setting.hidden_size), generator=torch.Generator().manual_seed(100 + seed)) * 0.05


def words(rng: random.Random, count: int, setting: Setting) -> list[int]:
    return [rng.randrange(FIRST_WORD, setting.vocab_size) for _ in range(count)]


def text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def pairs(setting: Setting, count: int) -> list[dict]:
    """Prompts with two responses, as token ids without EOS."""
    rng = random.Random(count)
    length = setting.response_tokens - 1
    return [
        {
            "prompt": words(rng, setting.prompt_tokens, setting),
            "chosen": words(rng, length, setting),
            "rejected": words(rng, length, setting),
        }
        for _ in range(count)
    ]


def ragged(setting: Setting, count: int) -> list[dict]:
    """Demonstrations of log-normal length (prompt and response together, a third of it prompt), as token ids."""
    rng = random.Random(count)
    lengths = [rng.lognormvariate(math.log(setting.ragged_median), setting.ragged_sigma) for _ in range(count)]
    rows = []
    for length in (min(max(int(x), 8), setting.ragged_cap) for x in lengths):
        prompt = length // 3
        rows.append(
            {"prompt": words(rng, prompt, setting), "chosen": words(rng, length - prompt - 1, setting)}
        )  # with EOS: length
    return rows


class WordTokenizer:
    """ "w7" is token 7: what the package asks of a tokenizer, and no more."""

    pad_token_id, eos_token_id = PAD, EOS

    def __init__(self, eos_token_id: int = EOS):
        self.eos_token_id = eos_token_id

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return text(ids)


class Clock:
    """CPU seconds, wall seconds and memory of this process, noted where one step ends and the next begins.

    With a GPU, memory is what torch has allocated there, and time is by the wall.
    """

    def __init__(self, setting: Setting, keep_first: bool = False):
        self.keep_first = keep_first
        self.setting, self.marks, self.before = setting, [], 0.0
        self.tokens = 0  # real tokens of the measured steps, where lengths are ragged
        self.tokens_so_far, self.tokens_before = None, 0  # or a function that counts them
        self.watched, self.first = None, None  # the gate's: a model, and its parameters after the first step
        self.replay = None  # the gate's, for PPO: what the other side sampled
        self.gflop = 0.0  # of the matrix products of a step, where they are counted
        self.extra = (0.0, 0.0)  # CPU and wall milliseconds a step that were spent before the first one

    def start(self) -> None:
        """Everything is built; memory that training takes is what comes on top of now."""
        self.before = memory_now()
        if self.setting.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20

    def each(self, function):
        """The function, which tells the clock each time that it is called: our loops draw a batch once a step."""

        def marked(*args, **kwargs):
            self.mark()
            return function(*args, **kwargs)

        return marked

    def mark(self) -> None:
        if self.setting.device == "cuda":
            torch.cuda.synchronize()
        self.marks.append((time.process_time(), time.perf_counter()))
        if len(self.marks) == 2 and self.watched is not None and self.keep_first:
            self.first = {name: p.detach().clone() for name, p in self.watched.named_parameters()}
        if self.tokens_so_far:
            if len(self.marks) == self.setting.warmup + 1:
                self.tokens_before = self.tokens_so_far()
            self.tokens = self.tokens_so_far() - self.tokens_before

    def beforehand(self, function, steps: int):
        """The function, whose time is shared out over the steps: work done once for all of them."""

        def timed(*args, **kwargs):
            before = time.process_time(), time.perf_counter()
            result = function(*args, **kwargs)
            spent = time.process_time() - before[0], time.perf_counter() - before[1]
            self.extra = tuple(1000 * seconds / steps for seconds in spent)
            return result

        return timed

    def result(self) -> dict:
        """Milliseconds a step over the measured steps."""
        first, last = self.marks[self.setting.warmup], self.marks[-1]
        steps = len(self.marks) - 1 - self.setting.warmup
        peak, on_cpu = memory_peak(), self.setting.device == "cpu"
        if not on_cpu:
            peak = torch.cuda.max_memory_allocated() / 2**20
        rate = "tokens_per_cpu_s" if on_cpu else "tokens_per_wall_s"
        return {
            "cpu_ms": 1000 * (last[0] - first[0]) / steps + self.extra[0],
            "wall_ms": 1000 * (last[1] - first[1]) / steps + self.extra[1],
            "steps": steps,
            "gflop": self.gflop,
            rate: self.tokens / (last[0] - first[0] if on_cpu else last[1] - first[1]),
            "peak_mb": peak,
            "training_mb": peak - self.before,
        }


def memory_now() -> float:
    """Resident MB."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:  # no /proc: macOS
        return memory_peak()


def memory_peak() -> float:
    """The most resident MB that this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
