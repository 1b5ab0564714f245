"""From a folder to bytes: which files a submission holds, read so that nothing in the folder can do harm.

Links are not followed, and nothing but a regular file is opened: no pipe that would never end, no device. What is read
has a bound, also what comes out of an archive.
"""

import hashlib
import io
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

LARGEST = 200_000_000  # bytes that are read of one submission
MOST_FILES = 40  # that are looked at
LARGEST_BESIDE = 5_000_000  # bytes of all other files
MOST_BESIDE = 10_000  # of them that are looked at
MOST_ENTRIES = 10_000  # of a folder
NOT_WORK = {"timestamp.txt", "submission_secret.txt", "requirements.txt", "readme.txt"}
ENDINGS = ("", ".json", ".txt", ".py", ".zip", ".gz", ".html", ".htm", ".bak", ".orig", ".tmp", ".part", ".download")
CHECKPOINTS = ".ipynb_checkpoints"


class Unreadable(Exception):
    """Why nothing can be got out of a file, as the rest of a sentence: "is empty"."""


@dataclass(frozen=True)
class File:
    name: str  # relative to the folder, with "/"
    data: bytes | None
    problem: str = ""  # why there is no data

    @property
    def is_notebook(self) -> bool:
        """By its name: what an instructor would want to hear of when it is not graded."""
        return "ipynb" in self.name.rsplit("/", 1)[-1].casefold()


@dataclass(frozen=True)
class Folder:
    files: list[File] = field(default_factory=list)
    digest: str = hashlib.sha256().hexdigest()
    problem: str = ""  # a sentence, if nothing can be read


def shown(name: str) -> str:
    """A file's name as a sentence can hold it: one line, no broken characters, not too long."""
    name = os.fsencode(name).decode("utf-8", "replace")
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return name if len(name) <= 80 else f"{name[:60]}...{name[-15:]}"


def rank(name: str, assignment: str) -> tuple:
    """The order in which files are looked at: the right name, then names that are nearly right."""
    plain = name.casefold()
    return (
        name != f"{assignment}.ipynb",
        CHECKPOINTS in plain,
        "/" in name,
        plain != f"{assignment}.ipynb".casefold(),
        not plain.endswith(".ipynb"),
        "ipynb" not in plain,
        assignment.casefold() not in plain,
        os.fsencode(name),
    )


def listed(folder: Path) -> list[tuple[str, os.stat_result]]:
    """The regular files of a folder and of the folders in it that may hold a notebook, in no order."""
    found = []
    inner = [(f"{entry.name}/", Path(entry.path)) for entry in entries(folder) if is_folder(entry)]
    for prefix, place in [("", folder), *sorted(inner)[:MOST_FILES]]:
        for entry in entries(place):
            try:
                status = entry.stat(follow_symlinks=False)
            except (OSError, ValueError):
                continue
            plain = entry.name.casefold()
            wanted = "ipynb" in plain or os.path.splitext(plain)[1] in ENDINGS
            skipped = plain in NOT_WORK or plain.startswith("._") or (plain.startswith(".") and "ipynb" not in plain)
            if wanted and not skipped and stat.S_ISREG(status.st_mode):
                found.append((prefix + entry.name, status))
    return found


def is_folder(entry: os.DirEntry) -> bool:
    hidden = entry.name.startswith(".") and entry.name != CHECKPOINTS
    try:
        return not hidden and entry.name not in ("__MACOSX", "__pycache__") and entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as scan:
            return [entry for entry, _ in zip(scan, range(MOST_ENTRIES))]
    except (OSError, ValueError):
        return []


def read(path: Path, most: int) -> bytes:
    """The bytes of a regular file. Raises: Unreadable."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        raise Unreadable(f"cannot be opened ({type(error).__name__})") from None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Unreadable("is no regular file")
        try:
            data = file.read(most + 1)
        except (OSError, MemoryError) as error:
            raise Unreadable(f"cannot be read ({type(error).__name__})") from None
    if len(data) > most:
        raise Unreadable(f"is too large (more than {LARGEST // 1_000_000} MB are not read)")
    return data


def files_in(folder: Path) -> Iterator[Path]:
    """The files below a folder, links to files among them: not without end, whatever a student makes of folders."""
    waiting, seen = [folder] if folder.is_dir() and not folder.is_symlink() else [], 0
    while waiting and seen < MOST_BESIDE:
        for entry in entries(waiting.pop()):
            seen += 1
            if entry.is_dir(follow_symlinks=False):
                waiting.append(Path(entry.path))
            else:
                yield Path(entry.path)


def files_beside(folder: Path, notebook: str | None) -> dict[str, bytes]:
    """A submission's other files, such as a module that its notebook imports: small ones, and no links."""
    found, left = {}, LARGEST_BESIDE
    for path in sorted(files_in(folder)):
        name = path.relative_to(folder).as_posix()
        wanted = path.suffix != ".ipynb" and name not in (notebook, "timestamp.txt") and name.isprintable()
        if not wanted or path.is_symlink() or len(found) >= 100:
            continue
        with suppress(Unreadable):
            found[name] = read(path, left)
            left -= len(found[name])
    return found


def look(folder: Path, assignment: str) -> Folder:
    """What a submission's folder holds, in the order in which it should be looked at."""
    try:
        status = os.lstat(folder)
    except (OSError, ValueError):
        return Folder(problem="Nothing was handed in: there is no folder.")
    if not stat.S_ISDIR(status.st_mode):
        kind = "a link, and links are not followed" if stat.S_ISLNK(status.st_mode) else "no folder"
        return Folder(problem=f"Nothing was read: the submission's folder is {kind}.")
    found = sorted(listed(folder), key=lambda item: rank(item[0], assignment))
    files, digest, left = [], hashlib.sha256(), LARGEST
    for name, status in found:
        digest.update(len(os.fsencode(name)).to_bytes(8, "big") + os.fsencode(name))
        try:
            if len(files) >= MOST_FILES:
                raise Unreadable("was not looked at: there are too many files")
            data = read(folder / name, left)
        except Unreadable as why:
            # Not its bytes, but what tells whether they have changed.
            digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
            if len(files) < MOST_FILES:
                files.append(File(name, None, str(why)))
            continue
        left -= len(data)
        digest.update(len(data).to_bytes(8, "big") + hashlib.sha256(data).digest())
        files.append(File(name, data))
    for name, data in files_beside(folder, None).items():
        digest.update(os.fsencode(name) + b"\0" + hashlib.sha256(data).digest())
    problem = "" if files else not_there(folder, f"{assignment}.ipynb")
    return Folder(files, digest.hexdigest(), problem)


def not_there(folder: Path, name: str) -> str:
    if not os.access(folder, os.R_OK | os.X_OK):
        return "Nothing was read: we may not look into the folder."
    try:
        mode = os.lstat(folder / name).st_mode
    except (OSError, ValueError):
        return "Nothing was handed in: there is no notebook in the folder."
    if stat.S_ISLNK(mode):
        return f"Nothing was read: {name} is a link, and links are not followed."
    return f"Nothing was read: {name} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}."


def unpacked(data: bytes) -> tuple[bytes, str]:
    """The content of an archive of one notebook, and a word for what it was in; anything else as it is.

    Raises: Unreadable for an archive that is broken, too large, or holds another number of notebooks.
    """
    if data[:2] == b"\x1f\x8b":
        return bounded(zlib.decompressobj(wbits=31), data, "a gzip archive"), "a gzip archive"
    if data[:4] not in (b"PK\x03\x04", b"PK\x05\x06"):
        return data, ""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            inside = [i for i in archive.infolist() if i.filename.casefold().endswith(".ipynb") and not i.is_dir()]
            hidden = (CHECKPOINTS, "__MACOSX", "/._")
            inside = [i for i in inside if not any(word in f"/{i.filename}" for word in hidden)]
            if len(inside) != 1:
                raise Unreadable(f"is a zip archive with {len(inside) or 'no'} notebooks in it; one is needed")
            content = b""
            if inside[0].file_size <= LARGEST:  # what it says; the next line does not rely on it
                with archive.open(inside[0]) as file:
                    content = file.read(LARGEST + 1)
    except Unreadable:
        raise
    except Exception as error:  # zipfile raises many kinds for broken, encrypted and unknown archives
        raise Unreadable(f"is a zip archive that cannot be opened ({type(error).__name__})") from None
    if max(len(content), inside[0].file_size) > LARGEST:
        raise Unreadable("is a zip archive whose content is too large")
    return content, "a zip archive"


def bounded(unpacker, data: bytes, what: str) -> bytes:
    try:
        content = unpacker.decompress(data, LARGEST + 1)
    except (zlib.error, MemoryError) as error:
        raise Unreadable(f"is {what} that cannot be opened ({type(error).__name__})") from None
    if len(content) > LARGEST:
        raise Unreadable(f"is {what} whose content is too large")
    return content
