"""From bytes to cells: whatever can be read of a file that is, was, or should have been a notebook.

Valid JSON is read by the standard library. Damaged JSON is read cell by cell: a cell that parses by itself is taken as
it is, and of one that does not, the lines of its source are. Nothing is guessed that is not in the file. Outputs are
left behind here.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cs336_alignment.grading.rescue_files import Unreadable, unpacked
from cs336_alignment.grading.rescue_names import LONGEST_PARSED, bindings, parsed

HEAVIEST = 20_000_000  # values in a file: what JSON becomes in memory is many times larger than its text
MOST_TRIES = 20_000  # places at which a damaged file is tried
MOST_CELLS = 2_000
MOST_CODE = 2_000_000  # characters of all cells with code: an honest notebook has some ten thousand
LONGEST_SOURCE = 5_000_000  # characters of one cell; a written answer may hold a picture
ENCODINGS = ["cp1252", "gb18030", "big5", "shift_jis", "euc_kr", "cp1251"]  # what editors save besides UTF-8 and UTF-16
LINES_BROKEN = re.compile("\r\n?")


@dataclass(frozen=True)
class Piece:
    """A cell as it was submitted, without its outputs."""

    kind: str  # code, markdown or raw
    source: str
    name: str = ""  # the cell's own id
    grader: dict[str, Any] = field(default_factory=dict)  # nbgrader's metadata
    tags: tuple[str, ...] = ()
    attachments: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    pieces: list[Piece]
    remarks: list[str]  # each the rest of a sentence that begins with the file's name


Worth = Callable[[list[Piece]], int]  # how much of an assignment is in some cells


def decoded(data: bytes) -> tuple[str, str]:
    """Text, and what to say of its encoding."""
    marked = data.startswith((b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff"))
    if marked or data[:2000].count(0) * 4 > len(data[:2000]):  # every other byte of ASCII in UTF-16 is zero
        encoding = json.detect_encoding(data)
        if encoding not in ("utf-8", "utf-8-sig"):
            return data.decode(encoding, "replace").replace("\x00", ""), f"is written in {encoding.upper()}, not UTF-8"
    try:
        return data.decode("utf-8-sig").replace("\x00", ""), ""
    except UnicodeDecodeError:
        text = data.decode("utf-8-sig", "replace").replace("\x00", "")
    strange = b"\n".join([line for line in data.splitlines() if not line.isascii()][:200])
    if text.count("\N{REPLACEMENT CHARACTER}") * 4 < len(strange) - len(strange.decode("ascii", "ignore")):
        return text, "has characters that are no UTF-8; they are lost"
    from charset_normalizer import from_bytes  # only needed here

    best = from_bytes(strange[:100_000], cp_isolation=ENCODINGS).best()
    encoding = best.encoding if best else "cp1252"
    return data.decode(encoding, "replace").replace("\x00", ""), f"is not written in UTF-8; it was read as {encoding}"


# ------------------------------------------------------------------------------------------------ valid JSON


def cells_in(value: Any, depth: int = 0) -> list | None:
    """The list of cells in a parsed file: of nbformat 4 and 3, bare, or within something else."""
    if isinstance(value, list):
        return value if any(is_cell(item) for item in value) else None
    if not isinstance(value, dict) or depth > 3:
        return None
    cells = value.get("cells")
    if isinstance(cells, dict):
        cells = list(cells.values())
    if isinstance(cells, list):
        return cells
    sheets = value.get("worksheets")
    if isinstance(sheets, list):
        lists = [sheet.get("cells") for sheet in sheets if isinstance(sheet, dict)]
        return [cell for cells in lists if isinstance(cells, list) for cell in cells]
    inner = (cells_in(item, depth + 1) for item in value.values())
    return next((cells for cells in inner if cells is not None), None)


def is_cell(value: Any) -> bool:
    return isinstance(value, dict) and "cell_type" in value and ("source" in value or "input" in value)


def text_of(value: Any) -> str:
    """A source, which is a string or a list of strings."""
    if isinstance(value, list):
        value = "".join(part for part in value if isinstance(part, str))
    text = LINES_BROKEN.sub("\n", value) if isinstance(value, str) else ""
    # Half of a pair of surrogates cannot be written to any file, and Python code holds no zero.
    return text.replace("\x00", "").encode("utf-8", "replace").decode("utf-8")


def pictures(value: Any) -> dict[str, dict[str, str]]:
    """Attachments that are what nbformat says: type and base64 by file name. All or, if too large, none."""
    if not isinstance(value, dict):
        return {}
    kept = {}
    for name, bundle in value.items():
        if isinstance(bundle, dict) and all(isinstance(item, str) for item in bundle.values()):
            kept[text_of(name)] = {text_of(kind): text_of(item) for kind, item in bundle.items()}
    size = sum(len(item) for bundle in kept.values() for item in bundle.values())
    return kept if size <= LONGEST_SOURCE else {}


def piece(cell: dict) -> Piece:
    metadata = cell.get("metadata") if isinstance(cell.get("metadata"), dict) else {}
    grader = metadata.get("nbgrader") if isinstance(metadata.get("nbgrader"), dict) else {}
    tags = metadata.get("tags") if isinstance(metadata.get("tags"), list) else []
    kind, source = cell.get("cell_type"), text_of(cell.get("source", cell.get("input")))
    if kind == "heading":  # nbformat 3
        level = cell.get("level")
        kind, source = "markdown", "#" * (int(level) if level in (1, 2, 3, 4, 5, 6) else 1) + " " + source
    if kind not in ("code", "markdown", "raw"):
        kind = "code" if "outputs" in cell or "input" in cell else "markdown"
    name = next((n for n in (cell.get("id"), metadata.get("id")) if isinstance(n, str)), "")
    attachments = pictures(cell.get("attachments")) if kind == "markdown" else {}
    return Piece(kind, source, name, grader, tuple(t for t in tags if isinstance(t, str)), attachments)


def pieces_of(cells: list) -> Reading:
    """Raises: nothing; what is no cell is left out, with a remark."""
    found = [piece(cell) for cell in cells if isinstance(cell, dict)]
    remarks = []
    if len(found) < len(cells):
        remarks.append(f"has among its cells what is no cell ({len(cells) - len(found)} times); it was left out")
    short = [p for p in found if len(p.source) <= LONGEST_SOURCE]
    if len(short) < len(found):
        remarks.append(f"has cells of more than {LONGEST_SOURCE:,} characters ({len(found) - len(short)}), left out")
    if len(short) > MOST_CELLS:
        remarks.append(f"has {len(short):,} cells; only the first {MOST_CELLS:,} were graded")
    kept, code = [], 0
    for one in short[:MOST_CELLS]:
        code += len(one.source) if one.kind == "code" else 0
        if code > MOST_CODE:
            remarks.append(f"has more than {MOST_CODE:,} characters of code; what comes after them was not graded")
            break
        kept.append(one)
    return Reading(kept, remarks)


def parse(text: str) -> Any:
    """JSON, with what others write besides: NaN, line breaks in strings. Raises: ValueError, RecursionError."""
    if 4 * text.count("{") + text.count("[") + text.count(",") > HEAVIEST:
        raise ValueError("too many values")
    return json.loads(text, strict=False, parse_int=float)  # int refuses more than some thousand digits


# ---------------------------------------------------------------------------------------------- damaged JSON

STRING = re.compile(r'\s*"((?:[^"\\]|\\.)*+)"\s*,?', re.DOTALL)
SOURCE = re.compile(r'"(?:source|input)"\s*:\s*(\[|")')
KIND = re.compile(r'"cell_type"\s*:\s*"(\w+)"')
GRADE_ID = re.compile(r'"grade_id"\s*:\s*"([^"\\\n]{1,200})"')
NAME = re.compile(r'^\s*"id"\s*:\s*"([\w-]{1,64})"', re.MULTILINE)


def salvaged(text: str) -> tuple[list[dict], int]:
    """The cells of a damaged file in their order, and how many of them are there in part only."""
    decoder = json.JSONDecoder(strict=False, parse_int=float)
    found: list[dict] = []
    in_part = position = done = 0
    budget = 5 * len(text) + 1_000_000  # characters that may be read in vain
    for _ in range(MOST_TRIES):
        start = text.find("{", position)
        if start < 0 or budget < 0:
            break
        try:
            value, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            budget -= error.pos - start
            position = start + 1
            continue
        except (ValueError, RecursionError, MemoryError):
            budget -= 10_000
            position = start + 1
            continue
        cells = [value] if is_cell(value) else cells_in(value)
        if cells is not None:
            parts = fragments(text[done:start])
            in_part += len(parts)
            found += parts + cells
            done = end
        position = end
    parts = fragments(text[done:])
    return found + parts, in_part + len(parts)


def fragments(text: str) -> list[dict]:
    """What can be read of cells that do not parse, from the text between those that do."""
    if not SOURCE.search(text):
        return []
    kind, source = KIND.search(text), SOURCE.search(text)
    first = KIND if kind and kind.start() < source.start() else SOURCE  # programs write keys in different orders
    starts = [match.start() for match in first.finditer(text)][:MOST_CELLS]
    cells = []
    for start, end in zip(starts, [*starts[1:], len(text)]):
        part = text[start:end]
        source = SOURCE.search(part)
        lines = source_lines(part[source.end() - 1 :]) if source else ""
        if lines.strip():
            kind, grade_id, name = KIND.search(part), GRADE_ID.search(part), NAME.search(part)
            cells.append({
                "cell_type": kind[1] if kind else "code",
                "id": name[1] if name else None,
                "metadata": {"nbgrader": {"grade_id": grade_id[1]}} if grade_id else {},
                "source": lines,
            })  # fmt: skip
    return cells


def source_lines(text: str) -> str:
    """A source that begins here, as far as it goes. Notebooks are written with each line of a source on its own."""
    if text.startswith('"'):
        whole = STRING.match(text)
        return unescaped(whole[1] if whole else text[1:].split("\n")[0])
    body, lines = text[1:], []
    if body.lstrip(" ").startswith(("\n", "\r")):
        rows = body.split("\n")[1:]
        indent = len(rows[0]) - len(rows[0].lstrip()) if rows else 0
        for row in rows:
            inner = row.rstrip().removesuffix(",").rstrip()
            if inner.lstrip().startswith(("]", "}")):
                break
            # Where the first quote is lost, the spaces behind it belong to the code.
            inner = inner.lstrip()[1:] if inner.lstrip().startswith('"') else inner[indent:]
            closed = inner.endswith('"') and not inner.endswith('\\"')
            lines.append(unescaped(inner[:-1] if closed else inner))
        # A line whose end is lost ends here all the same.
        return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines).removesuffix("\n")
    position = 0
    while match := STRING.match(body, position):
        lines.append(unescaped(match[1]))
        position = match.end()
    return "".join(lines)


def unescaped(text: str) -> str:
    try:
        return json.loads(f'"{text}"', strict=False)
    except ValueError:
        for escape, character in (("\\n", "\n"), ("\\t", "\t"), ('\\"', '"'), ("\\\\", "\\")):
            text = text.replace(escape, character)
        return text


MARKS = ("<<<<<<<", "|||||||", "=======", ">>>>>>>")


def without_conflicts(text: str) -> list[str]:
    """A file in which git left a conflict, in three versions: the first side, the second, and both. [] if it has none.

    The middle part of three-way marks, what both sides had before, is in none of them.
    """
    if not all(f"\n{mark}" in f"\n{text}" for mark in ("<<<<<<<", ">>>>>>>")):
        return []
    first, second, both = [], [], []
    side = ""
    for line in text.splitlines(keepends=True):
        mark = line[:7] if line[:7] in MARKS and line[7:8] in ("", " ", "\n", "\r") else ""
        if mark and (side or mark == MARKS[0]):
            side = "" if mark == MARKS[3] else mark
            continue
        if side in ("", MARKS[0]):
            first.append(line)
        if side in ("", MARKS[2]):
            second.append(line)
        if side != MARKS[1]:
            both.append(line)
    return ["".join(first), "".join(second), "".join(both)]


# ---------------------------------------------------------------------------------------------------- scripts

CELL_MARK = re.compile(r"^# (?:In\s?\[[ \d]*\]:|%%.*)$", re.MULTILINE)  # nbconvert's and jupytext's


def script_pieces(text: str) -> list[Piece]:
    """A Python script as cells: by the marks that an export leaves, otherwise one for each function. [] if it is none.

    Small cells, because an error in one then leaves the others alone, as it does in a notebook.
    """
    parts = CELL_MARK.split(text)
    if len(parts) > 1:
        parts = [part for part in parts if bindings(part) is not None]
    else:
        body = parsed(text) if len(text) <= LONGEST_PARSED else None
        if not body:
            return []
        lines, parts, before = text.splitlines(keepends=True), [], False
        last = 0
        for node in body:
            start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
            function = hasattr(node, "decorator_list")
            if start > last and (function or before):
                parts.append("".join(lines[last:start]))
                last = start
            before = function
        parts.append("".join(lines[last:]))
    parts = [text_of(part).strip("\n") for part in parts if part.strip()]
    return [Piece("code", part) for part in parts] if any(bindings(part) for part in parts) else []


# -------------------------------------------------------------------------------------------------- all of it


def read_notebook(data: bytes, worth: Worth) -> Reading:
    """The cells of a file, and what was odd about it. worth: which of two readings holds more.

    Raises: Unreadable.
    """
    content, archive = unpacked(data)
    text, encoding = decoded(content)
    remarks = [f"is {archive}; the notebook in it was graded"] if archive else []
    remarks += [encoding] if encoding else []
    if not text.strip():
        raise Unreadable("holds only zeros" if content.strip() else "is empty")
    try:
        cells = cells_in(parse(text))
        if cells is None:
            raise Unreadable("holds JSON that is no notebook")
        reading = pieces_of(cells)
        return Reading(reading.pieces, remarks + reading.remarks)
    except (ValueError, RecursionError, MemoryError):
        reading = repaired(text, worth)
    return Reading(reading.pieces, remarks + reading.remarks)


def repaired(text: str, worth: Worth) -> Reading:
    """What can be read of a file that is not JSON. Raises: Unreadable."""
    sides = without_conflicts(text)
    if sides:
        readings = [either(side) for side in sides]
        best = max(range(len(sides)), key=lambda i: (worth(readings[i].pieces), -i))
        which = ("before the =======", "after the =======", "on both sides of the =======")[best]
        if readings[best].pieces:
            mark = f"holds the marks of a merge that git could not finish; what stands {which} was graded"
            return Reading(readings[best].pieces, [mark, *readings[best].remarks])
    cells, in_part = salvaged(text)
    reading = pieces_of(cells)
    if reading.pieces:
        damage = f"is damaged (it is not valid JSON); cells that could be read: {len(reading.pieces)}"
        damage += f", {in_part} of them perhaps in part" if in_part else ""
        return Reading(reading.pieces, [damage, *reading.remarks])
    start = text.lstrip()[:1000].casefold()
    if start.startswith("<") and ("<html" in start or "<!doctype" in start):
        raise Unreadable("is a web page, not a notebook")
    script = script_pieces(text)
    if script:
        return Reading(script, ["is a Python script, not a notebook; only code could be read"])
    raise Unreadable("is no notebook, and no cells could be found in it")


def either(text: str) -> Reading:
    try:
        return pieces_of(cells_in(parse(text)) or [])
    except (ValueError, RecursionError, MemoryError):
        return pieces_of(salvaged(text)[0])
