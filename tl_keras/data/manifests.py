"""Tables that users write about their images: CSV as spreadsheets save it."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import posixpath
import re
import unicodedata
from pathlib import Path
from typing import Literal

from tl_keras.errors import UserError

_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
_CONTROL = frozenset(("Cc", "Cs", "Zl", "Zp"))


@dataclasses.dataclass(frozen=True)
class Table:
    """A CSV file.

    Attributes:
        path: of the file.
        names: of its columns: in small letters → as they stand there.
        rows: number of the line (the last of those that a row takes), and cells by name in small letters.
        header: its first line.
    """

    path: Path
    names: dict[str, str]
    rows: list[tuple[int, dict[str, str]]]
    header: str

    def cell(self, row: int, name: str) -> str:
        """A cell without white space around it; empty where there is none."""
        return (self.rows[row][1].get(name) or "").strip()

    def ids(self) -> list[str]:
        """Each row's id: the column `id` if it has any, or else its `path`, tidied.

        Raises:
            UserError: only some rows have an id, or two have the same: ids decide the splits, and taken from the paths
                for all rows they would move images from train to test.
        """
        given = self.ids_of("id")
        if "path" not in self.names:
            return given
        if not any(given):
            return self.ids_of("path")
        lines: dict[str, int] = {}
        for row, one in enumerate(given):
            line = self.rows[row][0]
            if not one:
                raise UserError(
                    f"{self.path} line {line} has no id, and other lines have one. Ids decide which split an image "
                    "belongs to: give every line one, or leave the column out to take the paths."
                )
            if one in lines:
                raise UserError(
                    f"{self.path}: lines {lines[one]} and {line} both have the id {one}. An id stands for one image: "
                    "make ids unique. If the column holds something else, such as a patient, rename it, and the paths "
                    "are taken."
                )
            lines[one] = line
        return given

    def ids_of(self, column: Literal["id", "path"]) -> list[str]:
        """Each row's id by that column alone, tidied; empty where the cell is."""
        cells = [self._path(row) if column == "path" else self.cell(row, column) for row in range(len(self.rows))]
        if column == "path":
            cells = [posixpath.normpath(cell) if cell else "" for cell in cells]
        return [one_spelling(cell) for cell in cells]

    def file(self, row: int) -> str:
        """The file that the cell `path` names; `~` is the home folder."""
        return os.path.expanduser(self._path(row))

    def _path(self, row: int) -> str:
        """The cell `path`; with Windows' separators turned unless a file's name has them."""
        path = self.cell(row, "path")
        if "\\" not in path or os.path.exists(self.path.parent / path):
            return path
        return path.replace("\\", "/")


def one_spelling(text: str) -> str:
    """One spelling of a name on every system: macOS writes accents apart (Unicode NFD), others together (NFC)."""
    return unicodedata.normalize("NFC", text)


def has_control(text: str) -> bool:
    """Whether a text has what no line can hold: control characters, line separators, bytes that are no UTF-8."""
    return any(unicodedata.category(letter) in _CONTROL for letter in text)


def read_table(path: Path, *, asked: str) -> Table:
    """Reads a CSV file: separated by commas, semicolons or tabs, in UTF-8 or UTF-16.

    Args:
        path: the file.
        asked: the flag with which it was asked for.

    Raises:
        UserError: it can't be read, or is no such file.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{asked} can't be read: {error.strerror}. Check the path.") from error
    encoding = "utf-16" if raw[:2] in {b"\xff\xfe", b"\xfe\xff"} else "utf-8-sig"  # Excel writes either mark
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}. Save it as 'CSV UTF-8'.") from error
    header = text.partition("\n")[0].strip()
    unquoted = re.sub(r'"[^"]*"', "", header)
    delimiter = max(",;\t", key=unquoted.count)  # Excel writes ';' where ',' is the decimal mark
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        names = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = [name.lower() for name in names]
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:  # a quote that is never closed
        raise UserError(f"{path} line {reader.line_num} is no CSV: {error}. Look for a stray quote.") from error
    for line, row in rows:
        extra = [cell for cell in row.pop(None, None) or () if cell.strip()]
        if extra:
            raise UserError(
                f"{path} line {line} has {len(names) + len(extra)} cells, and the header has {len(names)}. A cell "
                f"with a {_DELIMITERS[delimiter]} in it needs quotes."
            )
    twice = [name for name in names if name and [one.lower() for one in names].count(name.lower()) > 1]
    if twice:
        raise UserError(f"{path} has columns of one name: {', '.join(twice)}. Rename them.")
    return Table(path, {name.lower(): name for name in names if name}, rows, header)
