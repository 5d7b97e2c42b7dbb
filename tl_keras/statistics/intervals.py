"""Confidence intervals of metrics, with references."""

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
_BATCH = 50  # resamples per batch, to limit memory


def accuracy_interval(correct: int, count: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion: Wilson's score interval (1927; see Brown, Cai & DasGupta 2001).

    Args:
        correct: number of successes.
        count: number of trials; 0 gives (0, 1).

    Returns:
        Lower and upper bound, 0 to 1.
    """
    low, high = wilson(np.array(correct / max(count, 1)), np.array(count)).tolist()
    return low, high


def with_interval(value: float, interval: Sequence[float]) -> str:
    """Formats a value with its interval: `0.902 [0.845, 0.941]`."""
    low, high = interval
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def proportion_intervals(correct: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`accuracy_interval` for arrays: int `(k,)` each → float64 `(k, 2)`."""
    return wilson(correct / np.maximum(counts, 1), counts)


def f1_intervals(hits: np.ndarray, misses: np.ndarray) -> np.ndarray:
    """95 % confidence intervals of F1: Wilson's interval of hits / (hits + misses), transformed (Lam et al. 2023).

    F1 = 2 h / (2 h + m) is a monotonic function of the proportion h / (h + m) (the "indirect" interval of
    arXiv:2309.14621).

    Args:
        hits: true positives, int `(k,)`.
        misses: false positives and false negatives together, int `(k,)`.

    Returns:
        float64 `(k, 2)`.
    """
    shares = proportion_intervals(hits, hits + misses)
    return np.asarray(2 * shares / (1 + shares))


def wilson(share: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Wilson's interval of proportions.

    Args:
        share: proportions, 0 to 1, float `(...)`.
        counts: sample sizes, float or int `(...)`; effective sample sizes need not be integers; 0 gives (0, 1).

    Returns:
        Lower and upper bounds, float64 `(..., 2)`.
    """
    size = np.maximum(counts, np.finfo(float).tiny)
    middle = draw_to_half(share * size, size)
    half = _Z / (size + _Z**2) * np.sqrt(share * (1 - share) * size + _Z**2 / 4)
    # exact 0 and 1 instead of rounding errors of 1e-17
    low = np.where(share == 0, 0, middle - half)
    high = np.where((share == 1) | (counts == 0), 1, middle + half)
    return np.asarray(np.clip(np.stack([low, high], -1), 0, 1))


def draw_to_half(correct: Number, count: Number) -> Number:
    """Center of Wilson's interval: about two successes and two failures are added (Agresti & Coull 1998)."""
    return (correct + _Z**2 / 2) / (count + _Z**2)


def auroc_interval(auroc: float, positives: int, negatives: int) -> tuple[float, float]:
    """95 % confidence interval of an AUROC: score interval with Hanley & McNeil's variance (Newcombe 2006, method 5).

    Args:
        auroc: 0 to 1.
        positives: number of examples of one class, at least 1.
        negatives: number of examples of the other class, at least 1.

    Returns:
        Lower and upper bound, 0 to 1; the lower bound is below 1 even if the AUROC is 1.
    """
    half = (positives + negatives) / 2 - 1

    def error(area: float) -> float:
        spread = area * (1 - area) * (1 + half * ((1 - area) / (2 - area) + area / (1 + area)))
        return float(_Z * math.sqrt(spread / (positives * negatives)))

    # the error vanishes at 0 and at 1, so these trivial solutions are excluded
    low = optimize.brentq(lambda area: area + error(area) - auroc, 0, auroc * _NEARLY) if auroc > 0 else 0.0
    high = optimize.brentq(lambda area: area - error(area) - auroc, 1 - (1 - auroc) * _NEARLY, 1) if auroc < 1 else 1.0
    return float(low), float(high)


def mean_interval(values: np.ndarray) -> tuple[float, float] | None:
    """95 % confidence interval of a mean: percentile bootstrap with 1,000 resamples (Efron & Tibshirani 1993, 13.3).

    Args:
        values: float `(n,)`.

    Returns:
        Lower and upper bound; None for a single value.
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
