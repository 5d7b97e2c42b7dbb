"""The run folder: one folder that holds all that one invocation made, never half a file."""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import errno
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO, TypeVar

from tl_keras.errors import UserError

Key = TypeVar("Key")
Value = TypeVar("Value")
Found = TypeVar("Found")
INTERRUPTED = 130  # exit status, as shells say it: 128 + SIGINT


@dataclasses.dataclass(frozen=True)
class Result:
    """What a mode came to.

    Attributes:
        run_dir: the run folder, where there is one.
        exported: the exported version folder, where there is one.
        metrics: what `metrics.json` holds.
        exit_status: 0; 130 where the user interrupted; 1 where something is not as it should be.
    """

    run_dir: Path | None = None
    exported: Path | None = None
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    exit_status: int = 0


class Screen:
    """What the user sees: lines, and a progress line that is rewritten where the stream is a terminal."""

    def __init__(self, stream: Any = None) -> None:
        """Args: stream: standard output where not given."""
        self._stream = stream or sys.stdout
        self._progress_length = 0
        self._last_progress = 0.0

    def line(self, text: str) -> None:
        """Shows one line."""
        self._clear()
        print(text, file=self._stream, flush=True)
        if self._last_progress and not self._stream.isatty():
            self._last_progress = time.monotonic()  # what follows is a stage of its own

    def progress(self, text: str) -> None:
        """Shows how far a stage is: rewritten in place on a terminal, a line every ten seconds elsewhere."""
        now = time.monotonic()
        if self._stream.isatty() and now - self._last_progress > 0.1:
            self._clear()
            print(text, end="\r", file=self._stream, flush=True)
            self._progress_length, self._last_progress = len(text), now
        elif not self._stream.isatty() and now - self._last_progress > 10:
            if self._last_progress:
                print(text, file=self._stream, flush=True)
            self._last_progress = now

    def _clear(self) -> None:
        if self._progress_length:
            print(" " * self._progress_length, end="\r", file=self._stream)
            self._progress_length = 0


class Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        """Starts with no stage."""
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time that the block takes to the stage `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)


def existing_parent(path: str) -> Path:
    """The nearest folder (or file) above a path that exists, or the path itself.

    Not by Path.exists, which raises where a folder above can't be looked into.
    """
    absolute = Path(path).absolute()
    return next(parent for parent in [absolute, *absolute.parents] if os.path.exists(parent))


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turns a full disk, a missing permission and their like into one line that names `what`.

    Raises:
        UserError: the block raised an OSError.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # whoever reads our output has read enough: no mistake
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"the disk is full: {what} could not be written. Free some space and run again.") from error
        raise UserError(f"{what} can't be written: {error.strerror or error}. Choose another place.") from error


def check_writable(folder: Path, what: str) -> None:
    """Makes a folder and tries to write in it, before anything long is computed that is to end there.

    Raises:
        UserError: it can't be made or written; it names `what`.
    """
    with disk_errors(what):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it, so that no reader ever sees half of it.

    Raises:
        UserError: the disk is full, or the folder can't be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(str(path)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def csv_bytes(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Encodes rows as CSV, UTF-8, one header line."""
    text = io.StringIO()
    writer = csv_writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def csv_writer(stream: TextIO) -> Any:
    """A `csv.writer` whose lines end in LF and whose cells may hold CR and LF.

    Python before 3.12 quotes of the two only what the line's end holds, so that CR stood bare.
    """
    return csv.writer(_UnixLines(stream), lineterminator="\r\n")


class _UnixLines:
    """Takes rows that end in CR LF, and writes LF."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, row: str) -> None:
        self._stream.write(row.removesuffix("\r\n") + "\n")


class RunFolder:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        """Args: path: an existing folder."""
        self.path = path

    @classmethod
    def create(cls, path: str, *, overwrite: bool, config: dict[str, Any], flags: str) -> RunFolder:
        """Makes the folder, and writes into it what runs it again.

        Args:
            path: where; parents are made too.
            overwrite: an earlier run's folder is replaced.
            config: for `config.json`.
            flags: for `run.flags`.

        Raises:
            UserError: the folder exists already and is not empty, or can't be written.
        """
        folder = Path(path)
        if folder.is_dir() and any(folder.iterdir()):
            if not (overwrite and all((folder / name).is_file() for name in ("config.json", "run.flags"))):
                begun = (folder / "config.json").is_file() and not (folder / "metrics.json").is_file()
                raise UserError(
                    f"the run folder {path} exists already{', of a run that has not ended' * begun}. Give another "
                    "--run_dir, or --overwrite to replace an earlier run."
                )
            with disk_errors(f"the run folder {path}"):
                shutil.rmtree(folder)
        with disk_errors(f"the run folder {path}"):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                (folder / "config.json").open("x").close()
            except FileExistsError as error:
                raise UserError(f"the run folder {path} was taken by another run just now. Run again.") from error
        created = cls(folder)
        created.write_json("config.json", config)
        created.write_text("run.flags", flags)
        return created

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file, UTF-8."""
        write_atomically(self.path / name, text.encode("utf-8", "surrogateescape"))

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file: keys in the order given, NaN refused."""
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def write_csv(self, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Writes a CSV file, UTF-8, one header line."""
        write_atomically(self.path / name, csv_bytes(header, rows))


class History:
    """`history.csv`: one row an epoch, on disk as soon as the epoch has ended."""

    def __init__(self, folder: RunFolder, header: Sequence[str]) -> None:
        """Args: header: the columns."""
        self._folder, self._header = folder, header
        self.rows: list[Sequence[Any]] = []

    def keep(self, row: Sequence[Any]) -> None:
        """Adds a row."""
        self.rows.append(row)
        self._folder.write_csv("history.csv", self._header, self.rows)


def name_run(mode: str, data: str, backbone: str) -> str:
    """`runs/MODE-DATA-BACKBONE-TIME`, with a number behind it where that is taken (two runs in one second)."""
    stem = os.path.join("runs", f"{mode}-{data}-{backbone}-{time.strftime('%Y%m%d-%H%M%S')}")
    path, number = stem, 2
    while os.path.exists(path):
        path, number = f"{stem}-{number}", number + 1
    return path


def read_csv(path: Path) -> list[dict[str, str]]:
    """Reads the rows of a CSV file that a run wrote; names in it may be no UTF-8.

    Raises:
        OSError: it can't be read.
    """
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def map_ahead(
    work: Callable[[Value], Found], items: Iterable[tuple[Key, Value]], *, threads: int | None, ahead: int
) -> Iterator[tuple[Key, Found]]:
    """Works on items in threads, a little ahead of whoever consumes what was found, in the items' order.

    Args:
        work: what is done with an item's value.
        items: keys, by which what was found is known, and values.
        threads: at most so many; None: the executor's own number.
        ahead: items that are worked on before they are asked for.
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting = collections.deque[tuple[Key, Future[Found]]]()
        for key, value in items:
            waiting.append((key, pool.submit(work, value)))
            if len(waiting) >= ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: it is missing, unreadable or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}. Check the path.") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}. Make it again, or restore it from a copy.") from error
