"""Label errors: confident learning (Northcutt, Jiang & Chuang 2021)."""

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
_C = 0.01  # on standardized components (benchmarks/audit.py, --only=labels)
_TOLERANCE = 1e-3
_MARGIN = 0.3  # difference of probabilities; below it most are hard images with correct labels (--only=labels)


def build_surrogate(count: int, classes: int) -> Any:
    """Builds the surrogate classifier of an audit: a logistic regression on principal components.

    With very many images and classes this would take hours. Then it is a linear discriminant analysis with the
    shrinkage of Ledoit & Wolf 2004, which finds nearly as many planted errors.

    Args:
        count: number of images that it is fitted on.
        classes: number of classes.
    """
    if count * classes > _REGRESSION_AT_MOST:
        return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    return make_pipeline(StandardScaler(), LogisticRegression(C=_C, tol=_TOLERANCE, max_iter=300))


def too_many(count: int, classes: int) -> bool:
    """Whether the probabilities would not fit in memory; then labels are not checked."""
    return count * classes > _CELLS_AT_MOST


def cross_validate(points: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes out-of-sample class probabilities with a cross-validated surrogate classifier.

    Args:
        points: float `(n, d)`.
        labels: int `(n,)`.

    Returns:
        Rows whose class has at least two examples, int64 `(m,)`, and their probabilities, float32 `(m, classes)`, 0 for
        other classes. Both are empty with fewer than two classes, or if there are too many images and classes.
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
    """Finds examples that are confidently predicted as another class than their label (section 3.2, method 2).

    An example counts as class j if its probability of j reaches the mean probability of j among examples labeled j; of
    several such classes the most probable counts. Examples whose label is nearly as probable are left out.

    Args:
        probabilities: out-of-sample probabilities, float `(n, classes)`.
        labels: int `(n,)`.

    Returns:
        Rows, most suspicious first, int64 `(m,)`; the class that they look like, int64 `(m,)`; and by how much it is
        more probable than the label, float `(m,)` (the normalized margin, by which the paper ranks).
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
