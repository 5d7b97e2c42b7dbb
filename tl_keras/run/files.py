"""Atomic and durable files: complete or not there at all, even after a crash or power loss."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TextIO

from tl_keras.errors import UserError
from tl_keras.run.owner import check_owner


def existing_parent(path: str) -> Path:
    """Finds the nearest existing parent of a path, or the path itself.

    `Path.exists` is not used, because it raises if a parent is not accessible.
    """
    absolute = Path(path).absolute()
    return next(parent for parent in [absolute, *absolute.parents] if os.path.exists(parent))


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turns disk errors, such as a full disk or missing permissions, into one line that names `what`.

    Raises:
        UserError: the block raised an OSError.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of the output has closed it: not an error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"the disk is full: {what} could not be written. Free some space and run again.") from error
        raise UserError(f"{what} can't be written: {error.strerror or error}. Choose another place.") from error


def check_writable(folder: Path, what: str) -> None:
    """Creates a folder and checks that it is writable, before a long computation.

    Raises:
        UserError: it can't be created or written; the message names `what`.
    """
    with disk_errors(what):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, syncs it to the disk and renames it, so that it is never incomplete.

    Raises:
        UserError: the disk is full, or the folder can't be written.
        LostRunError: another process has continued the run that the file belongs to.
    """
    with open_atomically(path) as file:
        file.write(content)


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that gets its final name when the block ends without an error; creates missing parents.

    A device or pipe, such as `/dev/stdout`, is written to as it is.

    Raises:
        UserError: the disk is full, or the folder can't be written.
        LostRunError: another process has continued the run that the file belongs to.
    """
    check_owner(path)
    if is_special(path):
        with disk_errors(str(path)), open(path, "ab") as file:
            yield file
        return
    path = Path(os.path.realpath(path))  # a link keeps leading to the file
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(str(path)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                yield file
            replace_durably(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def is_special(path: Path) -> bool:
    """Whether a path is a device, a pipe or a socket, or leads to what a shell has opened (`/dev/stdout`)."""
    if os.path.abspath(path).startswith(("/dev/", "/proc/")):
        return True
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def replace_durably(source: Path, target: Path) -> None:
    """Renames a written file so that after a power loss it has either the old or the new content, and is never empty.

    The content is synced before the file is renamed, and the folder after it; `rename` guarantees neither (Pillai et
    al. 2014, "All File Systems Are Not Created Equal", OSDI).

    Raises:
        OSError: the disk is full, or the folder can't be written.
    """
    _sync(source)
    os.replace(source, target)
    sync_folder(target.parent)


def replace_folder(source: Path, target: Path) -> None:
    """Replaces a folder with a complete one, and deletes the old one.

    Raises:
        OSError: the disk is full, or the folders can't be written.
        LostRunError: another process has continued the run that the folder belongs to.
    """
    check_owner(target)
    sync_tree(source)
    before = target.with_name(f".{target.name}.{os.getpid()}.old.tmp")
    if target.is_dir():
        os.rename(target, before)
    os.rename(source, target)
    sync_folder(target.parent)
    shutil.rmtree(before, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Syncs every file and folder below a folder to the disk, before it gets its final name."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(Path(parent) / name)
        sync_folder(Path(parent))


def sync_folder(folder: Path) -> None:
    """Syncs the entries of a folder; Windows and some network file systems do not support this."""
    if os.name == "posix":
        with contextlib.suppress(OSError):
            _sync(folder)


def _sync(path: Path) -> None:
    flags = os.O_RDONLY if path.is_dir() or os.name == "posix" else os.O_RDWR
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def csv_bytes(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Encodes rows as CSV, UTF-8, one header line."""
    text = io.StringIO()
    writer = csv_writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def csv_writer(stream: TextIO) -> Any:
    """Makes a `csv.writer` whose lines end in LF, and whose cells may contain CR and LF.

    Python before 3.12 quotes CR and LF in cells only if they are part of the line terminator.
    """
    return csv.writer(_UnixLines(stream), lineterminator="\r\n")


class _UnixLines:
    """Writes rows that end in CR LF with LF."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, row: str) -> None:
        self._stream.write(row.removesuffix("\r\n") + "\n")


def read_csv(path: Path) -> list[dict[str, str]]:
    """Reads the rows of a CSV file of a run; file names in it may not be UTF-8.

    Raises:
        OSError: it can't be read.
    """
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: it is missing, unreadable or not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}. Check the path.") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}. Create it again, or restore a copy.") from error
