"""Selective classification: accuracy and coverage when only confident predictions are accepted."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from tl_keras.statistics.intervals import accuracy_interval

THRESHOLD_CONFIDENCE = 0.95  # probability with which the accuracy above a threshold holds on new images


def accuracy_by_coverage(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Computes the accuracy-coverage curve, the complement of the risk-coverage curve (El-Yaniv & Wiener 2010).

    Args:
        probabilities: float `(n, classes)`, n at least 1.
        labels: int `(n,)`.

    Returns:
        Thresholds (each confidence that occurs, decreasing), coverage, and accuracy above the threshold, float64
        `(k,)` each.
    """
    confidence = probabilities.max(1).astype(np.float64)
    correct = (probabilities.argmax(1) == labels).astype(np.float64)
    order = np.argsort(-confidence, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(confidence[order])), len(order) - 1)
    counts = ends + 1
    return confidence[order][ends], counts / len(order), np.cumsum(correct[order])[ends] / counts


def choose_threshold(probabilities: np.ndarray, labels: np.ndarray, *, target_accuracy: float) -> float | None:
    """Finds the lowest confidence threshold above which an accuracy on new images is guaranteed.

    Fixed-sequence testing from several starts (Angelopoulos, Bates, Candès, Jordan & Lei 2021, "Learn then Test",
    section 2): from each start the threshold is lowered as long as the exact binomial bound (Clopper & Pearson 1934) on
    the accuracy above it reaches the target, with a Bonferroni correction for the number of starts. With probability
    `THRESHOLD_CONFIDENCE` over the draw of val, the true accuracy above the threshold is at least the target, for new
    images from the same distribution as val (selection with guaranteed risk, Geifman & El-Yaniv 2017). Thresholds are
    confidences of val, and the image at the threshold counts too, so this probability is approximate.

    Args:
        probabilities: predictions for val, float `(n, classes)`.
        labels: int `(n,)`.
        target_accuracy: 0 to 1.

    Returns:
        The threshold; None if no threshold is guaranteed, as on a small val split.
    """
    thresholds, coverage, accuracy = accuracy_by_coverage(probabilities, labels)
    counts = np.rint(coverage * len(labels)).astype(np.int64)
    starts = _choose_starts(len(labels), target_accuracy)
    level = (1 - THRESHOLD_CONFIDENCE) / max(len(starts), 1)
    reached = _least_accuracy(np.rint(accuracy * counts), counts, level) >= target_accuracy
    lowest = -1  # position of the lowest guaranteed threshold
    for first in np.searchsorted(counts, starts):
        failed = np.flatnonzero(~reached[first:])
        last = first + failed[0] if len(failed) else len(reached)
        lowest = max(lowest, last - 1 if last > first else -1)
    return float(thresholds[lowest]) if lowest >= 0 else None


def fewest_for_threshold(target_accuracy: float) -> int:
    """Number of val images that a threshold needs if all predictions are correct; the target is between 0 and 1."""
    return _count_flawless(1 - THRESHOLD_CONFIDENCE, target_accuracy)


def _choose_starts(count: int, target_accuracy: float) -> list[int]:
    """Numbers of most confident images at which a sequence of tests starts on `count` images, each twice the last.

    The first is the fewest images that can reach the target, without an error among them.
    """
    if target_accuracy in {0.0, 1.0}:  # always reached, and never
        return [1] if count else []
    starts = list[int]()
    while True:
        fewest = _count_flawless((1 - THRESHOLD_CONFIDENCE) / (len(starts) + 1), target_accuracy)
        if fewest << len(starts) > count:
            return starts
        starts = [fewest << number for number in range(len(starts) + 1)]


def _count_flawless(level: float, target_accuracy: float) -> int:
    """Number of images without an error that bound an accuracy from below with error probability `level`."""
    return math.ceil(math.log(level) / math.log(target_accuracy))


def _least_accuracy(correct: np.ndarray, counts: np.ndarray, level: float) -> np.ndarray:
    """Lower confidence bounds of accuracies with error probability `level` (Clopper & Pearson 1934), `(k,)`."""
    return np.where(correct > 0, stats.beta.ppf(level, np.maximum(correct, 1), counts - correct + 1), 0.0)


def measure_threshold(probabilities: np.ndarray, labels: np.ndarray, threshold: float) -> dict[str, object]:
    """Measures `n` images above a threshold, their fraction `coverage`, `accuracy` and `accuracy_ci95` (Wilson)."""
    reached = probabilities.max(1) >= threshold
    correct = int((probabilities.argmax(1) == labels)[reached].sum())
    count = int(reached.sum())
    return {
        "threshold": threshold,
        "n": count,
        "coverage": count / len(labels),
        "accuracy": correct / count if count else None,
        "accuracy_ci95": list(accuracy_interval(correct, count)),
    }
