"""Do the hidden cases see every wrong answer, and do they accept every right one? All exercises, some minutes.

    python benchmarks/mutation.py

Runs every known mistake, every further wrong implementation and every unusual right one of each exercise through the
cases, with three secrets. Writes benchmarks/results/mutation.json and mutation.md. `tests/grading/test_exercises.py`
asserts the same at every run of the tests.
"""

import json
from datetime import date
from pathlib import Path

from cs336_alignment.grading.exercise import Exercise, exercises
from cs336_alignment.grading.score import Question, ask, case_seeds, known_mistake
from cs336_alignment.grading.visible import VISIBLE_SEED

RESULTS = Path(__file__).parent / "results"
SECRETS = ("a", "b", "c")


def asked(exercise: Exercise, secret: str) -> list[Question]:
    seeds = case_seeds(exercise, secret, "ada")
    return [ask(exercise, case, seeds[case.name]) for case in exercise.cases]


def points(questions: list[Question], function) -> float:
    return sum(q.case.points for q in questions if q.difference(q.results(function)) is None)


def row(exercise: Exercise) -> dict:
    """Counts for one exercise: wrong implementations, those that lose hidden points with every secret, those whose
    hint the visible cases give; right implementations and those that get all points with every secret."""
    wrong = [mistake.function for mistake in exercise.mistakes] + list(exercise.wrong)
    with_secrets = [asked(exercise, secret) for secret in SECRETS]
    hidden = [[q for q in questions if not q.case.visible] for questions in with_secrets]
    worth = sum(case.points for case in exercise.cases if not case.visible)
    killed = sum(all(points(questions, f) < worth for questions in hidden) for f in wrong)
    visible = [ask(exercise, case, VISIBLE_SEED) for case in exercise.cases if case.visible]
    hinted = 0
    for mistake in exercise.mistakes:
        results = [list(q.results(mistake.function)) for q in visible]
        found = known_mistake(visible, results, [q.difference(x) for q, x in zip(visible, results)])
        hinted += found is not None and found.hint == mistake.hint
    accepted = sum(all(points(qs, f) == exercise.points for qs in with_secrets) for f in exercise.unusual)
    return {
        "assignment": exercise.assignment,
        "exercise": exercise.name,
        "visible cases": len(visible),
        "hidden cases": len(exercise.cases) - len(visible),
        "wrong": len(wrong),
        "lose hidden points": killed,
        "get their hint": hinted,
        "unusual, right": len(exercise.unusual),
        "accepted": accepted,
    }


def main() -> None:
    rows = [row(exercise) for exercise in exercises() if not exercise.optional]
    counts = [key for key, value in rows[0].items() if isinstance(value, int)]
    total = {"assignment": "all", "exercise": ""} | {key: sum(r[key] for r in rows) for key in counts}
    record = {"date": date.today().isoformat(), "rows": rows, "total": total}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "mutation.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# Do the checks see what is wrong?",
        "",
        f"{record['date']}; made by `python benchmarks/mutation.py`. A wrong implementation counts as seen if it loses "
        "points on hidden cases for each of three secrets; as hinted if the visible cases alone name its mistake. An "
        "unusual right one counts as accepted if it gets all points for each secret.",
        "",
        "| " + " | ".join(total) + " |",
        "|---" * len(total) + "|",
    ]
    lines += ["| " + " | ".join(str(value) for value in r.values()) + " |" for r in [*rows, total]]
    (RESULTS / "mutation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
