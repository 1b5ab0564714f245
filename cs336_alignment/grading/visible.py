"""Writes what students may know of an exercise: numbers, never code. `check.py` reads these files."""

import json
from collections.abc import Iterable
from pathlib import Path

from cs336_alignment.grading.check import VISIBLE
from cs336_alignment.grading.exercise import Exercise, exercises
from cs336_alignment.grading.probe import encode_calls, encode_results
from cs336_alignment.grading.score import ask

VISIBLE_SEED = 0


def public_part(exercise: Exercise) -> dict:
    """The JSON of an exercise: its visible cases with inputs and expected values, and the values of the mistakes
    that these cases can tell from the right answer."""
    questions = [ask(exercise, case, VISIBLE_SEED) for case in exercise.cases if case.visible]
    mistakes = [
        {"hint": m.hint, "equation": m.equation, "results": [numbers(q.results(m.function)) for q in questions]}
        for m in exercise.mistakes
        if any(question.difference(question.results(m.function)) for question in questions)
    ]
    return {
        "name": exercise.name,
        "assignment": exercise.assignment,
        "order": exercise.order,
        "points": exercise.points,
        "minutes": exercise.minutes,
        "lecture": exercise.lecture,
        "equation": exercise.equation,
        "parameters": exercise.parameters,
        "stripped": exercise.stripped,
        "hidden": sum(not case.visible for case in exercise.cases),
        "cases": [
            {
                "name": question.case.name,
                "expects": question.case.expects,
                "points": question.case.points,
                "gradients": question.case.gradients,
                "after": question.case.after,
                "tolerance": question.case.tolerance,
                "calls": encode_calls(question.calls),
                "expected": numbers(question.expected),
            }
            for question in questions
        ],
        "mistakes": mistakes,
    }


def numbers(results: Iterable[dict]) -> list[dict]:
    """Results as JSON, without what an error says: that is the reference's own wording."""
    return [{key: x for key, x in r.items() if key not in ("message", "line")} for r in encode_results(results)]


def text_of(exercise: Exercise) -> str:
    return json.dumps(public_part(exercise), indent=1) + "\n"


def write_visible(folder: Path = VISIBLE) -> None:
    """Writes the files of all exercises and removes those of exercises that are gone."""
    folder.mkdir(exist_ok=True)
    wanted = {f"{exercise.name}.json": text_of(exercise) for exercise in exercises()}
    for path in folder.glob("*.json"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text, encoding="utf-8")
