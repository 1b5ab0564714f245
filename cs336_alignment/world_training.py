"""How the town's base model comes to be: pre-training on its documents, and the checkpoints that ship with it.

The schedule is warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395): the stable phase is saved too, because
mid-training continues from there (lecture 06). `python3 course.py world train` runs this file.
"""

import copy
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import torch

from cs336_alignment.distributed import alone
from cs336_alignment.models import Llama, ModelConfig, autocast, count_parameters, resolve_device, settings_digest
from cs336_alignment.optimize import Run, make_optimizer, optimizer_step, warmup_stable_decay
from cs336_alignment.sft import sft_loss
from cs336_alignment.tokens import pack, token_log_probs
from cs336_alignment.words import NAMES
from cs336_alignment.world import ASSETS, LARGE, PRETRAINING_SHARES, SMALL, World, WorldConfig


@dataclass
class PretrainingConfig:
    steps: int = 7000
    batch_size: int = 16  # rows a step
    row_length: int = 64  # tokens a row
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup: int = 50  # steps
    decay: int = 2100  # steps at the end; what comes before them is the stable phase
    save_every: int = 200
    seed: int = 0


@dataclass
class Profile:
    """A size of the whole course: the world, the model and its pre-training."""

    name: str
    world: WorldConfig
    model: ModelConfig
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)

    @property
    def key(self) -> str:
        """A hash of world, vocabulary and model: a checkpoint that carries it fits this profile."""
        vocabulary = (ASSETS / "vocabulary.txt").read_text(encoding="utf-8")
        return settings_digest(asdict(self.world), self.model.to_dict(), vocabulary)


def fast_mode() -> bool:
    """Whether CS336_FAST is set: notebooks then run on the test profile, in seconds, and assert their equations but
    not what their experiments find."""
    return os.environ.get("CS336_FAST", "") not in ("", "0")


def profile(name: str = "full") -> Profile:
    """ "full": the course. "test": the same code in seconds; its models have not learned much. "gpu": a town of 4,000
    people and a model of 100 million parameters, for which a CPU would need days."""
    vocab_size = len((ASSETS / "vocabulary.txt").read_text(encoding="utf-8").split())
    if name == "full":
        model = ModelConfig(vocab_size, num_hidden_layers=4, max_position_embeddings=256)
        return Profile(name, WorldConfig(), model)
    if name == "test":
        model = ModelConfig(
            vocab_size, hidden_size=48, intermediate_size=128, num_hidden_layers=2, max_position_embeddings=256
        )
        return Profile(name, SMALL, model, PretrainingConfig(steps=120, decay=40, warmup=10))
    if name == "gpu":
        model = ModelConfig(
            vocab_size + LARGE.known + LARGE.unknown - len(NAMES),
            hidden_size=768, intermediate_size=2048, num_hidden_layers=13, num_attention_heads=12,
            max_position_embeddings=256,
        )  # fmt: skip
        training = PretrainingConfig(
            steps=20_000, batch_size=64, row_length=128, learning_rate=6e-4, warmup=500, decay=5000, save_every=2000
        )
        return Profile(name, LARGE, model, training)
    raise ValueError(f"profile must be 'full', 'test' or 'gpu', got {name!r}")


def new_model(profile: Profile, device: str | torch.device = "auto") -> Llama:
    """An untrained model of the profile; its weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(profile.pretraining.seed)
        return Llama(profile.model).to(resolve_device(device))


def pretrain(
    model: Llama,
    world: World,
    config: PretrainingConfig,
    *,
    shares: dict[str, float] = PRETRAINING_SHARES,
    stable_path: Path | None = None,
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Trains `model` in place on documents, each seen once; returns the log.

    shares: of each kind of document, in tokens; the held-out loss is that of the standard mixture.
    stable_path: where the weights are saved as they are before the decay.
    """
    alone("pre-training")
    device = next(model.parameters()).device
    rows_needed = config.steps * config.batch_size
    rows = pack(
        world.documents(rows_needed * config.row_length + config.row_length, config.seed, shares), config.row_length
    )
    held_out = pack(world.documents(16_000, config.seed + 1_000), config.row_length)
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay)
    run = Run("pre-training", config, checkpoint, progress, model=model, optimizer=optimizer)
    for step in run:
        text = rows[step * config.batch_size : (step + 1) * config.batch_size].to(device)
        loss = next_token_loss(model, text)
        loss.backward()
        factor = warmup_stable_decay(step, config.steps, config.warmup, config.decay)
        grad_norm = optimizer_step(optimizer, config.learning_rate * factor)
        metrics = {"loss": loss, "grad_norm": grad_norm}
        if (step + 1) % 100 == 0 or step + 1 == config.steps:
            with torch.no_grad():
                metrics["held_out_loss"] = next_token_loss(model, held_out.to(device))
        run.record(step, **metrics)
        if stable_path and step + 1 == config.steps - config.decay:
            save_weights(model, stable_path)
    return run.log


@torch.no_grad()
def introduce_chat_tokens(model: Llama, world: World) -> Llama:
    """A copy of a base model, ready for SFT: the embeddings of <user> and <assistant>, which no document holds,
    start as those of their nearest relatives, "question" and "answer". From random ones, fine-tuning takes longer
    and forgets more on the way."""
    model = copy.deepcopy(model)
    weight, index = model.model.embed_tokens.weight, world.tokenizer.index
    for token, relative in (("<user>", "question"), ("<assistant>", "answer")):
        weight[index[token]] = weight[index[relative]]
    return model


def next_token_loss(model, rows: torch.Tensor) -> torch.Tensor:
    """Mean negative log-probability of every token but the first of each row; rows (N, L)."""
    with autocast(rows.device):
        log_probs = token_log_probs(model(rows[:, :-1]), rows[:, 1:])
    return sft_loss(log_probs, torch.ones_like(log_probs, dtype=torch.bool))


def save_weights(model: Llama, path: Path) -> None:
    """The weights in bfloat16: half the size, and following does not suffer (lecture 18)."""
    from safetensors.torch import save_file

    state = {name: x.detach().to("cpu", torch.bfloat16).contiguous() for name, x in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]  # the same tensor as the embedding
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file(state, part)
    os.replace(part, path)  # whole or not at all


def checkpoint_path(profile: Profile, phase: str = "base") -> Path:
    """Where the shipped checkpoint of a phase ("base" or "stable") lies."""
    return ASSETS / f"{phase}-{profile.name}-{profile.key}.safetensors"


def load_weights(profile: Profile, path: Path, device: str | torch.device = "auto") -> Llama:
    """The model of a profile with the weights of a file, in float32.

    Raises: FileNotFoundError if there is none.
    """
    from safetensors.torch import load_file

    if not path.exists():
        raise FileNotFoundError(
            f"no checkpoint {path.name} for this world: `python3 course.py world train` makes it "
            "(the name holds a hash of world, vocabulary and model; one of them has changed)"
        )
    state = {name: x.float() for name, x in load_file(path).items()}
    if profile.model.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = Llama(profile.model)
    model.load_state_dict(state)
    return model.to(resolve_device(device)).eval()


def load_base(profile: Profile, phase: str = "base", device: str | torch.device = "auto") -> Llama:
    """The shipped base model, or with phase="stable" the one from before the decay."""
    return load_weights(profile, checkpoint_path(profile, phase), device)


def train(profile_name: str = "full", device: str = "auto", folder: Path = ASSETS, work: Path | None = None) -> Path:
    """Pre-trains the base model and writes both checkpoints and the log beside them; returns the base's path.

    One pass over the documents, in minutes on one core. A killed run continues from `work`.
    """
    sizes = profile(profile_name)
    world, model = World(sizes.world), new_model(sizes, device)
    progress = (work or Path("runs")) / f"pretraining-{sizes.name}-{sizes.key}.unfinished.pt"
    base, stable = (folder / checkpoint_path(sizes, phase).name for phase in ("base", "stable"))
    stable_new = progress.with_name(stable.name)  # takes its place when the base model is there too
    started = time.process_time()
    log = pretrain(model, world, sizes.pretraining, stable_path=stable_new, checkpoint=progress)
    save_weights(model, base)
    shutil.move(stable_new, stable)
    progress.unlink(missing_ok=True)
    held_out = [line["held_out_loss"] for line in log if "held_out_loss" in line]
    record = {
        "date": date.today().isoformat(),
        "cpu_seconds": round(time.process_time() - started, 1),
        "parameters": count_parameters(model),
        "tokens": sizes.pretraining.steps * sizes.pretraining.batch_size * sizes.pretraining.row_length,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "pretraining": asdict(sizes.pretraining),
        "held_out_loss": [round(x, 4) for x in held_out],
    }
    base.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{base.name}: {record['parameters']:,} parameters, held-out loss {held_out[-1]:.3f} nats a token")
    return base
