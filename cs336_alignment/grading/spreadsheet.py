"""Csv files as spreadsheets save them: the class list and the extensions, which people keep in one."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path


def csv_text(path: Path) -> str:
    """UTF-8, with the mark that Excel puts in front or without, UTF-16, or Windows' own letters."""
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def csv_lines(path: Path, text: str, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """The lines with their numbers. Raises: ValueError with the file's name for what is no csv file."""
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for words in lines:
            yield lines.line_num, words
    except csv.Error as error:
        where = f"{path}, line {lines.line_num}"
        raise ValueError(f"{where}: {error}; is a quotation mark missing, or is it no csv file?") from None
