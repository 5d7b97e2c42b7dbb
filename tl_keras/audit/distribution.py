"""Where images lie: those far from all others, and whether test lies where train does."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from tl_keras.audit.labels import build_surrogate
from tl_keras.audit.neighbours import Neighbours

_SPREADS = 3.5  # Iglewicz & Hoaglin 1993
_MAD_TO_SIGMA = 1.4826
_SHIFT_AT_LEAST, _SHIFT_AT_MOST = 10, 10_000  # of each


def find_outliers(neighbours: Neighbours) -> tuple[np.ndarray, np.ndarray]:
    """Images whose nearest neighbours are unusually far away (Angiulli & Pizzuti 2002), by the robust z score.

    Args:
        neighbours: of the embeddings.

    Returns:
        Rows, the farthest first, int64 `(m,)`, and their z scores, float `(m,)`.
    """
    if not neighbours.distances.size:  # a single image has no neighbour
        return np.zeros(0, np.int64), np.zeros(0)
    distances = neighbours.distances.mean(1).astype(np.float64)
    middle = np.median(distances)
    spread = _MAD_TO_SIGMA * np.median(np.abs(distances - middle))
    scores = (distances - middle) / spread if spread > 0 else np.zeros(len(distances))
    rows = np.flatnonzero(scores > _SPREADS)
    order = np.argsort(-scores[rows], kind="stable")
    return rows[order], scores[rows][order]


def measure_shift(points: np.ndarray, is_test: np.ndarray) -> dict[str, Any] | None:
    """Whether test can be told from train: a classifier two-sample test (Lopez-Paz & Oquab 2017).

    Args:
        points: embeddings of train and test, float `(n, d)`.
        is_test: bool `(n,)`.

    Returns:
        `auroc` of a cross-validated logistic regression that tells test from train (0.5: it can't), and how many of
        both were drawn; None where one of them has fewer than ten examples.
    """
    order = np.random.default_rng(0).permutation(len(points))
    drawn = [order[is_test[order] == which][:_SHIFT_AT_MOST] for which in (False, True)]
    counts, rows = [len(part) for part in drawn], np.concatenate(drawn)
    if min(counts) < _SHIFT_AT_LEAST:
        return None
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    found = cross_val_predict(
        build_surrogate(len(rows), 2), points[rows], is_test[rows], cv=folds, method="predict_proba"
    )[:, 1]
    area = float(roc_auc_score(is_test[rows], found))
    return {"auroc": area, "train": counts[0], "test": counts[1]}
