"""Threads beside the event loop, and memory that is given back to the system."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

_Found = TypeVar("_Found")
_INLINE_BYTES = 1 << 16  # parsed or written at once: under a millisecond, which a thread would cost too
LARGE_BYTES = 4 << 20  # one such request at a time: its values are objects while it is parsed
_TRIM_SECONDS = 1.0
_SMALL_THREADS = 2


class Workers:
    """Threads that parse requests and write answers: the event loop has others to serve meanwhile."""

    def __init__(self) -> None:
        """Starts without a thread."""
        self._small = ThreadPoolExecutor(_SMALL_THREADS, thread_name_prefix="json")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="large-json")
        self._models = ThreadPoolExecutor(1, thread_name_prefix="models")
        self._is_due = False

    async def run(self, size: int, function: Callable[..., _Found], *arguments: Any, **named: Any) -> _Found:
        """Runs a function on a part of a request or answer.

        Args:
            size: bytes of what it works on.
            function: what to run.
            arguments: its arguments.
            named: its arguments by name.

        Returns:
            What the function returns.
        """
        call = functools.partial(function, *arguments, **named)
        if size < _INLINE_BYTES:
            return call()
        threads = self._small if size < LARGE_BYTES else self._large
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, call)
        finally:
            self._give_back(size)

    async def load_models(self, function: Callable[[], _Found]) -> _Found:
        """Runs what loads models, one after the other, in a thread that requests do not wait for."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._models, function)
        finally:
            self._give_back(LARGE_BYTES)

    def close(self) -> None:
        """Lets the threads end."""
        for threads in (self._small, self._large, self._models):
            threads.shutdown(wait=False, cancel_futures=True)

    def _give_back(self, size: int) -> None:
        """Soon gives the system back what large requests have left."""
        if size < LARGE_BYTES or self._is_due:
            return
        self._is_due = True
        asyncio.get_running_loop().call_later(_TRIM_SECONDS, self._trim)

    def _trim(self) -> None:
        self._is_due = False
        with contextlib.suppress(RuntimeError):  # the server ends
            self._small.submit(trim_memory)


def trim_memory() -> bool:
    """Gives the system the memory that was freed; C libraries other than glibc do so themselves.

    Returns:
        Whether the C library can.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is None:
        return False
    trim(0)
    return True
