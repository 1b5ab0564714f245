"""The judge: the kernel only computes, and this process decides.

In place of a cell with hidden tests the kernel gets inputs, drawn from a seed of the course's own for this student,
and says what the student's function returned. Here the results are compared with the reference, which the kernel
has never seen, and the cell's outputs become a report and the points, which nbgrader reads as partial credit.
`grade.py` grades a batch with it, `autograde.py` puts it into nbgrader's own command.
"""

import html
import re
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nbformat import NotebookNode
from torch import Tensor

from cs336_alignment.grading.exercise import Exercise
from cs336_alignment.grading.probe import decode_results, encode_calls
from cs336_alignment.grading.sandbox import INTERRUPTED, Died, Server
from cs336_alignment.grading.score import Question, Score, ask_all, case_seeds, score_of

NOT_RUN = ("check-", "experiment-")  # how the ids of cells start that grading does not need
LARGEST_ANSWER = 20_000_000  # bytes of a cell's kept text; honest ones are far below
MOST_ANSWERS = 1000  # cases of an exercise, and calls of a case
IN_TIME = f"The function did not come to an end: its cases were {INTERRUPTED}."
ONE_JUDGE = threading.Lock()  # workers are threads, and calling a function quietly changes sys.stdout for all of them
TEXT_KEPT, PICTURES_KEPT = 20_000, 2_000_000  # characters of a cell's text and of a notebook's pictures


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


def probe(questions: Sequence[Question]) -> dict:
    """The step that a kernel gets in place of an exercise's hidden tests: inputs, and no answer."""
    cases = [{"calls": encode_calls(q.calls), "gradients": q.case.gradients, "after": q.case.after} for q in questions]
    return {"probe": questions[0].exercise.name, "cases": cases}


def read_answers(answers: Sequence) -> list | None:
    """The results of the cases, decoded, up to the first that makes no sense; None if there are none."""
    found = []
    for answer in answers[:MOST_ANSWERS]:
        try:
            found.append([sensible(result) for result in decode_results(answer[:MOST_ANSWERS])])
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, RuntimeError):
            break
    return found or None


def sensible(result: dict) -> dict:
    """A decoded result, as far as it is one of `run_calls`: an answer may be forged. Raises: ValueError."""
    if "error" in result:
        line = result.get("line")
        return {
            "error": clean_text(str(result["error"])[:100]),
            "message": clean_text(str(result.get("message", ""))[:500]),
            "line": None if line is None else clean_text(str(line)[:500]),
        }
    parts = {"value": result["value"], "changed": result.get("changed", [])}
    if not (isinstance(parts["changed"], list) and all(isinstance(x, int) and x >= 0 for x in parts["changed"])):
        raise ValueError("changed is no list of positions")
    for name in ("gradients", "after"):
        if name in result:
            parts[name] = result[name]
            if not (isinstance(parts[name], list) and all(x is None or isinstance(x, Tensor) for x in parts[name])):
                raise ValueError(f"{name} is no list of tensors")
    return parts


# -------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Judged:
    """What became of a notebook."""

    scores: dict[str, Score]
    crashes: list[dict]  # cells that died or were interrupted: {"cell": which, "why": half a sentence}
    seconds: float
    cpu_seconds: float  # of the submission's processes


def judge(
    notebook: NotebookNode, graded: Sequence[Exercise], student: str, secret: str, server: Server,
    files: dict[str, bytes] | None = None,
) -> Judged:  # fmt: skip
    """Runs a notebook and writes outputs, reports and points into it.

    notebook: with the release's ids on its cells (see rescue.py). graded: the exercises to judge, all of one
    assignment; points cells of others are left as they are. files: what lies beside the notebook.
    """
    begin = time.monotonic()
    with ONE_JUDGE:
        asked = {exercise.name: ask_all(exercise, case_seeds(exercise, secret, student)) for exercise in graded}
        steps = list(steps_of(notebook, {name: probe(questions) for name, questions in asked.items()}))
    found, lost, cpu_seconds = run(server, steps, files or {})
    cut_short = {index: INTERRUPTED for index, (outputs, _) in found.items() if was_interrupted(outputs)}
    scores = {}
    for index, step in steps:
        outputs, answers = found.get(index, ([], []))
        problem = lost.get(index) and f"This cell got no further: {lost[index]}."
        cell = notebook.cells[index]
        if "probe" not in step:
            cell.outputs = kept_outputs(outputs)
            if problem:
                cell.outputs.append(error_output("DeadKernelError", problem))
            continue
        with ONE_JUDGE:
            result = score_of(asked[step["probe"]], read_answers(answers), problem or what_went_wrong(outputs))
        if problem or index in cut_short:
            result = replace(result, problem=problem or IN_TIME)
        scores[step["probe"]] = result
        cell.outputs = [
            new_output("display_data", {"text/html": report(result), "text/plain": clean_text(str(result))}),
            new_output("execute_result", {"text/plain": repr(result.points)}),
        ]
    limit_pictures(notebook)
    crashes = [{"cell": place(notebook, index), "why": why} for index, why in sorted((cut_short | lost).items())]
    return Judged(scores, crashes, time.monotonic() - begin, cpu_seconds)


def steps_of(notebook: NotebookNode, probes: dict[str, dict]) -> Iterator[tuple[int, dict]]:
    """The cells to run, with their places. Points cells of exercises become probes; tags do not count."""
    for index, cell in enumerate(notebook.cells):
        cell.metadata.pop("tags", None)
        name = grade_id(cell)
        if cell.cell_type != "code":
            continue
        if cell.metadata.get("nbgrader", {}).get("grade") and not name.startswith(NOT_RUN):
            if name in probes:
                yield index, probes[name]
            continue
        cell.outputs, cell.execution_count = [], None
        if not name.startswith(NOT_RUN):
            yield index, {"code": cell.source}


def grade_id(cell: NotebookNode) -> str:
    return cell.metadata.get("nbgrader", {}).get("grade_id", "")


def was_interrupted(outputs: Sequence[dict]) -> bool:
    return bool(outputs) and outputs[-1].get("evalue", "") == INTERRUPTED and outputs[-1].get("ename") == "TimeoutError"


def place(notebook: NotebookNode, index: int) -> str:
    """Which cell that is, for a person: its id, or what it begins with and where it stands."""
    if name := grade_id(notebook.cells[index]):
        return name
    before = next((grade_id(cell) for cell in reversed(notebook.cells[:index]) if grade_id(cell)), "")
    lines = [line for line in notebook.cells[index].source.splitlines() if line.strip()]
    begin = clean_text((lines or [""])[0].strip()[:60])
    return f"the cell `{begin}`" + (f" after {before}" if before else "")


def run(
    server: Server, steps: Sequence[tuple[int, dict]], files: dict[str, bytes]
) -> tuple[dict[int, tuple[list, list]], dict[int, str], float]:
    """Outputs and answers of each step, why some were lost, and the CPU seconds of it all.

    A step in which the kernel dies costs that step: the others are run again in a fresh kernel without it (but no probe
    is asked twice).
    """
    found, lost, cpu_seconds = {}, {}, 0.0
    deadline = time.monotonic() + server.limits.notebook_seconds
    while True:
        left = [(i, step) for i, step in steps if i not in lost and not ("probe" in step and i in found)]
        session = None
        try:
            with server.run(files) as session:
                for index, step in left:
                    seconds = min(server.limits.cell_seconds, deadline - time.monotonic())
                    if seconds <= 0:
                        lost[index] = "the time for the whole notebook was up"
                        continue
                    try:
                        found[index] = session.step(step, seconds)
                    except Died as death:
                        found[index], lost[index] = (death.outputs, death.answers), str(death)
                        break
                else:
                    break
        finally:
            cpu_seconds += session.cpu_seconds if session else 0.0
    return found, lost, cpu_seconds


# -------------------------------------------------------------------------------------------------- outputs


def kept_outputs(outputs: Sequence[dict]) -> list[NotebookNode]:
    """A cell's outputs as far as they are harmless: text, errors and pictures. What a kernel says is not trusted."""
    kept, left = [], TEXT_KEPT
    for output in outputs:
        kind, data = output.get("output_type"), output.get("data")
        if kind == "stream":
            text = str(output.get("text", ""))[:left]
            left -= len(text)
            if text and kept and kept[-1].output_type == "stream" and kept[-1].name == output.get("name"):
                kept[-1].text += clean_text(text)
            elif text:
                name = "stderr" if output.get("name") == "stderr" else "stdout"
                kept.append(new_output("stream", name=name, text=clean_text(text)))
        elif kind == "error":
            lines = output.get("traceback")
            lines = [clean_text(str(line)[:2000]) for line in (lines if isinstance(lines, list) else [])[-100:]]
            left -= sum(map(len, lines)) // 10  # an honest one is long
            kept.append(error_output(str(output.get("ename")), str(output.get("evalue")), lines))
        elif kind in ("display_data", "execute_result") and isinstance(data, dict):
            bundle = {"text/plain": clean_text(str(data.get("text/plain", ""))[:left])}
            left -= len(bundle["text/plain"])
            for picture in ("image/png", "image/jpeg"):
                if re.fullmatch(r"[A-Za-z0-9+/=\s]+", str(data.get(picture, ""))):
                    bundle[picture] = str(data[picture])
            kept.append(new_output(kind, bundle))
        if left <= 0 or len(kept) > 100:
            kept.append(new_output("stream", name="stdout", text="... the rest of this cell's output is left out\n"))
            break
    return kept


def clean_text(text: str) -> str:
    """Text that can be written as UTF-8: half a surrogate pair cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def error_output(name: str, value: str, traceback: Sequence[str] = ()) -> NotebookNode:
    name, value = clean_text(name[:100]), clean_text(value[:1000])
    return new_output("error", ename=name, evalue=value, traceback=list(traceback) or [f"{name}: {value}"])


def limit_pictures(notebook: NotebookNode) -> None:
    """Drops a notebook's pictures where there are too many to keep and to send back."""
    left = PICTURES_KEPT
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            for kind in ("image/png", "image/jpeg"):
                left -= len(output.get("data", {}).get(kind, ""))
                if left < 0:
                    output.get("data", {}).pop(kind, None)


def new_output(kind: str, data: dict | None = None, **fields) -> NotebookNode:
    """As nbformat's, which validates each output with care and takes its time; the notebook is validated as a whole."""
    if data is not None:
        fields = {"data": NotebookNode(data), "metadata": NotebookNode()} | fields
    if kind == "execute_result":
        fields["execution_count"] = None
    return NotebookNode(output_type=kind, **fields)


CELL = "padding: 2px 12px 2px 0; text-align: left; vertical-align: top"  # nbgrader's pages have none of their own


def report(result: Score) -> str:
    """The report as a student finds it in the feedback: each case with its points and, where it is wrong, why.
    What a hidden case expected is not in it. What it was given is not either, unless the function itself said so in an
    error; feedback.py leaves that out too."""
    rows = []
    for verdict in result.verdicts:
        why = html.escape(clean_text(verdict.why))
        if verdict.wrong:
            why += f"<br><em>Expected: {html.escape(verdict.case.expects)}</em>"
        mark = "&#10007;" if verdict.wrong else "&#10003;"
        points = f"{verdict.points:g} / {verdict.case.points:g}"
        name = html.escape(verdict.case.name) + ("" if verdict.case.visible else " (hidden)")
        rows.append((mark, name, points, why))
    title = f"<p><strong>{result.exercise.name}: {result.points:g} of {result.exercise.points:g} points</strong></p>"
    notes = [f"<p>{html.escape(clean_text(result.problem))}</p>"] if result.problem else []
    notes += [f"<p>Looks like a known mistake: {html.escape(result.hint)}</p>"] if result.hint else []
    rows.insert(0, tuple(f"<b>{word}</b>" for word in ("", "case", "points", "what was wrong")))
    cells = ("".join(f'<td style="{CELL}">{text}</td>' for text in row) for row in rows)
    table = '<table style="margin: 0 0 12px">' + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"
    return "".join([title, *notes, table])


def what_went_wrong(outputs: Sequence[dict]) -> str:
    """Why a function gave no answers, as a sentence for the student."""
    if was_interrupted(outputs):
        return IN_TIME
    for output in outputs:
        if output.get("output_type") == "error":
            name, value = clean_text(str(output.get("ename")))[:100], clean_text(str(output.get("evalue")))[:300]
            if name == "NameError":
                return f"The function was not there when its cases ran: {value}."
            return f"The function's cases stopped with {name}: {value}"
    return "The function gave no answer that could be read."


# ------------------------------------------------------------------------------------------- what it runs with


def preloaded(release: NotebookNode) -> list[str]:
    """The modules that a release's own cells import: a server imports them once for all submissions."""
    source = "\n".join(cell.source for cell in release.cells if cell.cell_type == "code" and grade_id(cell) == "setup")
    return sorted(set(re.findall(r"^(?:from|import) +([A-Za-z_][\w.]*)", source, re.MULTILINE)))
