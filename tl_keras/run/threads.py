"""Work done in threads, a little ahead of whoever consumes it."""

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
