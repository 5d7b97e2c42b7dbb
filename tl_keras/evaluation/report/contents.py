"""What a report says, gathered from what a run knows: plain values for the template."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tl_keras.evaluation.metrics import count_pairs

FULL_MATRIX = 30  # classes: up to these the whole confusion matrix is a table
_PART_OF_MATRIX = 16
_CLASSES_AT_MOST = 2000


@dataclasses.dataclass(frozen=True)
class Near:
    """A training image that lies near a shown one: its id, label, thumb, and cosine similarity."""

    id: str
    label: str
    thumb: str
    similarity: float


@dataclasses.dataclass(frozen=True)
class Shown:
    """An evaluated image.

    Attributes:
        id: its id.
        label: what it is said to show.
        predicted: what the classifier says.
        probability: of that.
        label_probability: of the label.
        thumb: a `data:` address.
        heat: the same, bright where the heat is; empty where there is no heat map.
        place: where that is, in words.
        near: training images, the nearest first.
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
        """Whether it is classified as labelled."""
        return self.label == self.predicted


@dataclasses.dataclass(frozen=True)
class ShownPair:
    """Images of one class that were taken for another."""

    label: str
    predicted: str
    count: int
    images: Sequence[Shown]


@dataclasses.dataclass(frozen=True)
class ShownFinding:
    """A finding of the audit with its pictures: what it is about, and the other image where there is one."""

    id: str
    kind: str
    severity: str
    evidence: str
    thumb: str
    other_id: str = ""
    other_thumb: str = ""


@dataclasses.dataclass(frozen=True)
class MatrixRow:
    """One label's row of a confusion matrix: counts, their shares, and what falls outside the columns."""

    label: str
    counts: Sequence[int]
    shares: Sequence[float]
    others: int


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A confusion matrix, or the part of it where errors are."""

    names: Sequence[str]
    rows: Sequence[MatrixRow]
    whole: bool


def make_matrix(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str], order: np.ndarray) -> Matrix:
    """The confusion matrix as a table; of many classes the part with the most confused ones.

    Args:
        predicted: int `(n,)`.
        labels: int `(n,)`.
        names: of the classes.
        order: in which they are shown where not all are, int `(classes,)`; see `plots.order_classes`.
    """
    label, taken, counts = count_pairs(predicted, labels)
    whole, kept = len(names) <= FULL_MATRIX, list(range(len(names)))
    if not whole:
        wrong, largest = label != taken, np.zeros((2, len(names)), np.int64)
        for side, classes in zip(largest, (label, taken), strict=True):
            np.maximum.at(side, classes[wrong], counts[wrong])
        # one large confusion matters more than many small ones
        chosen = set(np.argsort(-largest.sum(0), kind="stable")[:_PART_OF_MATRIX].tolist())
        kept = [number for number in order.tolist() if number in chosen]
    cells = dict(zip(zip(label.tolist(), taken.tolist(), strict=True), counts.tolist(), strict=True))
    totals = np.bincount(labels, minlength=len(names))
    rows = []
    for number in kept:
        own, total = [cells.get((number, other), 0) for other in kept], int(totals[number])
        rows.append(MatrixRow(names[number], own, [count / max(total, 1) for count in own], total - sum(own)))
    return Matrix([names[number] for number in kept], rows, whole)


def make_classes(classes: Mapping[str, np.ndarray], names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the table of classes, the worst F1 first, those without an image last.

    Args:
        classes: what `measure_classes` gives.
        names: of the classes.

    Returns:
        At most two thousand; `per_class.csv` has them all.
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
        return "Whether it has seen some of these images before, this report can't know."
    if split not in leaks:
        return "None of them is one of its run's training images, byte for byte; copies saved anew were not looked for."
    return f"It was trained on {leaks[split]['leaked']:,} of these images, or on copies: its figures are too good."


def _describe_leak(leak: Mapping[str, Any] | None) -> str:
    """Evaluated images that are training images as well, a sentence or two; empty where there are none."""
    if not leak:
        return ""
    told = f" But {leak['leaked']:,} of these images are training images of this run or of an earlier one."
    if "accuracy_without" not in leak:
        return told
    low, high = leak["accuracy_without_ci95"]
    share = f"{100 * leak['accuracy_without']:.1f} % (95 % interval {100 * low:.1f} to {100 * high:.1f} %)"
    return f"{told} Without them the accuracy is {share}."


def describe_run(
    config: Mapping[str, Any], metrics: Mapping[str, Any], *, split: str, counts: Mapping[str, int], backbone: str
) -> list[str]:
    """What was done, in three sentences.

    Args:
        config: what `config.json` holds.
        metrics: what `metrics.json` holds.
        split: that the headline is of.
        counts: split → images.
        backbone: the network's name.
    """
    figures, mode, weights = metrics[split], config["mode"], Path(config["backbone"]["weights"]).name
    low, high = figures["accuracy_ci95"]
    right = f"{100 * figures['accuracy']:.1f} % (95 % interval {100 * low:.1f} to {100 * high:.1f} %)"
    last = f"Of {figures['n']:,} {split} images {right} are answered rightly."
    if mode == "evaluate":
        made = (
            f"The classifier {config['read']['classifier']}{f' ({backbone})' * bool(backbone)} was evaluated as it is."
        )
        leaks = metrics.get("leaks")
        if config["data"]["dataset"]:
            chosen = _describe_seen(leaks, split)
        elif leaks and split in leaks:
            chosen = f"These are the {split} images of its own run. {_describe_seen(leaks, split)}"
        elif split == "val":
            chosen = "These are the val images of its own run, on which that run made its choices."
        else:
            chosen = "These are the test images of its own run, on which that run chose nothing."
        return [made, chosen, last]
    if mode == "extract":
        fitted, count = "training images", counts["train"]
        if config["probe"]["refit"] != "train":
            fitted, count = "training and val images", counts["train"] + counts["val"]
        made = (
            f"{backbone} (weights: {weights}) was read as it is at its layer {metrics['probe']['layer']}, and "
            f"{metrics['probe']['probe'].replace('_', ' ')} was fitted on the embeddings of {count:,} {fitted}."
        )
    else:
        part = config["training"]["trainable"]
        trained = "a new head" if part == "head" else f"a new head and part of the network (--trainable={part})"
        ended = ", and was interrupted" if metrics.get("interrupted") else ""
        made = (
            f"On {backbone} (weights: {weights}) {trained} was trained with {counts['train']:,} images, for at most "
            f"{config['training']['epochs']} epochs a stage{ended}."
        )
    where = f"on {'the ' * (split == 'val')}{counts['val']:,} val images"
    if "cross-validation" in str(metrics.get("probe", {}).get("chosen_by", "")):
        where = "by cross-validation within train and val"
    if split == "val":
        chosen = f"What had to be chosen was chosen {where}; there is no test split."
        last = f"Of the val images {right} are answered rightly, a little more than of new ones, for choices fit them."
    else:
        chosen = f"What had to be chosen was chosen {where}; test was looked at once, at the end."
    return [made, chosen, last + _describe_leak((metrics.get("leaks") or {}).get(split))]


def make_command(flags: str) -> str:
    """The command that runs it again, of a flag file's lines."""
    return " ".join(["python -m tl_keras.main", *(shlex.quote(line) for line in flags.rstrip("\n").split("\n"))])
