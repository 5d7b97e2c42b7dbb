"""Which images a report shows: the worst mistakes, the least sure, and those of the most confused pairs."""

from __future__ import annotations

import dataclasses

import numpy as np

from tl_keras.evaluation.metrics import most_confused

WORST, LEAST_SURE, PAIRS, EACH = 12, 12, 6, 3


@dataclasses.dataclass(frozen=True)
class ConfusedPair:
    """A label that is taken for another.

    Attributes:
        label: its number.
        taken: what it was taken for.
        count: how often.
        rows: some of these, the surest first.
    """

    label: int
    taken: int
    count: int
    rows: list[int]


@dataclasses.dataclass(frozen=True)
class Selection:
    """Rows of the evaluated split.

    Attributes:
        worst: wrong ones, the surest first, but for those of the pairs.
        least_sure: those whose best two classes are nearest to each other, but for both.
        pairs: the most confused.
    """

    worst: list[int]
    least_sure: list[int]
    pairs: list[ConfusedPair]

    @property
    def rows(self) -> list[int]:
        """All of them, each once."""
        shown = [*self.worst, *self.least_sure, *(row for pair in self.pairs for row in pair.rows)]
        return list(dict.fromkeys(shown))


def choose_shown(probabilities: np.ndarray, labels: np.ndarray) -> Selection:
    """Chooses what is worth a look.

    Args:
        probabilities: float `(n, classes)`, n at least 1.
        labels: int `(n,)`.
    """
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    wrong = np.flatnonzero(predicted != labels)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")]
    pairs = []
    for label, taken, count in most_confused(predicted, labels, at_most=PAIRS):
        own = wrong[(labels[wrong] == label) & (predicted[wrong] == taken)]
        pairs.append(ConfusedPair(label, taken, count, own[:EACH].tolist()))
    shown = {row for pair in pairs for row in pair.rows}
    worst = [row for row in wrong.tolist() if row not in shown][:WORST]
    ordered = np.sort(probabilities, axis=1)
    margins = ordered[:, -1] - (ordered[:, -2] if ordered.shape[1] > 1 else 0)
    shown |= set(worst)
    unsure = [row for row in np.argsort(margins, kind="stable").tolist() if row not in shown]
    return Selection(worst, unsure[:LEAST_SURE], pairs)
