"""Distribution of embeddings: outliers, and distribution shift between train and test."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from tl_keras.audit.labels import build_surrogate
from tl_keras.audit.neighbors import Neighbors

_SPREADS = 3.5  # Iglewicz & Hoaglin 1993
_MAD_TO_SIGMA = 1.4826
_SHIFT_AT_LEAST, _SHIFT_AT_MOST = 10, 10_000  # images of each split


def find_outliers(neighbors: Neighbors) -> tuple[np.ndarray, np.ndarray]:
    """Finds images whose nearest neighbors are unusually far away (Angiulli & Pizzuti 2002), by the robust z score.

    Args:
        neighbors: nearest neighbors of the embeddings.

    Returns:
        Rows, farthest first, int64 `(m,)`, and their z scores, float `(m,)`.
    """
    if not neighbors.distances.size:  # a single image has no neighbor
        return np.zeros(0, np.int64), np.zeros(0)
    distances = neighbors.distances.mean(1).astype(np.float64)
    middle = np.median(distances)
    spread = _MAD_TO_SIGMA * np.median(np.abs(distances - middle))
    scores = (distances - middle) / spread if spread > 0 else np.zeros(len(distances))
    rows = np.flatnonzero(scores > _SPREADS)
    order = np.argsort(-scores[rows], kind="stable")
    return rows[order], scores[rows][order]


def measure_shift(points: np.ndarray, is_test: np.ndarray) -> dict[str, Any] | None:
    """Measures distribution shift between train and test: a classifier two-sample test (Lopez-Paz & Oquab 2017).

    Args:
        points: embeddings of train and test, float `(n, d)`.
        is_test: bool `(n,)`.

    Returns:
        `auroc` of a cross-validated logistic regression that distinguishes test from train (0.5 is chance), and the
        number of images drawn from each, `train` and `test`; None if one of them has fewer than ten images.
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
