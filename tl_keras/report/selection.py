"""Selects the images of a report: confident errors, least confident predictions, and the most confused classes."""

from __future__ import annotations

import dataclasses

import numpy as np

from tl_keras.evaluation.metrics import most_confused

WORST, LEAST_SURE, PAIRS, EACH = 12, 12, 6, 3


@dataclasses.dataclass(frozen=True)
class ConfusedPair:
    """A pair of classes that is confused.

    Attributes:
        label: number of the labeled class.
        predicted: number of the predicted class.
        count: number of examples.
        rows: rows of some of these examples, most confident first.
    """

    label: int
    predicted: int
    count: int
    rows: list[int]


@dataclasses.dataclass(frozen=True)
class Selection:
    """Rows of the evaluated split; no row is selected twice.

    Attributes:
        worst: errors, most confident first, without those in `pairs`.
        least_sure: rows with the smallest margin between the two most probable classes, without those above.
        pairs: the most confused pairs of classes.
    """

    worst: list[int]
    least_sure: list[int]
    pairs: list[ConfusedPair]

    @property
    def rows(self) -> list[int]:
        """All selected rows, each once."""
        shown = [*self.worst, *self.least_sure, *(row for pair in self.pairs for row in pair.rows)]
        return list(dict.fromkeys(shown))


def choose_shown(probabilities: np.ndarray, labels: np.ndarray) -> Selection:
    """Selects the images that a report shows.

    Args:
        probabilities: float `(n, classes)`, n at least 1.
        labels: int `(n,)`.
    """
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    wrong = np.flatnonzero(predicted != labels)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")]
    pairs = []
    for label, prediction, count in most_confused(predicted, labels, at_most=PAIRS):
        own = wrong[(labels[wrong] == label) & (predicted[wrong] == prediction)]
        pairs.append(ConfusedPair(label, prediction, count, own[:EACH].tolist()))
    shown = {row for pair in pairs for row in pair.rows}
    worst = [row for row in wrong.tolist() if row not in shown][:WORST]
    ordered = np.sort(probabilities, axis=1)
    margins = ordered[:, -1] - (ordered[:, -2] if ordered.shape[1] > 1 else 0)
    shown |= set(worst)
    unsure = [row for row in np.argsort(margins, kind="stable").tolist() if row not in shown]
    return Selection(worst, unsure[:LEAST_SURE], pairs)
