"""`check("dpo_loss", dpo_loss)`: a student's function on the visible cases, and its mistake by name if it is known.

It works from numbers alone: `visible/NAME.json` holds the inputs, the expected values, and the values that known
mistakes give. The code behind them stays with the instructors (`visible.py` writes the files).
"""

import contextlib
import io
import json
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path

from cs336_alignment.grading.compare import Difference, difference, find_mistake
from cs336_alignment.grading.editions import NOT_HERE
from cs336_alignment.grading.probe import decode, decode_results, encode_results, run_calls

VISIBLE = Path(__file__).parent / "visible"


class CheckFailed(AssertionError):
    """A visible case is not right. In a notebook it shows as the report alone, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


def check(name: str, function: Callable) -> None:
    """Runs the visible cases of an exercise on your function and says what it finds, case by case.

    name: of the exercise, which is the function's name. Raises: CheckFailed with the report if a case is not right,
    ValueError for a name that is no exercise.
    """
    exercise = load(name)
    report, passed = examine(exercise, function)
    if not passed:
        raise CheckFailed(report)
    print(report)


def load(name: str) -> dict:
    """What is published of an exercise."""
    path = VISIBLE / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in VISIBLE.glob("*.json")))
        raise ValueError(f"there is no exercise {name!r}; there are {known}")
    return json.loads(path.read_text(encoding="utf-8"))


def published(assignment: str) -> list[dict]:
    """What is published of all exercises of an assignment, in their order."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in VISIBLE.glob("*.json")]
    return sorted((e for e in found if e["assignment"] == assignment), key=lambda exercise: exercise["order"])


def examine(exercise: dict, function: Callable) -> tuple[str, bool]:
    """The report, and whether every visible case is right."""
    name = exercise["name"]
    if not callable(function):
        return f"{name} is {function!r:.60}, not a function.", False
    if (getattr(function, "__module__", "") or "").startswith("cs336_alignment."):
        return (
            f"This is the package's own {name}. It is not there when your notebook is graded: write yours, "
            "and give that to check.",
            False,
        )
    results = []
    for case in exercise["cases"]:
        calls = [[decode(argument) for argument in call] for call in case["calls"]]
        found = run_calls(function, calls, case["gradients"], case["after"], quiet=False)
        for result in found:
            if result.get("error") == "NotImplementedError":
                if NOT_HERE in result["message"]:
                    return f"{name} calls the package's own function: {result['message']}.", False
                return f"{name} is not written yet: it raises NotImplementedError.", False
        results.append(decode_results(encode_results(found)))  # as the judge gets them: the same types compare alike
    wrong = [compare(exercise, case, found, case["expected"]) for case, found in zip(exercise["cases"], results)]
    report = as_text(exercise, wrong, known_mistake(exercise, results, wrong))
    for other in broken_helpers(exercise, function) if any(wrong) else []:
        report += f"\nIt calls your `{other}`, which does not pass its own checks: mend that first."
    return report, not any(wrong)


def broken_helpers(exercise: dict, function: Callable) -> list[str]:
    """The functions of other exercises that a function calls and that are not right themselves."""
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    found = []
    for other in published(exercise["assignment"]):
        theirs = getattr(function, "__globals__", {}).get(other["name"])
        if other["name"] in names and other["name"] != exercise["name"] and callable(theirs):
            with contextlib.redirect_stdout(io.StringIO()):
                if not examine(other, theirs)[1]:
                    found.append(other["name"])
    return found


def compare(exercise: dict, case: dict, found: list[dict], wanted: list[dict]) -> Difference | None:
    """The first difference between results and what is wanted, over the calls of a case; None if there is none."""
    names, (rtol, atol) = tuple(exercise["parameters"]), case["tolerance"]
    parts = (
        difference(result, right, rtol, atol, names, tuple(case["gradients"]))
        for result, right in zip(found, decode_results(wanted))
    )
    return next(filter(None, parts), None)


def known_mistake(exercise: dict, results: list[list[dict]], wrong: list[Difference | None]) -> dict | None:
    """The mistake that explains what is wrong, if it is one of those that are published."""
    cases, mistakes = exercise["cases"], exercise["mistakes"]

    @cache
    def agrees(mistake: int, case: int) -> bool:
        return not compare(exercise, cases[case], results[case], mistakes[mistake]["results"][case])

    @cache
    def mistaken(mistake: int, case: int) -> bool:
        theirs = decode_results(mistakes[mistake]["results"][case])
        return compare(exercise, cases[case], theirs, cases[case]["expected"]) is not None

    number = find_mistake([w is not None for w in wrong], len(mistakes), agrees, mistaken)
    return None if number is None else mistakes[number]


def as_text(exercise: dict, wrong: list, mistake: dict | None) -> str:
    """The report: a line a case, what was expected where it is not right, and the mistake if it is known."""
    width = max(len(case["name"]) for case in exercise["cases"])
    lines = []
    for case, found in zip(exercise["cases"], wrong):
        if found is None:
            lines.append(f"  right   {case['name']}")
            continue
        lines.append(f"  WRONG   {case['name']:<{width}}   {found.text}")
        lines += textwrap.wrap(
            f"asked for: {case['expects']}", 100, initial_indent=" " * 10, subsequent_indent=" " * 20
        )
    hint = []
    if mistake:  # first, since the sentences of the cases tell what each is about, not what went wrong
        equation = mistake["equation"] or exercise["equation"]
        lecture = f"lecture {int(equation.split('.')[0]):02d}"
        text = f"Looks like a known mistake: {mistake['hint']} See equation ({equation}), {lecture}."
        hint = [*textwrap.wrap(text, 100), ""]
    return "\n".join([exercise["name"], *hint, *lines, "", tally(len(wrong) - sum(map(bool, wrong)), exercise)])


def tally(right: int, exercise: dict) -> str:
    visible, hidden = len(exercise["cases"]), exercise["hidden"]
    count = f"{right} of {visible} visible checks pass"
    if exercise["points"] == 0:
        return f"{count}; this exercise is optional and not graded."
    return f"{count}; {hidden} hidden ones run when it is graded."
