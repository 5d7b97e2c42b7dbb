"""The figures of `metrics.json`, `per_class.csv` and `confusion.csv`."""

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
    """Scores every example.

    Args:
        probabilities: float32 `(n, classes)`, n at least 1.
        labels: int `(n,)`.
        classes: what `measure_classes` gives, where it is there already.

    Returns:
        `n`, `accuracy`, `mean_per_class_accuracy` over the classes that occur, `top5_accuracy` (1 where there are five
        classes or fewer), `nll` (mean negative log-likelihood, nats), `ece` (expected calibration error, 15 bins of
        equal width), `macro` and `weighted` averages of precision, recall and F1 over the classes that occur, and for
        two classes that both occur `auroc`. Each `NAME` has its 95 % interval in `NAME_ci95`,
        `nll` of a single example None.
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
    """Figures of each class.

    Args:
        predicted: int `(n,)`.
        labels: int `(n,)`.
        num_classes: classes.

    Returns:
        `support` (examples of the class) and `predicted` (examples taken for it), int `(classes,)`; `precision`,
        `recall` and `f1`, float64 `(classes,)`, 0 where there is nothing to count; of each `NAME_ci95`, float64
        `(classes, 2)` (Wilson; F1: Lam et al. 2023).
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
    """The confusion matrix, int `(classes, classes)`: rows are labels, columns what was predicted."""
    return np.asarray(confusion_matrix(labels, predicted, labels=np.arange(num_classes)))


def count_pairs(predicted: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cells of the confusion matrix that are not empty: label, prediction and count, int64 `(m,)` each, in order.

    Of thousands of classes the matrix itself would be too large.
    """
    pairs, counts = np.unique(np.stack([labels, predicted], 1).astype(np.int64), axis=0, return_counts=True)
    return pairs[:, 0], pairs[:, 1], counts


def most_confused(predicted: np.ndarray, labels: np.ndarray, *, at_most: int) -> list[tuple[int, int, int]]:
    """Label, what it was taken for, how often: the most frequent first, of equals the lower number first."""
    label, taken, counts = (column.tolist() for column in count_pairs(predicted, labels))
    errors = [cell for cell in zip(label, taken, counts, strict=True) if cell[0] != cell[1]]
    return sorted(errors, key=lambda cell: -cell[2])[:at_most]


def summarize(accuracies: Sequence[float]) -> dict[str, Any]:
    """Of repeated trainings: `accuracies`, `mean`, `standard_deviation`, `min`, `max`."""
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    return {
        "accuracies": list(accuracies),
        "mean": statistics.mean(accuracies),
        "standard_deviation": spread,
        "min": min(accuracies),
        "max": max(accuracies),
    }


def describe_spread(summary: Mapping[str, Any]) -> str:
    """`0.902, standard deviation 0.004, 0.897 to 0.908`."""
    low, high = summary["min"], summary["max"]
    return f"{summary['mean']:.3f}, standard deviation {summary['standard_deviation']:.3f}, {low:.3f} to {high:.3f}"


def headline(name: str, metrics: dict[str, Any]) -> str:
    """`test accuracy 0.902 [0.845, 0.941] n=153`."""
    return f"{name} accuracy {with_interval(metrics['accuracy'], metrics['accuracy_ci95'])} n={metrics['n']}"


def _log_odds(probabilities: np.ndarray) -> np.ndarray:
    """Of the second class of two: near 1 a float32 has no room for differences, where the other class's has it."""
    least = np.finfo(np.float32).smallest_subnormal
    logs = np.log(np.maximum(probabilities, least).astype(np.float64))
    return np.asarray(logs[:, 1] - logs[:, 0])
