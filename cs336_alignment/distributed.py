"""Training in several processes: each reads its slice of every batch, and their gradients are added up.

    torchrun --nproc-per-node 2 -m cs336_alignment train sft --data FILE            # each process has the model
    torchrun --nproc-per-node 2 -m cs336_alignment train sft --data FILE --shard    # each has a part of it

The whole batch's loss is a sum over its rows divided by one count (of response tokens, of pairs). A process divides
its part of the sum by the count of the *whole* batch, so the processes' gradients must be added, not averaged. A mean
of the processes' own means would be another loss wherever their counts differ: a token would weigh more in the
process that has fewer of them. It is the same rule as for accumulating micro-batches (lecture 02).

With one process every function here gives back what it got: a reader of the loops may skip them. There is no wrapper
around the model. DistributedDataParallel adds the same gradients while the backward pass still runs, but only for
models that are used through `forward`; sharding is torch's own `fully_shard`. All processes must see one file system.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def process_count() -> int:
    """How many processes train together; 1 where none was told of others."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that writes files and shows progress."""
    return process_rank() == 0


def alone(name: str) -> None:
    """Raises: ValueError if there are other processes, for a loop that does not share its work."""
    if process_count() > 1:
        raise ValueError(f"{name} runs in one process: it would do the same work in each of the {process_count()}")


@contextmanager
def launched(device: str = "auto") -> Iterator[str]:
    """Joins the processes that torchrun has started, if it has, and leaves them at the end; gives the device to use.

    Processes on one computer get a GPU each with "auto" and "cuda". Raises: ValueError if there are too few.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        if local >= torch.cuda.device_count():
            seen = torch.cuda.device_count()
            raise ValueError(f"process {local} of this computer has no GPU of its own: torch sees {seen}; start fewer")
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    # Losses and counts are added on the CPU, gradients where they are.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield device if on_gpu else "cpu"
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------ slices and sums


def my_rows(rows: Tensor, parts: int = 1) -> Tensor:
    """This process's slice of the whole batch's rows (N,); slices differ by one row at most.

    parts: micro-batches that each slice will be split into; every process must make as many.
    Raises: ValueError for fewer rows than processes, and rows that do not split evenly into parts.
    """
    count = process_count()
    if count == 1:
        return rows
    if len(rows) < count or (parts > 1 and len(rows) % (count * parts)):
        raise ValueError(
            f"a batch of {len(rows)} rows cannot be shared by {count} processes"
            + (f" in {parts} equal parts each" if parts > 1 else "")
            + ": change batch_size or start fewer processes"
        )
    return rows.tensor_split(count)[process_rank()]


def my_turns(batches: Sequence) -> Iterator[tuple[Any, bool]]:
    """(batch, whether it is this process's own): the batches dealt out in turns, the same number to each process.

    Where they do not come out even, the last batch is repeated by those who would have none: with sharded parameters
    all processes must compute together.
    """
    count = process_count()
    for start in range(0, len(batches), count):
        mine = start + process_rank()
        yield batches[min(mine, len(batches) - 1)], mine < len(batches)


def added_up(x: Tensor) -> Tensor:
    """The sum of x over all processes, on x's device; no gradient flows."""
    if process_count() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def averaged(metrics: dict[str, float | Tensor], share: float) -> dict[str, float | Tensor]:
    """Means over the whole batch from means over this process's share (0 to 1) of it."""
    if process_count() == 1:
        return metrics
    values = [x.item() if isinstance(x, Tensor) else x for x in metrics.values()]
    means = added_up(share * torch.tensor(values, dtype=torch.float64))
    return dict(zip(metrics, means.tolist(), strict=True))


def add_gradients(model: nn.Module) -> None:
    """Replaces each gradient by its sum over all processes; sharded ones were added by the backward pass."""
    if process_count() == 1:
        return
    own = [p.grad for p in model.parameters() if p.grad is not None and not _is_sharded(p)]
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in own]:
        work.wait()


def same_start(model: nn.Module) -> None:
    """Gives every process the weights of the first."""
    if process_count() == 1:
        return
    for x in model.state_dict().values():
        if not _is_sharded(x):
            dist.broadcast(x, src=0)


# -------------------------------------------------------------------------------------------- sharded models


def shard(model: nn.Module) -> nn.Module:
    """Leaves each process a part of every parameter, in place; returns the model. To be called before its loop.

    torch's `fully_shard` (FSDP2): a block's weights are put together when they are needed and dropped again, so
    parameters, gradients and Adam's moments take 1/processes of the memory each. A model is one unit for each entry
    of its lists of layers, and one for the rest. What FSDP cannot shard stays whole everywhere: single numbers, and
    parameters of another dtype than most (the float32 head of a half-precision model). Without other processes
    nothing happens.
    """
    if process_count() == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    same_start(model)
    mesh = init_device_mesh(next(model.parameters()).device.type, (process_count(),))
    sizes = Counter()
    for p in model.parameters():
        sizes[p.dtype] += p.numel()
    dtype = sizes.most_common(1)[0][0]
    left_whole = {p for p in model.parameters() if p.dim() == 0 or p.dtype != dtype}
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for layer in module:
                fully_shard(layer, mesh=mesh, ignored_params=left_whole)
    # By default the outermost unit stays whole after a forward pass, and an optimizer made then would hold the whole
    # parameters, which nobody looks at afterwards.
    fully_shard(model, mesh=mesh, ignored_params=left_whole, reshard_after_forward=True)
    for name in ("hidden", "head"):  # what is called beside `forward` must put the weights together too
        if callable(getattr(model, name, None)) and not isinstance(getattr(model, name), nn.Module):
            register_fsdp_forward_method(model, name)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # a sum, as everywhere here
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    return model


def is_sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether this process has only a part of some of the parameters."""
    return any(map(_is_sharded, parameters))


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, which cannot take sharded gradients and whole ones together."""
    if not is_sharded(parameters):
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(g) for g in gradients]
    norm = torch.stack([n.full_tensor() if _is_sharded(n) else n.to(norms[0].dtype) for n in norms]).norm()
    for gradient in gradients:
        gradient.mul_((max_norm / (norm.item() + 1e-6)) if norm > max_norm else 1.0)
    return norm


def _is_sharded(x: Any) -> bool:
    return hasattr(x, "full_tensor")  # a DTensor, whose import would cost every other user half a second


def whole_state(part) -> dict:
    """The state_dict of a module or an optimizer with whole tensors, as if it had never been sharded.

    All processes must call it; those that are not the first get empty tensors where sharded ones were put together.
    """

    def whole(x):
        if isinstance(x, dict):
            return {key: whole(value) for key, value in x.items()}
        if isinstance(x, list):
            return [whole(value) for value in x]
        if not _is_sharded(x):
            return x
        full = x.full_tensor()
        return full.cpu() if is_first() else full.new_empty(0)

    state = whole(part.state_dict())
    if process_count() > 1 and isinstance(part, nn.Module):  # what was one parameter under two names is one again
        first_names: dict[int, str] = {}
        for name, p in part.named_parameters(remove_duplicate=False):
            state[name] = state[first_names.setdefault(id(p), name)]
    return state


def load_whole_state(part, state: dict) -> None:
    """Loads what `whole_state` gave into a module or an optimizer, sharded or not."""
    if process_count() > 1:
        state = _scattered(part, state)
    part.load_state_dict(state)


def _scattered(part, state: dict) -> dict:
    """`state` with its tensors sharded as those of `part` are."""
    from torch.distributed.tensor import distribute_tensor

    def like(x, target):
        if not (_is_sharded(target) and isinstance(x, Tensor) and x.shape == target.shape):
            return x
        return distribute_tensor(x.to(target.device), target.device_mesh, target.placements)

    if isinstance(part, nn.Module):
        targets = part.state_dict()
        return {name: like(x, targets[name]) for name, x in state.items()}
    # An optimizer's state names parameters by number, in the order of its groups.
    parameters = [p for group in part.param_groups for p in group["params"]]
    moments = {i: {k: like(x, parameters[i]) for k, x in values.items()} for i, values in state["state"].items()}
    return state | {"state": moments}
