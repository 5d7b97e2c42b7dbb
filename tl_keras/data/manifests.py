"""CSV tables of users: manifests of images and tables of attributes, as spreadsheets save them."""

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
        path: path of the file.
        names: column names: lower case → as written.
        rows: line number (the last line of the row), and cells by column name in lower case.
        header: first line of the file.
    """

    path: Path
    names: dict[str, str]
    rows: list[tuple[int, dict[str, str]]]
    header: str

    def cell(self, row: int, name: str) -> str:
        """A cell without surrounding white space; empty if it does not exist."""
        return (self.rows[row][1].get(name) or "").strip()

    def ids(self) -> list[str]:
        """The id of each row: the column `id` if it has values, otherwise the normalized `path`.

        Raises:
            UserError: only some rows have an id, or two rows have the same id. Ids determine the splits, so falling
                back to the paths would move images from train to test.
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
                    f"{self.path} line {line} has no id, but other lines have one. Ids determine the split of an "
                    "image: give every line an id, or remove the column to use the paths."
                )
            if one in lines:
                raise UserError(
                    f"{self.path}: lines {lines[one]} and {line} both have the id {one}. Ids must be unique. If the "
                    "column has another meaning, such as a patient, rename it; then the paths are used."
                )
            lines[one] = line
        return given

    def ids_of(self, column: Literal["id", "path"]) -> list[str]:
        """The id of each row from one column, normalized; empty for empty cells."""
        cells = [self._path(row) if column == "path" else self.cell(row, column) for row in range(len(self.rows))]
        if column == "path":
            cells = [posixpath.normpath(cell) if cell else "" for cell in cells]
        return [one_spelling(cell) for cell in cells]

    def file(self, row: int) -> str:
        """The file in the cell `path`; `~` is expanded to the home folder."""
        return os.path.expanduser(self._path(row))

    def _path(self, row: int) -> str:
        """The cell `path`, with Windows separators replaced unless they are part of a file name."""
        path = self.cell(row, "path")
        if "\\" not in path or os.path.exists(self.path.parent / path):
            return path
        return path.replace("\\", "/")


def one_spelling(text: str) -> str:
    """Normalizes a name to Unicode NFC: macOS writes accents as separate characters (NFD)."""
    return unicodedata.normalize("NFC", text)


def has_control(text: str) -> bool:
    """Whether a text has control characters, line separators, or bytes that are not UTF-8."""
    return any(unicodedata.category(letter) in _CONTROL for letter in text)


def read_table(path: Path, *, asked: str) -> Table:
    """Reads a CSV file with commas, semicolons or tabs, in UTF-8 or UTF-16.

    Args:
        path: the file.
        asked: the flag that names the file, for error messages.

    Raises:
        UserError: the file can't be read, or is not a CSV file.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{asked} can't be read: {error.strerror}. Check the path.") from error
    encoding = "utf-16" if raw[:2] in {b"\xff\xfe", b"\xfe\xff"} else "utf-8-sig"  # Excel writes either byte order mark
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}. Save it as 'CSV UTF-8'.") from error
    header = text.partition("\n")[0].strip()
    unquoted = re.sub(r'"[^"]*"', "", header)
    delimiter = max(",;\t", key=unquoted.count)  # Excel writes ';' in locales with a decimal comma
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        names = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = [name.lower() for name in names]
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:  # an unclosed quote
        raise UserError(
            f"{path} line {reader.line_num} is not valid CSV: {error}. Look for an unclosed quote."
        ) from error
    for line, row in rows:
        extra = [cell for cell in row.pop(None, None) or () if cell.strip()]
        if extra:
            raise UserError(
                f"{path} line {line} has {len(names) + len(extra)} cells, but the header has {len(names)}. Put cells "
                f"that contain a {_DELIMITERS[delimiter]} in quotes."
            )
    twice = [name for name in names if name and [one.lower() for one in names].count(name.lower()) > 1]
    if twice:
        raise UserError(f"{path} has several columns with the same name: {', '.join(twice)}. Rename them.")
    return Table(path, {name.lower(): name for name in names if name}, rows, header)
