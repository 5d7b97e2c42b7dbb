"""Robustness: accuracy on corrupted images (Hendrycks & Dietterich 2019)."""

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
    """Measures accuracy on clean images, and on the same images under each corruption at each strength.

    Args:
        images: RGB at the network's size, uint8 `(n, size, size, 3)`, n at least 1.
        labels: int `(n,)`.
        predict: float32 `(b, size, size, 3)` → probabilities `(b, classes)`.
        show_progress: called with the progress as text.

    Returns:
        `n`; `clean`; `corruptions`: name → entries for strengths 1 to 5. `clean` and each entry have `accuracy` and
        `accuracy_ci95` (Wilson). `mean_accuracy` is the mean over corruptions and strengths, `mean_accuracy_ci95` its
        interval (bootstrap over images; None for a single image).
    """
    clean = _is_correct(images, labels, predict)
    result: dict[str, Any] = {"n": len(labels), "clean": _score(clean), "corruptions": {}}
    total, correct = len(CORRUPTIONS) * STRENGTHS, list[np.ndarray]()
    for name in CORRUPTIONS:
        for strength in range(1, STRENGTHS + 1):
            worse = np.stack([corrupt(image, name, strength, seed=row) for row, image in enumerate(images)])
            correct.append(_is_correct(worse, labels, predict))
            show_progress(f"corruptions {len(correct)}/{total}: {name} {strength}")
        result["corruptions"][name] = [_score(right) for right in correct[-STRENGTHS:]]
    each = np.mean(correct, axis=0)  # accuracy per image: all results share the same images, so images are resampled
    interval = mean_interval(each)
    result |= {"mean_accuracy": float(each.mean()), "mean_accuracy_ci95": list(interval) if interval else None}
    return result


def robustness_rows(robustness: dict[str, Any]) -> list[tuple[str, ...]]:
    """Makes a table for the screen: corruption, accuracy at strengths 1 to 5."""
    return [(name, *(f"{one['accuracy']:.3f}" for one in found)) for name, found in robustness["corruptions"].items()]


def _is_correct(images: np.ndarray, labels: np.ndarray, predict: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    batches = range(0, len(images), _BATCH)
    predicted = np.concatenate([
        predict(images[start : start + _BATCH].astype(np.float32)).argmax(1) for start in batches
    ])
    return np.asarray(predicted == labels)


def _score(right: np.ndarray) -> dict[str, Any]:
    correct, count = int(right.sum()), len(right)
    return {"accuracy": correct / count, "accuracy_ci95": list(accuracy_interval(correct, count))}
