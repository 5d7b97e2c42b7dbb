"""What runs beside the event loop does not wait for what loads models, and memory is given back."""

from __future__ import annotations

import asyncio
import sys
import threading

import pytest

from tl_keras.serving import workers
from tl_keras.serving.calls import Budget, Limits
from tl_keras.serving.errors import RequestError
from tl_keras.serving.workers import LARGE_BYTES, Workers, trim_memory


def test_requests_do_not_wait_for_reloads():
    """Reloads took all threads of the pool that large requests are parsed in."""
    loaded, order = threading.Event(), list[str]()

    async def run() -> None:
        pool = Workers()
        reloads = [asyncio.ensure_future(pool.load_models(lambda: loaded.wait(60))) for _ in range(20)]
        await asyncio.sleep(0)
        for size in (100, 1 << 20, LARGE_BYTES):
            order.append(await pool.run(size, str.upper, "parsed"))
        assert not any(one.done() for one in reloads)
        loaded.set()
        assert all(await asyncio.gather(*reloads))
        pool.close()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert order == ["PARSED"] * 3


def test_one_large_request_is_parsed_at_a_time():
    running, most, lock = [0], [0], threading.Lock()

    def work() -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        threading.Event().wait(0.02)
        with lock:
            running[0] -= 1

    async def run() -> None:
        pool = Workers()
        await asyncio.gather(*(pool.run(LARGE_BYTES, work) for _ in range(5)))
        pool.close()

    asyncio.run(run())
    assert most == [1]


def test_memory_is_given_back_after_large_requests_once(monkeypatch):
    trimmed = threading.Semaphore(0)
    monkeypatch.setattr(workers, "_TRIM_SECONDS", 0.01)
    monkeypatch.setattr(workers, "trim_memory", trimmed.release)

    async def run() -> bool:
        pool = Workers()
        await pool.run(LARGE_BYTES - 1, int)
        for _ in range(3):
            await pool.run(LARGE_BYTES, int)
        while not trimmed.acquire(blocking=False):
            await asyncio.sleep(0.01)
        pool.close()
        return trimmed.acquire(blocking=False)

    assert not asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_glibc_can_give_memory_back():
    assert trim_memory() in {True, False}


def test_large_requests_leave_room_for_small_ones():
    """Sixteen of 60 MB at once made the server refuse everybody else."""
    budget = Budget(Limits(request_bytes=64 << 20, images=1, seconds=1.0, bytes_in_flight=1 << 30))
    for _ in range(14):
        budget.take(60 << 20)
    with pytest.raises(RequestError):
        budget.take(60 << 20)
    for _ in range(150):
        budget.take(500_000, held=500_000)
    with pytest.raises(RequestError):
        budget.take(500_000, held=1_000_000)
