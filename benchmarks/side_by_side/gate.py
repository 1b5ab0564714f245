"""The parity gate: before any clock runs, both sides must compute the same thing.

Same weights, same batches. The losses of the first two steps (PPO: of the four epochs of the first update) agree to
1e-4, and the parameters after one step (update) have moved in the same way: the difference of the two movements is
small beside the movement. (Adam divides each gradient by its own size, so where a gradient is nearly 0 its rounding
error is a step of full length; that is what is left.) On a GPU both sides compute in bfloat16, with three digits, and
the tolerances are as much larger; the comparison in float32 is the one on a CPU.

What it does not watch: PPO's value model (tests/test_ppo_update.py holds it to TRL's), sampling, since two samplers
draw different tokens from one seed (tests/test_decode.py holds ours to the plain model), and the lines beside the two
that are compared: TRL at its defaults or packing, and the plain loop.
"""

from pathlib import Path

import torch
from setting import Setting, score_weights, weights

LOSS_TOLERANCE = {"cpu": 1e-4, "cuda": 3e-2}  # absolute
MOVEMENT_TOLERANCE = {"cpu": 1e-2, "cuda": 0.5}  # norm of the difference of the movements / norm of the movement


def moved(path: Path, setting: Setting) -> torch.Tensor:
    """How far every parameter went from where it started, in one vector, under transformers' names."""
    start = weights(setting, 1) | {"score.weight": score_weights(setting, 1)}
    names = {"head.weight": "score.weight"}
    after = {name.removeprefix("backbone."): p.float().cpu() for name, p in torch.load(path).items()}
    after = {names.get(name, name): p for name, p in after.items() if not name.startswith("lm_head")}
    return torch.cat([(after[name] - start[name]).flatten() for name in sorted(after)])


def compare(ours: dict, theirs: dict, our_file: Path, their_file: Path, setting: Setting) -> dict:
    """The two sides' losses and movements. `passed` says whether anything may be timed."""
    pairs = list(zip(ours["losses"], theirs["losses"], strict=True))
    ours_moved, theirs_moved = moved(our_file, setting), moved(their_file, setting)
    loss = max(abs(a - b) for a, b in pairs)
    movement = ((ours_moved - theirs_moved).norm() / theirs_moved.norm()).item()
    allowed = LOSS_TOLERANCE[setting.device], MOVEMENT_TOLERANCE[setting.device]
    return {
        "losses": ours["losses"],
        "trl_losses": theirs["losses"],
        "largest_loss_difference": loss,
        "movement_difference": movement,
        "largest_parameter_difference": (ours_moved - theirs_moved).abs().max().item(),
        "passed": len(pairs) >= 2 and loss <= allowed[0] and movement <= allowed[1],
    }
