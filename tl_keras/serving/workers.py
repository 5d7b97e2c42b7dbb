"""Threads beside the event loop, and the release of free memory to the system."""

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
_INLINE_BYTES = 1 << 16  # parsing this takes less than a millisecond, so a thread would not pay
LARGE_BYTES = 4 << 20  # requests of this size are parsed one at a time, to bound the memory
_TRIM_SECONDS = 1.0
_SMALL_THREADS = 2


class Workers:
    """Threads that parse requests, format answers and load models while the event loop serves other clients."""

    def __init__(self) -> None:
        """Creates the pools; threads start on demand."""
        self._small = ThreadPoolExecutor(_SMALL_THREADS, thread_name_prefix="json")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="large-json")
        self._models = ThreadPoolExecutor(1, thread_name_prefix="models")
        self._is_due = False

    async def run(self, size: int, function: Callable[..., _Found], *arguments: Any, **named: Any) -> _Found:
        """Runs a function on a request or an answer.

        Args:
            size: number of bytes that the function processes.
            function: the function.
            arguments: positional arguments.
            named: keyword arguments.

        Returns:
            The result of the function.
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
        """Runs a function that loads models, in a thread of its own so that requests do not wait for it."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._models, function)
        finally:
            self._give_back(LARGE_BYTES)

    def close(self) -> None:
        """Ends the threads."""
        for threads in (self._small, self._large, self._models):
            threads.shutdown(wait=False, cancel_futures=True)

    def _give_back(self, size: int) -> None:
        """Schedules the release of memory after a large request."""
        if size < LARGE_BYTES or self._is_due:
            return
        self._is_due = True
        asyncio.get_running_loop().call_later(_TRIM_SECONDS, self._trim)

    def _trim(self) -> None:
        self._is_due = False
        with contextlib.suppress(RuntimeError):  # the server ends
            self._small.submit(trim_memory)


def trim_memory() -> bool:
    """Returns free memory to the system. C libraries other than glibc do this on their own.

    Returns:
        Whether the C library supports it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is None:
        return False
    trim(0)
    return True
