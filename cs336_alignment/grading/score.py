"""Points for results: which cases are right, why the others are not, and which known mistake explains them."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice, repeat

from cs336_alignment.grading.compare import Difference, find_mistake
from cs336_alignment.grading.exercise import Case, Exercise, Mistake


@dataclass(frozen=True)
class Verdict:
    """What became of one case."""

    case: Case
    wrong: Difference | None  # None if the case is right

    @property
    def points(self) -> float:
        return self.case.points if self.wrong is None else 0.0

    @property
    def why(self) -> str:
        """What is wrong, in words; of a hidden case without its expected number."""
        if self.wrong is None:
            return ""
        return self.wrong.text if self.case.visible else self.wrong.without_numbers


@dataclass(frozen=True)
class Score:
    """What became of an exercise."""

    exercise: Exercise
    verdicts: tuple[Verdict, ...]
    hint: str | None  # the known mistake that explains what is wrong
    problem: str | None  # why there was nothing to judge

    @property
    def points(self) -> float:
        return float(sum(verdict.points for verdict in self.verdicts))

    def __str__(self) -> str:
        lines = [f"{self.exercise.name}: {self.points:g} of {self.exercise.points:g} points"]
        lines += [self.problem] if self.problem else []
        for verdict in self.verdicts:
            lines.append(
                f"  {'WRONG' if verdict.wrong else 'right'}  {verdict.case.name}"
                + ": " * bool(verdict.why)
                + verdict.why
            )
        return "\n".join(lines + ([f"Looks like a known mistake: {self.hint}"] if self.hint else []))


def case_seeds(exercise: Exercise, secret: str, student: str) -> dict[str, int]:
    """The seeds of the cases' inputs: the same at every regrading, others for every student, and not to be guessed."""

    def seed(case: Case) -> int:
        text = "\0".join((secret, exercise.assignment, student, exercise.name, case.name))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")

    return {case.name: seed(case) for case in exercise.cases}


@dataclass(frozen=True)
class Question:
    """A case with its inputs drawn and the reference run: once, however many answers are compared with it."""

    exercise: Exercise
    case: Case
    calls: list[tuple]
    expected: list[dict]

    def results(self, function: Callable) -> Iterator[dict]:
        """What a function gives, call by call as they are asked for."""
        for call in self.calls:
            yield from self.exercise.results(function, self.case, [call])

    def difference(self, results: Iterable[dict]) -> Difference | None:
        """What is wrong with results, decoded; None if nothing is."""
        return self.exercise.difference(results, self.expected, self.case)


def ask(exercise: Exercise, case: Case, seed: int) -> Question:
    calls = case.calls(seed)
    return Question(exercise, case, calls, exercise.results(exercise.reference, case, calls))


def score(
    exercise: Exercise, answers: list[list[dict]] | None, seeds: dict[str, int], problem: str | None = None
) -> Score:
    """Judges results of all cases, decoded; None where a submission gave none, for the reason `problem`."""
    return score_of(ask_all(exercise, seeds), answers, problem)


def ask_all(exercise: Exercise, seeds: dict[str, int]) -> list[Question]:
    return [ask(exercise, case, seeds[case.name]) for case in exercise.cases]


def score_of(questions: Sequence[Question], answers: list[list[dict]] | None, problem: str | None = None) -> Score:
    """The same for questions that were asked before."""
    exercise = questions[0].exercise
    found = list(islice(chain(answers or [], repeat([])), len(questions)))
    wrong = [question.difference(results) for question, results in zip(questions, found)]
    mistake = known_mistake(questions, found, wrong) if answers is not None else None
    hint = mistake and f"{mistake.hint} See equation ({mistake.equation or exercise.equation})."
    return Score(exercise, tuple(map(Verdict, exercise.cases, wrong)), hint, problem if answers is None else None)


def known_mistake(
    questions: Sequence[Question], found: Sequence[Sequence[dict]], wrong: Sequence[Difference | None]
) -> Mistake | None:
    """The mistake that explains what is wrong with the results found, if it is a known one.

    Mistakes run only as far as that needs to be known: most are ruled out by one call.
    """
    exercise = questions[0].exercise

    @cache
    def agrees(mistake: int, number: int) -> bool:
        question = questions[number]
        theirs = question.results(exercise.mistakes[mistake].function)
        return exercise.difference(found[number], theirs, question.case) is None

    def mistaken(mistake: int, number: int) -> bool:
        question = questions[number]
        return question.difference(question.results(exercise.mistakes[mistake].function)) is not None

    chosen = find_mistake([x is not None for x in wrong], len(exercise.mistakes), agrees, mistaken)
    return None if chosen is None else exercise.mistakes[chosen]
