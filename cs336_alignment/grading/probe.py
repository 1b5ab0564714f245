"""Calling a student's function on given inputs and writing down what came out.

This runs where the student's code runs: in a notebook, or in a kernel that is graded. It holds no expected value and
no reference, so nothing here is worth stealing. Inputs and results travel as JSON; numbers travel as their exact bits.
"""

import base64
import contextlib
import io
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
DTYPES |= {str(d).removeprefix("torch."): d for d in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)}
DTYPES |= {"bool": torch.bool}


MOST_DIMENSIONS = 64
ENCODED = ("value", "gradients", "after")  # what of a result is values; the rest is plain text and numbers


class ToyModel(torch.nn.Module):
    """A causal language model small enough to be an input of a test: logits at t depend on the tokens up to t."""

    def __init__(self, weight: Tensor, most_rows: int | None = None):
        """weight: (V, V). Logits are the mean of the rows of the tokens so far, twice the last token's included.

        most_rows: how many sequences fit into its memory at once; it raises MemoryError for more. (An error of its
        own kind: RuntimeError is what torch raises for everything else.)
        """
        super().__init__()
        self.weight, self.most_rows = torch.nn.Parameter(weight), most_rows

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.most_rows is not None and len(input_ids) > self.most_rows:
            raise MemoryError(f"{len(input_ids)} rows at once, where {self.most_rows} fit: use micro-batches")
        rows = self.weight[input_ids]
        count = torch.arange(1, input_ids.shape[1] + 1, device=rows.device, dtype=rows.dtype)[:, None]
        return rows + rows.cumsum(dim=1) / count


@dataclass(frozen=True)
class ToyTokenizer:
    """A tokenizer with the interface of Hugging Face's, small enough to be an input of a test.

    A word is a token. Where the vocabulary holds two words as one entry ("ice cream"), the two in a row are one token,
    as letters are in real vocabularies. The first entry stands for unknown words; `<s>` is added in front by default.
    """

    vocabulary: tuple[str, ...]
    pad_token: str | None = "<pad>"
    eos_token: str = "<end>"

    @property
    def pad_token_id(self) -> int | None:
        return None if self.pad_token is None else self.vocabulary.index(self.pad_token)

    @property
    def eos_token_id(self) -> int:
        return self.vocabulary.index(self.eos_token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        words, ids = ["<s>"] * add_special_tokens + text.split(), []
        while words:
            size = 2 if " ".join(words[:2]) in self.vocabulary[1:] else 1
            token = " ".join(words[:size])
            ids.append(self.vocabulary.index(token) if token in self.vocabulary else 0)
            words = words[size:]
        return ids

    def decode(self, ids) -> str:
        return " ".join(self.vocabulary[int(i)] for i in ids)


class PlainSGD(torch.optim.Optimizer):
    """Stochastic gradient descent with what every optimizer has: `zero_grad`, `step`, `param_groups`.

    torch's own does the same numbers, but its first use in a process imports a compiler, for three seconds.
    """

    def __init__(self, parameters, lr: float):
        self.param_groups = [{"params": list(parameters), "lr": lr}]
        self.state, self.defaults = {}, {"lr": lr}

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.param_groups[0]["params"]:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad = torch.zeros_like(parameter.grad)

    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=self.param_groups[0]["lr"])
        return None if closure is None else loss


@dataclass(frozen=True)
class SGD:
    """Stands for a plain optimizer of the model at position `of` of the arguments, that has seen another batch before:
    its gradients are not zero. The function gets a `PlainSGD`."""

    lr: float
    of: int = 0

    def build(self, arguments: list) -> PlainSGD:
        parameters = list(arguments[self.of].parameters())
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        return PlainSGD(parameters, self.lr)


# ------------------------------------------------------------------------------------------ values as JSON


def encode(value):
    """A value as JSON: tensors, numbers, text, None, lists, dicts, toy models and toy tokenizers."""
    if isinstance(value, ToyModel):
        limit = {} if value.most_rows is None else {"most_rows": value.most_rows}
        return {"model": encode(value.weight.detach())} | limit
    if isinstance(value, ToyTokenizer):
        return {"tokenizer": list(value.vocabulary), "pad": value.pad_token, "eos": value.eos_token}
    if isinstance(value, SGD):
        return {"sgd": value.lr, "of": value.of}
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        exact = value.detach().cpu().to(torch.float64 if value.is_floating_point() else torch.int64).contiguous()
        bits = base64.b64encode(exact.numpy().tobytes()).decode()
        return {"tensor": kind, "shape": list(value.shape), "bits": bits}
    if isinstance(value, bool | int | str | None):
        return value
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, tuple | list):
        return {"list": [encode(x) for x in value]}
    if isinstance(value, dict):
        return {"dict": {str(key): encode(x) for key, x in value.items()}}
    return {"other": type(value).__name__}


def decode(data):
    """The value that `encode` wrote; what no student's function is meant to return comes back as an `Other`.

    Raises: ValueError, TypeError or KeyError on anything that `encode` did not write.
    """
    if isinstance(data, bool | int | str | None):
        return data
    if "model" in data:
        return ToyModel(decode(data["model"]), data.get("most_rows"))
    if "tokenizer" in data:
        return ToyTokenizer(tuple(map(str, data["tokenizer"])), data["pad"], str(data["eos"]))
    if "sgd" in data:
        return SGD(float(data["sgd"]), int(data["of"]))
    if "tensor" in data:
        floating = DTYPES[data["tensor"]].is_floating_point
        shape = [int(n) for n in data["shape"]]
        if len(shape) > MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {len(shape)} dimensions")
        exact = torch.float64 if floating else torch.int64
        raw = base64.b64decode(data["bits"], validate=True)
        flat = torch.frombuffer(bytearray(raw), dtype=exact) if raw else torch.empty(0, dtype=exact)
        return flat.reshape(shape).to(DTYPES[data["tensor"]])
    if "float" in data:
        return float.fromhex(data["float"])
    if "list" in data:
        return [decode(x) for x in data["list"]]
    if "dict" in data:
        return {key: decode(x) for key, x in data["dict"].items()}
    return Other(str(data["other"])[:100])


class Other:
    """Stands for a returned object that is no number, tensor, list or dictionary of them."""

    def __init__(self, kind: str):
        self.kind = kind


# --------------------------------------------------------------------------------------- calling functions


def run_calls(
    function: Callable, calls: Sequence, gradients: Sequence[int] = (), after: Sequence[int] = (), quiet: bool = True
) -> list[dict]:
    """What `function` does with each list of arguments.

    gradients: positions of arguments by which the result is differentiated: d(sum of weighted results)/d(argument),
    where the weights differ, so that a gradient that belongs to another row is seen; of a model, by its weight.
    after: positions of arguments that the function is there to change, such as a model in a training step.
    Returns a dict a call: "value", "gradients" and "after" (not encoded), or "error" with "message" and "line" (the
    line of the student's code that raised); "changed": the positions of arguments that it should have left alone.
    """
    return [run_call(function, [copied(x) for x in call], gradients, after, quiet) for call in calls]


def copied(value):
    """As `decode(encode(value))`, and quicker; `copy.deepcopy` takes ten times as long for a small tensor."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, ToyModel):
        return ToyModel(value.weight.detach().clone(), value.most_rows)
    if isinstance(value, tuple | list):
        return [copied(x) for x in value]
    if isinstance(value, dict):
        return {key: copied(x) for key, x in value.items()}
    return value  # the rest cannot be changed


def run_call(function: Callable, arguments: list, gradients: Sequence[int], after: Sequence[int], quiet: bool) -> dict:
    before = [encode(x) for x in arguments]
    leaves = []
    for position in gradients:
        argument = arguments[position]
        leaves.append(argument.weight if isinstance(argument, ToyModel) else argument.requires_grad_(True))
    arguments = [x.build(arguments) if isinstance(x, SGD) else x for x in arguments]
    silence = contextlib.ExitStack()
    try:
        with silence, torch.enable_grad():
            silence.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            if quiet:
                silence.enter_context(contextlib.redirect_stdout(io.StringIO()))
                silence.enter_context(contextlib.redirect_stderr(io.StringIO()))
            value = function(*arguments)
            result = {"value": value}
            if gradients:
                result["gradients"] = gradients_of(value, leaves)
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)[:500], "line": students_line(error)}
    if after:
        result["after"] = [arguments[position].weight.detach() for position in after]
    kept = [i for i, x in enumerate(arguments) if i not in after and not isinstance(x, torch.optim.Optimizer)]
    result["changed"] = [i for i in kept if encode(arguments[i]) != before[i]]
    return result


def gradients_of(value, leaves: list[Tensor]) -> list[Tensor | None]:
    """Gradients of the weighted sum of the result by the leaves; None where the result does not depend on a leaf."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return [None] * len(leaves)
    weights = torch.linspace(1, 2, value.numel(), dtype=value.dtype, device=value.device).reshape(value.shape)
    return list(torch.autograd.grad((value * weights).sum(), leaves, allow_unused=True))


def students_line(error: BaseException) -> str | None:
    """The innermost line of code written in a notebook (or a student's file) that an error passed through."""
    package = __file__.rsplit("grading", 1)[0]
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith((package, "<frozen"))]
    return own[-1].line if own else None


def encode_calls(calls: Iterable[Sequence]) -> list[list]:
    """The arguments of each call as JSON."""
    return [[encode(argument) for argument in call] for call in calls]


def encode_results(results: Iterable[dict]) -> list[dict]:
    """Results of `run_calls` as JSON."""
    return [{name: encode(x) if name in ENCODED else x for name, x in result.items()} for result in results]


def decode_results(data: list[dict]) -> list[dict]:
    """Raises: ValueError, TypeError or KeyError on anything that `encode_results` did not write."""
    return [{name: decode(x) if name in ENCODED else x for name, x in result.items()} for result in data]
