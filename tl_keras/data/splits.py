"""Splits: train, val and test, given by the source or carved from it by a hash of each example's id."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from tl_keras.errors import UserError

SPLITS = ("train", "val", "test")
# what sources call them
SPLIT_NAMES = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "dev": 1, "test": 2, "testing": 2}
SPLIT_NAMES |= {f"{name}{ending}": split for name, split in SPLIT_NAMES.items() for ending in ("_set", "-set", "set")}
UNUSED = -1
DEFAULT_TEST_FRACTION = 0.2
_NAMED = 5


def evaluated_split(splits: Iterable[str]) -> str:
    """The split whose figures are quoted, of those that there are: test, or val where there is no test."""
    return "test" if "test" in splits else "val"


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: the first 8 bytes of its SHA-256."""
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
    """Gives each example its split; what the source lacks is carved from train.

    An example's split is decided by a threshold on a hash of its id, whatever other images there are. There is one
    exception: of a class that would have no training image, the image with the largest hash stays in train.
    A source with train and test gets its val from train; one with train and val keeps them, and gets a test only if
    `test_fraction` is given; one with train alone gets both.

    Args:
        ids: n ids.
        given: int8 `(n,)`, index into `SPLITS`, as the source has it.
        val_fraction: share of train that becomes val.
        test_fraction: share of train that becomes test; 0.2 where not given and the source has neither val nor test.
        labels: int `(n,)`; None: there are no classes to keep in train.

    Returns:
        int8 `(n,)`, index into `SPLITS`.

    Raises:
        UserError: the source has no train.
    """
    train, val, test = (bool(np.any(given == number)) for number in range(3))
    if not train:
        raise UserError("the data has no train split. Give it one, or leave the splits out and they are carved.")
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
    """Keeps `shots` training examples a class; the others are marked `UNUSED`.

    Those with the smallest hash of seed and id are kept, so that more shots contain fewer.

    Args:
        ids: n ids.
        labels: int `(n,)`.
        splits: int8 `(n,)`.
        shots: examples a class.
        seed: another seed draws others.

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
        raise UserError(f"--shots={shots} is more than a class has: the smallest has {fewest} in train. Give fewer.")
    return kept


def check_classes(labels: np.ndarray, splits: np.ndarray, names: Sequence[str]) -> list[str]:
    """Checks that each class can be learnt and measured.

    Args:
        labels: int `(n,)`.
        splits: int8 `(n,)`.
        names: the classes.

    Returns:
        Lines that name classes without a val or test example, with what to do.

    Raises:
        UserError: one class only, a split without any example, or a class that train lacks.
    """
    counts = np.zeros((len(SPLITS), len(names)), np.int64)
    used = splits >= 0
    np.add.at(counts, (splits[used], labels[used]), 1)
    if len(names) < 2:
        raise UserError(f"only one class: {', '.join(names)}. A classifier needs two or more; add another class.")
    if not counts[1].any():
        raise UserError(
            "val has no example, so that nothing can be chosen on it. Add images, give a larger --val_fraction, or a "
            "val split of your own."
        )
    missing = _name([names[number] for number in np.flatnonzero(counts[0] == 0).tolist()])
    if missing:
        raise UserError(
            f"train has no example of {missing}, which val or test has. Add training images of it, move some of its "
            "images to train, or leave it out with --classes."
        )
    lines = []
    for number in (1, 2):
        if counts[number].any() and (counts[number] == 0).any():
            missing = _name([names[label] for label in np.flatnonzero(counts[number] == 0).tolist()])
            lines.append(
                f"warning: {SPLITS[number]} has no example of {missing}: it can't be measured there. Add images, or "
                f"carve more with --{SPLITS[number]}_fraction"
            )
    return lines


def _name(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more classes" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
