"""Contents of a report as plain values for the templates: tables, sentences and images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tl_keras.evaluation.metrics import count_pairs
from tl_keras.run import count_of

FULL_MATRIX = 30  # up to this number of classes the table shows the whole confusion matrix
_PART_OF_MATRIX = 16
_CLASSES_AT_MOST = 2000


@dataclasses.dataclass(frozen=True)
class Near:
    """A training image with an embedding similar to that of a shown image; `similarity` is the cosine similarity."""

    id: str
    label: str
    thumb: str
    similarity: float


@dataclasses.dataclass(frozen=True)
class Shown:
    """An evaluated image.

    Attributes:
        id: id of the image.
        label: name of the labeled class.
        predicted: name of the predicted class.
        probability: probability of the predicted class.
        label_probability: probability of the labeled class.
        thumb: thumbnail as a `data:` URL.
        heat: thumbnail with the heat map applied, as a `data:` URL; empty if there is no heat map.
        place: location of the heat, in words.
        near: nearest training images, nearest first.
    """

    id: str
    label: str
    predicted: str
    probability: float
    label_probability: float
    thumb: str
    heat: str = ""
    place: str = ""
    near: Sequence[Near] = ()

    @property
    def right(self) -> bool:
        """Whether the prediction is correct."""
        return self.label == self.predicted


@dataclasses.dataclass(frozen=True)
class ShownPair:
    """Images of one class that were predicted as another."""

    label: str
    predicted: str
    count: int
    images: Sequence[Shown]


@dataclasses.dataclass(frozen=True)
class ShownFinding:
    """A finding of the audit with thumbnails of its image and, if there is one, of the other image."""

    id: str
    kind: str
    severity: str
    evidence: str
    thumb: str
    other_id: str = ""
    other_thumb: str = ""


@dataclasses.dataclass(frozen=True)
class MatrixRow:
    """A row of a confusion matrix: counts, their shares of the row, and the number of images in other columns."""

    label: str
    counts: Sequence[int]
    shares: Sequence[float]
    others: int


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A confusion matrix, or its most confused classes."""

    names: Sequence[str]
    rows: Sequence[MatrixRow]
    whole: bool


def make_matrix(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str], order: np.ndarray) -> Matrix:
    """Makes the table of the confusion matrix; with many classes, of the most confused ones.

    Args:
        predicted: predicted classes, int `(n,)`.
        labels: int `(n,)`.
        names: class names.
        order: order of the classes in a partial matrix, int `(classes,)`; see `plots.order_classes`.
    """
    label, prediction, counts = count_pairs(predicted, labels)
    whole, kept = len(names) <= FULL_MATRIX, list(range(len(names)))
    if not whole:
        wrong, largest = label != prediction, np.zeros((2, len(names)), np.int64)
        for side, classes in zip(largest, (label, prediction), strict=True):
            np.maximum.at(side, classes[wrong], counts[wrong])
        # one large confusion matters more than many small ones
        chosen = set(np.argsort(-largest.sum(0), kind="stable")[:_PART_OF_MATRIX].tolist())
        kept = [number for number in order.tolist() if number in chosen]
    cells = dict(zip(zip(label.tolist(), prediction.tolist(), strict=True), counts.tolist(), strict=True))
    totals = np.bincount(labels, minlength=len(names))
    rows = []
    for number in kept:
        own, total = [cells.get((number, other), 0) for other in kept], int(totals[number])
        rows.append(MatrixRow(names[number], own, [count / max(total, 1) for count in own], total - sum(own)))
    return Matrix([names[number] for number in kept], rows, whole)


def make_classes(classes: Mapping[str, np.ndarray], names: Sequence[str]) -> list[dict[str, Any]]:
    """Makes the rows of the per-class table, lowest F1 first, classes without images last.

    Args:
        classes: result of `measure_classes`.
        names: class names.

    Returns:
        At most 2,000 rows; `per_class.csv` has all classes.
    """
    rows = []
    for number in np.lexsort((classes["f1"], classes["support"] == 0))[:_CLASSES_AT_MOST].tolist():
        figures = {
            name: {
                "value": float(classes[name][number]),
                "low": float(classes[f"{name}_ci95"][number][0]),
                "high": float(classes[f"{name}_ci95"][number][1]),
            }
            for name in ("precision", "recall", "f1")
        }
        rows.append({"name": names[number], "support": int(classes["support"][number]), **figures})
    return rows


def _describe_seen(leaks: Mapping[str, Any] | None, split: str) -> str:
    if leaks is None:
        return "It is unknown whether the classifier was trained on some of these images."
    if split not in leaks:
        return (
            "None of these images is identical to a training image of the classifier's run; modified copies were not "
            "searched for."
        )
    count = leaks[split]["leaked"]
    return f"The classifier was trained on {count:,} of these images or on copies of them, so its metrics are too good."


def _describe_leak(leak: Mapping[str, Any] | None) -> str:
    """Describes evaluated images that are training images too; empty if there are none."""
    if not leak:
        return ""
    count = leak["leaked"]
    are = "is a training image" if count == 1 else "are training images"
    text = f" However, {count:,} of these images {are} of this run or of an earlier one."
    if "accuracy_without" not in leak:
        return text
    accuracy = _describe_accuracy(leak["accuracy_without"], leak["accuracy_without_ci95"])
    return f"{text} Without them, accuracy is {accuracy}."


def _describe_accuracy(accuracy: float, interval: Sequence[float]) -> str:
    low, high = interval
    return f"{100 * accuracy:.1f} % (95 % confidence interval {100 * low:.1f} to {100 * high:.1f} %)"


def describe_run(
    config: Mapping[str, Any], metrics: Mapping[str, Any], *, split: str, counts: Mapping[str, int], backbone: str
) -> list[str]:
    """Summarizes a run in three parts: what was trained or evaluated, how selections were made, and the accuracy.

    Args:
        config: contents of `config.json`.
        metrics: contents of `metrics.json`.
        split: the split of the headline.
        counts: split → number of images.
        backbone: name of the network.
    """
    figures, mode = metrics[split], config["mode"]
    accuracy = _describe_accuracy(figures["accuracy"], figures["accuracy_ci95"])
    result = f"Accuracy on {figures['n']:,} {split} images is {accuracy}."
    if mode == "evaluate":
        return [*_describe_evaluated(config, metrics, split=split, backbone=backbone), result]
    if mode == "extract":
        made, selected = _describe_probe(config, metrics, counts=counts, backbone=backbone), "the probe was"
    else:
        made, selected = _describe_training(config, metrics, counts=counts, backbone=backbone), "epochs were"
    where = f"on {counts['val']:,} val images"
    if "cross-validation" in str(metrics.get("probe", {}).get("chosen_by", "")):
        where = "by cross-validation within train and val"
    if split == "val":
        method = f"All selections were made {where}; there is no test split."
        result = f"{result} Expect slightly less on new images: {selected} selected on val."
    else:
        method = f"All selections were made {where}; test was evaluated once, at the end."
    return [made, method, result + _describe_leak((metrics.get("leaks") or {}).get(split))]


def _describe_evaluated(
    config: Mapping[str, Any], metrics: Mapping[str, Any], *, split: str, backbone: str
) -> tuple[str, str]:
    """Names the evaluated classifier, and relates the images to those of its run."""
    network = f" ({backbone})" if backbone else ""
    made = f"The classifier {config['read']['classifier']}{network} was evaluated."
    leaks = metrics.get("leaks")
    if config["data"]["dataset"]:
        return made, _describe_seen(leaks, split)
    own = f"These are the {split} images of its own run"
    if leaks and split in leaks:
        return made, f"{own}. {_describe_seen(leaks, split)}"
    if split == "val":
        return made, f"{own}, which were used to select epochs or parameters."
    return made, f"{own}, which were not used to select anything."


def _describe_probe(
    config: Mapping[str, Any], metrics: Mapping[str, Any], *, counts: Mapping[str, int], backbone: str
) -> str:
    fitted, count = "training images", counts["train"]
    if config["probe"]["refit"] != "train":
        fitted, count = "training and val images", counts["train"] + counts["val"]
    probe, layer = metrics["probe"]["probe"].replace("_", " "), metrics["probe"]["layer"]
    weights = Path(config["backbone"]["weights"]).name
    return (
        f"A probe ({probe}) was fitted on the embeddings of {count:,} {fitted}, the outputs of layer {layer} of "
        f"{backbone} (weights: {weights})."
    )


def _describe_training(
    config: Mapping[str, Any], metrics: Mapping[str, Any], *, counts: Mapping[str, int], backbone: str
) -> str:
    part, epochs = config["training"]["trainable"], config["training"]["epochs"]
    trained = "A new head was" if part == "head" else f"A new head and layers of the backbone (--trainable={part}) were"
    weights, images = Path(config["backbone"]["weights"]).name, count_of(counts["train"], "image")
    limit = count_of(epochs, "epoch")
    end = " Training was interrupted." if metrics.get("interrupted") else ""
    return f"{trained} trained on {backbone} (weights: {weights}) with {images}, for at most {limit} per stage.{end}"
