"""Confidence intervals, each with the source of its method."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import optimize, stats

_CONFIDENCE = 0.95
_TINY = 1e-9
_RESAMPLES = 1000
_BATCH = 50  # resamples at once: memory stays bounded


def accuracy_interval(correct: int, count: int) -> tuple[float, float]:
    """95 % interval of a proportion: Wilson's score interval (Wilson 1927; recommended by Brown, Cai & DasGupta 2001).

    Args:
        correct: successes.
        count: trials; 0 gives (0, 1).

    Returns:
        Low and high, 0 to 1.
    """
    if not count:
        return 0.0, 1.0
    interval = stats.binomtest(correct, count).proportion_ci(confidence_level=_CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def with_interval(value: float, interval: Sequence[float]) -> str:
    """`0.902 [0.845, 0.941]`."""
    low, high = interval
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def proportion_intervals(correct: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`accuracy_interval` of many proportions, float64 `(k, 2)`; of int `(k,)` each."""
    pairs = zip(correct.tolist(), counts.tolist(), strict=True)
    return np.array([accuracy_interval(int(right), int(count)) for right, count in pairs]).reshape(-1, 2)


def f1_intervals(hits: np.ndarray, misses: np.ndarray) -> np.ndarray:
    """95 % intervals of F1 scores: Wilson's interval of hits / (hits + misses), carried over (Lam et al. 2023).

    F1 = 2 h / (2 h + m) rises with h / (h + m), which is a proportion (the "indirect" interval of arXiv:2309.14621).

    Args:
        hits: true positives, int `(k,)`.
        misses: false positives and false negatives together, int `(k,)`.

    Returns:
        float64 `(k, 2)`.
    """
    shares = proportion_intervals(hits, hits + misses)
    return np.asarray(2 * shares / (1 + shares))


def mean_interval(values: np.ndarray, intervals: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """95 % interval of a weighted mean of figures that have intervals: MOVER (Zou & Donner 2008), as if independent.

    Args:
        values: float `(k,)`, k at least 1.
        intervals: float `(k, 2)`.
        weights: float `(k,)`, of sum 1.

    Returns:
        Low and high.
    """
    mean = float(values @ weights)
    below = math.sqrt(float((weights**2) @ (values - intervals[:, 0]) ** 2))
    above = math.sqrt(float((weights**2) @ (intervals[:, 1] - values) ** 2))
    return mean - below, mean + above


def auroc_interval(auroc: float, positives: int, negatives: int) -> tuple[float, float]:
    """95 % interval of an area under the ROC curve: Newcombe 2006, method 5 (a score interval of Hanley & McNeil 1982).

    Args:
        auroc: 0 to 1.
        positives: examples of the one class, at least 1.
        negatives: of the other, at least 1.

    Returns:
        Low and high, 0 to 1; at an area of 1 the low end is below it.
    """
    z = stats.norm.ppf((1 + _CONFIDENCE) / 2)
    half = (positives + negatives) / 2 - 1

    def error(area: float) -> float:
        spread = area * (1 - area) * (1 + half * ((1 - area) / (2 - area) + area / (1 + area)))
        return float(z * math.sqrt(spread / (positives * negatives)))

    # at 0 and at 1 the error is nothing, which is a solution that says nothing
    low = optimize.brentq(lambda area: area + error(area) - auroc, 0, auroc - _TINY) if auroc > 0 else 0.0
    high = optimize.brentq(lambda area: area - error(area) - auroc, auroc + _TINY, 1) if auroc < 1 else 1.0
    return float(low), float(high)


def bootstrap_interval(statistic: Callable[..., Any], *columns: np.ndarray) -> tuple[float, float] | None:
    """95 % interval by the percentile bootstrap over examples (Efron & Tibshirani 1993, section 13.3), 1,000 resamples.

    Args:
        statistic: columns, `(..., n)` each, and `axis` → figures, `(...)`.
        columns: of the examples, `(n,)` each.

    Returns:
        Low and high; None of a single example.
    """
    if len(columns[0]) < 2:
        return None
    found = stats.bootstrap(
        columns,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=_BATCH,
        confidence_level=_CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
