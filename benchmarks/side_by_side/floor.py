"""The matmul floor: what a step of ours would take if it were its matrix products and nothing else.

One step of the fast loop is run and every matrix product in it is noted, forward and backward, with the shapes and
strides of its operands: the linear layers and the output layer. (For DPO that is the pass of the reference too.) Then
these products alone are run again on random numbers. Attention's own products run inside a fused kernel and are not
counted, nor is any addition, norm, softmax, optimizer or Python: so the floor is a little too low and the share of it
that a loop reaches a little too small.
"""

import ours
import torch
from setting import Clock, Setting
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)


class Noted(TorchDispatchMode):
    """Notes the operands of every matrix product that runs inside the context."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in PRODUCTS:
            self.products.append([(x.shape, x.stride(), x.dtype, x.device) for x in args[-2:]])
        return function(*args, **(kwargs or {}))


def products(setting: Setting, task: str) -> list:
    """The operands' (shape, stride, dtype, device) of every product in one step of the fast loop."""
    with Noted() as noted:
        getattr(ours, f"run_{task}")(setting, "fast", 1, Clock(setting))
    return noted.products


def replay(setting: Setting, task: str, steps: int, clock: Clock) -> list:
    memory = {}  # one tensor for each kind of operand: a real step finds fewer of them in the cache

    def operand(shape, stride, dtype, device, place):
        key = (shape, stride, place)
        if key not in memory:
            flat = torch.randn(sum((n - 1) * s for n, s in zip(shape, stride)) + 1, dtype=dtype, device=device)
            memory[key] = flat.as_strided(shape, stride)
        return memory[key]

    work = [[operand(*x, place) for place, x in enumerate(pair)] for pair in products(setting, task)]
    clock.gflop = sum(2 * a.numel() * b.shape[-1] for a, b in work) / 1e9
    clock.start()
    for _ in range(steps):
        clock.mark()
        for a, b in work:
            torch.matmul(a, b)
    clock.mark()
    return []


def run_sft(setting: Setting, variant: str, steps: int, clock: Clock):
    return replay(setting, "sft", steps, clock)


def run_dpo(setting: Setting, variant: str, steps: int, clock: Clock):
    return replay(setting, "dpo", steps, clock)
