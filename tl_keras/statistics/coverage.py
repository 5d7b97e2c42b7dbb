"""Selective classification: accuracy and coverage when only confident predictions are accepted."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from tl_keras.statistics.intervals import accuracy_interval

THRESHOLD_CONFIDENCE = 0.95  # probability with which the accuracy above a threshold holds on new images


def accuracy_by_coverage(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is gained by leaving the least sure images to a person (El-Yaniv & Wiener 2010: the risk-coverage curve).

    Args:
        probabilities: float `(n, classes)`, n at least 1.
        labels: int `(n,)`.

    Returns:
        Thresholds, falling, float64 `(k,)`: each probability that occurs; the share of images that reach it; the
        accuracy on these.
    """
    confidence = probabilities.max(1).astype(np.float64)
    correct = (probabilities.argmax(1) == labels).astype(np.float64)
    order = np.argsort(-confidence, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(confidence[order])), len(order) - 1)
    counts = ends + 1
    return confidence[order][ends], counts / len(order), np.cumsum(correct[order])[ends] / counts


def choose_threshold(probabilities: np.ndarray, labels: np.ndarray, *, target_accuracy: float) -> float | None:
    """The lowest of some confidence thresholds above which the accuracy on new images is guaranteed.

    Selection with guaranteed risk (Geifman & El-Yaniv 2017, "Selective Classification for Deep Neural Networks",
    section 3): a binary search over the confidences of val. For each threshold that it tries, the exact binomial bound
    (Clopper & Pearson 1934) on the accuracy must reach the target, at a confidence level that is shared out between
    all of them (Bonferroni). With probability `THRESHOLD_CONFIDENCE` over the draw of val, the true accuracy above the
    threshold is at least the target; this holds for new images that are drawn as val was.

    Args:
        probabilities: of val, float `(n, classes)`.
        labels: int `(n,)`.
        target_accuracy: 0 to 1.

    Returns:
        The threshold; None where none is guaranteed, as on a small val.
    """
    confidence = probabilities.max(1).astype(np.float64)
    order = np.argsort(-confidence, kind="stable")
    ordered, right = confidence[order], np.cumsum((probabilities.argmax(1) == labels)[order])
    tries = _count_tries(len(labels))
    level = (1 - THRESHOLD_CONFIDENCE) / tries
    fewest, most, found = 0, len(labels), None  # images that are answered: too few is safe, too many may not be
    for number in range(tries):
        middle = most if number == 0 else (fewest + most + 1) // 2
        threshold = float(ordered[middle - 1])
        count = int(np.searchsorted(-ordered, -threshold, side="right"))  # those of equal confidence are answered too
        if _least_accuracy(int(right[count - 1]), count, level) >= target_accuracy:
            fewest, found = count, threshold
        else:
            most = middle - 1
        if fewest >= most:
            break
    return found


def fewest_for_threshold(target_accuracy: float) -> int:
    """How many val images, all of them right, a threshold for a target above 0 and below 1 needs."""
    count, before = 1, 0
    while count != before:
        before = count
        level = (1 - THRESHOLD_CONFIDENCE) / _count_tries(count)
        count = max(count, math.ceil(math.log(level) / math.log(target_accuracy)))
    return count


def _count_tries(count: int) -> int:
    """Thresholds that `choose_threshold` may try on so many images."""
    return max(1, math.ceil(math.log2(count)) + 1)


def _least_accuracy(correct: int, count: int, level: float) -> float:
    """Lower limit of an accuracy, which is wrong with probability `level` at most (Clopper & Pearson 1934)."""
    return float(stats.beta.ppf(level, correct, count - correct + 1)) if correct else 0.0


def measure_threshold(probabilities: np.ndarray, labels: np.ndarray, threshold: float) -> dict[str, object]:
    """How many images reach a threshold, `n`; their share, `coverage`; `accuracy` and `accuracy_ci95` (Wilson)."""
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
