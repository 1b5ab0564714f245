"""The report on a class: `graded/ASSIGNMENT/report.html`. For the instructor alone; it needs no network.

What the class can do and what cost it points, which known mistakes were made how often, what the sanitiser found, who
waits for a person, what was late, slow or crashed, and which submissions are suspiciously alike.
"""

import io
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from urllib.parse import quote

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from cs336_alignment.grading.alike import Pair, Place, alike_of
from cs336_alignment.grading.feedback import STUB, duration, page_name, templates
from cs336_alignment.grading.markup import plain
from cs336_alignment.grading.records import Cell, Class, Record, grade_id, judged, notebook_of, read_cells, read_class
from cs336_alignment.grading.results import graded_folder, write_atomically
from cs336_alignment.paths import in_course

LONGEST_LIST = 40  # lines of a table that names students or cases
SLOW = 10
CONTEXT = 1  # lines around what is alike


@dataclass(frozen=True)
class Row:
    """An exercise in the class: of those who submitted and are graded there."""

    cell: Cell
    graded: int
    mean: float  # share of the points, 0 to 1
    full: float  # shares of the students
    none: float
    lost: float  # points, all students together


@dataclass(frozen=True)
class Loss:
    """Something that cost the class points."""

    exercise: str
    what: str
    students: int
    points: float  # all students together
    hidden: bool = False


def write_class_report(root: Path, assignment: str) -> Path:
    """Writes the report; returns its path. Raises: ValueError where nothing has been graded."""
    return write_class_report_of(read_class(root, assignment))[0]


def write_class_report_of(found: Class) -> tuple[Path, int]:
    """The report's path, and how many pairs of submissions it calls alike."""
    verdicts, notebooks = {}, {}
    for record in found.submitted():
        cells = notebook_of(found, record.student)
        verdicts[record.student] = judged(record, cells, found.assignment)
        notebooks[record.student] = [{key: c.get(key) for key in ("cell_type", "source", "metadata")} for c in cells]
    pairs = alike_of(found, notebooks)
    path = graded_folder(found.root, found.assignment) / "report.html"
    write_atomically(path, html(found, verdicts, notebooks, pairs))
    return path, len(pairs)


def html(found: Class, verdicts: dict[str, dict], notebooks: dict[str, list[dict]], pairs: list[Pair]) -> str:
    records, cells = found.submitted(), found.cells
    reports = [(record, record.report) for record in records]
    return (
        templates()
        .get_template("report.html")
        .render(
            found=found,
            records=records,
            totals=[record.total(cells) for record in records],
            median=median([record.total(cells) for record in records] or [0.0]),
            histogram=histogram([record.total(cells) for record in records], found.maximum),
            rows=[exercise_row(cell, records) for cell in cells],
            cases=dearest_cases(verdicts),
            hints=known_mistakes(verdicts),
            odd=[(r, [plain(str(x)) for x in report["findings"]]) for r, report in reports if report.get("findings")],
            crashed=[(r, list(map(crash, report["crashes"]))) for r, report in reports if report.get("crashes")],
            slow=sorted(
                ((float(p.get("seconds") or 0), r) for r, p in reports if p.get("seconds")), key=lambda x: -x[0]
            )[:SLOW],
            missing=[record for record in found.records if not record.submitted],
            idle=[r for r in records if without_work(notebooks[r.student], found)],
            waiting=[(c, who) for c in cells if (who := [r for r in records if c.name in r.waiting([c])])],
            again=[(r, names) for r in records if (names := marked_again(r, cells))],
            late=sorted((r for r in records if r.late.total_seconds() > 0), key=lambda r: -r.late.total_seconds()),
            duration=duration,
            pairs=[(pair, [(place, excerpt(place)) for place in telling(pair)]) for pair in pairs],
            link=lambda student: f"feedback/{quote(page_name(student))}",
            longest=LONGEST_LIST,
        )
    )


def crash(found: dict) -> tuple[str, str]:
    """Which cell, and why. A cell of the student's own is named by its first line."""
    return plain(str(found.get("cell", "?"))), plain(str(found.get("why", "")))


# ------------------------------------------------------------------------------------------- counting


def exercise_row(cell: Cell, records: list[Record]) -> Row:
    scores = [m.score for r in records if (m := r.marks.get(cell.name)) is not None and m.score is not None]
    count = max(1, len(scores))
    return Row(
        cell,
        len(scores),
        sum(scores) / count / cell.of,
        sum(score >= cell.of for score in scores) / count,
        sum(score <= 0 for score in scores) / count,
        sum(max(0.0, cell.of - score) for score in scores),
    )


def dearest_cases(verdicts: dict[str, dict]) -> list[Loss]:
    """The cases that cost the class most. Who has no case right is not counted: mostly there is no function, and what
    is wrong is no single case. The table and the known mistakes have them."""
    lost: dict[tuple, list[float]] = defaultdict(list)
    for exercises in verdicts.values():
        for name, verdict in exercises.items():
            cases = verdict.get("cases") or []
            for case in cases if any(case.get("right") for case in cases) else []:
                if not case.get("right"):
                    key = name, str(case.get("name")), not case.get("visible")
                    lost[key].append(float(case.get("of") or 0) - float(case.get("points") or 0))
    found = [Loss(name, case, len(points), sum(points), hidden) for (name, case, hidden), points in lost.items()]
    return sorted(found, key=lambda loss: -loss.points)[:LONGEST_LIST]


def known_mistakes(verdicts: dict[str, dict]) -> list[Loss]:
    """The known mistakes with how many made them, and the points lost in exercises where they explain what is wrong."""
    count: Counter = Counter()
    points: Counter = Counter()
    for exercises in verdicts.values():
        for name, verdict in exercises.items():
            if verdict.get("hint"):
                key = name, str(verdict["hint"])
                count[key] += 1
                points[key] += float(verdict.get("of") or 0) - float(verdict.get("points") or 0)
    found = [Loss(name, hint, count[name, hint], points[name, hint]) for name, hint in count]
    return sorted(found, key=lambda loss: (-loss.points, -loss.students))[:LONGEST_LIST]


def without_work(cells: list[dict], found: Class) -> bool:
    """Whether every function and answer is as released, or there is nothing at all."""
    release = read_cells(in_course(found.root, "assignments", found.assignment, f"{found.assignment}.ipynb"))
    given = {grade_id(cell): cell["source"].strip() for cell in release if grade_id(cell)}
    written = {cell.name for cell in found.cells if cell.written}
    for cell in cells:
        name, source = grade_id(cell), cell["source"].strip()
        if name.startswith("solution-") and source and source != given.get(name, "").strip():
            return False
        if name in written and source and source != given.get(name, STUB):
            return False
    return True


def marked_again(record: Record, cells: list[Cell]) -> list[str]:
    """Cells that have points and that nbgrader wants a person to look at again."""
    return [c.name for c in cells if (m := record.marks.get(c.name)) and m.look_again and m.manual is not None]


# -------------------------------------------------------------------------------------------- pictures


def histogram(totals: list[float], maximum: float) -> Markup:
    """The distribution of totals as SVG that reads on light and on dark paper."""
    if not totals or not maximum:
        return Markup("")
    grey = "#7d8592"
    figure = Figure(figsize=(7.5, 2.4), layout="constrained")
    FigureCanvasSVG(figure)
    axis = figure.add_subplot()
    axis.hist(
        totals, bins=min(20, max(5, round(maximum))), range=(0, max(maximum, max(totals))), color="#4a90c2", rwidth=0.92
    )
    axis.set_xlabel("points", color=grey)
    axis.set_ylabel("students", color=grey)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.tick_params(colors=grey)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(grey)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "totals"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Markup(text.getvalue()[text.getvalue().index("<svg") :])


# ------------------------------------------------------------------------------------------ side by side


def telling(pair: Pair) -> Iterable[Place]:
    """The places with something marked, those with most first."""
    marked = [(sum(mark for _, mark in p.left) + sum(mark for _, mark in p.right), p) for p in pair.places]
    return [place for count, place in sorted(marked, key=lambda x: -x[0]) if count][:12]


def excerpt(place: Place) -> tuple[list, list]:
    """Both sides, cut to the marked lines and a little around; None stands for lines left out."""
    return tuple(around(side) for side in (place.left, place.right))


def around(lines: list[tuple[str, bool]]) -> list[tuple[str, bool] | None]:
    near = {n for i, (_, mark) in enumerate(lines) if mark for n in range(i - CONTEXT, i + CONTEXT + 1)}
    shown: list[tuple[str, bool] | None] = []
    for number, (text, mark) in enumerate(lines):
        if number in near and len(shown) < 80:
            shown.append((plain(text[:300]), mark))
        elif shown and shown[-1] is not None:
            shown.append(None)
    return shown
