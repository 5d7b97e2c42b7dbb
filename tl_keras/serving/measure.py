"""Benchmark of an exported model for each batch size and precision, run like in TF Serving."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tl_keras.backbones.engines import FASTER_AT_LEAST, has_bfloat16
from tl_keras.serving.engines import DIFFERENCE_AT_MOST
from tl_keras.serving.graphs import DEFAULT_SIGNATURE, IMAGE_INPUT, Graph, as_strings, time_run

_SECONDS, _PASSES = 0.3, 2  # minimum time of each measurement
_FULL_SPEED = 0.95  # fraction of the highest speed: larger batches only increase the latency


@dataclasses.dataclass(frozen=True)
class Speed:
    """Measured speeds, and recommended settings.

    Attributes:
        images_per_second: precision → batch size → images per second.
        batch_sizes: recommended batch sizes, increasing.
        bfloat16: whether `--mixed_precision=bfloat16` is recommended.
        difference: largest difference of a probability with bfloat16; None if the CPU does not have it.
        cores: number of CPU cores.
    """

    images_per_second: dict[str, dict[int, float]]
    batch_sizes: tuple[int, ...]
    bfloat16: bool
    difference: float | None
    cores: int


def measure_speed(path: Path, samples: Sequence[bytes], *, batch_sizes: Sequence[int]) -> Speed:
    """Measures the signature `serving_default` twice for all sizes and precisions, because other load varies.

    Args:
        path: the version folder.
        samples: encoded images.
        batch_sizes: batch sizes to try, increasing.

    Returns:
        Speeds in images per second, and recommended settings.
    """
    precisions = ["float32", "bfloat16"] if has_bfloat16() else ["float32"]
    graphs = {precision: Graph(path, precision=precision) for precision in precisions}
    passes = [
        {precision: _measure(graph, samples, batch_sizes) for precision, graph in graphs.items()}
        for _ in range(_PASSES)
    ]
    difference = _compare(list(graphs.values()), samples)
    for graph in graphs.values():
        graph.close()
    found = {
        precision: {size: max(one[precision][size] for one in passes) for size in batch_sizes}
        for precision in precisions
    }
    is_true = difference is not None and difference <= DIFFERENCE_AT_MOST
    pays = is_true and all(_pays(one, batch_sizes) for one in passes)
    speeds = found["bfloat16" if pays else "float32"]
    largest = next(size for size in batch_sizes if speeds[size] >= _FULL_SPEED * max(speeds.values()))
    sizes = tuple(size for size in batch_sizes if size <= largest)
    return Speed(found, sizes, pays, difference, os.cpu_count() or 1)


def _pays(speeds: dict[str, dict[int, float]], batch_sizes: Sequence[int]) -> bool:
    """Whether bfloat16 is sufficiently faster in the largest batch, and not slower for a single image."""
    ratios = {size: speeds["bfloat16"][size] / speeds["float32"][size] for size in batch_sizes}
    return ratios[batch_sizes[-1]] >= FASTER_AT_LEAST and ratios[batch_sizes[0]] >= 1.0


def _compare(graphs: Sequence[Graph], samples: Sequence[bytes]) -> float | None:
    """Largest difference of a probability between two graphs; None if there is only one graph."""
    answers = [graph.run(DEFAULT_SIGNATURE, {IMAGE_INPUT: as_strings(samples)})["probabilities"] for graph in graphs]
    return float(np.abs(answers[0] - answers[1]).max()) if len(answers) > 1 else None


def _measure(graph: Graph, samples: Sequence[bytes], batch_sizes: Sequence[int]) -> dict[int, float]:
    speeds = {}
    for size in batch_sizes:
        images = as_strings([samples[row % len(samples)] for row in range(size)])
        graph.run(DEFAULT_SIGNATURE, {IMAGE_INPUT: images})  # warm-up
        speeds[size] = size / time_run(graph, images, seconds=_SECONDS)
    return speeds
