"""Splits: train, val and test, given by the source or held out from train by a hash of each example's id."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from tl_keras.errors import UserError

SPLITS = ("train", "val", "test")
# names that are recognized in sources
SPLIT_NAMES = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "dev": 1, "test": 2, "testing": 2}
SPLIT_NAMES |= {f"{name}{ending}": split for name, split in SPLIT_NAMES.items() for ending in ("_set", "-set", "set")}
UNUSED = -1
DEFAULT_TEST_FRACTION = 0.2
_NAMED = 5


def evaluated_split(splits: Iterable[str]) -> str:
    """The split whose metrics are reported: test, or val if there is no test split."""
    return "test" if "test" in splits else "val"


def hash_fraction(text: str) -> float:
    """Hashes a text to a number in [0, 1): the first 8 bytes of its SHA-256."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def carve(
    ids: Sequence[str],
    given: np.ndarray,
    *,
    val_fraction: float,
    test_fraction: float | None,
    labels: np.ndarray | None = None,
) -> np.ndarray:
    """Assigns a split to each example; splits that the source lacks are held out from train.

    The split of an example is decided by thresholds on a hash of its id, independently of other images. There is one
    exception: if a class would have no training image, its image with the largest hash stays in train.
    A source with train and test gets its val from train. A source with train and val keeps them, and gets a test split
    only if `test_fraction` is given. A source with only train gets both.

    Args:
        ids: n ids.
        given: splits of the source, int8 `(n,)`, index into `SPLITS`.
        val_fraction: fraction of train that becomes val.
        test_fraction: fraction of train that becomes test; None: 0.2 if the source has neither val nor test.
        labels: int `(n,)`; None if there are no classes to keep in train.

    Returns:
        int8 `(n,)`, index into `SPLITS`.

    Raises:
        UserError: the source has no train split.
    """
    train, val, test = (bool(np.any(given == number)) for number in range(3))
    if not train:
        raise UserError("the data has no train split. Add one, or leave the splits out to create them from all images.")
    if test_fraction is None:
        test_fraction = 0.0 if val else DEFAULT_TEST_FRACTION
    test_until = 0.0 if test else test_fraction
    val_until = test_until if val else test_until + val_fraction
    splits = given.copy()
    largest: dict[int, tuple[float, int]] = {}
    for position in np.flatnonzero(given == 0).tolist() if val_until else ():
        fraction = hash_fraction(ids[position])
        if fraction < val_until:
            splits[position] = 2 if fraction < test_until else 1
        if labels is not None:
            label = int(labels[position])
            largest[label] = max(largest.get(label, (-1.0, -1)), (fraction, position))
    for _, position in largest.values():
        splits[position] = 0
    return splits


def choose_shots(ids: Sequence[str], labels: np.ndarray, splits: np.ndarray, *, shots: int, seed: int) -> np.ndarray:
    """Keeps `shots` training examples per class; the others are marked `UNUSED`.

    The examples with the smallest hash of seed and id are kept, so a larger draw contains a smaller one.

    Args:
        ids: n ids.
        labels: int `(n,)`.
        splits: int8 `(n,)`.
        shots: number of examples per class.
        seed: random seed of the draw.

    Returns:
        int8 `(n,)`, a new array.

    Raises:
        UserError: a class has fewer training examples.
    """
    kept = splits.copy()
    train = np.flatnonzero(splits == 0).tolist()
    order = sorted(train, key=lambda position: hash_fraction(f"{seed}:{ids[position]}"))
    counts: dict[int, int] = {}
    for position in order:
        label = int(labels[position])
        counts[label] = counts.get(label, 0) + 1
        if counts[label] > shots:
            kept[position] = UNUSED
    fewest = min(counts.values(), default=0)
    if fewest < shots:
        raise UserError(
            f"--shots={shots} is more than the smallest class has in train, which is {fewest}. Give a smaller number."
        )
    return kept


def check_classes(labels: np.ndarray, splits: np.ndarray, names: Sequence[str]) -> list[str]:
    """Checks that each class can be trained and evaluated.

    Args:
        labels: int `(n,)`.
        splits: int8 `(n,)`.
        names: class names.

    Returns:
        Warnings about classes without val or test examples, with advice.

    Raises:
        UserError: there is only one class, val is empty, or a class has no training example.
    """
    counts = np.zeros((len(SPLITS), len(names)), np.int64)
    used = splits >= 0
    np.add.at(counts, (splits[used], labels[used]), 1)
    if len(names) < 2:
        raise UserError(f"only one class: {', '.join(names)}. A classifier needs at least two. Add another class.")
    if not counts[1].any():
        raise UserError(
            "val has no examples, but it is needed for selection. Add images, increase --val_fraction, or add a val "
            "split to the data."
        )
    missing = _name([names[number] for number in np.flatnonzero(counts[0] == 0).tolist()])
    if missing:
        raise UserError(
            f"train has no example of {missing}, but val or test does. Add training images, move some of its images to "
            "train, or leave the class out with --classes."
        )
    lines = []
    for number in (1, 2):
        if counts[number].any() and (counts[number] == 0).any():
            missing = _name([names[label] for label in np.flatnonzero(counts[number] == 0).tolist()])
            lines.append(
                f"warning: {SPLITS[number]} has no example of {missing}, so it can't be evaluated there. Add images, "
                f"or increase --{SPLITS[number]}_fraction"
            )
    return lines


def _name(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more classes" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
