"""What the four training loops share: an optimizer, a schedule, batches in a fixed order, and resuming.

Everything random in a loop is a function of (seed, step), never of what was drawn before. So a run that was
killed continues from its last checkpoint and ends exactly where an uninterrupted one ends. The exception is a model
with dropout in train mode: it draws from torch's global generator, which no checkpoint holds. The loops leave the mode
as it is, and `load_model` gives models in eval mode.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cs336_alignment.distributed import clip_gradients, is_first, is_sharded, load_whole_state, same_start, whole_state
from cs336_alignment.models import load_progress, save_progress


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random generator of one step."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


def shuffled_batch(size: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Indices of batch number `step` when `size` records are shuffled anew each epoch; (batch_size,).

    The incomplete batch at the end of an epoch is left out; with fewer records than `batch_size`, all of
    them are one batch.
    """
    if size == 0:
        raise ValueError("no records to train on")
    batches = max(size // batch_size, 1)
    epoch, position = divmod(step, batches)
    order = torch.randperm(size, generator=step_generator(seed, epoch))
    return order[position * batch_size : (position + 1) * batch_size]


def scaled_learning_rate(learning_rate: float, hidden_size: int) -> float:
    """A rate that was tuned at hidden size 128, for a wider model: it shrinks as (128 / hidden size)^2, a rule of
    thumb that suits the fine-tuning of larger models."""
    return learning_rate * min(1.0, (128 / hidden_size) ** 2)


def make_optimizer(model: nn.Module, learning_rate: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW with the betas usual for language models; only matrices decay. One fused kernel a step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = not is_sharded(parameters)  # the fused kernel takes no sharded parameters together with whole ones
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=fused, foreach=None if fused else False)


def warmup_stable_decay(step: int, steps: int, warmup: int, decay: int) -> float:
    """The factor on the learning rate: up over `warmup` steps, 1, and down to 0 over the last `decay` (6.1)."""
    return min(1.0, (step + 1) / max(warmup, 1), (steps - step) / max(decay, 1))


def optimizer_step(optimizer: torch.optim.Optimizer, learning_rate: float, max_grad_norm: float = 1.0) -> float:
    """Clips the gradient's norm, takes a step, clears the gradient. Returns the norm before clipping."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = clip_gradients(parameters, max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


class Run:
    """The steps of one training run: a progress bar, a log, and a checkpoint to continue from.

        run = Run("SFT", config, checkpoint, progress, model=model, optimizer=optimizer)
        for step in run:
            ...
            run.record(step, loss=loss)
        return run.log

    With a `checkpoint` path, everything named (things with a state_dict) is saved every `config.save_every`
    steps and at the end, and a run that finds the file goes on from there.
    Raises: ValueError if the file was written with another configuration.
    """

    def __init__(self, name: str, config, checkpoint: Path | str | None = None, progress: bool = True, **parts):
        self.name, self.config, self.progress, self.parts = name, config, progress and is_first(), parts
        self.checkpoint = Path(checkpoint) if checkpoint else None
        self.log: list[dict[str, float]] = []
        self.start = 0
        for part in parts.values():
            if isinstance(part, nn.Module):
                same_start(part)
        if self.checkpoint and self.checkpoint.exists():
            state = load_progress(self.checkpoint)
            if state["config"] != asdict(config):
                raise ValueError(
                    f"{self.checkpoint} was written by a run with other settings; "
                    "delete it to start again, or give this run another checkpoint path"
                )
            for part, module in parts.items():
                load_whole_state(module, state[part])
            self.start, self.log = state["step"], state["log"]

    def __iter__(self) -> Iterator[int]:
        steps = self.config.steps
        with tqdm(total=steps, initial=self.start, desc=self.name, disable=not self.progress) as self.bar:
            for step in range(self.start, steps):
                yield step
                self.bar.update()
                if self.checkpoint and ((step + 1) % self.config.save_every == 0 or step + 1 == steps):
                    state = {part: whole_state(module) for part, module in self.parts.items()}
                    if is_first():
                        save_progress(self.checkpoint, step=step + 1, log=self.log, config=asdict(self.config), **state)

    def record(self, step: int, **metrics: float | Tensor) -> None:
        """Adds a line to the log and shows it beside the bar."""
        metrics = {name: value.item() if isinstance(value, Tensor) else float(value) for name, value in metrics.items()}
        self.log.append({"step": step, **metrics})
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in list(metrics.items())[:4]}, refresh=False)
