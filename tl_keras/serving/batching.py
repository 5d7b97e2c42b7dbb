"""Batching: combines requests of several clients into batches of sizes that were warmed up."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np

from tl_keras.serving.errors import RequestError, expired

_WORTH_PADDING = 0.75  # so full, a batch is filled up with empty rows; else the next smaller size is taken
# Behind a batch of many, few may wait for its clients to come back: so long at most, as a share of that batch's time.
# Without it a large crowd and a small one take turns for ever, and the small one's batches waste the machine.
_LINGER_SHARE, _LINGER_SECONDS = 0.1, 0.02

_ANSWERED = "the request was answered"

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass
class _Task:
    """The rows of a request, or a part of them, until they are answered."""

    inputs: Arrays
    rows: int
    arrival: float
    deadline: float
    answer: asyncio.Future[Arrays]


class Batcher:
    """Runs the requests of one model in batches.

    A single request runs at once. Under load, the requests that arrive while a batch runs form the next batch. All
    methods must be called in the thread of the event loop.
    """

    def __init__(
        self,
        run: Callable[[str, Mapping[str, np.ndarray]], Arrays],
        *,
        sizes: Sequence[int],
        max_queued: int,
        workers: int = 1,
    ) -> None:
        """Starts the threads.

        Args:
            run: signature and inputs → outputs; thread-safe.
            sizes: batch sizes, increasing.
            max_queued: maximum number of rows in the queue.
            workers: number of concurrent batches. One batch keeps a few cores busy; fewer workers make larger batches.
        """
        self._run, self._sizes, self._max_queued, self._workers = run, sorted(sizes), max_queued, workers
        self._waiting: dict[str, collections.deque[_Task]] = {}
        self._queued = self._busy = 0
        self._wanted_rows, self._linger_until = 1, 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="batch")

    @property
    def queued(self) -> int:
        """Number of rows in the queue."""
        return self._queued

    async def run(self, signature: str, inputs: Arrays, *, rows: int, deadline: float) -> Arrays:
        """Runs a request, together with others.

        Args:
            signature: name of the signature.
            inputs: name → array `(rows, ...)`, already validated.
            rows: number of rows.
            deadline: latest time, in seconds of `time.monotonic`.

        Returns:
            Name of the output → array `(rows, ...)`.

        Raises:
            RequestError: the queue is full, the deadline passed, or the graph rejects the inputs.
        """
        if self._queued + rows > self._max_queued:
            raise RequestError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "The batch scheduling queue to which this task was submitted is full; "
                f"task size={rows}, queued={self._queued}, max_queued={self._max_queued}",
            )
        loop, now = asyncio.get_running_loop(), time.monotonic()
        largest = self._sizes[-1]
        starts = range(0, max(rows, 1), largest)
        tasks = [
            _Task(
                {name: array[start : start + largest] for name, array in inputs.items()},
                min(largest, rows - start),
                now,
                deadline,
                loop.create_future(),
            )
            for start in starts
        ]
        self._waiting.setdefault(signature, collections.deque()).extend(tasks)
        self._queued += rows
        self._dispatch()
        parts = await _wait([task.answer for task in tasks], max(0.0, deadline - time.monotonic()))
        return parts[0] if len(parts) == 1 else {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def close(self) -> None:
        """Ends the threads; no batch may be running."""
        if self._timer is not None:
            self._timer.cancel()
        self._threads.shutdown(wait=False)

    def _dispatch(self) -> None:
        """Starts batches in free threads; the signature whose first request has waited longest comes first."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._busy < self._workers and (name := self._next_signature()):
            seconds = self._linger_until - time.monotonic()
            if seconds > 0 and self._queued < self._wanted_rows:
                self._timer = asyncio.get_running_loop().call_later(seconds, self._dispatch)
                return
            tasks = self._take(self._waiting[name])
            if not tasks:
                continue
            self._busy += 1
            work = asyncio.get_running_loop().run_in_executor(self._threads, self._answer, name, tasks)
            work.add_done_callback(functools.partial(self._finish, tasks, time.monotonic()))

    def _next_signature(self) -> str | None:
        waiting = {name: tasks for name, tasks in self._waiting.items() if tasks}
        return min(waiting, key=lambda name: waiting[name][0].arrival, default=None)

    def _take(self, waiting: collections.deque[_Task]) -> list[_Task]:
        """Takes requests for one batch; canceled and expired requests are left out."""
        tasks, rows = list[_Task](), 0
        limit = self._choose_size(sum(task.rows for task in waiting))
        while waiting and (not tasks or rows + waiting[0].rows <= limit):
            task = waiting.popleft()
            self._queued -= task.rows
            if task.answer.done():
                continue
            if task.deadline <= time.monotonic():
                task.answer.set_exception(expired(_ANSWERED))
                continue
            tasks.append(task)
            rows += task.rows
        return tasks

    def _choose_size(self, rows: int) -> int:
        """Chooses the batch size for the number of rows in the queue."""
        above = next((size for size in self._sizes if size >= rows), self._sizes[-1])
        below = max((size for size in self._sizes if size <= rows), default=self._sizes[0])
        return above if rows >= _WORTH_PADDING * above else below

    def _answer(self, signature: str, tasks: list[_Task]) -> list[Arrays | RequestError]:
        """Runs a batch in a thread; if it fails, runs each request alone, so that only invalid requests fail."""
        try:
            return list[Arrays | RequestError](self._run_together(signature, tasks))
        except RequestError as error:
            failure = RequestError(error.code, error.message)  # without its traceback, which holds these frames
        except Exception as error:  # OpenVINO raises plain RuntimeErrors
            failure = RequestError(grpc.StatusCode.INTERNAL, str(error).splitlines()[0] if str(error) else repr(error))
        if len(tasks) == 1:
            return [failure]
        answers: list[Arrays | RequestError] = []
        for task in tasks:
            answers += self._answer(signature, [task])
        return answers

    def _run_together(self, signature: str, tasks: list[_Task]) -> list[Arrays]:
        rows = sum(task.rows for task in tasks)
        size = next((size for size in self._sizes if size >= rows), rows) if rows else 0
        inputs = {name: _fill([task.inputs[name] for task in tasks], size) for name in tasks[0].inputs}
        outputs = self._run(signature, inputs)
        ends = np.cumsum([task.rows for task in tasks])
        return [
            {name: array[end - task.rows : end] for name, array in outputs.items()}
            for end, task in zip(ends, tasks, strict=True)
        ]

    def _finish(self, tasks: list[_Task], start: float, done: asyncio.Future[list[Arrays | RequestError]]) -> None:
        self._busy -= 1
        now, rows = time.monotonic(), sum(task.rows for task in tasks)
        self._linger_until = now + min(_LINGER_SECONDS, _LINGER_SHARE * (now - start)) if rows > 1 else now
        self._wanted_rows = min((self._queued + rows + 1) // 2, self._sizes[-1])
        failure = done.exception()
        answers = [failure] * len(tasks) if failure else done.result()
        for task, answer in zip(tasks, answers, strict=True):
            if task.answer.done():
                continue
            if isinstance(answer, BaseException):
                task.answer.set_exception(answer)
            else:
                task.answer.set_result(answer)
        self._dispatch()


async def _wait(answers: list[asyncio.Future[Arrays]], seconds: float) -> list[Arrays]:
    """Collects all answers in order; all are canceled if one fails or the deadline passes.

    Raises:
        RequestError: an answer failed, or the deadline passed.
    """
    try:
        await asyncio.wait(answers, timeout=seconds)
        if not all(answer.done() for answer in answers):
            raise expired(_ANSWERED)
    finally:
        for answer in answers:
            answer.cancel()  # has no effect on those that are complete
    failures = [answer.exception() for answer in answers]
    if failure := next((one for one in failures if one), None):
        raise failure
    return [answer.result() for answer in answers]


def _fill(arrays: list[np.ndarray], size: int) -> np.ndarray:
    """Concatenates all rows, and pads them to the batch size with empty strings or zeros."""
    missing = size - sum(len(array) for array in arrays)
    if missing <= 0:
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    shape = (missing, *arrays[0].shape[1:])
    filler = np.full(shape, b"", object) if arrays[0].dtype == object else np.zeros(shape, arrays[0].dtype)
    return np.concatenate([*arrays, filler])
