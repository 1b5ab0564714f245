"""Whose file is it? What learning systems write into the names of the files that they export, and the class list.

Known: Canvas, Moodle, Blackboard, Gradescope, and plain folders or files named after students. Times are taken where a
system states them: Blackboard's attempts and Gradescope's metadata. The times of files in archives are not: they say
when the archive was made, or what the student's own computer said.
"""

import itertools
import os
import re
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from pathlib import Path, PurePosixPath

import yaml
from rapidfuzz import fuzz, process

from cs336_alignment.grading.gradebook import Person
from cs336_alignment.grading.spreadsheet import csv_lines, csv_text
from cs336_alignment.grading.unpack import RESERVED

# `ids` is what the system wrote of the student; what follows may be the student's own words. Canvas writes names in
# small letters without anything between them.
CANVAS = re.compile(
    r"(?P<ids>(?P<who>[^_\sA-Z]+)(?P<late>_(?i:LATE))?_(?P<user>\d+)_(?P<submission>\d+))_(?P<file>.+)\Z"
)
MOODLE = re.compile(r"(?P<ids>(?P<who>.+?)_(?P<id>\d+))_assignsubmission_(?P<kind>[a-z]+)_?(?P<file>.*)\Z")
BLACKBOARD = re.compile(
    r"(?P<ids>.+?)_attempt_(?P<when>\d{4}-\d\d-\d\d-\d\d-\d\d-\d\d)(?:_(?P<file>.+)|(?P<receipt>\.txt))\Z"
)
GRADESCOPE = re.compile(r"(?P<ids>submission_(?P<id>\d+))\Z")
GRADESCOPE_EXPORT = re.compile(r"assignment_\d+_export\Z")
METADATA = "submission_metadata.yml"
LARGEST_METADATA = 20_000_000  # bytes


@dataclass(frozen=True)
class Origin:
    """What a file's name, or metadata beside it, says."""

    system: str
    who: str  # a name or an id
    file: str  # the student's own name of the file
    ids: tuple[tuple[str, str], ...] = ()  # (column of the class list, value), surer than the name
    attempt: tuple[int, ...] = ()  # the larger, the newer
    when: datetime | None = None  # UTC
    note: str = ""
    others: tuple[str, ...] = ()  # what else could be the name: nobody's, if two are students


def origins(name: str, assignment: str, zone: tzinfo | None, metadata: dict, shared: str = "") -> list[Origin]:
    """Whose the file of that name is: none if nobody's, several for a group. zone: of times without one; None is this
    computer's. metadata: Gradescope's, see `read_metadata`. shared: Blackboard's, see `shared_start`."""
    parts = PurePosixPath(name).parts
    match, own = system_of(parts[0]), "/".join(parts[1:])
    if match is None:
        return plain(parts, assignment)
    if match.re is MOODLE:
        who, key = match["who"].strip(), match["id"]
        return [Origin("Moodle", who, own or match["file"], (("moodle_id", key),), (int(key),))]
    if match.re is BLACKBOARD:
        return [] if match["receipt"] else [blackboard(match, own, assignment, zone, shared)]
    return [canvas(match, own)] if match.re is CANVAS else gradescope(match[0], own, metadata)


def system_of(part: str) -> re.Match | None:
    """The system that made the outermost part of a name. Students choose what stands further in and further right, and
    may imitate another system there: of several that fit it is the one that is done first."""
    found = [match for form in (MOODLE, BLACKBOARD, CANVAS, GRADESCOPE) if (match := form.match(part))]
    return min(found, key=lambda match: match.end("ids"), default=None)


def canvas(match: re.Match, own: str) -> Origin:
    """lovelaceada_LATE_12345_67890_a4_dpo-2.ipynb: name, user, submission, file. Submissions are numbered as they come;
    -2 says nothing more, and may be the student's own."""
    attempt = (int(match["submission"]),)
    note = "late, says Canvas, which does not say when" if match["late"] else ""
    return Origin("Canvas", match["who"], own or match["file"], (("canvas_id", match["user"]),), attempt, None, note)


def shared_start(names: list[str]) -> str:
    """What all of Blackboard's names start with: the assignment's name is a part of it, or all of it."""
    return os.path.commonprefix([m["ids"] for name in names if (m := BLACKBOARD.match(name.split("/", 1)[0]))])


def blackboard(match: re.Match, own: str, assignment: str, zone: tzinfo | None, shared: str) -> Origin:
    """Assignment_user_attempt_2026-11-20-22-00-00_file: both the assignment's name and the user's may hold a "_"."""
    head = match["ids"]
    pieces = head.split("_")
    suffixes = ["_".join(pieces[i:]) for i in range(1, len(pieces))]
    sure = [s for s in suffixes if canonical(head.removesuffix(s)) == canonical(assignment)]
    suffixes = [s for s in suffixes if shared.startswith(head.removesuffix(s))] or suffixes
    who = sure[0] if sure else [head, *suffixes][-1]
    when = None
    try:
        local = datetime.strptime(match["when"], "%Y-%m-%d-%H-%M-%S")
        when = (local.replace(tzinfo=zone) if zone else local.astimezone()).astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    attempt = (int(match["when"].replace("-", "")),)
    others = () if sure else tuple(s for s in suffixes if s != who)
    return Origin("Blackboard", who, own or match["file"], (), attempt, when, "", others)


def gradescope(folder: str, own: str, metadata: dict) -> list[Origin]:
    """submission_12345/...: a number, and in the metadata who it is of (several in a group) and when it came."""
    number = int(GRADESCOPE.match(folder)["id"])
    known = metadata.get(folder)
    if not known:
        return [Origin("Gradescope", folder, own, (("gradescope_id", str(number)),), (number,))]
    group = "handed in by a group" if len(known["submitters"]) > 1 else ""
    return [
        Origin("Gradescope", who, own, tuple(ids), (number,), known["when"], group) for who, ids in known["submitters"]
    ]


def plain(parts: tuple[str, ...], assignment: str) -> list[Origin]:
    """ada.ipynb, ada/a4_dpo.ipynb, ada/a4_dpo/a4_dpo.ipynb: the outermost folder's name, and no other; the file's where
    there is no folder."""
    folders = [re.sub(r"(?i)\.zip\Z", "", part) for part in parts[:-1]]
    folders = [f for f in folders if canonical(f) not in (canonical(assignment), "submitted")]
    stem = re.split(r"(?i)\.ipynb", parts[-1])[0]
    bare = re.sub(rf"(?i)\A{re.escape(assignment)}[ _.-]+|[ _.-]+{re.escape(assignment)}\Z", "", stem)
    names = [bare] if canonical(bare) not in (canonical(assignment), "") else []
    return [Origin("plain", who, parts[-1]) for who in (folders + names)[:1]]


def without_wrapper(names: list[str], assignment: str, source: str) -> str:
    """The folder that an export is wrapped in, with "/"; "" if there is none. names: of all notebooks.

    It is what all share, if there are several and it is no student's own folder, or if it is called like the archive.
    """
    tops = {name.split("/", 1)[0] for name in names if "/" in name}
    if len(tops) != 1 or not all("/" in name for name in names):
        return ""
    top = tops.pop()
    own = {f"{top}/{assignment}.ipynb", f"{top}/{assignment}/{assignment}.ipynb"}
    if system_of(top) or own & set(names):
        return ""
    if len(names) == 1 and canonical(top) != canonical(source) and not GRADESCOPE_EXPORT.match(top):
        return ""
    return f"{top}/"


def read_metadata(data: bytes) -> dict[str, dict]:
    """Gradescope's submission_metadata.yml: by folder, who submitted, with the ids that it states, and when."""
    try:
        content = yaml.safe_load(data) if len(data) <= LARGEST_METADATA else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    found = {}
    for folder, entry in content.items() if isinstance(content, dict) else ():
        people = entry.get(":submitters") if isinstance(entry, dict) else None
        submitters = []
        for person in people if isinstance(people, list) else ():
            if isinstance(person, dict):
                values = {key: str(person.get(f":{key}") or "").strip() for key in ("name", "sid", "email")}
                ids = [(key, values[key]) for key in ("sid", "email") if values[key]]
                if any(values.values()):
                    submitters.append((values["name"] or values["email"] or values["sid"], ids))
        when = entry.get(":created_at") if isinstance(entry, dict) else None
        when = when.replace(tzinfo=when.tzinfo or UTC).astimezone(UTC) if isinstance(when, datetime) else None
        if submitters:
            found[str(folder)] = {"submitters": submitters, "when": when}
    return found


# ------------------------------------------------------------------------------------------ the class


def canonical(text: str) -> str:
    """Letters and digits alone, without case and accents: what is left of a name in most systems."""
    letters = unicodedata.normalize("NFKD", text).casefold()
    return "".join(c for c in letters if c.isalnum())


def make_id(name: str) -> str:
    """A student id from a name: one that is a folder's name on every computer. "" if nothing is left."""
    text = unicodedata.normalize("NFC", name)
    text = "".join(c for c in text if unicodedata.category(c)[0] != "C")  # control, invisible, unassigned
    text = re.sub(r"[^\w.@+-]+", "_", text).strip("._- ")
    while len(text.encode()) > 64:
        text = text[:-1]
    text = text.rstrip("._- ")
    return f"_{text}" if RESERVED.match(text) else text


@dataclass(frozen=True)
class Roster:
    """The class list: what each student is known by."""

    students: dict[str, Person] = field(default_factory=dict)  # by id
    ids: dict[tuple[str, str], set[str]] = field(default_factory=dict)  # (column, value): students
    names: dict[str, set[str]] = field(default_factory=dict)  # canonical name: students

    def find(self, origin: Origin) -> set[str]:
        """The students that a file may be of: one, if all is well."""
        for column, value in origin.ids:
            if found := self.ids.get((column, value.casefold())):
                return found
        words = [origin.who, *(value for column, value in origin.ids if column in ("sid", "email"))]
        known = next((found for word in words if (found := self.names.get(canonical(word)))), set())
        return known.union(*(self.names.get(canonical(word), set()) for word in origin.others))

    def nearest(self, name: str) -> str:
        """Who may be meant, for a person to decide; "" where nobody comes near."""
        best = process.extractOne(canonical(name), list(self.names), scorer=fuzz.ratio, score_cutoff=60)
        return ", ".join(sorted(self.names[best[0]])) if best else ""


def read_roster(path: Path) -> Roster:
    """A csv file with a column `student`, and any of name, first_name, last_name, email, sid, canvas_id, moodle_id ...

    Commas, semicolons or tabs; a mark at the start as Excel writes it; UTF-8, UTF-16 or Windows' own letters.
    Raises: ValueError for a file without that column, an id that no folder can have, or an id that is there twice.
    """
    text = csv_text(path)
    head = text.split("\n", 1)[0]
    lines = csv_lines(path, text, max(",;\t", key=head.count))
    _, words = next(lines, (0, []))
    columns = [re.sub(r"\W+", "_", word.strip().casefold()).strip("_") for word in words]
    if "student" not in columns:
        raise ValueError(f"{path}: the first line needs a column student; it has {', '.join(columns) or 'nothing'}")
    roster, ids, names = {}, defaultdict(set), defaultdict(set)
    for number, words in lines:
        row = {column: word.strip() for column, word in zip(columns, words) if word.strip()}
        if not row:
            continue
        student = unicodedata.normalize("NFC", row.get("student", ""))
        if not student or make_id(student) != student:
            raise ValueError(f"{path}, line {number}: {student!r} cannot be a student's id (and a folder's name)")
        if student.casefold() in {known.casefold() for known in roster}:
            raise ValueError(f"{path}, line {number}: {student} is there a second time")
        first, last = row.get("first_name", ""), row.get("last_name", row.get("surname", ""))
        full = row.get("name") or row.get("full_name") or f"{first} {last}".strip()
        email = row.get("email", "")
        roster[student] = Person(*((first, last) if first or last else first_and_last(full)), email)
        for column, value in row.items():
            ids[column, value.casefold()].add(student)
        for known in {student, email, email.split("@")[0], *orders(full), *orders(f"{first} {last}")}:
            if canonical(known):
                names[canonical(known)].add(student)
    return Roster(roster, dict(ids), dict(names))


def first_and_last(name: str) -> tuple[str, str]:
    """A name in two, as far as one can: "Lovelace, Ada King" is "Ada King Lovelace", and "Plato" a first name."""
    if "," in name:
        last, _, first = name.partition(",")
    else:
        first, _, last = name.strip().rpartition(" ")
        first, last = first or last, last if first else ""
    return first.strip(), last.strip()


def orders(name: str) -> list[str]:
    """The ways to write a name: "Ada King Lovelace" is "Lovelace, Ada King" elsewhere."""
    words = re.split(r"[\s,]+", name.strip())
    return ["".join(itertools.chain(words[i:], words[:i])) for i in range(len(words))]
