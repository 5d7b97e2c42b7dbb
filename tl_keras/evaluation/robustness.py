"""How accuracy falls when images get worse (Hendrycks & Dietterich 2019)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tl_keras.data.corruptions import CORRUPTIONS, STRENGTHS, corrupt
from tl_keras.statistics.intervals import accuracy_interval, mean_interval

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
        `mean_accuracy` over all of these, with `mean_accuracy_ci95` (bootstrap over images; None of a single one).
    """
    clean = _predict_rightly(images, labels, predict)
    result: dict[str, Any] = {"n": len(labels), "clean": _score(clean), "corruptions": {}}
    total, rightly = len(CORRUPTIONS) * STRENGTHS, list[np.ndarray]()
    for name in CORRUPTIONS:
        for strength in range(1, STRENGTHS + 1):
            worse = np.stack([corrupt(image, name, strength, seed=row) for row, image in enumerate(images)])
            rightly.append(_predict_rightly(worse, labels, predict))
            show_progress(f"corruptions {len(rightly)}/{total}: {name} {strength}")
        result["corruptions"][name] = [_score(right) for right in rightly[-STRENGTHS:]]
    each = np.mean(rightly, axis=0)  # an image's share: the same images stand behind all figures
    interval = mean_interval(each)
    result |= {"mean_accuracy": float(each.mean()), "mean_accuracy_ci95": list(interval) if interval else None}
    return result


def robustness_rows(robustness: dict[str, Any]) -> list[tuple[str, ...]]:
    """A table for the screen: corruption, accuracy at strengths 1 to 5."""
    return [(name, *(f"{one['accuracy']:.3f}" for one in found)) for name, found in robustness["corruptions"].items()]


def _predict_rightly(images: np.ndarray, labels: np.ndarray, predict: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    batches = range(0, len(images), _BATCH)
    predicted = np.concatenate([
        predict(images[start : start + _BATCH].astype(np.float32)).argmax(1) for start in batches
    ])
    return np.asarray(predicted == labels)


def _score(right: np.ndarray) -> dict[str, Any]:
    correct, count = int(right.sum()), len(right)
    return {"accuracy": correct / count, "accuracy_ci95": list(accuracy_interval(correct, count))}
