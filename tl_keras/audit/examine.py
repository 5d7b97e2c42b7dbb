"""Audit of images with known embeddings: duplicates, labels, outliers, distribution shift, class balance."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from tl_keras.audit.distribution import find_outliers, measure_shift
from tl_keras.audit.duplicates import Images, describe_pairs, find_candidates, find_pairs
from tl_keras.audit.findings import Finding, sort
from tl_keras.audit.labels import build_surrogate, cross_validate, find_label_issues, too_many
from tl_keras.audit.looks import ContentStream, find_looks
from tl_keras.audit.neighbors import find_neighbors
from tl_keras.run import count_of
from tl_keras.statistics.intervals import auroc_interval

_SMALLEST_CLASS = 10  # evaluated images: with fewer, metrics of a class are unreliable
_CHANCE = 0.5
_SHIFTED = 0.7  # AUROC of the classifier that distinguishes test from train
_SURE_MARGIN = 0.5  # difference of two probabilities beyond which a label error has severity high
_SEEN = {"stanford_dogs"}  # Khosla et al. 2011: train and test from ImageNet's train
_DRAWN = {"imagenette", "imagewang", "stl10"}  # fast.ai's; Coates, Ng & Lee 2011: most of it from ImageNet's train
_IMAGENET = ("imagenet2012", "imagenet_resized", "downsampled_imagenet", "imagenet_lt", "imagenet_pi")
_SYNSET = re.compile(r"n\d{8}")  # WordNet id of a class, as in n02085620-Chihuahua
_NAMED = 5

_LOOKED_AT_AT_MOST = 20_000  # images in the report of a run, so that it takes less time than the run


@dataclasses.dataclass(frozen=True)
class Audit:
    """The results of an audit.

    Attributes:
        findings: the findings, most severe first.
        points: float32 `(n, d)`, see `Neighbors`.
        shift: result of `measure_shift`, with the 95 % confidence interval `auroc_ci95`.
        copied: the other splits in which each image has a copy, bool `(n, 3)`, columns as in `SPLITS`.
        not_looked_at: number of images that may be duplicates but were not compared, to save time.
    """

    findings: list[Finding]
    points: np.ndarray
    shift: dict[str, Any] | None
    copied: np.ndarray
    not_looked_at: int = 0

    def counts(self) -> dict[str, int]:
        """Kind of finding → number of findings."""
        return dict(collections.Counter(one.kind for one in self.findings))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Silences warnings of Pillow about large images, and of scikit-learn about classes with few examples."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


@_silence()
def examine(
    images: Images,
    *,
    digests: Sequence[bytes],
    embeddings: np.ndarray,
    read: ContentStream,
    all_pixels: bool,
    store_dir: str | None = None,
    known: Sequence[Finding] = (),
) -> Audit:
    """Finds duplicates, label errors, outliers, and distribution shift between train and the evaluated split.

    Args:
        images: n images.
        digests: SHA-256 of each file's bytes.
        embeddings: float `(n, dim)`.
        read: rows → pairs of row and encoded bytes.
        all_pixels: whether to decode every image, which also finds blank images; otherwise only images that may be
            duplicates are decoded.
        store_dir: folder of the embedding stores, where properties of pixels are cached.
        known: findings about files, which are included in the result.

    Returns:
        The audit, with all findings sorted.
    """
    findings = list(known)
    neighbors = find_neighbors(embeddings)
    may_be = np.arange(len(images.ids)) if all_pixels else find_candidates(neighbors)
    hurried = not all_pixels and len(may_be) > _LOOKED_AT_AT_MOST
    wanted = find_candidates(neighbors, at_most=_LOOKED_AT_AT_MOST) if hurried else may_be
    looks = find_looks(wanted, digests=digests, read=read, store_dir=store_dir)
    findings += [
        Finding(images.ids[row], "blank", "high", "nearly all pixels have the same color")
        for row, look in sorted(looks.items(), key=lambda item: item[0])
        if look.blank
    ]
    copies, copied = describe_pairs(find_pairs(digests, looks, neighbors), images)
    findings += copies
    findings += _judge_labels(neighbors.points, images)
    for row, score in zip(*find_outliers(neighbors), strict=True):
        evidence = f"its nearest neighbors are unusually far away (robust z score {score:.1f})"
        findings.append(Finding(images.ids[row], "outlier", "medium", evidence, rank=float(score)))
    splits = np.array(images.splits)
    compared = (splits == "train") | (splits == images.evaluated)
    shift = measure_shift(neighbors.points[compared], splits[compared] == images.evaluated)
    if shift:
        shift["auroc_ci95"] = list(auroc_interval(shift["auroc"], shift["test"], shift["train"]))
    return Audit(sort(findings), neighbors.points, shift, copied, len(may_be) - len(wanted))


@_silence()
def predict_surrogate(points: np.ndarray, images: Images) -> np.ndarray:
    """Predicts the evaluated split with a logistic regression fitted on train, if there is no classifier yet.

    Args:
        points: float `(n, d)`.
        images: n images.

    Returns:
        Predicted classes in the split's order, int64 `(m,)`; empty if train has fewer than two classes.
    """
    splits = np.array(images.splits)
    train = splits == "train"
    if len(np.unique(images.labels[train])) < 2 or not (splits == images.evaluated).any():
        return np.zeros(0, np.int64)
    model = build_surrogate(int(train.sum()), len(images.names)).fit(points[train], images.labels[train])
    return np.asarray(model.predict(points[splits == images.evaluated]))


def describe_data(audit: Audit, images: Images) -> list[str]:
    """Makes lines on class balance, and on distribution shift between train and the evaluated split."""
    lines, split = _describe_classes(images), images.evaluated
    if too_many(len(images.ids), len(images.names)):
        lines.append(f"labels: not checked: too many images and classes ({len(images.ids):,}, {len(images.names):,})")
    if audit.shift:
        low, high = audit.shift["auroc_ci95"]
        figures = f"AUROC {audit.shift['auroc']:.2f} [{low:.2f}, {high:.2f}], 0.5 is chance"
        lines.append(f"distribution shift: {_describe_shift(split, low)} ({figures})")
    if audit.not_looked_at:
        lines.append(
            f"duplicates: {audit.not_looked_at:,} images that may be duplicates were not compared, to save time; "
            "--mode=audit compares all"
        )
    return lines


def _describe_shift(split: str, low: float) -> str:
    if low > _SHIFTED:
        return f"{split} differs from train, so metrics may not hold for other images"
    return f"{split} differs slightly from train" if low > _CHANCE else f"none found between train and {split}"


def describe_origin(dataset: str, weights: str, class_names: Sequence[str] = ()) -> str:
    """Makes a warning if the network was pretrained on the test images; otherwise an empty text.

    Args:
        dataset: value of `--dataset`.
        weights: value of `--weights`.
        class_names: names of the classes.
    """
    if weights != "imagenet":
        return ""
    name = dataset.partition("/")[0].partition(":")[0]
    if name in _SEEN:
        return (
            f"warning: the images of {name} come from ImageNet's training set: a network with ImageNet weights was "
            "trained on its test images and their labels, and metrics on them are too good"
        )
    if name in _DRAWN:
        return (
            f"warning: the images of {name} come from ImageNet: a network with ImageNet weights was trained on most of "
            "them and their labels, and metrics on them are too good"
        )
    if name.startswith(_IMAGENET):
        return (
            f"warning: the training images of {name} come from ImageNet: a network with ImageNet weights was trained "
            "on them and their labels, and metrics on val or test images held out from them are too good"
        )
    if sum(bool(_SYNSET.match(one)) for one in class_names) > len(class_names) / 2:
        return (
            "warning: the classes are named like ImageNet classes (n02085620): if the images come from ImageNet, a "
            "network with ImageNet weights was trained on them and their labels, and metrics on them are too good"
        )
    return ""


def _judge_labels(points: np.ndarray, images: Images) -> Iterator[Finding]:
    judged, probabilities = cross_validate(points, images.labels)
    labels = images.labels[judged]
    if not len(judged):
        return
    for row, other, margin in zip(*find_label_issues(probabilities, labels), strict=True):
        own = labels[row]
        evidence = (
            f"labeled {images.names[own]} ({probabilities[row, own]:.2f}), looks like {images.names[other]} "
            f"({probabilities[row, other]:.2f})"
        )
        severity = "high" if margin > _SURE_MARGIN else "medium"
        yield Finding(images.ids[judged[row]], "label", severity, evidence, rank=float(margin))


def _describe_classes(images: Images) -> list[str]:
    if not images.names:
        return []
    counts = np.bincount(images.labels, minlength=len(images.names))
    largest, smallest = int(counts.argmax()), int(counts.argmin())
    fewest, most = count_of(counts[smallest], "image"), count_of(counts[largest], "image")
    lines = [f"classes: smallest {images.names[smallest]} ({fewest}), largest {images.names[largest]} ({most})"]
    if counts[smallest] == counts[largest]:
        lines = [f"classes: {len(counts):,}, with {fewest} each"]
    if len(counts) < 2:
        lines = [f"classes: only {images.names[0]}; a classifier needs at least two"]
    split = images.evaluated
    tested = np.bincount(images.labels[np.array(images.splits) == split], minlength=len(images.names))
    few = [images.names[number] for number in np.flatnonzero(tested < _SMALLEST_CLASS).tolist()]
    if few:
        named = ", ".join(few[:_NAMED]) + (", ..." if len(few) > _NAMED else "")
        lines.append(
            f"classes: {len(few):,} with fewer than {_SMALLEST_CLASS} {split} images, too few for reliable metrics: "
            f"{named}"
        )
    return lines
