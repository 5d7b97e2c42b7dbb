"""Paired comparison of two classifiers on the same examples."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import stats

from tl_keras.statistics.intervals import accuracy_interval

_SIGNIFICANT = 0.05


def adjust_p_values(p_values: list[float]) -> list[float]:
    """Adjusts the p values of several comparisons (Holm 1979)."""
    count, adjusted, highest = len(p_values), [0.0] * len(p_values), 0.0
    for rank, number in enumerate(sorted(range(count), key=lambda one: p_values[one])):
        highest = max(highest, min(1.0, (count - rank) * p_values[number]))
        adjusted[number] = highest
    return adjusted


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two classifiers, A and B, on the same examples.

    Attributes:
        count: number of examples.
        only_first: number of examples that only A gets right.
        only_second: number of examples that only B gets right.
        p_value: McNemar's exact test, two-sided.
        difference: accuracy of B minus accuracy of A.
        interval: 95 % confidence interval of the difference.
    """

    count: int
    only_first: int
    only_second: int
    p_value: float
    difference: float
    interval: tuple[float, float]

    def describe(self, first: str, second: str) -> str:
        """Describes the comparison in a sentence that starts with the conclusion."""
        numbers = (
            f"{self.only_second:,} images only {second} gets right, {self.only_first:,} only {first}, p "
            f"{_short(self.p_value)}; difference {self.difference:+.3f} [{self.interval[0]:+.3f}, "
            f"{self.interval[1]:+.3f}], n={self.count:,}"
        )
        if self.only_first == self.only_second == 0:
            return f"{first} and {second} get the same {self.count:,} images right and wrong"
        if self.p_value >= _SIGNIFICANT:
            beside = not self.interval[0] <= 0 <= self.interval[1]
            why = (
                ". The interval excludes 0, but it is approximate and refers to this pair only: p decides"
                if beside
                else ""
            )
            return f"{first} and {second} are not significantly different on these images: {numbers}{why}"
        better = second if self.difference > 0 else first
        return f"{better} is better: {numbers}"


def compare_paired(first: np.ndarray, second: np.ndarray) -> Comparison:
    """Compares two classifiers on the same examples.

    The test is McNemar's exact test (McNemar 1947; Dietterich 1998). The interval of the difference is the hybrid score
    interval for paired proportions (Newcombe 1998, Statistics in Medicine 17, method 10).

    Args:
        first: whether the predictions of A are correct, bool `(n,)`, n at least 1.
        second: whether the predictions of B are correct, bool `(n,)`.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    differing = only_first + only_second
    p_value = float(stats.binomtest(only_first, differing).pvalue) if differing else 1.0
    return Comparison(
        len(first), only_first, only_second, p_value, float(second.mean() - first.mean()), _interval(first, second)
    )


def _interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Newcombe's method 10; see `compare_paired`."""
    count = len(first)
    a, d = int((first & second).sum()), int((~first & ~second).sum())
    b, c = int((second & ~first).sum()), int((first & ~second).sum())  # the difference is (b - c) / n
    low_second, high_second = accuracy_interval(a + b, count)
    low_first, high_first = accuracy_interval(a + c, count)
    share_second, share_first = (a + b) / count, (a + c) / count
    product = (a + b) * (c + d) * (a + c) * (b + d)
    covariance = float(a * d - b * c)
    if covariance > 0:  # continuity correction: the difference between methods 10 and 8
        covariance = max(0.0, covariance - count / 2)
    phi = covariance / math.sqrt(product) if product else 0.0
    below, above = share_second - low_second, high_first - share_first
    up, down = high_second - share_second, share_first - low_first
    difference = share_second - share_first
    return (
        difference - math.sqrt(max(0.0, below**2 - 2 * phi * below * above + above**2)),
        difference + math.sqrt(max(0.0, up**2 - 2 * phi * up * down + down**2)),
    )


def _short(p_value: float) -> str:
    text = f"= {p_value:.3f}" if p_value >= 0.001 else "< 0.001"
    return f"< {_SIGNIFICANT:.3f}" if p_value < _SIGNIFICANT and text == f"= {_SIGNIFICANT:.3f}" else text
