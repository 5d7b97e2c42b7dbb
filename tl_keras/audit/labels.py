"""Labels that look wrong: confident learning (Northcutt, Jiang & Chuang 2021)."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

_FOLDS = 5
_REGRESSION_AT_MOST, _CELLS_AT_MOST = 20_000_000, 100_000_000  # images times classes
_C = 0.01  # on standardised components (benchmarks/audit.py, --only=labels)
_TOLERANCE = 1e-3
_MARGIN = 0.3  # between two probabilities: below it, most are hard images with the right label (--only=labels)


def build_surrogate(count: int, classes: int) -> Any:
    """Builds the surrogate classifier of an audit: a logistic regression on principal components.

    Of very many images and classes it would take hours; then it is a linear discriminant analysis with the shrinkage of
    Ledoit & Wolf 2004, which finds nearly as many planted errors.

    Args:
        count: images that it is fitted on.
        classes: how many.
    """
    if count * classes > _REGRESSION_AT_MOST:
        return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    return make_pipeline(StandardScaler(), LogisticRegression(C=_C, tol=_TOLERANCE, max_iter=300))


def too_many(count: int, classes: int) -> bool:
    """Whether probabilities of so many images and classes would not fit into memory; then no label is judged."""
    return count * classes > _CELLS_AT_MOST


def cross_validate(points: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of each label by a logistic regression that has not seen the example.

    Args:
        points: float `(n, d)`.
        labels: int `(n,)`.

    Returns:
        Rows that could be judged, int64 `(m,)`: those whose class has at least two examples; and their probabilities,
        float32 `(m, classes)`, 0 for classes that could not. None where there are too many, or but one class.
    """
    counts = np.bincount(labels)
    rows = np.flatnonzero(counts[labels] >= 2)
    known = np.unique(labels[rows])
    if len(known) < 2 or too_many(len(rows), len(counts)):
        return rows[:0], np.zeros((0, len(counts)))
    found = np.zeros((len(rows), len(counts)), np.float32)
    folds = StratifiedKFold(min(_FOLDS, int(counts.max())), shuffle=True, random_state=0)
    model = build_surrogate(len(rows), len(known))
    found[:, known] = cross_val_predict(model, points[rows], labels[rows], cv=folds, method="predict_proba")
    return rows, found


def find_label_issues(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Examples that are confidently another class than their label says (the paper's section 3.2, method 2).

    An example counts as class j where its probability of j reaches the mean that examples labelled j have of it; of
    several such classes the most probable counts. Those whose label is nearly as probable are left out.

    Args:
        probabilities: out of sample, float `(n, classes)`.
        labels: int `(n,)`.

    Returns:
        Rows, the most suspect first, int64 `(m,)`; the class that they look like, int64 `(m,)`; and how much more
        probable it is than the label, float `(m,)` (the normalised margin, by which the paper ranks).
    """
    count, classes = probabilities.shape
    sums = np.zeros(classes)
    np.add.at(sums, labels, probabilities[np.arange(count), labels])
    thresholds = sums / np.maximum(np.bincount(labels, minlength=classes), 1)
    reaches = (probabilities >= thresholds) & (thresholds > 0)
    confident = np.where(reaches, probabilities, -1.0)
    looks_like = confident.argmax(1)
    suspect = np.flatnonzero(reaches.any(1) & (looks_like != labels))
    margins = probabilities[suspect, looks_like[suspect]] - probabilities[suspect, labels[suspect]]
    suspect, margins = suspect[margins > _MARGIN], margins[margins > _MARGIN]
    order = np.argsort(-margins, kind="stable")
    return suspect[order], looks_like[suspect][order], margins[order]
