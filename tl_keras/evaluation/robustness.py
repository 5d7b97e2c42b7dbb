"""How accuracy falls when images get worse (Hendrycks & Dietterich 2019)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tl_keras.data.corruptions import CORRUPTIONS, STRENGTHS, corrupt
from tl_keras.evaluation.intervals import accuracy_interval

_BATCH = 32


def measure_corruptions(
    images: np.ndarray,
    labels: np.ndarray,
    predict: Callable[[np.ndarray], np.ndarray],
    *,
    show_progress: Callable[[str], None],
) -> dict[str, Any]:
    """Accuracy on the same images, clean and in each corruption at each strength.

    Args:
        images: RGB at the network's size, uint8 `(n, size, size, 3)`, n at least 1.
        labels: int `(n,)`.
        predict: such images, as float32 → probabilities `(b, classes)`.
        show_progress: shows how far it is.

    Returns:
        `n`; `clean`; `corruptions`: name → for strengths 1 to 5; each `accuracy` and `accuracy_ci95` (Wilson); and
        `mean_accuracy` over all of these.
    """
    result: dict[str, Any] = {"n": len(labels), "clean": _score(images, labels, predict), "corruptions": {}}
    total = len(CORRUPTIONS) * STRENGTHS
    for number, name in enumerate(CORRUPTIONS):
        rows = []
        for strength in range(1, STRENGTHS + 1):
            worse = np.stack([corrupt(image, name, strength, seed=row) for row, image in enumerate(images)])
            rows.append(_score(worse, labels, predict))
            show_progress(f"corruptions {number * STRENGTHS + strength}/{total}: {name} {strength}")
        result["corruptions"][name] = rows
    every = [row["accuracy"] for rows in result["corruptions"].values() for row in rows]
    result["mean_accuracy"] = float(np.mean(every))
    return result


def robustness_rows(robustness: dict[str, Any]) -> list[tuple[str, ...]]:
    """A table for the screen: corruption, accuracy at strengths 1 to 5."""
    rows = [(name, *(f"{one['accuracy']:.3f}" for one in found)) for name, found in robustness["corruptions"].items()]
    low, high = robustness["clean"]["accuracy_ci95"]
    clean = f"{robustness['clean']['accuracy']:.3f}"
    return [(f"none [{low:.3f}, {high:.3f}]", clean, *[""] * (STRENGTHS - 1)), *rows]


def _score(images: np.ndarray, labels: np.ndarray, predict: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
    batches = range(0, len(images), _BATCH)
    predicted = np.concatenate([
        predict(images[start : start + _BATCH].astype(np.float32)).argmax(1) for start in batches
    ])
    correct = int((predicted == labels).sum())
    return {"accuracy": correct / len(labels), "accuracy_ci95": list(accuracy_interval(correct, len(labels)))}
