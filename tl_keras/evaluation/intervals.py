"""Confidence intervals."""

from __future__ import annotations

from scipy import stats


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
    interval = stats.binomtest(correct, count).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)
