"""Requests of many clients in one batch."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping

import grpc
import numpy as np
import pytest

from tl_keras.serving.batching import Batcher
from tl_keras.serving.errors import RequestError, invalid

SIZES = (1, 2, 4, 8)


class Recorder:
    """Doubles numbers, and notes the size of each batch; it can be held up."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.threads: set[str] = set()
        self.go = threading.Event()
        self.go.set()

    def run(self, signature: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.go.wait(10)
        self.sizes.append(len(inputs["x"]))
        self.threads.add(threading.current_thread().name)
        if signature == "fails" or (inputs["x"] < 0).any():
            raise invalid("negative")
        return {"y": inputs["x"] * 2}


async def ask(batcher: Batcher, *values: float, seconds: float = 10.0, signature: str = "s") -> list[float]:
    inputs = {"x": np.array(values, np.float32)}
    deadline = time.monotonic() + seconds
    answer = await batcher.run(signature, inputs, rows=len(values), deadline=deadline)
    return answer["y"].tolist()


def run(work) -> Recorder:
    recorder = Recorder()
    batcher = Batcher(recorder.run, sizes=SIZES, max_queued=40)
    asyncio.run(work(batcher, recorder))
    batcher.close()
    return recorder


async def hold(batcher: Batcher, recorder: Recorder) -> list[asyncio.Task]:
    """A request that keeps the thread busy until `go` is set."""
    recorder.go.clear()
    tasks = [asyncio.create_task(ask(batcher, 100.0))]
    await asyncio.sleep(0.05)
    return tasks


def test_a_request_alone_runs_at_once_and_unpadded():
    async def work(batcher, recorder):
        assert await ask(batcher, 1.0) == [2.0]
        assert await ask(batcher, 1.0, 2.0) == [2.0, 4.0]

    assert run(work).sizes == [1, 2]


def test_what_waits_goes_together_and_everyone_gets_his_own():
    async def work(batcher, recorder):
        held = await hold(batcher, recorder)
        tasks = [asyncio.create_task(ask(batcher, float(number))) for number in range(8)]
        await asyncio.sleep(0.05)
        recorder.go.set()
        assert await asyncio.gather(*tasks) == [[2.0 * number] for number in range(8)]
        await asyncio.gather(*held)

    assert sorted(run(work).sizes) == [1, 8]


@pytest.mark.parametrize(
    ("waiting", "sizes"), [(7, [8]), (6, [8]), (5, [4, 1]), (3, [4]), (9, [8, 1]), (20, [4, 8, 8])]
)
def test_batches_have_the_sizes_that_are_allowed(waiting, sizes):
    async def work(batcher, recorder):
        held = await hold(batcher, recorder)
        tasks = [asyncio.create_task(ask(batcher, float(number))) for number in range(waiting)]
        await asyncio.sleep(0.05)
        recorder.go.set()
        assert await asyncio.gather(*tasks) == [[2.0 * number] for number in range(waiting)]
        await asyncio.gather(*held)

    assert sorted(run(work).sizes) == sorted([1, *sizes])


def test_a_request_larger_than_a_batch_is_split_and_comes_back_whole():
    async def work(batcher, recorder):
        values = [float(number) for number in range(19)]
        assert await ask(batcher, *values) == [2 * value for value in values]

    assert sum(run(work).sizes) in {19, 20}


def test_an_empty_request_is_answered():
    async def work(batcher, recorder):
        assert await ask(batcher) == []

    run(work)


def test_a_full_queue_refuses_at_once():
    async def work(batcher, recorder):
        held = await hold(batcher, recorder)
        tasks = [asyncio.create_task(ask(batcher, *[1.0] * 8)) for _ in range(5)]
        await asyncio.sleep(0.05)
        assert batcher.queued == 40
        with pytest.raises(RequestError, match="queue to which this task was submitted is full") as caught:
            await ask(batcher, 1.0)
        assert caught.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.http_status == 429
        recorder.go.set()
        await asyncio.gather(*tasks, *held)
        assert batcher.queued == 0
        assert await ask(batcher, 1.0) == [2.0]

    run(work)


def test_who_is_too_late_is_told_so_and_never_run():
    async def work(batcher, recorder):
        held = await hold(batcher, recorder)
        late = asyncio.create_task(ask(batcher, 5.0, seconds=0.1))
        with pytest.raises(RequestError) as caught:
            await late
        assert caught.value.http_status == 504
        recorder.go.set()
        await asyncio.gather(*held)
        await ask(batcher, 1.0)
        assert batcher.queued == 0

    assert run(work).sizes == [1, 1]


def test_who_hangs_up_costs_nothing_more():
    async def work(batcher, recorder):
        held = await hold(batcher, recorder)
        gone = [asyncio.create_task(ask(batcher, 5.0)) for _ in range(4)]
        await asyncio.sleep(0.05)
        for task in gone:
            task.cancel()
        await asyncio.sleep(0.05)
        recorder.go.set()
        await asyncio.gather(*held)
        assert await ask(batcher, 1.0) == [2.0]
        assert batcher.queued == 0

    assert run(work).sizes == [1, 1]


def test_one_bad_request_fails_alone():
    async def work(batcher, recorder):
        held = await hold(batcher, recorder)
        tasks = [asyncio.create_task(ask(batcher, value)) for value in (1.0, -1.0, 3.0, 4.0)]
        await asyncio.sleep(0.05)
        recorder.go.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [answers[0], *answers[2:]] == [[2.0], [6.0], [8.0]]
        assert isinstance(answers[1], RequestError)
        await asyncio.gather(*held)

    run(work)


def test_signatures_do_not_mix():
    async def work(batcher, recorder):
        held = await hold(batcher, recorder)
        good = [asyncio.create_task(ask(batcher, 1.0)) for _ in range(4)]
        bad = [asyncio.create_task(ask(batcher, 1.0, signature="fails")) for _ in range(2)]
        await asyncio.sleep(0.05)
        recorder.go.set()
        assert await asyncio.gather(*good) == [[2.0]] * 4
        assert all(isinstance(one, RequestError) for one in await asyncio.gather(*bad, return_exceptions=True))
        await asyncio.gather(*held)

    run(work)


def test_as_many_batches_run_at_once_as_there_are_workers():
    recorder = Recorder()
    batcher = Batcher(recorder.run, sizes=SIZES, max_queued=40, workers=2)

    async def work() -> None:
        recorder.go.clear()
        tasks = [asyncio.create_task(ask(batcher, float(number))) for number in range(2)]
        await asyncio.sleep(0.05)
        assert batcher.queued == 0
        recorder.go.set()
        assert await asyncio.gather(*tasks) == [[0.0], [2.0]]

    asyncio.run(work())
    batcher.close()
    assert len(recorder.threads) == 2


def test_a_small_crowd_waits_for_a_large_one_to_come_back():
    """Else eleven and one would take turns: twelve clients that ask again at once settle at six and six."""

    class Slow(Recorder):
        def run(self, signature, inputs):
            time.sleep(0.02 + 0.005 * len(inputs["x"]))
            return super().run(signature, inputs)

    recorder = Slow()
    batcher = Batcher(recorder.run, sizes=(1, 2, 4, 8, 16), max_queued=100)

    async def client() -> None:
        for _ in range(10):
            await ask(batcher, 1.0)
            await asyncio.sleep(0.002)

    async def work() -> None:
        await asyncio.gather(*(client() for _ in range(12)))

    asyncio.run(work())
    batcher.close()
    middle = recorder.sizes[6:-6]
    assert np.mean(np.array(middle) < 4) < 0.25  # taking turns, it would be half of them
