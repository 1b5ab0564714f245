"""Whether a result is the expected one, and if not, what is different, in words, and which known mistake explains it.

Used on visible cases by `check` and on all cases by the judge. Results are those of `probe.run_calls`, decoded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import torch
from torch import Tensor

from cs336_alignment.grading.probe import Other


@dataclass(frozen=True)
class Difference:
    """What is different, as half a sentence about the student's function.

    Of a hidden case a student reads `without_numbers` alone. It holds no expected number, and nothing that the
    function chose freely either: a number, a size, a text or a type's name can carry the inputs that it was given.
    Errors are the exception here, for the instructor's eyes; feedback.py says what of them is on a page.
    """

    text: str
    discreet: str = ""  # where the text holds such things: the same without them

    @property
    def without_numbers(self) -> str:
        return self.discreet or self.text


def difference(
    result: dict, expected: dict, rtol: float, atol: float, names: tuple[str, ...], gradients: tuple[int, ...] = ()
) -> Difference | None:
    """What distinguishes a result from the expected one; None if nothing does.

    names: of the function's arguments; gradients: the positions of those that it is differentiated by.
    """
    if "error" not in result and "value" not in result:
        return Difference("gave no answer")
    if "error" in expected:
        if result.get("error") == expected["error"]:
            return None
        got = f"raised {result['error']}" if "error" in result else "returned a value"
        return Difference(f"{got}; it should raise {expected['error']}")
    if "error" in result:
        line = f", at `{result['line'].strip():.100}`" if result.get("line") else ""
        return Difference(f"raised {result['error']}: {result.get('message') or 'no message'}{line}")
    different = value_difference(result["value"], expected["value"], rtol, atol, "the result")
    if different:
        return different
    theirs = chain(result.get("gradients", ()), repeat(None))  # one that is not there is missing
    pairs = zip(gradients, theirs, expected.get("gradients", []))
    for position, got, wanted in pairs:
        what = f"the gradient by `{names[position]}`"
        if got is None and wanted is not None and not (wanted == 0).all():  # a NaN is no missing gradient
            return Difference(f"{what} is missing: the result does not depend on it in a way that autograd can follow")
        if got is not None and wanted is not None:
            different = value_difference(got, wanted, rtol, atol, what)
            if different:
                return different
    for got, wanted in zip(chain(result.get("after", ()), repeat(None)), expected.get("after", [])):
        different = value_difference(got, wanted, rtol, atol, "the model's weight afterwards")
        if different:
            return different
    changed = [f"`{names[i]}`" for i in result.get("changed", []) if i < len(names)]
    if changed and not expected.get("changed"):
        return Difference(f"changes its argument {', '.join(changed)} in place; work on a copy")
    return None


def value_difference(got, wanted, rtol: float, atol: float, what: str) -> Difference | None:
    """As `difference`, for a value: tensors, numbers, text, None, lists and dictionaries of them."""
    if isinstance(wanted, dict):
        if not isinstance(got, dict):
            should = f"it should be a dictionary with {', '.join(map(repr, wanted))}"
            return Difference(f"{what} is {kind(got)}; {should}", f"{what} is {bare_kind(got)}; {should}")
        missing = [key for key in wanted if key not in got]
        if missing:
            return Difference(f"{what} has no {', '.join(map(repr, missing))}")
        parts = (value_difference(got[key], x, rtol, atol, f"{what}[{key!r}]") for key, x in wanted.items())
        return next(filter(None, parts), None)
    if isinstance(wanted, list | tuple):
        if not isinstance(got, list | tuple) or len(got) != len(wanted):
            size = f" of {len(got)}" if isinstance(got, list | tuple) else ""
            bare = "of another length" if size else bare_kind(got)
            should = f"it should be {len(wanted)} values"
            return Difference(f"{what} is {kind(got)}{size}; {should}", f"{what} is {bare}; {should}")
        parts = (value_difference(a, b, rtol, atol, f"{what}[{i}]") for i, (a, b) in enumerate(zip(got, wanted)))
        return next(filter(None, parts), None)
    if isinstance(wanted, str | bool | None):
        if isinstance(got, Tensor) and isinstance(wanted, bool) and got.numel() == 1:
            got = bool(got)
        if got == wanted and type(got) is type(wanted):
            return None
        return Difference(f"{what} is {kind(got)}; it should be {wanted!r}", f"{what} is not as expected")
    return tensor_difference(got, wanted, rtol, atol, what)


def tensor_difference(got, wanted, rtol: float, atol: float, what: str) -> Difference | None:
    """Numbers count as tensors without dimensions; float types are not compared, only what they hold."""
    if not isinstance(got, Tensor | float | int) or isinstance(got, bool):
        should = f"it should be {'a tensor' if isinstance(wanted, Tensor) else 'a number'}"
        return Difference(f"{what} is {kind(got)}; {should}", f"{what} is {bare_kind(got)}; {should}")
    if isinstance(got, int) and abs(got) >= 2**63:  # no tensor holds it
        return Difference(f"{what} is an integer of {got.bit_length()} bits", f"{what} is a far too large integer")
    exact = isinstance(wanted, Tensor) and not wanted.is_floating_point()
    got, wanted = torch.as_tensor(got), torch.as_tensor(wanted)
    if got.shape != wanted.shape:
        dimensions = f"{wanted.dim() or 'no'} dimension{'s' * (wanted.dim() != 1)}"
        bare = f"has {dimensions}, as it should, but other sizes"
        if got.dim() != wanted.dim():
            bare = f"should have {dimensions}; it has another number of them"
        text = f"{what} has shape {tuple(got.shape)}; it should have {tuple(wanted.shape)}"
        return Difference(text, f"{what} {bare}")
    if exact and (got.dtype == torch.bool) != (wanted.dtype == torch.bool):
        should = f"it should be {str(wanted.dtype)[6:]}"
        return Difference(f"{what} has type {str(got.dtype)[6:]}; {should}", f"{what} has another type; {should}")
    got, wanted = got.double(), wanted.double()
    close = torch.isclose(got, wanted, rtol, atol, equal_nan=True)
    if close.all():
        return None
    worst = torch.where(close, -1.0, (got - wanted).abs().nan_to_num(torch.inf)).flatten().argmax().item()
    place = f" at [{', '.join(map(str, coordinates(worst, wanted.shape)))}]" if wanted.dim() else ""
    wrong = int((~close).sum())
    many = f" ({wrong} of {wanted.numel()} values differ)" if wanted.numel() > 1 else ""
    return Difference(
        f"{what}{place} is {got.flatten()[worst]:.6g}; it should be {wanted.flatten()[worst] + 0.0:.6g}{many}",
        f"{what} is not the expected one",
    )


def coordinates(index: int, shape: tuple[int, ...]) -> list[int]:
    """Where an index into the flat values lies (`torch.unravel_index` imports sympy first, which takes seconds)."""
    place = []
    for size in reversed(shape):
        index, last = divmod(index, size)
        place.insert(0, last)
    return place


def kind(value) -> str:
    """What sort of thing a value is, for a message."""
    if isinstance(value, Other):
        return f"of type {value.kind}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    names = {
        type(None): "None",
        bool: str(value),
        dict: "a dictionary",
        list: "a list",
        tuple: "a tuple",
        str: f"the text {value!r:.60}",
    }
    return names.get(type(value), f"{value!r:.60}")


def bare_kind(value) -> str:
    """The same without anything that the function chose: no size, no number, no words."""
    known = {Tensor: "a tensor", dict: "a dictionary", list: "a list", tuple: "a tuple", str: "a text"}
    known |= {int: "a number", float: "a number", bool: "True or False", type(None): "None"}
    return known.get(type(value), "of another type")


def find_mistake(
    wrong: Sequence[bool], mistakes: int, agrees: Callable[[int, int], bool], mistaken: Callable[[int, int], bool]
) -> int | None:
    """The number of the known mistake that gives a student's results on every case; failing that, of one that
    explains a case that is wrong and leaves right what is right (who makes two mistakes at once is told of one).

    wrong: of each case, whether the student's result is wrong; mistakes: how many there are.
    agrees: whether mistake m gives the student's result on case c; mistaken: whether it is wrong there itself. A
    result that is near a mistake's and wrong does not make the mistake wrong: nearness is not transitive. Both are
    asked no more than is needed, though more than once for the same m and c.
    """
    bad = [case for case, is_wrong in enumerate(wrong) if is_wrong]
    if not bad:
        return None
    good = [case for case, is_wrong in enumerate(wrong) if not is_wrong]
    fitting = [m for m in range(mistakes) if all(agrees(m, case) for case in good)]
    whole = [m for m in fitting if all(agrees(m, case) for case in bad)]
    candidates = [(m, case) for m in whole for case in bad] + [(m, case) for case in bad for m in fitting]
    return next((m for m, case in candidates if agrees(m, case) and mistaken(m, case)), None)
