"""Writes what students may know of an exercise: numbers, never code. `check.py` reads these files."""

import json
from pathlib import Path

from cs336_alignment.grading.check import VISIBLE
from cs336_alignment.grading.exercise import Exercise, exercises
from cs336_alignment.grading.probe import encode, encode_results
from cs336_alignment.grading.score import explains

VISIBLE_SEED = 0


def public_part(exercise: Exercise) -> dict:
    """The JSON of an exercise: its visible cases with inputs and expected values, and the values of the mistakes
    that these cases can tell from the right answer."""
    cases = [case for case in exercise.cases if case.visible]
    calls = {case.name: case.calls(VISIBLE_SEED) for case in cases}

    def plain(function, case) -> list[dict]:
        results = encode_results(exercise.results(function, case, calls[case.name]))
        return [{key: x for key, x in result.items() if key not in ("message", "line")} for result in results]

    mistakes = [
        {"hint": m.hint, "equation": m.equation, "results": [plain(m.function, case) for case in cases]}
        for m in exercise.mistakes
        if explains(exercise, cases, m, dict.fromkeys(calls, VISIBLE_SEED))
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
                "name": case.name,
                "expects": case.expects,
                "points": case.points,
                "gradients": case.gradients,
                "after": case.after,
                "tolerance": case.tolerance,
                "calls": [[encode(argument) for argument in call] for call in calls[case.name]],
                "expected": plain(exercise.reference, case),
            }
            for case in cases
        ],
        "mistakes": mistakes,
    }


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
