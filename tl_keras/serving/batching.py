"""Requests of many clients in one batch of a size that the network was warmed up for."""

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

from tl_keras.serving.errors import RequestError

WORKERS = 2  # one batch is decoded while the network runs another
_WORTH_PADDING = 0.75  # so full, a batch is filled up with empty rows; else the next smaller size is taken

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass
class _Task:
    """A request's rows, or a part of them, until they are answered."""

    inputs: Arrays
    rows: int
    deadline: float
    answer: asyncio.Future[Arrays]


class Batcher:
    """Runs requests of one model in batches: whatever waits while a batch runs goes together into the next.

    No request waits for others to come: alone it runs at once, and under load batches grow by themselves.
    All methods are for the event loop's thread.
    """

    def __init__(
        self, run: Callable[[str, Mapping[str, np.ndarray]], Arrays], *, sizes: Sequence[int], max_queued: int
    ) -> None:
        """Starts its threads.

        Args:
            run: signature and inputs → outputs; for several threads at once.
            sizes: of batches, rising.
            max_queued: rows that may wait.
        """
        self._run, self._sizes, self._max_queued = run, sorted(sizes), max_queued
        self._waiting: dict[str, collections.deque[_Task]] = {}
        self._queued = self._busy = 0
        self._threads = ThreadPoolExecutor(WORKERS, thread_name_prefix="batch")

    @property
    def queued(self) -> int:
        """Rows that wait."""
        return self._queued

    async def run(self, signature: str, inputs: Arrays, *, rows: int, deadline: float) -> Arrays:
        """Runs a request, together with others.

        Args:
            signature: its name.
            inputs: name → array `(rows, ...)`, checked.
            rows: how many.
            deadline: by `time.monotonic`.

        Returns:
            Output's name → array `(rows, ...)`.

        Raises:
            RequestError: too many wait already, the deadline passed, or the graph refuses the inputs.
        """
        if self._queued + rows > self._max_queued:
            raise RequestError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "The batch scheduling queue to which this task was submitted is full; "
                f"task size={rows}, queued={self._queued}, max_queued={self._max_queued}",
            )
        loop = asyncio.get_running_loop()
        largest = self._sizes[-1]
        starts = range(0, max(rows, 1), largest)
        tasks = [
            _Task(
                {name: array[start : start + largest] for name, array in inputs.items()},
                min(largest, rows - start),
                deadline,
                loop.create_future(),
            )
            for start in starts
        ]
        self._waiting.setdefault(signature, collections.deque()).extend(tasks)
        self._queued += rows
        self._dispatch()
        answers = asyncio.gather(*(task.answer for task in tasks))
        try:
            parts = await asyncio.wait_for(answers, max(0.0, deadline - time.monotonic()))
        except asyncio.TimeoutError as error:
            raise _expired() from error
        return parts[0] if len(parts) == 1 else {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def close(self) -> None:
        """Ends the threads; nothing may run any more."""
        self._threads.shutdown(wait=False)

    def _dispatch(self) -> None:
        """Gives free threads what waits; the signature whose first request has waited longest comes first."""
        while self._busy < WORKERS and (name := self._next_signature()):
            tasks = self._take(self._waiting[name])
            if not tasks:
                continue
            self._busy += 1
            work = asyncio.get_running_loop().run_in_executor(self._threads, self._answer, name, tasks)
            work.add_done_callback(functools.partial(self._finish, tasks))

    def _next_signature(self) -> str | None:
        waiting = {name: tasks for name, tasks in self._waiting.items() if tasks}
        return min(waiting, key=lambda name: waiting[name][0].deadline, default=None)

    def _take(self, waiting: collections.deque[_Task]) -> list[_Task]:
        """As many as fill a batch; who gave up or is too late is left out."""
        tasks, rows = list[_Task](), 0
        limit = self._choose_size(sum(task.rows for task in waiting))
        while waiting and (not tasks or rows + waiting[0].rows <= limit):
            task = waiting.popleft()
            self._queued -= task.rows
            if task.answer.done():
                continue
            if task.deadline <= time.monotonic():
                task.answer.set_exception(_expired())
                continue
            tasks.append(task)
            rows += task.rows
        return tasks

    def _choose_size(self, rows: int) -> int:
        """The batch's size for so many rows that wait."""
        above = next((size for size in self._sizes if size >= rows), self._sizes[-1])
        below = max((size for size in self._sizes if size <= rows), default=self._sizes[0])
        return above if rows >= _WORTH_PADDING * above else below

    def _answer(self, signature: str, tasks: list[_Task]) -> list[Arrays | RequestError]:
        """In a thread: one batch, or each request alone where the batch fails, so that none pays for another."""
        try:
            return list[Arrays | RequestError](self._run_together(signature, tasks))
        except RequestError as error:
            if len(tasks) == 1:
                return [error]
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

    def _finish(self, tasks: list[_Task], done: asyncio.Future[list[Arrays | RequestError]]) -> None:
        self._busy -= 1
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


def _fill(arrays: list[np.ndarray], size: int) -> np.ndarray:
    """All rows one behind the other, and rows of nothing (empty strings, zeros) up to the size."""
    missing = size - sum(len(array) for array in arrays)
    if missing <= 0:
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    shape = (missing, *arrays[0].shape[1:])
    filler = np.full(shape, b"", object) if arrays[0].dtype == object else np.zeros(shape, arrays[0].dtype)
    return np.concatenate([*arrays, filler])


def _expired() -> RequestError:
    return RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the request was answered")
