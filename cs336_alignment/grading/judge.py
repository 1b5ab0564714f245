"""The judge: nbgrader's Execute, but the kernel only computes and this process decides.

In place of a cell with hidden tests the kernel gets inputs, drawn from a seed of the course's own for this student,
and says what the student's function returned. Here the results are compared with the reference, which the kernel
has never seen, and the cell's outputs become a report and the points, which nbgrader reads as partial credit.
`nbgrader_config.py` puts `JudgedExecute` in the place of Execute; nothing else of nbgrader changes.
"""

import copy
import html
import json
import os
import secrets
import tempfile
from contextlib import contextmanager
from pathlib import Path

from nbformat.v4 import new_output
from nbgrader.preprocessors import Execute
from traitlets import Unicode

from cs336_alignment.grading.editions import kernel_edition
from cs336_alignment.grading.exercise import Exercise, exercises, stripped_of
from cs336_alignment.grading.probe import decode_results, encode
from cs336_alignment.grading.score import Score, case_seeds, score
from cs336_alignment.grading.student import ANSWERS

LARGEST_ANSWER = 20_000_000  # characters: no honest one is longer than some ten thousand


def course_secret(path: Path) -> str:
    """The secret that seeds hidden cases, made at first use. Keep the file: with another one, regrading asks
    other (equally hard) questions."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(secrets.token_hex(32), encoding="utf-8")
        part.chmod(0o600)
        part.replace(path)
    return path.read_text(encoding="utf-8").strip()


def probe_source(exercise: Exercise, seeds: dict[str, int]) -> str:
    """What the kernel runs in place of the hidden tests: inputs in, results out. It holds no answer."""
    cases = [
        {"calls": [[encode(x) for x in call] for call in case.calls(seeds[case.name])],
         "gradients": case.gradients, "after": case.after}
        for case in exercise.cases
    ]  # fmt: skip
    return (
        "from cs336_alignment.grading.student import answer as _answer\n"
        f"_answer({exercise.name}, {json.dumps(json.dumps(cases))})"
    )


def read_answers(outputs: list) -> list | None:
    """The results of all cases as the kernel published them; None if there are none that can be read."""
    for output in reversed(outputs):
        data = output.get("data", {}).get(ANSWERS)
        if data is None:
            continue
        try:
            text = data if isinstance(data, str) else json.dumps(data)
            if len(text) > LARGEST_ANSWER:
                return None
            return [decode_results(results) for results in json.loads(text)]
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, RuntimeError):
            return None
    return None


# -------------------------------------------------------------------------------------------------- reports

CELL = "padding: 2px 12px 2px 0; text-align: left; vertical-align: top"  # nbgrader's pages have none of their own


def report(result: Score) -> str:
    """The report as a student finds it in the feedback: each case with its points and, where it is wrong, why.
    What a hidden case was given and what it expected is not in it."""
    rows = []
    for verdict in result.verdicts:
        why = html.escape(verdict.why)
        if verdict.wrong:
            why += f"<br><em>Expected: {html.escape(verdict.case.expects)}</em>"
        mark = "&#10007;" if verdict.wrong else "&#10003;"
        points = f"{verdict.points:g} / {verdict.case.points:g}"
        name = html.escape(verdict.case.name) + ("" if verdict.case.visible else " (hidden)")
        rows.append((mark, name, points, why))
    title = f"<p><strong>{result.exercise.name}: {result.points:g} of {result.exercise.points:g} points</strong></p>"
    notes = [f"<p>{html.escape(result.problem)}</p>"] if result.problem else []
    notes += [f"<p>Looks like a known mistake: {html.escape(result.hint)}</p>"] if result.hint else []
    rows.insert(0, tuple(f"<b>{word}</b>" for word in ("", "case", "points", "what was wrong")))
    cells = ("".join(f'<td style="{CELL}">{text}</td>' for text in row) for row in rows)
    table = '<table style="margin: 0 0 12px">' + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"
    return "".join([title, *notes, table])


def what_went_wrong(outputs: list) -> str | None:
    """Why a cell published no answers, as a sentence for the student."""
    for output in outputs:
        if output.output_type == "error":
            if output.ename == "NameError":
                return f"The function was not there when its cases ran: {output.evalue}."
            return f"The cell stopped with {output.ename}: {str(output.evalue)[:300]}"
    return "The kernel gave no answer: it may have died, or run out of time, in an earlier cell."


# ------------------------------------------------------------------------------------------------ nbgrader


class JudgedExecute(Execute):
    """Runs a submission with probes in place of hidden tests, and judges what they bring back.

    Cells are known by their nbgrader id: the id of a cell with points is its exercise's name; cells whose ids start
    with "check-" or "experiment-" are not run. Ids and sources of locked cells are nbgrader's, restored from the
    gradebook before this runs, so what a submission says about its own cells does not count. Tags do not count either.
    A notebook without such exercises is executed as nbgrader always does.
    """

    secret_file = Unicode(".course/grading-secret", help="What seeds the hidden cases; beside the gradebook.").tag(
        config=True
    )

    def preprocess(self, nb, resources, km=None):
        self.probes: dict[str, tuple[Exercise, dict[str, int]]] = {}
        identity = resources["nbgrader"]
        try:
            graded = [e for e in exercises(identity["assignment"]) if not e.optional]
        except ValueError:  # an assignment that is not of this kind
            return super().preprocess(nb, resources, km)
        database = identity["db_url"].removeprefix("sqlite:///")
        root = Path(database).parent if database != identity["db_url"] else Path.cwd()
        secret = course_secret(root / self.secret_file)
        with tempfile.TemporaryDirectory(prefix="kernel-") as folder:
            edition = kernel_edition(stripped_of(identity["assignment"]), Path(folder))
            self.probes = {e.name: (e, case_seeds(e, secret, identity["student"])) for e in graded}
            with environment(PYTHONPATH=str(edition)):
                return super().preprocess(nb, resources, km)

    def preprocess_cell(self, cell, resources, index):
        if not self.probes:
            return super().preprocess_cell(cell, resources, index)
        cell.metadata.pop("tags", None)
        name = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        if cell.cell_type != "code":
            return cell, resources
        if name.startswith(("check-", "experiment-")):
            cell.outputs = []
            return cell, resources
        if name not in self.probes or not cell.metadata.nbgrader.get("grade"):
            return super().preprocess_cell(cell, resources, index)
        exercise, seeds = self.probes[name]
        earlier = copy.deepcopy([c.get("outputs") for c in self.nb.cells[:index]])
        source, cell.source = cell.source, probe_source(exercise, seeds)
        try:
            self.execute_cell(cell, index, store_history=False)  # the inputs are in no In[]
        finally:
            cell.source = source
            for other, outputs in zip(self.nb.cells, earlier):  # nothing is written into cells that had ended
                if outputs is not None:
                    other.outputs = outputs
        result = score(exercise, read_answers(cell.outputs), seeds, what_went_wrong(cell.outputs))
        cell.outputs = [
            new_output("display_data", {"text/html": report(result), "text/plain": str(result)}),
            new_output("execute_result", {"text/plain": repr(result.points)}),
        ]
        return cell, resources


@contextmanager
def environment(**variables: str):
    """Environment variables that are set for a while; kernels that start meanwhile inherit them."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
