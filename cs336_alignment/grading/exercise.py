"""What an exercise is: one definition from which the check, the grade and the mutation test are made.

Each file of `exercises/` holds one `EXERCISE`. Its reference is the package's own function; its cases make seeded
inputs; its known mistakes are wrong implementations, each with a hint that names it. They serve three times: `check`
and the feedback say which mistake a student's numbers look like, and the mutation test wants every one of them to
lose points on hidden cases.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import chain, repeat
from pathlib import Path

import torch

from cs336_alignment.grading.compare import Difference, difference
from cs336_alignment.grading.probe import run_calls

FLOAT32 = (1e-4, 1e-5)  # rtol, atol: another order of the same float32 operations differs by some 1e-6
FLOAT64 = (1e-7, 1e-9)  # the same for float64; wide enough for 1e-8, tight enough to see a detour through float32
LARGE = (1e-4, 1e-3)  # small results beside float32 numbers in the hundreds, whose own rounding is 3e-5


@dataclass(frozen=True)
class Case:
    """Some calls of the function that together ask one thing. All must be right, and no constant is right on all."""

    name: str
    expects: str  # what is expected of the value, as a sentence a student reads when it is not so
    make: Callable[[torch.Generator], list[tuple]]  # the calls: a tuple of positional arguments each
    points: float
    visible: bool = False
    gradients: tuple[int, ...] = ()  # positions of arguments; see probe.run_calls
    after: tuple[int, ...] = ()
    tolerance: tuple[float, float] = FLOAT32

    def calls(self, seed: int) -> list[tuple]:
        return self.make(torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Mistake:
    """A wrong implementation that people write, and the sentence that helps them."""

    hint: str  # "You average over the tokens; DPO needs the sum."
    function: Callable
    equation: str | None = None  # of the lecture, where it differs from the exercise's


@dataclass(frozen=True)
class Exercise:
    name: str  # of the function
    assignment: str
    order: int  # within the assignment
    points: float  # the sum of the cases'; 0 makes the exercise optional
    minutes: int
    lecture: str  # file name of the lecture without suffix
    equation: str  # "12.6"
    parameters: tuple[str, ...]
    reference: Callable
    cases: tuple[Case, ...]
    mistakes: tuple[Mistake, ...]
    wrong: tuple[Callable, ...] = ()  # further wrong implementations, without a hint of their own
    unusual: tuple[Callable, ...] = ()  # right implementations that look different
    stripped: tuple[str, ...] = ()  # "dpo.dpo_loss": what a student's kernel must not find in the package

    @property
    def optional(self) -> bool:
        """Only checked, never graded."""
        return self.points == 0

    def results(self, function: Callable, case: Case, calls: list[tuple]) -> list[dict]:
        return run_calls(function, calls, case.gradients, case.after)

    def difference(self, results: Iterable[dict], expected: Iterable[dict], case: Case) -> Difference | None:
        """The first difference over the calls of a case; None if there is none. Looks no further than that."""
        answered = chain(results, repeat({}))  # nothing for calls that got no answer
        parts = (
            difference(result, wanted, *case.tolerance, self.parameters, case.gradients)
            for result, wanted in zip(answered, expected)
        )
        return next(filter(None, parts), None)


@cache
def exercises(assignment: str | None = None) -> tuple[Exercise, ...]:
    """All exercises, or those of an assignment, in their order.

    Raises: ValueError for an assignment that has none.
    """
    folder = Path(__file__).parent / "exercises"
    found = [
        import_module(f"cs336_alignment.grading.exercises.{path.stem}").EXERCISE for path in folder.glob("[a-z]*.py")
    ]
    names = sorted({exercise.assignment for exercise in found})
    if assignment is not None and assignment not in names:
        raise ValueError(f"there is no assignment {assignment!r}; there are {', '.join(names)}")
    chosen = [e for e in found if assignment in (None, e.assignment)]
    return tuple(sorted(chosen, key=lambda exercise: (exercise.assignment, exercise.order)))


def exercise(name: str) -> Exercise:
    """The exercise of a function's name. Raises: ValueError if there is none."""
    for candidate in exercises():
        if candidate.name == name:
            return candidate
    raise ValueError(f"there is no exercise {name!r}; there are {', '.join(e.name for e in exercises())}")


def stripped_of(assignment: str | None = None) -> list[str]:
    """The package's functions that a student's kernel must not find, of the exercises of an assignment or of all."""
    return sorted({name for exercise in exercises(assignment) for name in exercise.stripped})
