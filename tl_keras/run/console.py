"""What the user sees while a run goes on, and how long each stage takes."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any


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
