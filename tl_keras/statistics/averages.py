"""Averages of precision, recall and F1 over classes, and their confidence intervals.

An average of recalls is the mean of a stratified sample whose strata are the classes. Precision and F1 are ratios; the
effect of an image on their average is approximated to first order (delta method, Takahashi et al. 2022 for macro F1).
The variance gives an effective sample size for Wilson's interval, which is also valid near 1 (Korn & Graubard 1998;
recommended by Franco et al. 2019). The accuracy of each class is shrunk toward the overall accuracy, so that ten
correct predictions out of ten do not count as certainty; shrinkage is stronger if the classes differ little beyond
chance (Kleinman 1973).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tl_keras.statistics.intervals import draw_to_half, wilson

_PARTS = {"precision": (1, 0, 1), "recall": (1, 1, 0), "f1": (2, 1, 1)}  # c hits / (a support + b predicted)
_LEAST_STRENGTH = 0.5
Average = tuple[float, tuple[float, float]]


def average(
    predicted: np.ndarray, labels: np.ndarray, classes: Mapping[str, np.ndarray], weights: np.ndarray
) -> dict[str, Average]:
    """Computes weighted averages over classes.

    Args:
        predicted: int `(n,)`, n at least 1.
        labels: int `(n,)`.
        classes: result of `measure_classes`.
        weights: float `(classes,)`; they sum to 1, and are 0 for classes that do not occur.

    Returns:
        `precision`, `recall` and `f1`, each with its 95 % confidence interval.
    """
    support, taken = classes["support"].astype(float), classes["predicted"].astype(float)
    hits = np.bincount(labels[predicted == labels], minlength=len(support)).astype(float)
    wrong = predicted != labels
    chance, spread = _draw_to_pool(hits, support)
    result = {}
    for figure, (count, of_support, of_taken) in _PARTS.items():
        values, whole = classes[figure], np.maximum(of_support * support + of_taken * taken, 1)
        value = float(values @ weights)
        by_taken, by_hit = of_taken * weights * values / whole, count * weights / whole
        mean, variance = _describe_wrong(by_taken, labels[wrong], predicted[wrong], occurs=support > 0)
        moved = spread * (by_hit - by_taken + mean) ** 2 + (1 - chance) * variance
        # precision of few predictions is biased upward, because its denominator is random too
        excess = weights * values * (1 - values) * classes["recall"] / whole if figure == "precision" else np.zeros(1)
        low, high = _as_proportion(value - float(excess.sum()), float(support @ moved), len(labels))
        result[figure] = value, (min(low, value), max(high, value))
    return result


def _draw_to_pool(hits: np.ndarray, support: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shrinks the accuracy of each class toward the pooled accuracy: accuracy and its variance, float `(classes,)`."""
    count, occurring = support.sum(), np.count_nonzero(support)
    pooled = hits.sum() / count
    middle = draw_to_half(hits.sum(), count)
    own = np.divide(hits, support, out=np.full(len(hits), pooled), where=support > 0)
    one = pooled * (1 - pooled)
    beyond = float(support @ (own - pooled) ** 2) - one * (occurring - 1)
    if beyond <= 0:  # the classes differ no more than by chance
        return np.full(len(hits), middle), np.full(len(hits), middle * (1 - middle))
    between = beyond / (count - float(support @ support) / count)
    strength = max(one / between - 1, _LEAST_STRENGTH)
    chance = (hits + strength * middle) / (support + strength)
    return chance, chance * (1 - chance) * (support + strength) / (support + strength + 1)


def _describe_wrong(
    slopes: np.ndarray, labels: np.ndarray, predicted: np.ndarray, *, occurs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance, by label, of the slopes of its wrongly predicted classes, with one pseudo-observation."""
    others = max(np.count_nonzero(occurs) - 1, 1)
    counts = np.bincount(labels, minlength=len(slopes)) + 1
    moments = []
    for power in (1, 2):
        raised = slopes**power
        elsewhere = (raised[occurs].sum() - raised * occurs) / others
        moments.append((np.bincount(labels, raised[predicted], len(slopes)) + elsewhere) / counts)
    return moments[0], np.maximum(moments[1] - moments[0] ** 2, 0)


def _as_proportion(value: float, variance: float, count: int) -> tuple[float, float]:
    """Wilson's interval of a proportion with this variance."""
    share = min(max(value, 0.0), 1.0)
    middle = draw_to_half(share * count, count)
    low, high = wilson(np.array(share), np.array(middle * (1 - middle) / variance if variance else count)).tolist()
    return low, high
