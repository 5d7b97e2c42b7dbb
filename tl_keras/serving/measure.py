"""How fast an exported model is here in each batch size and precision, run as TF Serving runs it."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

from tl_keras.backbones.engines import FASTER_AT_LEAST, has_bfloat16
from tl_keras.serving.graphs import Graph, as_strings

_RUNS = 3
_FULL_SPEED = 0.95  # of the fastest size: larger batches only make clients wait


@dataclasses.dataclass(frozen=True)
class Speed:
    """What was measured, and what follows.

    Attributes:
        images_per_second: precision → batch size → images a second.
        batch_sizes: those worth allowing, rising.
        bfloat16: whether `--mixed_precision=bfloat16` pays.
        cores: the CPU's.
    """

    images_per_second: dict[str, dict[int, float]]
    batch_sizes: tuple[int, ...]
    bfloat16: bool
    cores: int


def measure_speed(path: Path, sample: bytes, *, batch_sizes: Sequence[int]) -> Speed:
    """Times the signature `serving_default`.

    Args:
        path: the version folder.
        sample: an encoded image.
        batch_sizes: to try, rising.

    Returns:
        Images a second, and the settings that follow from them.
    """
    found = {"float32": _measure(path, "float32", sample, batch_sizes)}
    if has_bfloat16():
        found["bfloat16"] = _measure(path, "bfloat16", sample, batch_sizes)
    first, last = batch_sizes[0], batch_sizes[-1]
    ratios = {size: found["bfloat16"][size] / found["float32"][size] for size in batch_sizes if "bfloat16" in found}
    pays = bool(ratios) and ratios[last] >= FASTER_AT_LEAST and ratios[first] >= 1.0
    speeds = found["bfloat16" if pays else "float32"]
    largest = next(size for size in batch_sizes if speeds[size] >= _FULL_SPEED * max(speeds.values()))
    return Speed(found, tuple(size for size in batch_sizes if size <= largest), pays, os.cpu_count() or 1)


def _measure(path: Path, precision: str, sample: bytes, batch_sizes: Sequence[int]) -> dict[int, float]:
    graph = Graph(path, precision=precision)
    speeds = {}
    for size in batch_sizes:
        images = {"image_bytes": as_strings([sample] * size)}
        graph.run("serving_default", images)  # plans and allocates
        seconds = []
        for _ in range(_RUNS):
            start = time.perf_counter()
            graph.run("serving_default", images)
            seconds.append(time.perf_counter() - start)
        speeds[size] = size / min(seconds)
    graph.close()
    return speeds
