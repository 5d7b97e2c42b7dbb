"""Confidence intervals, each with the source of its method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from scipy import optimize, stats

Number = TypeVar("Number", float, np.ndarray)
_CONFIDENCE = 0.95
_Z = float(stats.norm.ppf((1 + _CONFIDENCE) / 2))
_NEARLY = 1 - 1e-9
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
    low, high = wilson(np.array(correct / max(count, 1)), np.array(count)).tolist()
    return low, high


def with_interval(value: float, interval: Sequence[float]) -> str:
    """`0.902 [0.845, 0.941]`."""
    low, high = interval
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def proportion_intervals(correct: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`accuracy_interval` of many proportions, float64 `(k, 2)`; of int `(k,)` each."""
    return wilson(correct / np.maximum(counts, 1), counts)


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


def wilson(share: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Wilson's interval of shares of samples; a sample's size may be an effective one, no whole number.

    Args:
        share: 0 to 1, float `(...)`.
        counts: float or int `(...)`; 0 gives (0, 1).

    Returns:
        Low and high, float64 `(..., 2)`.
    """
    size = np.maximum(counts, np.finfo(float).tiny)
    middle = draw_to_half(share * size, size)
    half = _Z / (size + _Z**2) * np.sqrt(share * (1 - share) * size + _Z**2 / 4)
    # where an end is 0 or 1, rounding leaves 1e-17 of it
    low = np.where(share == 0, 0, middle - half)
    high = np.where((share == 1) | (counts == 0), 1, middle + half)
    return np.asarray(np.clip(np.stack([low, high], -1), 0, 1))


def draw_to_half(correct: Number, count: Number) -> Number:
    """The middle of Wilson's interval: as if two more had been right and two more wrong (Agresti & Coull 1998)."""
    return (correct + _Z**2 / 2) / (count + _Z**2)


def auroc_interval(auroc: float, positives: int, negatives: int) -> tuple[float, float]:
    """95 % interval of an area under the ROC curve: Newcombe 2006, method 5 (a score interval of Hanley & McNeil 1982).

    Args:
        auroc: 0 to 1.
        positives: examples of the one class, at least 1.
        negatives: of the other, at least 1.

    Returns:
        Low and high, 0 to 1; at an area of 1 the low end is below it.
    """
    half = (positives + negatives) / 2 - 1

    def error(area: float) -> float:
        spread = area * (1 - area) * (1 + half * ((1 - area) / (2 - area) + area / (1 + area)))
        return float(_Z * math.sqrt(spread / (positives * negatives)))

    # at 0 and at 1 the error is nothing, which is a solution that says nothing
    low = optimize.brentq(lambda area: area + error(area) - auroc, 0, auroc * _NEARLY) if auroc > 0 else 0.0
    high = optimize.brentq(lambda area: area - error(area) - auroc, 1 - (1 - auroc) * _NEARLY, 1) if auroc < 1 else 1.0
    return float(low), float(high)


def mean_interval(values: np.ndarray) -> tuple[float, float] | None:
    """95 % interval of a mean by the percentile bootstrap (Efron & Tibshirani 1993, section 13.3), 1,000 resamples.

    Args:
        values: float `(n,)`.

    Returns:
        Low and high; None of a single value.
    """
    if len(values) < 2:
        return None
    found = stats.bootstrap(
        (values,),
        np.mean,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=_BATCH,
        confidence_level=_CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
