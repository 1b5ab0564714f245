"""Points for results: which cases are right, why the others are not, and which known mistake explains them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

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


def score(
    exercise: Exercise, answers: list[list[dict]] | None, seeds: dict[str, int], problem: str | None = None
) -> Score:
    """Judges results of all cases, decoded; None where a submission gave none, for the reason `problem`."""
    cases = exercise.cases
    found = [answers[i] if answers is not None and i < len(answers) else [] for i in range(len(cases))]
    verdicts = tuple(judge_case(exercise, case, results, seeds) for case, results in zip(cases, found))
    mistake = known_mistake(exercise, cases, found, seeds) if answers is not None else None
    hint = mistake and f"{mistake.hint} See equation ({mistake.equation or exercise.equation})."
    return Score(exercise, verdicts, hint, problem if answers is None else None)


def judge_case(exercise: Exercise, case: Case, results: list[dict], seeds: dict[str, int]) -> Verdict:
    """results: of the student's function on `case.calls(seed)`, decoded; seeds: by the case's name."""
    expected = exercise.results(exercise.reference, case, case.calls(seeds[case.name]))
    return Verdict(case, next(filter(None, exercise.differences(results, expected, case)), None))


def mistaken(exercise: Exercise, mistake: Mistake, case: Case, seeds: dict[str, int]) -> list[dict]:
    """What a mistake gives on a case."""
    return exercise.results(mistake.function, case, case.calls(seeds[case.name]))


def explains(exercise: Exercise, cases: Sequence[Case], mistake: Mistake, seeds: dict[str, int]) -> bool:
    """Whether a mistake gives a wrong result on at least one of the cases."""
    return any(
        judge_case(exercise, case, mistaken(exercise, mistake, case, seeds), seeds).wrong is not None for case in cases
    )


def known_mistake(
    exercise: Exercise, cases: Sequence[Case], results: Sequence[list[dict]], seeds: dict[str, int]
) -> Mistake | None:
    """The mistake that explains what is wrong with results of these cases, if it is a known one."""
    wrong = [judge_case(exercise, case, found, seeds).wrong is not None for case, found in zip(cases, results)]

    @cache
    def theirs(mistake: int, case: int) -> list[dict]:
        return mistaken(exercise, exercise.mistakes[mistake], cases[case], seeds)

    @cache
    def agrees(mistake: int, case: int) -> bool:
        return not any(exercise.differences(results[case], theirs(mistake, case), cases[case]))

    def is_mistaken(mistake: int, case: int) -> bool:
        return judge_case(exercise, cases[case], theirs(mistake, case), seeds).wrong is not None

    number = find_mistake(wrong, len(exercise.mistakes), agrees, is_mistaken)
    return None if number is None else exercise.mistakes[number]
