"""The files of a folder or zip archive that somebody else has filled, read so that nothing in it can do harm.

Names are looked at, never used: whoever writes the files chooses where. What could lead out of a folder, is a link, is
encrypted or would unfold beyond bounds is refused with a reason. Archives in an archive are opened, one level deep.
"""

import os
import re
import stat
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

MOST_FILES = 20_000  # of an export; 300 students have some hundred
LARGEST = 100_000_000  # bytes of one file
LARGEST_TOGETHER = 3_000_000_000  # bytes of all that is unpacked
BEST_COMPRESSION = 250  # notebooks shrink to a tenth, some to a hundredth; what shrinks more is no notebook
RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?\Z")  # on Windows, whatever the ending


class Refused(Exception):
    """Why something is not read, as the rest of a sentence: "is encrypted"."""


@dataclass(frozen=True)
class Entry:
    """A file: its name with "/", and how to get at its bytes (which may raise Refused)."""

    name: str
    read: Callable[[], bytes]


def files_of(source: Path) -> tuple[list[Entry], list[tuple[str, str]]]:
    """All files of a folder or archive, those of archives in it too, as "outer.zip/inner"; and (name, why) of others.

    Raises: ValueError where there is no such folder or archive.
    """
    refused: list[tuple[str, str]] = []
    entries: list[Entry] = []
    if not source.exists():
        raise ValueError(f"there is no {source}")
    if not source.is_dir() and not zipfile.is_zipfile(source):
        raise ValueError(f"{source} is neither a folder nor a zip archive")
    budget = [LARGEST_TOGETHER]
    for entry in in_folder(source, refused) if source.is_dir() else in_archive(source, "", refused, budget):
        if not entry.name.lower().endswith(".zip"):
            entries.append(entry)
            continue
        try:
            inner = list(in_archive(BytesIO(entry.read()), entry.name + "/", refused, budget))
        except Refused as why:
            refused.append((entry.name, str(why)))
            continue
        for file in inner:
            if file.name.lower().endswith(".zip"):
                refused.append((file.name, "is an archive in an archive in an archive"))
            else:
                entries.append(file)
    if len(entries) > MOST_FILES:
        raise ValueError(f"{source} holds more than {MOST_FILES:,} files: that is no export of an assignment")
    return sorted(entries, key=lambda entry: entry.name), refused


def unsafe(name: str) -> str:
    """What is wrong with a name of a file, or ""."""
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        return "has control characters in its name"
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or re.match(r"[A-Za-z]:", name):
        return "has an absolute path for a name"
    if ".." in (part.strip() for part in parts):
        return "leads out of its folder"
    if len(name) > 1_000 or any(len(part.encode("utf-8", "replace")) > 255 for part in parts):
        return "has a name that is too long"
    if any(RESERVED.match(part.strip()) for part in parts):
        return "has a name that Windows keeps for devices"
    return ""


def tidy(name: str) -> str:
    """One spelling for a name: "/" between folders, composed letters."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def in_folder(folder: Path, refused: list[tuple[str, str]]) -> Iterator[Entry]:
    """The regular files of a folder, links not followed."""
    waiting, count = [folder], 0
    while waiting:
        with os.scandir(waiting.pop()) as listing:
            found = sorted(listing, key=lambda item: item.name)
        for item in found:
            count += 1
            if count > 2 * MOST_FILES:
                raise ValueError(f"{folder} holds more than {MOST_FILES:,} files: that is no export of an assignment")
            path = Path(item.path)
            name = os.fsencode(path.relative_to(folder).as_posix()).decode("utf-8", "replace")
            if item.is_symlink():
                refused.append((name, "is a link"))
            elif item.is_dir(follow_symlinks=False):
                waiting.append(path)
            elif not item.is_file(follow_symlinks=False):
                refused.append((name, "is no regular file"))
            elif why := unsafe(name):
                refused.append((name, why))
            else:
                yield Entry(tidy(name), lambda path=path: read_file(path))


def read_file(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise Refused("is too large")
    return data


def in_archive(source, prefix: str, refused: list[tuple[str, str]], budget: list[int]) -> Iterator[Entry]:
    """The files of a zip archive. Raises: Refused if it is none, or holds too many."""
    try:
        archive = zipfile.ZipFile(source)
        infos = archive.infolist()
    except Exception as error:  # zipfile raises many kinds for broken archives
        raise Refused(f"is an archive that cannot be opened ({type(error).__name__})") from None
    if len(infos) > MOST_FILES:
        raise Refused(f"is an archive of {len(infos):,} entries; {MOST_FILES:,} are the most")
    for info in infos:
        if info.is_dir():
            continue
        why = unsafe(info.orig_filename) or unsafe(info.filename) or unwelcome(info)
        if why:
            refused.append((prefix + info.orig_filename, why))
        else:
            yield Entry(prefix + tidy(info.filename), lambda info=info: read_member(archive, info, budget))


def unwelcome(info: zipfile.ZipInfo) -> str:
    """What is wrong with an archive's entry, or ""."""
    mode = info.external_attr >> 16
    if stat.S_ISLNK(mode) or (stat.S_IFMT(mode) and not stat.S_ISREG(mode)):
        return "is a link" if stat.S_ISLNK(mode) else "is no regular file"
    if info.flag_bits & 0x1:
        return "is encrypted"
    if info.file_size > LARGEST:
        return "is too large"
    if info.file_size > 1_000_000 and info.file_size > BEST_COMPRESSION * max(1, info.compress_size):
        return "would unfold to many times its size"
    return ""


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, budget: list[int]) -> bytes:
    """The bytes of an entry, whatever it says of its own size."""
    try:
        with archive.open(info) as file:
            data = file.read(min(LARGEST, info.file_size) + 1)
    except Exception as error:
        raise Refused(f"cannot be unpacked ({type(error).__name__})") from None
    budget[0] -= len(data)
    if len(data) > LARGEST or budget[0] < 0:
        raise Refused("is too large, or the archive is")
    return data
