"""The whole audit of images whose embeddings are known: copies, labels, outliers, shift, classes."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from tl_keras.audit.distribution import find_outliers, measure_shift
from tl_keras.audit.duplicates import Images, Look, describe_pairs, find_candidates, find_pairs
from tl_keras.audit.files import look_at
from tl_keras.audit.findings import Finding, sort
from tl_keras.audit.labels import build_surrogate, cross_validate, find_label_issues, too_many
from tl_keras.audit.neighbours import find_neighbours
from tl_keras.run import map_ahead
from tl_keras.statistics.intervals import auroc_interval

_SMALLEST_CLASS = 10  # evaluated examples: fewer say next to nothing about a class
_CHANCE = 0.5
_SHIFTED = 0.7  # of the AUROC that tells test from train
_SURE_MARGIN = 0.5  # between two probabilities: a label that is wrong beyond doubt
_SEEN = {"stanford_dogs"}  # Khosla et al. 2011: train and test from ImageNet's train
_DRAWN = {"imagenette", "imagewang", "stl10"}  # fast.ai's; Coates, Ng & Lee 2011: most of it from ImageNet's train
_IMAGENET = ("imagenet2012", "imagenet_resized", "downsampled_imagenet", "imagenet_lt", "imagenet_pi")
_SYNSET = re.compile(r"n\d{8}")  # WordNet's number of what a class shows, as in n02085620-Chihuahua
_NAMED = 5

_LOOKED_AT_AT_MOST = 20_000  # images in a run's report, which is not to take longer than the run
_AHEAD = 32

ContentStream = Callable[[np.ndarray], Iterator[tuple[int, bytes]]]


@dataclasses.dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        findings: the most severe first.
        points: float32 `(n, d)`, see `Neighbours`.
        shift: see `measure_shift`, with the area's 95 % interval, `auroc_ci95`.
        copied: in which other splits each image has a copy, bool `(n, 3)`, columns as `SPLITS`.
        not_looked_at: images that may be copies, beyond what a report has time for.
    """

    findings: list[Finding]
    points: np.ndarray
    shift: dict[str, Any] | None
    copied: np.ndarray
    not_looked_at: int = 0

    def counts(self) -> dict[str, int]:
        """Kind of finding → how many."""
        return dict(collections.Counter(one.kind for one in self.findings))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps off the screen what Pillow says of large images, and scikit-learn of few examples of many classes."""
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
    known: Sequence[Finding] = (),
) -> Audit:
    """Looks for copies, wrong labels, outliers and a shift between train and what is evaluated.

    Args:
        images: n of them.
        digests: of each file's bytes.
        embeddings: float `(n, dim)`.
        read: rows → (row, encoded bytes) of each.
        all_pixels: whether the pixels of every image are compared, which finds blank images too; otherwise only those
            of images that may be copies.
        known: what is known already, of files.

    Returns:
        All findings, sorted.
    """
    findings = list(known)
    neighbours = find_neighbours(embeddings)
    may_be = np.arange(len(images.ids)) if all_pixels else find_candidates(neighbours)
    hurried = not all_pixels and len(may_be) > _LOOKED_AT_AT_MOST
    wanted = find_candidates(neighbours, at_most=_LOOKED_AT_AT_MOST) if hurried else may_be
    looks = dict[int, Look]()
    for row, look in map_ahead(look_at, read(wanted), threads=os.cpu_count(), ahead=_AHEAD):
        if look is None:
            continue
        looks[row] = look
        if look.blank:
            findings.append(Finding(images.ids[row], "blank", "high", "all but one colour"))
    copies, copied = describe_pairs(find_pairs(digests, looks, neighbours), images)
    findings += copies
    findings += _judge_labels(neighbours.points, images)
    for row, score in zip(*find_outliers(neighbours), strict=True):
        evidence = f"its nearest neighbours are {score:.1f} spreads farther away than usual"
        findings.append(Finding(images.ids[row], "outlier", "medium", evidence, rank=float(score)))
    splits = np.array(images.splits)
    compared = (splits == "train") | (splits == images.evaluated)
    shift = measure_shift(neighbours.points[compared], splits[compared] == images.evaluated)
    if shift:
        shift["auroc_ci95"] = list(auroc_interval(shift["auroc"], shift["test"], shift["train"]))
    return Audit(sort(findings), neighbours.points, shift, copied, len(may_be) - len(wanted))


@_silence()
def predict_surrogate(points: np.ndarray, images: Images) -> np.ndarray:
    """What a logistic regression, fitted on train, says of the evaluated split; before there is a classifier.

    Args:
        points: float `(n, d)`.
        images: n of them.

    Returns:
        Labels in the split's order, int64 `(m,)`; none where train has fewer than two classes.
    """
    splits = np.array(images.splits)
    train = splits == "train"
    if len(np.unique(images.labels[train])) < 2 or not (splits == images.evaluated).any():
        return np.zeros(0, np.int64)
    model = build_surrogate(int(train.sum()), len(images.names)).fit(points[train], images.labels[train])
    return np.asarray(model.predict(points[splits == images.evaluated]))


def describe_data(audit: Audit, images: Images) -> list[str]:
    """Lines on the balance of classes, and on the shift between train and what is evaluated."""
    lines, split = _describe_classes(images), images.evaluated
    if too_many(len(images.ids), len(images.names)):
        lines.append(f"labels: not judged: {len(images.ids):,} images of {len(images.names):,} classes are too many")
    if audit.shift:
        low, high = audit.shift["auroc_ci95"]
        figures = f"AUROC {audit.shift['auroc']:.2f} [{low:.2f}, {high:.2f}], where 0.5 is chance"
        lines.append(f"shift: {_describe_shift(split, low)} ({figures})")
    if audit.not_looked_at:
        lines.append(
            f"copies: {audit.not_looked_at:,} images that may be copies were not looked at, to save time: --mode=audit "
            "looks at all"
        )
    return lines


def _describe_shift(split: str, low: float) -> str:
    if low > _SHIFTED:
        return f"{split} is unlike train, and figures may not hold elsewhere"
    return f"{split} is not quite like train" if low > _CHANCE else f"{split} can't be told from train for sure"


def describe_origin(dataset: str, weights: str, class_names: Sequence[str] = ()) -> str:
    """A warning where the network has seen the test images; else nothing.

    Args:
        dataset: `--dataset`.
        weights: `--weights`.
        class_names: of the data.
    """
    if weights != "imagenet":
        return ""
    name = dataset.partition("/")[0].partition(":")[0]
    if name in _SEEN:
        return (
            f"warning: the images of {name} come from ImageNet's training set: a network with ImageNet weights has "
            "seen its test images, with their labels, and figures on them are too good"
        )
    if name in _DRAWN:
        return (
            f"warning: the images of {name} are drawn from ImageNet: a network with ImageNet weights has seen most of "
            "them, with their labels, and figures on them are too good"
        )
    if name.startswith(_IMAGENET):
        return (
            f"warning: the training images of {name} are ImageNet's: a network with ImageNet weights has seen them, "
            "with their labels, and figures on a val or test carved from them are too good"
        )
    if sum(bool(_SYNSET.match(one)) for one in class_names) > len(class_names) / 2:
        return (
            "warning: the classes are called as ImageNet's are (n02085620): where the images are ImageNet's, a network "
            "with ImageNet weights has seen them, with their labels, and figures on them are too good"
        )
    return ""


def _judge_labels(points: np.ndarray, images: Images) -> Iterator[Finding]:
    judged, probabilities = cross_validate(points, images.labels)
    labels = images.labels[judged]
    if not len(judged):
        return
    for row, taken, margin in zip(*find_label_issues(probabilities, labels), strict=True):
        own = labels[row]
        evidence = (
            f"labelled {images.names[own]} ({probabilities[row, own]:.2f}), looks like {images.names[taken]} "
            f"({probabilities[row, taken]:.2f})"
        )
        severity = "high" if margin > _SURE_MARGIN else "medium"
        yield Finding(images.ids[judged[row]], "label", severity, evidence, rank=float(margin))


def _describe_classes(images: Images) -> list[str]:
    if not images.names:
        return []
    counts = np.bincount(images.labels, minlength=len(images.names))
    largest, smallest = int(counts.argmax()), int(counts.argmin())
    lines = [
        f"classes: {images.names[smallest]} is the smallest with {counts[smallest]:,} images, {images.names[largest]} "
        f"the largest with {counts[largest]:,}"
    ]
    if counts[smallest] == counts[largest]:
        lines = [f"classes: {len(counts):,}, each of {counts[smallest]:,} images"]
    if len(counts) < 2:
        lines = [f"classes: only {images.names[0]}: a classifier needs two or more"]
    split = images.evaluated
    tested = np.bincount(images.labels[np.array(images.splits) == split], minlength=len(images.names))
    few = [images.names[number] for number in np.flatnonzero(tested < _SMALLEST_CLASS).tolist()]
    if few:
        named = ", ".join(few[:_NAMED]) + (", ..." if len(few) > _NAMED else "")
        lines.append(
            f"classes: {len(few):,} with fewer than {_SMALLEST_CLASS} {split} images, too few to be judged: {named}"
        )
    return lines
