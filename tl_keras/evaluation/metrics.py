"""The figures of `metrics.json`."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import log_loss

from tl_keras.evaluation.intervals import accuracy_interval

_ECE_BINS = 15  # Guo et al. 2017, section 5
_TOP_K = 5


def measure(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Scores every example.

    Args:
        probabilities: float32 `(n, classes)`, n at least 1.
        labels: int `(n,)`.

    Returns:
        `n`, `accuracy`, `accuracy_ci95` (Wilson), `mean_per_class_accuracy` over the classes that occur,
        `top5_accuracy` (1 where there are five classes or fewer), `nll` (mean negative log-likelihood, nats) and
        `ece` (expected calibration error, 15 bins of equal width; Naeini et al. 2015).
    """
    predicted = probabilities.argmax(1)
    correct = int((predicted == labels).sum())
    low, high = accuracy_interval(correct, len(labels))
    top = np.argsort(-probabilities, axis=1, kind="stable")[:, :_TOP_K]
    known = np.unique(labels)
    exact = probabilities.astype(np.float64)
    exact = exact / exact.sum(1, keepdims=True)  # a float32 softmax sums to 1 within 1e-6, scikit-learn wants 1e-8
    per_class = [float((predicted[labels == label] == label).mean()) for label in known]
    return {
        "n": len(labels),
        "accuracy": correct / len(labels),
        "accuracy_ci95": [low, high],
        "mean_per_class_accuracy": float(np.mean(per_class)),
        "top5_accuracy": float((top == labels[:, np.newaxis]).any(1).mean()),
        "nll": float(log_loss(labels, exact, labels=np.arange(exact.shape[1]))),
        "ece": expected_calibration_error(probabilities, labels),
    }


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean distance between confidence and accuracy over 15 bins of confidence (Naeini et al. 2015, section 3).

    Args:
        probabilities: float `(n, classes)`.
        labels: int `(n,)`.

    Returns:
        0 to 1.
    """
    confidence = probabilities.max(1)
    correct = probabilities.argmax(1) == labels
    bins = np.clip(np.ceil(confidence * _ECE_BINS).astype(int) - 1, 0, _ECE_BINS - 1)
    sums = [np.bincount(bins, values, minlength=_ECE_BINS) for values in (confidence, correct)]
    return float(np.abs(sums[0] - sums[1]).sum() / len(labels))


def headline(name: str, metrics: dict[str, Any]) -> str:
    """`test accuracy 0.902 [0.845, 0.941] n=153`."""
    low, high = metrics["accuracy_ci95"]
    return f"{name} accuracy {metrics['accuracy']:.3f} [{low:.3f}, {high:.3f}] n={metrics['n']}"
