"""Whether one classifier is better than another on the same examples."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from tl_keras.data.splits import evaluated_split
from tl_keras.errors import UserError
from tl_keras.evaluation.intervals import accuracy_interval
from tl_keras.evaluation.leaks import read_digests
from tl_keras.run import read_csv

_SIGNIFICANT = 0.05


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a run predicted.

    Attributes:
        name: of the run's folder, with as much of its path as tells it from the others.
        split: `test`, or `val` where the run has none.
        labels: id → label.
        predicted: id → what was predicted.
        digests: id → SHA-256 of the image; empty if the run does not say.
    """

    name: str
    split: str
    labels: dict[str, str]
    predicted: dict[str, str]
    digests: dict[str, bytes] = dataclasses.field(default_factory=dict)

    def correct(self, ids: list[str]) -> np.ndarray:
        """Whether each is predicted rightly, bool `(n,)`."""
        return np.array([self.labels[one] == self.predicted[one] for one in ids], bool)


def read_runs(paths: Sequence[str]) -> list[Predictions]:
    """Reads what runs have predicted on the split that they report.

    Args:
        paths: run folders.

    Raises:
        UserError: a `predictions.csv` is missing or damaged, or the runs report different splits.
    """
    runs = [_read_predictions(path, name) for path, name in zip(paths, _short_names(paths), strict=True)]
    if len({run.split for run in runs}) > 1:
        told = ", ".join(f"{run.name} has {run.split}" for run in runs)
        raise UserError(
            f"--compare: figures on val, on which choices are made, are too good beside those on test: {told}. Compare "
            "runs on the same data, split alike."
        )
    return runs


def _short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    parts = [Path(path).resolve().parts for path in paths]
    longest = max(map(len, parts))
    by_length = (["/".join(one[-length:]) for one in parts] for length in range(1, longest + 1))
    return next(names for names in by_length if len(set(names)) == len(names))


def _read_predictions(path: str, name: str) -> Predictions:
    file = Path(path) / "predictions.csv"
    try:
        rows = [(row["split"], row["id"], row["label"], row["predicted"]) for row in read_csv(file)]
    except (OSError, KeyError, ValueError, csv.Error) as error:
        told = f"it has no column {error}" if isinstance(error, KeyError) else str(error)
        reason = getattr(error, "strerror", None) or told
        raise UserError(
            f"--compare: {file} can't be read: {reason}. Give run folders whose runs have ended."
        ) from error
    split = evaluated_split(row[0] for row in rows)
    own = [row for row in rows if row[0] == split]
    try:
        digests = {one: digest for one, its_split, digest in read_digests(Path(path)) if its_split == split}
    except UserError:  # a run of an earlier version
        digests = {}
    labels, predicted = {row[1]: row[2] for row in own}, {row[1]: row[3] for row in own}
    return Predictions(name, split, labels, predicted, digests)


def find_shared(runs: list[Predictions]) -> list[str]:
    """The ids that all runs have predicted, in the first one's order; each stands for one image in all of them.

    Raises:
        UserError: there are none, one has another label for an id, or all ids stand for other images.
    """
    first = runs[0]
    named = [one for one in first.labels if all(one in run.labels for run in runs)]
    shared = [one for one in named if len({run.digests[one] for run in runs if one in run.digests}) < 2]
    if named and not shared:
        raise UserError(
            f"--compare: all {len(named):,} ids that {', '.join(run.name for run in runs)} have in common stand for "
            "different images: the content of the files differs. Compare runs on the same images."
        )
    if not shared:
        raise UserError(
            f"--compare: {', '.join(run.name for run in runs)} have no example of {first.split} in common. Compare "
            "runs on the same data, split alike."
        )
    for run in runs[1:]:
        for one in shared:
            if run.labels[one] != first.labels[one]:
                raise UserError(
                    f"--compare: {one} is {first.labels[one]!r} to {first.name} and {run.labels[one]!r} to {run.name}. "
                    "Compare runs on the same labels."
                )
    return shared


def adjust(p_values: list[float]) -> list[float]:
    """P values of several comparisons, made comparable with 0.05 again (Holm 1979)."""
    count, adjusted, highest = len(p_values), [0.0] * len(p_values), 0.0
    for rank, number in enumerate(sorted(range(count), key=lambda one: p_values[one])):
        highest = max(highest, min(1.0, (count - rank) * p_values[number]))
        adjusted[number] = highest
    return adjusted


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two classifiers, A and B, on the same examples.

    Attributes:
        count: examples.
        only_first: that only A gets right.
        only_second: that only B gets right.
        p_value: McNemar's exact test, two-sided.
        difference: accuracy of B less that of A.
        interval: of the difference, 95 %.
    """

    count: int
    only_first: int
    only_second: int
    p_value: float
    difference: float
    interval: tuple[float, float]

    def describe(self, first: str, second: str) -> str:
        """A sentence for people who never heard of a p value."""
        numbers = (
            f"{self.only_second:,} images only {second} gets right, {self.only_first:,} only {first}, p "
            f"{_short(self.p_value)}; difference {self.difference:+.3f} [{self.interval[0]:+.3f}, "
            f"{self.interval[1]:+.3f}], n={self.count:,}"
        )
        if self.only_first == self.only_second == 0:
            return f"{first} and {second} get the same {self.count:,} images right and wrong"
        if self.p_value >= _SIGNIFICANT:
            beside = not self.interval[0] <= 0 <= self.interval[1]
            why = ". The interval leaves 0 out, but it is approximate and of this pair alone: p decides" * beside
            return f"{first} and {second} can't be told apart on these images: {numbers}{why}"
        better = second if self.difference > 0 else first
        return f"{better} is better: {numbers}"


def compare(first: np.ndarray, second: np.ndarray) -> Comparison:
    """Compares two classifiers on the same examples.

    The test is McNemar's in its exact form (McNemar 1947; Dietterich 1998), the difference's interval the hybrid score
    interval for paired proportions (Newcombe 1998, Statistics in Medicine 17, method 10).

    Args:
        first: whether A is right, bool `(n,)`, n at least 1.
        second: whether B is right, bool `(n,)`.

    Returns:
        What was found.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    differing = only_first + only_second
    p_value = float(stats.binomtest(only_first, differing).pvalue) if differing else 1.0
    return Comparison(
        len(first), only_first, only_second, p_value, float(second.mean() - first.mean()), _interval(first, second)
    )


def _interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Newcombe's method 10; see `compare`."""
    count = len(first)
    a, d = int((first & second).sum()), int((~first & ~second).sum())
    b, c = int((second & ~first).sum()), int((first & ~second).sum())  # the difference is (b - c) / n
    low_second, high_second = accuracy_interval(a + b, count)
    low_first, high_first = accuracy_interval(a + c, count)
    share_second, share_first = (a + b) / count, (a + c) / count
    product = (a + b) * (c + d) * (a + c) * (b + d)
    covariance = float(a * d - b * c)
    if covariance > 0:  # the continuity correction by which method 10 differs from method 8
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
