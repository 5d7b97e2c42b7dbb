"""The tables of a run, and the lines that describe its results."""

from __future__ import annotations

import io
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import sklearn
import tensorflow as tf

from tl_keras.data.examples import Examples
from tl_keras.data.splits import evaluated_split
from tl_keras.evaluation.metrics import count_pairs, measure, measure_classes, most_confused
from tl_keras.evaluation.slices import SLICES, Attributes, describe_worst, measure_slices, slice_cells
from tl_keras.run import RunFolder, write_atomically
from tl_keras.statistics.calibration import RELIABILITY, reliability
from tl_keras.statistics.coverage import (
    THRESHOLD_CONFIDENCE,
    accuracy_by_coverage,
    choose_threshold,
    fewest_for_threshold,
    measure_threshold,
)
from tl_keras.statistics.intervals import with_interval
from tl_keras.version import __version__

DIGESTS = "digests.npy"
_PREDICTIONS_HEADER = ("id", "split", "label", "predicted", "probability", "label_probability")
_DIGITS = 6
_PAIRS, _PAIRS_SHOWN = 50, 3
_CURVE_POINTS = 200
_FIGURES = ("precision", "recall", "f1")
_PER_CLASS_HEADER = (
    "split",
    "label",
    "support",
    "predicted",
    *(f"{figure}{part}" for figure in _FIGURES for part in ("", "_low", "_high")),
)


def write_evaluation(
    folder: RunFolder,
    examples: Examples,
    probabilities: Mapping[str, np.ndarray],
    *,
    target_accuracy: float,
    attributes: Attributes | None = None,
) -> dict[str, Any]:
    """Computes the metrics of val and test, and writes the tables.

    The tables are `splits.csv`, `digests.npy`, `predictions.csv`, `probabilities.npy`, `labels.txt`, `per_class.csv`,
    `confusion.csv`, `reliability.csv` and `coverage.csv`; with attributes also `slices.csv`.

    Args:
        folder: the run folder.
        examples: the evaluated examples.
        probabilities: split → float32 `(n, classes)`, in the order of the split's positions.
        target_accuracy: see `choose_threshold`.
        attributes: attributes for slices; None without slices.

    Returns:
        For `metrics.json`: split → metrics, and with a val split `reject`: `target_accuracy`, `threshold`, and for each
        split the result of `measure_threshold`.
    """
    write_examples(folder, examples)
    write_predictions(folder, examples, probabilities)
    folder.write_text("labels.txt", "".join(f"{label}\n" for label in examples.class_names))
    metrics = {}
    per_class, confusion, curve, coverage, slices = (list[tuple[Any, ...]]() for _ in range(5))
    for split, values in probabilities.items():
        labels, predicted, names = examples.labels(split), values.argmax(1), examples.class_names
        classes = measure_classes(predicted, labels, num_classes=len(names))
        metrics[split] = measure(values, labels, classes)
        per_class += [(split, name, *_class_cells(classes, number)) for number, name in enumerate(names)]
        metrics[split]["most_confused"] = [
            {"label": names[label], "predicted": names[prediction], "count": count}
            for label, prediction, count in most_confused(predicted, labels, at_most=_PAIRS)
        ]
        cells = zip(*(column.tolist() for column in count_pairs(predicted, labels)), strict=True)
        confusion += [(split, names[label], names[prediction], count) for label, prediction, count in cells]
        curve += [(split, *row.values()) for row in reliability(values, labels)]
        coverage += [(split, *row) for row in _thin(accuracy_by_coverage(values, labels))]
        if attributes:
            metrics[split]["slices"] = found = measure_slices(attributes, examples.ids(split), values, labels)
            slices += [(split, *cells) for cells in slice_cells(found)]
    if attributes:
        folder.write_csv("slices.csv", ("split", *SLICES), slices)
    folder.write_csv("per_class.csv", _PER_CLASS_HEADER, per_class)
    folder.write_csv("confusion.csv", ("split", "label", "predicted", "count"), confusion)
    folder.write_csv("reliability.csv", ("split", *RELIABILITY), curve)
    folder.write_csv("coverage.csv", ("split", "threshold", "coverage", "accuracy"), coverage)
    if "val" in probabilities:  # test is never used for selection
        reached = choose_threshold(probabilities["val"], examples.labels("val"), target_accuracy=target_accuracy)
        metrics["reject"] = {
            "target_accuracy": target_accuracy,
            "threshold": reached,
            "threshold_confidence": THRESHOLD_CONFIDENCE,
            "val_images": len(probabilities["val"]),
        }
        needed = fewest_for_threshold(target_accuracy) if 0 < target_accuracy < 1 else None
        if needed and len(probabilities["val"]) < needed:
            metrics["reject"]["val_images_needed"] = needed
        if reached is not None:
            for split, values in probabilities.items():
                metrics["reject"][split] = measure_threshold(values, examples.labels(split), reached)
    return metrics


def describe_evaluation(metrics: Mapping[str, Any]) -> list[str]:
    """Makes the lines below the headline: calibration, frequent errors, slices, confidence threshold."""
    split = evaluated_split(metrics)
    figures, lines = metrics[split], list[str]()
    calibration = metrics.get("calibration")
    if calibration and calibration["temperature"] != 1:
        before = calibration["before"][split]["ece"]
        lines.append(
            f"calibration: temperature {calibration['temperature']:.2f}, fitted on val; {split} ECE {before:.3f} "
            f"→ {figures['ece']:.3f}"
        )
    if calibration and not calibration.get("supported", True):
        lines.append("calibration: none; val does not determine a temperature")
    if figures["most_confused"]:
        pairs = figures["most_confused"][:_PAIRS_SHOWN]
        errors = ", ".join(f"{one['label']} predicted as {one['predicted']} ({one['count']})" for one in pairs)
        lines.append(f"most frequent errors on {split}: {errors}")
    if "slices" in figures:
        lines.append(describe_worst(figures["slices"], accuracy=figures["accuracy"]))
    return [*lines, *_describe_reject(metrics["reject"], split, figures["accuracy"])] if "reject" in metrics else lines


def write_examples(folder: RunFolder, examples: Examples) -> None:
    """Writes `splits.csv` with the split of each example, in the order of the source, and `digests.npy`.

    `digests.npy` has the SHA-256 of each image's bytes, uint8 `(n, 32)`, in the same order.
    """
    folder.write_csv("splits.csv", ("id", "split", "label"), examples.rows())
    _write_array(folder, DIGESTS, examples.digests[examples.splits >= 0].view(np.uint8).reshape(-1, 32))


def write_predictions(folder: RunFolder, examples: Examples, probabilities: Mapping[str, np.ndarray]) -> None:
    """Writes `predictions.csv` and `probabilities.npy` with the same rows, val before test.

    Args:
        folder: the run folder.
        examples: the evaluated examples.
        probabilities: split → float32 `(n, classes)`, in the order of the split's positions.
    """
    folder.write_csv("predictions.csv", _PREDICTIONS_HEADER, _prediction_rows(examples, probabilities))
    _write_array(folder, "probabilities.npy", np.concatenate(list(probabilities.values())))


def _write_array(folder: RunFolder, name: str, values: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    write_atomically(folder.path / name, content.getvalue())


def describe_environment(*, engine: str, precision: str) -> dict[str, Any]:
    """Collects versions, device, engine and precision for `metrics.json`."""
    return {
        "tl_keras": __version__,
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "scikit-learn": sklearn.__version__,
        "device": describe_device(),
        "engine": engine,
        "precision": precision,
    }


def describe_device() -> str:
    """Names the GPUs that TensorFlow uses, or the CPU."""
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        names = [tf.config.experimental.get_device_details(gpu).get("device_name", "GPU") for gpu in gpus]
        return ", ".join(names)
    return f"CPU ({platform.machine()})"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Formats a table for the screen; each column is as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]


def _describe_reject(reject: Mapping[str, Any], split: str, accuracy: float) -> list[str]:
    target = f"{100 * reject['target_accuracy']:g} %"
    if reject["threshold"] is None:
        needed = reject.get("val_images_needed")
        if needed:
            return [
                f"no confidence threshold guarantees an accuracy of {target}: val has {reject['val_images']:,} images, "
                f"and at least {needed:,} are needed"
            ]
        return [f"no confidence threshold on val guarantees an accuracy of {target}"]
    if accuracy >= reject["target_accuracy"] and "run" not in reject:
        return []
    found = reject[split]
    accuracy_text = f", accuracy {with_interval(found['accuracy'], found['accuracy_ci95'])}" if found["n"] else ""
    where = "on val" if "run" not in reject else "by the classifier's run"
    certainty = reject.get("threshold_confidence")
    certain = f" or more, with {100 * certainty:g} % certainty" if certainty else " on val"
    chosen = f"chosen {where} for an accuracy of {target}{certain}"
    return [
        f"at confidence ≥ {reject['threshold']:.3f} ({chosen}): covers {100 * found['coverage']:.0f} % of {split}"
        f"{accuracy_text}"
    ]


def _class_cells(found: Mapping[str, np.ndarray], number: int) -> list[Any]:
    cells: list[Any] = [int(found["support"][number]), int(found["predicted"][number])]
    for figure in _FIGURES:
        values = (found[figure][number], *found[f"{figure}_ci95"][number])
        cells += [round(float(value), _DIGITS) for value in values]
    return cells


def _thin(curve: tuple[np.ndarray, ...]) -> Iterable[tuple[float, ...]]:
    """Yields evenly spaced points of a curve, including the last."""
    count = len(curve[0])
    rows = np.unique(np.linspace(0, count - 1, min(count, _CURVE_POINTS)).round().astype(int))
    for row in rows:
        yield tuple(round(float(column[row]), _DIGITS) for column in curve)


def _prediction_rows(examples: Examples, probabilities: Mapping[str, np.ndarray]) -> Iterable[tuple[Any, ...]]:
    names = examples.class_names
    for split, values in probabilities.items():
        ids, labels = examples.ids(split), examples.labels(split)
        for row, example_id in enumerate(ids):
            best = int(values[row].argmax())
            yield (
                example_id,
                split,
                names[labels[row]],
                names[best],
                round(float(values[row, best]), _DIGITS),
                round(float(values[row, labels[row]]), _DIGITS),
            )
