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

    Selection with guaranteed risk (Geifman & El-Yaniv 2017, "Selective Classification for Deep Neural Networks",
    section 3): a binary search over the confidences of val. For each threshold that it tries, the exact binomial bound
    (Clopper & Pearson 1934) on the accuracy must reach the target, with a Bonferroni correction for the number of
    thresholds. With probability `THRESHOLD_CONFIDENCE` over the draw of val, the true accuracy above the threshold is
    at least the target, for new images from the same distribution as val.

    Args:
        probabilities: predictions for val, float `(n, classes)`.
        labels: int `(n,)`.
        target_accuracy: 0 to 1.

    Returns:
        The threshold; None if no threshold is guaranteed, as on a small val split.
    """
    confidence = probabilities.max(1).astype(np.float64)
    order = np.argsort(-confidence, kind="stable")
    ordered, right = confidence[order], np.cumsum((probabilities.argmax(1) == labels)[order])
    tries = _count_tries(len(labels))
    level = (1 - THRESHOLD_CONFIDENCE) / tries
    fewest, most, found = 0, len(labels), None  # number of images above the threshold
    for number in range(tries):
        middle = most if number == 0 else (fewest + most + 1) // 2
        threshold = float(ordered[middle - 1])
        count = int(np.searchsorted(-ordered, -threshold, side="right"))  # includes ties
        if _least_accuracy(int(right[count - 1]), count, level) >= target_accuracy:
            fewest, found = count, threshold
        else:
            most = middle - 1
        if fewest >= most:
            break
    return found


def fewest_for_threshold(target_accuracy: float) -> int:
    """Number of val images that a threshold needs if all predictions are correct; the target is between 0 and 1."""
    count, before = 1, 0
    while count != before:
        before = count
        level = (1 - THRESHOLD_CONFIDENCE) / _count_tries(count)
        count = max(count, math.ceil(math.log(level) / math.log(target_accuracy)))
    return count


def _count_tries(count: int) -> int:
    """Maximum number of thresholds that `choose_threshold` tries on `count` images."""
    return max(1, math.ceil(math.log2(count)) + 1)


def _least_accuracy(correct: int, count: int, level: float) -> float:
    """Lower confidence bound of an accuracy with error probability `level` (Clopper & Pearson 1934)."""
    return float(stats.beta.ppf(level, correct, count - correct + 1)) if correct else 0.0


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
