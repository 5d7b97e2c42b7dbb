"""Metrics of `metrics.json`, `per_class.csv` and `confusion.csv`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score

from tl_keras.statistics.averages import average
from tl_keras.statistics.calibration import error_interval, expected_calibration_error, losses
from tl_keras.statistics.intervals import (
    accuracy_interval,
    auroc_interval,
    f1_intervals,
    mean_interval,
    proportion_intervals,
    with_interval,
)

_TOP_K = 5


def measure(
    probabilities: np.ndarray, labels: np.ndarray, classes: dict[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """Computes all metrics of a split.

    Args:
        probabilities: float32 `(n, classes)`, n at least 1.
        labels: int `(n,)`.
        classes: result of `measure_classes`, if it is known already.

    Returns:
        `n`, `accuracy`, `mean_per_class_accuracy` over the classes that occur, `top5_accuracy` (1 with five classes or
        fewer), `nll` (mean negative log-likelihood, nats), `ece` (expected calibration error, 15 bins of equal width),
        `macro` and `weighted` averages of precision, recall and F1 over the classes that occur, and for two classes
        that both occur `auroc`. Each `NAME` has its 95 % confidence interval in `NAME_ci95`; that of `nll` is None for
        a single example.
    """
    predicted = probabilities.argmax(1)
    correct, count = int((predicted == labels).sum()), len(labels)
    top = np.argsort(-probabilities, axis=1, kind="stable")[:, :_TOP_K]
    in_top = int((top == labels[:, np.newaxis]).any(1).sum())
    classes = classes or measure_classes(predicted, labels, num_classes=probabilities.shape[1])
    occurs = classes["support"] > 0
    by_name = (("macro", occurs / occurs.sum()), ("weighted", classes["support"] / count))
    averages = {name: average(predicted, labels, classes, weights) for name, weights in by_name}
    each_loss = losses(probabilities, labels)
    figures: dict[str, tuple[float, tuple[float, float] | None]] = {
        "accuracy": (correct / count, accuracy_interval(correct, count)),
        "mean_per_class_accuracy": averages["macro"]["recall"],
        "top5_accuracy": (in_top / count, accuracy_interval(in_top, count)),
        "nll": (float(each_loss.mean()), mean_interval(each_loss)),
        "ece": (expected_calibration_error(probabilities, labels), error_interval(probabilities, labels)),
    }
    if probabilities.shape[1] == 2 and occurs.all():
        area = float(roc_auc_score(labels, _log_odds(probabilities)))
        positives, negatives = (int(classes["support"][label]) for label in (1, 0))
        figures["auroc"] = area, auroc_interval(area, positives, negatives)
    result: dict[str, Any] = {"n": count}
    for name, (value, interval) in figures.items():
        result |= {name: value, f"{name}_ci95": list(interval) if interval else None}
    for name, found in averages.items():
        result[name] = {}
        for figure, (value, interval) in found.items():
            result[name] |= {figure: value, f"{figure}_ci95": list(interval)}
    return result


def measure_classes(predicted: np.ndarray, labels: np.ndarray, *, num_classes: int) -> dict[str, np.ndarray]:
    """Computes precision, recall and F1 of each class.

    Args:
        predicted: predicted classes, int `(n,)`.
        labels: int `(n,)`.
        num_classes: number of classes.

    Returns:
        `support` (examples of the class) and `predicted` (examples predicted as the class), int `(classes,)`;
        `precision`, `recall` and `f1`, float64 `(classes,)`, 0 if they are undefined; and their 95 % confidence
        intervals `NAME_ci95`, float64 `(classes, 2)` (Wilson; F1: Lam et al. 2023).
    """
    numbers = np.arange(num_classes)
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=numbers, zero_division=0.0
    )
    hits = np.bincount(labels[predicted == labels], minlength=num_classes)
    taken = np.bincount(predicted, minlength=num_classes)
    return {
        "support": support,
        "predicted": taken,
        "precision": precision,
        "precision_ci95": proportion_intervals(hits, taken),
        "recall": recall,
        "recall_ci95": proportion_intervals(hits, support),
        "f1": f1,
        "f1_ci95": f1_intervals(hits, support + taken - 2 * hits),
    }


def confuse(predicted: np.ndarray, labels: np.ndarray, *, num_classes: int) -> np.ndarray:
    """Computes the confusion matrix, int `(classes, classes)`: rows are labels, columns are predictions."""
    return np.asarray(confusion_matrix(labels, predicted, labels=np.arange(num_classes)))


def count_pairs(predicted: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts the nonzero cells of the confusion matrix: label, prediction and count, int64 `(m,)` each, sorted.

    With thousands of classes the matrix itself would be too large.
    """
    pairs, counts = np.unique(np.stack([labels, predicted], 1).astype(np.int64), axis=0, return_counts=True)
    return pairs[:, 0], pairs[:, 1], counts


def most_confused(predicted: np.ndarray, labels: np.ndarray, *, at_most: int) -> list[tuple[int, int, int]]:
    """Lists the most frequent errors as label, prediction and count; ties are sorted by class number."""
    label, prediction, counts = (column.tolist() for column in count_pairs(predicted, labels))
    errors = [cell for cell in zip(label, prediction, counts, strict=True) if cell[0] != cell[1]]
    return sorted(errors, key=lambda cell: -cell[2])[:at_most]


def summarize(accuracies: Sequence[float]) -> dict[str, Any]:
    """Summarizes the accuracies of repeated trainings: `accuracies`, `mean`, `standard_deviation`, `min`, `max`."""
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    return {
        "accuracies": list(accuracies),
        "mean": statistics.mean(accuracies),
        "standard_deviation": spread,
        "min": min(accuracies),
        "max": max(accuracies),
    }


def describe_spread(summary: Mapping[str, Any]) -> str:
    """Formats a summary: `0.902 (standard deviation 0.004, range 0.897 to 0.908)`."""
    mean, spread, low, high = (summary[name] for name in ("mean", "standard_deviation", "min", "max"))
    return f"{mean:.3f} (standard deviation {spread:.3f}, range {low:.3f} to {high:.3f})"


def headline(name: str, metrics: dict[str, Any]) -> str:
    """Formats the headline: `test accuracy 0.902 [0.845, 0.941] n=153`."""
    return f"{name} accuracy {with_interval(metrics['accuracy'], metrics['accuracy_ci95'])} n={metrics['n']}"


def _log_odds(probabilities: np.ndarray) -> np.ndarray:
    """Log odds of the second of two classes, from both probabilities: near 1 a float32 can't resolve differences."""
    least = np.finfo(np.float32).smallest_subnormal
    logs = np.log(np.maximum(probabilities, least).astype(np.float64))
    return np.asarray(logs[:, 1] - logs[:, 0])
