"""Output on the screen and in the log of a run, and time per stage."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

Verbosity = Literal["all", "warnings", "nothing"]
_PROGRESS_SECONDS, _PROGRESS_LINE_SECONDS = 0.1, 10.0  # between two updates on a terminal, and in a file


class Screen:
    """The lines that a run shows, and a progress line that is rewritten in place if the stream is a terminal.

    Lines are also written to the log of the run, as soon as it has a folder.

    Attributes:
        shows: which lines are shown.
        watch: seconds by stage, from the imports on.
    """

    def __init__(self, stream: Any = None, *, shows: Verbosity = "all") -> None:
        """Starts with an empty screen.

        Args:
            stream: where lines are shown (default: standard output).
            shows: `all` lines, `warnings` and results only, or `nothing`.
        """
        self._stream = stream or sys.stdout
        self.shows, self.watch = shows, Stopwatch()
        self._progress_length = 0
        self._last_progress = 0.0
        self._log: Path | None = None
        self._unlogged: list[str] = []

    def line(self, text: str) -> None:
        """Shows one line, if all lines are shown; one that begins with `warning:` is a warning."""
        if text.startswith("warning:"):
            self.warning(text)
            return
        if self.shows == "all":
            self._show(text)
        self.log(text)

    def warning(self, text: str) -> None:
        """Shows a warning."""
        if self.shows != "nothing":
            self._show(text)
        self.log(text)

    def result(self, text: str) -> None:
        """Shows the result of the run."""
        if self.shows != "nothing":
            self._show(text)
        self.log(text)

    def progress(self, text: str) -> None:
        """Shows the progress of a stage: rewritten in place on a terminal, otherwise a line every ten seconds."""
        if self.shows != "all":
            return
        now = time.monotonic()
        if now - self._last_progress <= _PROGRESS_SECONDS:  # before `isatty`, which asks the system
            return
        if self._stream.isatty():
            self._clear()
            print(text, end="\r", file=self._stream, flush=True)
            self._progress_length, self._last_progress = len(text), now
        elif now - self._last_progress > _PROGRESS_LINE_SECONDS:
            if self._last_progress:
                print(text, file=self._stream, flush=True)
                self.log(text)
            self._last_progress = now

    def log_to(self, path: Path) -> None:
        """Appends to a log file everything that was shown, and from now on every line."""
        self._log = path
        shown, self._unlogged = self._unlogged, []
        for text in shown:
            self.log(text)

    def log(self, text: str) -> None:
        """Appends a line to the log, without showing it; a full disk does not stop the run."""
        if self._log is None:
            self._unlogged.append(text)
            return
        with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"{text}\n")

    def _show(self, text: str) -> None:
        self._clear()
        print(text, file=self._stream, flush=True)
        if self._last_progress and not self._stream.isatty():
            self._last_progress = time.monotonic()  # the next stage starts now

    def _clear(self) -> None:
        if self._progress_length:
            print(" " * self._progress_length, end="\r", file=self._stream)
            self._progress_length = 0


def count_of(count: int, noun: str) -> str:
    """A number with its noun: `1 image`, `2,000 images`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


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
