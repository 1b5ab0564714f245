"""Submissions that are suspiciously alike. A report for a person to look into, never a verdict, and no points.

Solutions of short functions are alike because the mathematics is. So what counts is what is rare: the code is cut into
overlapping runs of tokens, winnowed to fingerprints (Schleimer, Wilkerson and Aiken 2003), what the release holds is
taken out, and each fingerprint that two students share counts log(class size / students who have it). There are two
views of code. *As written*, with names, comments and strings: copies and light edits share many rare fingerprints.
*By structure*, names and comments gone: there each exercise counts at most once, as the surprise of sharing its whole
structure, so it takes agreement over many exercises, which renaming does not hide. Written answers are compared by
runs of words. A pair is reported when it is far beyond chance and far out of line with the rest of the class.

It cannot see what many took from the same page (then it is not rare), a copy that was really rewritten, or a renamed
copy of code whose structure half the class has: there is no evidence in it.
"""

import builtins
import keyword
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cs336_alignment.grading.records import Class, grade_id, notebook_of, read_cells, read_class
from cs336_alignment.paths import in_course

LONGEST = 30_000  # characters of a part that are looked at
SMALLEST_CLASS = 20  # weights are those of a class of at least so many: in a class of two everything shared is common
MOST = 50  # pairs that are reported, of one view and of all
TOKEN = re.compile(
    r"(?P<comment>\#[^\n]*)"
    r"|(?P<string>[rbfuRBFU]{0,2}(?:\"\"\"(?:[^\\]|\\.)*?\"\"\"|'''(?:[^\\]|\\.)*?'''"
    r"|\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'))"
    r"|(?P<name>[^\W\d]\w*)|(?P<number>\d[\w.]*)|(?P<sign>\*\*|//|[=!<>+*/-]=|->|[^\w\s])",
    re.DOTALL,
)
KEPT = frozenset(keyword.kwlist) | frozenset(dir(builtins)) | {"torch", "F", "np", "math"}


@dataclass(frozen=True)
class View:
    """One way to look at texts. length: tokens of a run; window: fingerprints are the least of so many runs."""

    name: str
    tokens: object  # text -> [(token, line)]
    length: int
    window: int
    by_part: bool  # each part counts at most once, by the share that is the same


@dataclass(frozen=True)
class Place:
    """An exercise or answer of a pair, side by side; True for lines that hold shared rare material."""

    part: str
    left: list[tuple[str, bool]]
    right: list[tuple[str, bool]]


@dataclass(frozen=True)
class Pair:
    left: str
    right: str
    view: str  # what is alike, the most striking first
    score: float  # evidence in nats: exp(-score) is the chance for two strangers, if runs were independent
    limit: float  # what this class's other pairs stay below
    places: list[Place]


# --------------------------------------------------------------------------------------------- tokens


def as_written(text: str) -> list[tuple[str, int]]:
    """All of the code's tokens; comments and strings word by word."""
    found = []
    for match, line in numbered(text):
        if match.lastgroup in ("comment", "string"):
            for word in re.finditer(r"\w+|[^\w\s]", match[0]):
                found.append((word[0], line + match[0].count("\n", 0, word.start())))
        else:
            found.append((match[0], line))
    return found


def by_structure(text: str) -> list[tuple[str, int]]:
    """Tokens without comments, every string the same, every name the same but what is called of libraries."""
    found, before = [], ""
    for match, line in numbered(text):
        token = match[0]
        if match.lastgroup == "comment" or (match.lastgroup == "string" and before in ("", ":")):
            continue  # a docstring is a comment too
        if match.lastgroup == "string":
            token = '""'
        elif match.lastgroup == "name" and token not in KEPT and before != ".":
            token = "_"
        found.append((token, line))
        before = token
    return found


def words(text: str) -> list[tuple[str, int]]:
    """The words of a written answer, without case."""
    return [
        (word[0].lower(), line) for line, row in enumerate(text.split("\n")) for word in re.finditer(r"[^\W_]+", row)
    ]


def numbered(text: str) -> Iterable[tuple[re.Match, int]]:
    """The tokens of code with their lines, from 0. Never raises: what is no Python is taken sign by sign."""
    line, seen = 0, 0
    for match in TOKEN.finditer(text):
        line += text.count("\n", seen, match.start())
        seen = match.start()
        yield match, line


WRITTEN = View("code as written", as_written, 8, 4, False)
STRUCTURE = View("structure of the code", by_structure, 8, 3, True)
ANSWERS = View("written answer", words, 4, 3, False)


# --------------------------------------------------------------------------------------- fingerprints


def runs(view: View, text: str) -> list[tuple[int, int, int]]:
    """Every run of a text: its hash, first and last line."""
    tokens = view.tokens(text[:LONGEST])
    # Hashes of text differ from process to process, those of numbers do not: each token becomes its bytes as a number.
    numbers = [int.from_bytes(token.encode("utf-8", "replace")[:24], "big") for token, _ in tokens]
    n = view.length
    return [(hash(tuple(numbers[i : i + n])), tokens[i][1], tokens[i + n - 1][1]) for i in range(len(tokens) - n + 1)]


def fingerprints(view: View, text: str, released: set[int]) -> dict[int, tuple[int, int]]:
    """hash: (first line, last line) of the winnowed runs that the release does not have."""
    all_runs = runs(view, text)
    found = {}
    for start in range(max(1, len(all_runs) - view.window + 1)):
        if window := all_runs[start : start + view.window]:
            value, first, last = min(window, key=lambda run: run[0])
            if value not in released:
                found.setdefault(value, (first, last))
    return found


def pair_scores(marks: list[dict[int, tuple[int, int]]], by_part: bool) -> np.ndarray:
    """(students, students): what each pair shares of one part, each fingerprint weighed by its rarity."""
    students, size = len(marks), max(len(marks), SMALLEST_CLASS)
    count = Counter(value for found in marks for value in found)
    column = {value: i for i, value in enumerate(value for value, n in count.items() if n > 1)}
    if not column:
        return np.zeros((students, students), np.float32)
    has = np.zeros((students, len(column)), np.float32)
    for row, found in zip(has, marks):
        row[[column[value] for value in found if value in column]] = 1.0
    weight = np.array([math.log(size / count[value]) for value in column], np.float32)
    shared = (has * weight) @ has.T
    if by_part:
        lengths = np.array([len(found) for found in marks], np.float32)
        shared /= np.maximum(1.0, np.maximum(lengths[:, None], lengths[None, :]))
    return shared


def limit(view: View, scores: np.ndarray) -> float:
    """Beyond chance, and out of line: many deviations above what a student's nearest other student usually has."""
    students = len(scores)
    size = max(students, SMALLEST_CLASS)
    pairs = math.log(size * size / 2)  # with so many pairs, a coincidence of this surprise is expected once
    floor = pairs + 2 if view.by_part else 8 * math.log(size)
    best = [float(x) for x in scores.max(axis=1)] if students > 1 else [0.0]
    middle = statistics.median(best)
    spread = 1.48 * statistics.median(abs(x - middle) for x in best)
    return max(floor, middle + (4 if view.by_part else 8) * spread)


def alike_in(view: View, texts: dict[str, dict[str, str]], released: dict[str, str]) -> list[Pair]:
    """Pairs that are out of line in one view.

    texts: by student, by part (exercise or answer). released: by part, what all were given.
    """
    students = sorted(texts)
    parts = sorted({part for of in texts.values() for part in of})
    given = {value for text in released.values() for value, _, _ in runs(view, text)}
    marks = {part: [fingerprints(view, texts[s].get(part, ""), given) for s in students] for part in parts}
    scores = sum((pair_scores(marks[part], view.by_part) for part in parts), np.zeros((len(students),) * 2))
    np.fill_diagonal(scores, 0.0)
    bound = limit(view, scores)
    found = []
    for i, j in np.argwhere(np.triu(scores) >= bound):
        places = []
        for part in parts:
            ours, theirs = marks[part][i], marks[part][j]
            few = max(3, len(students) // 3)
            rare = {v for v in ours.keys() & theirs.keys() if sum(v in other for other in marks[part]) <= few}
            if rare:
                left, right = texts[students[i]][part], texts[students[j]][part]
                places.append(Place(part, marked(left, ours, rare), marked(right, theirs, rare)))
        found.append(Pair(students[i], students[j], view.name, float(scores[i, j]), bound, places))
    return sorted(found, key=lambda pair: -pair.score)[:MOST]


def marked(text: str, found: dict[int, tuple[int, int]], rare: set[int]) -> list[tuple[str, bool]]:
    """The lines of a text, and whether a rare fingerprint comes from them."""
    lines = {line for value in rare for line in range(found[value][0], found[value][1] + 1)}
    return [(row, number in lines) for number, row in enumerate(text[:LONGEST].split("\n"))]


# ---------------------------------------------------------------------------------------- submissions


def alike(root: Path, assignment: str) -> list[Pair]:
    """The suspicious pairs of an assignment. Raises: ValueError where nothing has been graded."""
    found = read_class(root, assignment)
    return alike_of(found, {record.student: notebook_of(found, record.student) for record in found.submitted()})


def alike_of(found: Class, notebooks: dict[str, list[dict]]) -> list[Pair]:
    """The suspicious pairs, the most striking first; each once, with the places of the view that shows it best.

    notebooks: their cells, by student.
    """
    names = {cell.name: cell.written for cell in found.cells}
    release = read_cells(in_course(found.root, "assignments", found.assignment, f"{found.assignment}.ipynb"))
    given = {f"{i}": cell["source"] for i, cell in enumerate(release)}  # questions too: answers quote them
    code = {student: code_parts(cells, given) for student, cells in notebooks.items()}
    answers = {
        student: {grade_id(c): c["source"] for c in cells if names.get(grade_id(c)) and c["cell_type"] == "markdown"}
        for student, cells in notebooks.items()
    }
    pairs = [
        pair
        for view, texts in ((WRITTEN, code), (STRUCTURE, code), (ANSWERS, answers))
        for pair in alike_in(view, texts, given)
    ]
    found: dict[tuple[str, str], Pair] = {}
    for pair in sorted(pairs, key=lambda pair: -pair.score / pair.limit):
        best = found.setdefault((pair.left, pair.right), pair)
        if best is not pair:
            found[pair.left, pair.right] = replace(best, view=f"{best.view}, {pair.view}")
    return list(found.values())[:MOST]


def code_parts(cells: list[dict], given: dict[str, str]) -> dict[str, str]:
    """A student's code by exercise; what stands in cells of their own is one part."""
    parts, others, known = {}, [], set(given.values())
    for cell in cells:
        name = grade_id(cell)
        if cell["cell_type"] != "code" or cell["source"] in known:
            continue
        if name.startswith("solution-"):
            parts[name.removeprefix("solution-")] = cell["source"]
        elif not name:
            others.append(cell["source"])
    if others:
        parts["cells of their own"] = "\n\n".join(others)
    return parts
