"""From submitted cells to a notebook that can be graded, built on the cells of the release.

What nbgrader or the judge goes by (locked cells, ids, points, types, metadata) is always the release's. What a student
wrote is always the student's, in the student's order. A cell with points stands where the student had it, as long as
it comes after the definition that counts and before anything that takes the name away again; else it is moved.
"""

import copy
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from nbformat import NotebookNode

from cs336_alignment.grading.rescue_names import additions, spoils, strength, used
from cs336_alignment.grading.rescue_read import Piece

MOST_FINDINGS = 30
CELL_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def tidy(source: str) -> str:
    """A source without what editors change by themselves at the ends of lines."""
    return "\n".join(line.rstrip() for line in source.strip().split("\n"))


class Plan:
    """What rebuilding needs to know of a release; made once for each."""

    def __init__(self, release: NotebookNode):
        self.cells: dict[str, NotebookNode] = {}  # by grade id, in the release's order
        self.by_name: dict[str, str] = {}  # grade id by the cell's own id
        self.order: list[tuple[str, str]] = []  # (grade id or "", the cell's own id)
        for cell in release.cells:
            key = cell.metadata.get("nbgrader", {}).get("grade_id", "")
            self.order.append((key, cell.get("id", "")))
            if key:
                self.cells[key] = cell
                self.by_name[cell.get("id", "")] = key
        self.text = {name for key, name in self.order if not key}
        self.locked = {key for key, cell in self.cells.items() if cell.metadata.nbgrader.get("locked")}
        self.exercises = [key.removeprefix("solution-") for key in self.cells if key.startswith("solution-")]
        self.points = {name for name in self.exercises if name in self.locked}
        self.written = [
            key for key, cell in self.cells.items() if cell.cell_type == "markdown" and key not in self.locked
        ]
        # Locked cells that no metadata is needed to know, and those that all look the same.
        seen = Counter(tidy(self.cells[key].source) for key in self.locked)
        self.by_source = {tidy(self.cells[key].source): key for key in self.locked}
        self.alike = {source for source, times in seen.items() if times > 1}
        self.stubs = {tidy(self.cells[f"solution-{name}"].source) for name in self.exercises}
        first = next((i for i, (key, _) in enumerate(self.order) if key.startswith("solution-")), 0)
        self.setup = [
            key for key, _ in self.order[:first] if key in self.locked and self.cells[key].cell_type == "code"
        ]

    def key(self, piece: Piece) -> str:
        """The grade id of a submitted cell, "" if it has none that is known. Without metadata its own id tells."""
        said = piece.grader.get("grade_id")
        if isinstance(said, str) and said in self.cells:
            return said
        return self.by_name.get(piece.name, "")

    def worth(self, pieces: list[Piece]) -> int:
        """How many of the assignment's exercises and questions have something of the student's in some cells."""
        code = [p for p in pieces if self.key(p) not in self.locked]
        code = [p.source for p in code if p.kind == "code" or self.key(p)]
        done = sum(any(strength(source, name) for source in code) for name in self.exercises)
        return done + len({self.key(p) for p in pieces if self.key(p) in self.written and not self.untouched(p)})

    def known(self, pieces: list[Piece]) -> int:
        """How many of the assignment's own cells are among some cells, touched or not."""
        own = {self.key(p) for p in pieces} - {"", "setup"}
        return len(own) + sum(p.kind == "code" and tidy(p.source) in self.stubs for p in pieces if not self.key(p))

    def untouched(self, piece: Piece) -> bool:
        return tidy(piece.source) in ("", tidy(self.cells[self.key(piece)].source))


@dataclass(eq=False)
class Item:
    """A cell of the result. node: None for the place of a locked cell, which is filled in later."""

    key: str
    node: NotebookNode | None
    text: str = ""  # the own id of a text of the release

    def code(self) -> str:
        return self.node.source if self.node is not None and self.node.cell_type == "code" else ""


def rebuild(plan: Plan, release: NotebookNode, pieces: list[Piece]) -> tuple[NotebookNode, list[str]]:
    """The notebook to grade, and sentences about what had to be mended."""
    findings: list[str] = []
    line = student_line(plan, pieces, findings)
    line = with_solutions(plan, line, findings)
    line = with_locked(plan, line, findings)
    notebook = copy.copy(release)
    notebook.metadata = copy.deepcopy(release.metadata)
    notebook.nbformat_minor = max(release.nbformat_minor, 5)  # the first in which cells have ids
    notebook.cells = [item.node for item in line]
    name_cells(plan, notebook.cells)
    findings += remarks_on_locked(plan, pieces)
    if len(findings) > MOST_FINDINGS:
        findings = [*findings[:MOST_FINDINGS], f"There is more of this kind: {len(findings) - MOST_FINDINGS} more."]
    return notebook, findings


def released(plan: Plan, key: str, source: str | None = None) -> NotebookNode:
    cell = copy.deepcopy(plan.cells[key])
    cell.source = cell.source if source is None else source
    if cell.cell_type == "code":
        cell.outputs, cell.execution_count = [], None
    return cell


def ordinary(piece: Piece) -> NotebookNode:
    """A student's own cell, with nothing but its text."""
    cell = NotebookNode(id=piece.name, cell_type=piece.kind, metadata=NotebookNode(), source=piece.source)
    if piece.kind == "code":
        cell |= {"outputs": [], "execution_count": None}
    elif piece.attachments:
        cell.attachments = NotebookNode(piece.attachments)
    return cell


# ------------------------------------------------------------------------------------------ the student's cells


def keepers(plan: Plan, pieces: list[Piece], findings: list[str]) -> dict[str, int]:
    """Which of the cells with the same id is the one: the last that answers."""
    places: dict[str, list[int]] = {}
    for i, piece in enumerate(pieces):
        key = plan.key(piece)
        if key and key not in plan.locked:
            places.setdefault(key, []).append(i)
    chosen = {}
    for key, where in places.items():
        name = key.removeprefix("solution-")

        def answers(i: int, name: str = name) -> tuple:
            own = strength(pieces[i].source, name) if name in plan.exercises else 0
            said = pieces[i].grader.get("grade_id") == plan.key(pieces[i])  # a cell's own id only where nothing else
            return own, not plan.untouched(pieces[i]), said, i

        chosen[key] = max(where, key=answers)
        copies = {tidy(pieces[i].source) for i in where if not plan.untouched(pieces[i])}
        if len(where) > 1 and len(copies) > 1:
            findings.append(f"The cell {key} is there {len(where)} times; the last one with an answer counts.")
    return chosen


def student_line(plan: Plan, pieces: list[Piece], findings: list[str]) -> list[Item]:
    """The student's cells in their order, each with the release's metadata or with none."""
    chosen = keepers(plan, pieces, findings)
    present = {plan.key(piece) for piece in pieces}
    line: list[Item] = []
    lost = 0
    for i, piece in enumerate(pieces):
        key = plan.key(piece)
        source = tidy(piece.source)
        lost += bool(key) and not piece.grader
        if not key and piece.kind == "code":
            key = plan.by_source.get(source, "")  # its metadata is lost; what it says is not
            lost += bool(key)
            if source in plan.alike or (key and key in present) or source in plan.stubs:
                continue  # a copy of what was released; a stub behind the answer would even take it away
        if key in plan.locked:
            line += locked_line(plan, key, piece, findings)
        elif chosen.get(key) == i:
            cell = plan.cells[key]
            node = released(plan, key, piece.source)
            if cell.cell_type == "markdown" and piece.attachments:
                node.attachments = NotebookNode(piece.attachments)
            if piece.kind != cell.cell_type and not plan.untouched(piece):
                what = "code" if cell.cell_type == "code" else "text"
                findings.append(f"The cell {key} had become a {piece.kind} cell; it is graded as {what}.")
            line.append(Item(key, node))
        elif key and plan.untouched(piece):
            continue  # a further copy of what was released
        else:
            line.append(Item("", ordinary(piece), piece.name if piece.name in plan.text else ""))
    if lost > 3:
        findings.append("The notebook has lost nbgrader's marks; its cells were recognised by their ids and content.")
    return line


def locked_line(plan: Plan, key: str, piece: Piece, findings: list[str]) -> list[Item]:
    """The place of a locked cell, and beside it what a student defined in that cell."""
    cell = plan.cells[key]
    place = Item(key, None)
    if cell.cell_type != "code" or tidy(piece.source) == tidy(cell.source):
        return [place]
    mine = additions(piece.source, cell.source, definitions_only=key.startswith("experiment-"))
    what = f"The cell {key} is locked and was changed; it is graded as released"
    if not mine:
        findings.append(f"{what}.")
        return [place]
    findings.append(f"{what}, and what you defined in it stands in a cell beside it.")
    own = Item("", ordinary(Piece("code", mine)))
    return [place, own] if key in plan.setup else [own, place]


# ------------------------------------------------------------------------------------- what each name stands for


def index_of(line: list[Item], key: str) -> int:
    return next((i for i, item in enumerate(line) if item.key == key), -1)


def insert_missing(plan: Plan, line: list[Item], key: str) -> None:
    """Puts a released cell back behind the cell that it follows in the release, the nearest that is there."""
    before = plan.order[: [k for k, _ in plan.order].index(key)]
    for other, name in reversed(before):
        at = [i for i, item in enumerate(line) if (other and item.key == other) or (not other and item.text == name)]
        if at:
            line.insert(at[-1] + 1, Item(key, released(plan, key)))
            return
    line.insert(0, Item(key, released(plan, key)))


def defining(plan: Plan, line: list[Item], name: str) -> int:
    """Where the definition of a function stands that counts: its own cell, if there is an answer in it; else the last
    cell that has one. What does not parse comes after what does."""
    own = index_of(line, f"solution-{name}")
    if strength(line[own].code(), name) == 2:
        return own
    found = [(strength(item.code(), name), i) for i, item in enumerate(line)]
    if any(power == 2 for power, _ in found):
        return max(found)[1]
    return own if strength(line[own].code(), name) or not any(p for p, _ in found) else max(found)[1]


def with_solutions(plan: Plan, line: list[Item], findings: list[str]) -> list[Item]:
    """Every cell that students write in, once; and no stub behind the answer."""
    for key in plan.cells:
        if key in plan.locked or index_of(line, key) >= 0:
            continue
        insert_missing(plan, line, key)
        name = key.removeprefix("solution-")
        elsewhere = name in plan.exercises and any(strength(item.code(), name) for item in line)
        if not elsewhere:
            findings.append(f"The cell {key} is missing" + ("." if key in plan.written else "; nothing was found."))
    strays = []
    for name in plan.exercises:
        own, at = index_of(line, f"solution-{name}"), defining(plan, line, name)
        if own != at:
            strays.append(name)
        if own > at:
            line.insert(at, line.pop(own))
    if strays:
        findings.append(f"Not defined in its own cell, so the last cell that defines it counts: {', '.join(strays)}.")
    return line


# ------------------------------------------------------------------------------------------------ locked cells


def with_locked(plan: Plan, line: list[Item], findings: list[str]) -> list[Item]:
    """Every locked cell once, as released: at the student's place where that does, else at the release's."""
    missing = [key for key in plan.cells if key in plan.locked and index_of(line, key) < 0]
    moved: list[str] = []
    for key in plan.cells:
        if key not in plan.locked:
            continue
        if key in plan.points:
            moved += [key] if place_points(plan, line, key) else []
        elif key in plan.setup:
            place_setup(plan, line, key)
        elif key in missing:
            insert_missing(plan, line, key)
        else:
            keep_one(plan, line, key, index_of(line, key))
    if moved:
        findings.append(f"Points cells were moved to where their functions are defined: {', '.join(moved)}.")
    gone = [key for key in missing if key in plan.points or key in plan.setup]
    if gone:
        findings.append("Locked cells were missing and are there again: " + ", ".join(gone) + ".")
    return line


def keep_one(plan: Plan, line: list[Item], key: str, at: int) -> None:
    """Fills in the place of a locked cell, and takes its other copies out."""
    line[at].node = released(plan, key)
    kept = line[at]
    line[:] = [item for item in line if item.key != key or item is kept]


def place_setup(plan: Plan, line: list[Item], key: str) -> None:
    """The imports come before the first cell that may need them, or before everything."""
    first = next(
        (i for i, item in enumerate(line) if any(name in item.code() for name in plan.exercises)),
        len(line),
    )
    at = index_of(line, key)
    if not 0 <= at < first:
        line.insert(plan.setup.index(key), Item(key, None))
        at = plan.setup.index(key)
    keep_one(plan, line, key, at)


def behind(plan: Plan, line: list[Item], name: str) -> int:
    """Where the last of the other exercises' functions stands that a function needs; -1 if it needs none."""
    needed, waiting, last = {name}, [name], -1
    while waiting:
        other = waiting.pop()
        at = defining(plan, line, other)
        if other != name and strength(line[at].code(), other):
            last = max(last, at)
        more = [n for n in plan.exercises if n in used(line[at].code()) and n not in needed]
        needed |= set(more)
        waiting += more
    return last


def place_points(plan: Plan, line: list[Item], name: str) -> bool:
    """A cell with points: after the definition that counts, and before its name stands for something else.

    Returns: whether the student had it elsewhere.
    """
    start = defining(plan, line, name)
    own = {f"solution-{name}", f"check-{name}", name}
    end, crossed = len(line), False
    for i in range(start + 1, len(line)):
        item = line[i]
        crossed |= bool(item.key) and item.key not in own
        # Within the exercise a second definition is a second try; further down it is a demonstration.
        if spoils(item.code(), name) or (crossed and strength(item.code(), name)):
            end = i
            break
    last = behind(plan, line, name)
    start = last if start < last < end else start
    there = index_of(line, name) >= 0
    at = next((i for i in range(start + 1, end) if line[i].key == name), -1)
    moved = there and at < 0
    if at < 0:
        at = start + 1
        check = index_of(line, f"check-{name}")
        if start < check < end:
            at = check + 1
        for i in range(at, end):  # helpers that a student wrote below belong to it
            if line[i].key or line[i].text or strength(line[i].code(), name):
                break
            at = i + 1 if line[i].code() else at
        line.insert(at, Item(name, None))
    keep_one(plan, line, name, at)
    return moved


# --------------------------------------------------------------------------------------------------- the rest


def remarks_on_locked(plan: Plan, pieces: list[Piece]) -> list[str]:
    """What a submission says of its own cells, and what does not count."""
    remarks = []
    if any(set(piece.tags) & {"skip-execution", "raises-exception"} for piece in pieces):
        remarks.append("Cells have tags that change how they are run (skip-execution and the like); tags do not count.")
    points = []
    for piece in pieces:
        key = plan.key(piece)
        said = piece.grader.get("points")
        if key in plan.cells and said is not None and said != plan.cells[key].metadata.nbgrader.get("points"):
            points.append(key)
    if points:
        remarks.append(f"The points of cells were changed ({', '.join(points)}); they count as released.")
    unknown = [p for p in pieces if isinstance(p.grader.get("grade_id"), str) and not plan.key(p)]
    if unknown:
        remarks.append(f"Cells with nbgrader ids that are not of this assignment count as ordinary ({len(unknown)}).")
    return remarks


def name_cells(plan: Plan, cells: list[NotebookNode]) -> None:
    """Each cell an id of its own: the release's for its cells, the student's where it will do, else a new one."""
    taken = {cell.id for cell in cells if "nbgrader" in cell.metadata and "id" in cell}
    for i, cell in enumerate(cells):
        if "nbgrader" in cell.metadata and "id" in cell:
            continue
        if cell.get("id", "") in taken or not CELL_ID.fullmatch(cell.get("id", "")):
            cell.id = next(n for k in range(len(cells) + 1) if (n := f"own-{i:03}-{k}") not in taken)
        taken.add(cell.id)


def which_assignment(pieces: list[Piece], others: Mapping[str, Plan]) -> str:
    """The assignment whose cells these are; "" if it is none of them."""
    known = {name: plan.worth(pieces) + plan.known(pieces) for name, plan in others.items()}
    best = max(known, key=lambda name: known[name], default="")
    return best if best and known[best] > 1 else ""
