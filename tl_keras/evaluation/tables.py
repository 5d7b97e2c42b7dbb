"""The files in which a run says what it was and what came out."""

from __future__ import annotations

import io
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import sklearn
import tensorflow as tf

from tl_keras import __version__
from tl_keras.data.examples import Examples
from tl_keras.evaluation.metrics import measure
from tl_keras.run import RunFolder, write_atomically

_PREDICTIONS_HEADER = ("id", "split", "label", "predicted", "probability", "label_probability")
_DIGITS = 6


def write_evaluation(folder: RunFolder, examples: Examples, probabilities: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Measures val and test, and writes `splits.csv`, `predictions.csv`, `probabilities.npy` and `labels.txt`.

    Args:
        folder: the run folder.
        examples: what was evaluated.
        probabilities: split → float32 `(n, classes)`, in the order of the split's positions.

    Returns:
        Split → its figures, for `metrics.json`.
    """
    write_examples(folder, examples)
    write_predictions(folder, examples, probabilities)
    folder.write_text("labels.txt", "".join(f"{label}\n" for label in examples.class_names))
    return {split: measure(values, examples.labels(split)) for split, values in probabilities.items()}


def write_examples(folder: RunFolder, examples: Examples) -> None:
    """Writes `splits.csv`: what was used for what, in the source's order."""
    folder.write_csv("splits.csv", ("id", "split", "label"), examples.rows())


def write_predictions(folder: RunFolder, examples: Examples, probabilities: Mapping[str, np.ndarray]) -> None:
    """Writes `predictions.csv` and `probabilities.npy`: row by row the same examples, val before test.

    Args:
        folder: the run folder.
        examples: what was evaluated.
        probabilities: split → float32 `(n, classes)`, in the order of the split's positions.
    """
    folder.write_csv("predictions.csv", _PREDICTIONS_HEADER, _prediction_rows(examples, probabilities))
    content = io.BytesIO()
    np.save(content, np.concatenate(list(probabilities.values())), allow_pickle=False)
    write_atomically(folder.path / "probabilities.npy", content.getvalue())


def describe_environment(*, engine: str, precision: str) -> dict[str, Any]:
    """Versions, device, engine and precision, for `metrics.json`."""
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
    """What TensorFlow computes on: the GPUs' names, or the CPU's."""
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        names = [tf.config.experimental.get_device_details(gpu).get("device_name", "GPU") for gpu in gpus]
        return ", ".join(names)
    return f"CPU ({platform.machine()})"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table for the screen, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]


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
