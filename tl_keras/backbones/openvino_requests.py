"""Requests of a compiled OpenVINO model that run in parallel."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


class Requests:
    """As many parallel requests as OpenVINO recommends for a compiled model; for one thread at a time.

    `openvino.AsyncInferQueue` is not used: its callbacks run in threads of OpenVINO and need Python's lock. If the
    queue is freed while the last callback returns, both wait forever (OpenVINO 2026.4).
    """

    def __init__(self, compiled: Any) -> None:
        """Args: compiled: an `openvino.CompiledModel`."""
        count = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        self._idle = collections.deque(compiled.create_infer_request() for _ in range(count))

    def run(self, images: np.ndarray, *, size: int, outputs: Sequence[np.ndarray], places: Sequence[int]) -> None:
        """Runs the model on images, in batches of a fixed size.

        Args:
            images: `(n, ...)`.
            size: batch size of the model; the last batch is padded with zeros.
            outputs: arrays `(n, ...)` that are filled.
            places: for each of these arrays the number of the model's output.
        """
        running = collections.deque[tuple[int, Any]]()

        def keep_first() -> None:
            start, request = running[0]
            try:
                request.wait()
            finally:
                self._idle.append(running.popleft()[1])
            for output, place in zip(outputs, places, strict=True):
                part = output[start : start + size]
                part[:] = request.get_output_tensor(place).data[: len(part)]

        try:
            for start, part in _divide(images, size):
                if not self._idle:
                    keep_first()
                running.append((start, self._idle.popleft()))
                running[-1][1].start_async({0: part})
            while running:
                keep_first()
        finally:
            while running:  # after an error or an interrupt
                with contextlib.suppress(RuntimeError):  # the first error is raised
                    running[0][1].wait()
                self._idle.append(running.popleft()[1])


def _divide(images: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the first row of each batch, and the batch."""
    for start in range(0, len(images), size):
        yield start, pad(images[start : start + size], size)


def pad(images: np.ndarray, size: int) -> np.ndarray:
    """Pads a batch with zeros to a fixed size; a batch of this size is returned as it is."""
    missing = size - len(images)
    return np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)]) if missing else images
