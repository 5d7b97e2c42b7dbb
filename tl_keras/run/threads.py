"""Parallel work in threads, ahead of the consumer."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")
Found = TypeVar("Found")


def map_ahead(
    work: Callable[[Value], Found], items: Iterable[tuple[Key, Value]], *, threads: int | None, ahead: int
) -> Iterator[tuple[Key, Found]]:
    """Applies a function to items in threads, ahead of the consumer; results are in the order of the items.

    Args:
        work: function of an item's value.
        items: pairs of key and value; a result is yielded with its key.
        threads: maximum number of threads; None for the default of the executor.
        ahead: number of items that are processed ahead of the consumer.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        waiting = collections.deque[tuple[Key, Future[Found]]]()
        for key, value in items:
            waiting.append((key, pool.submit(work, value)))
            if len(waiting) >= ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # the consumer may have stopped early
