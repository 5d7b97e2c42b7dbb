"""The examples of one run: labels, splits, digests, and images that are left out because they are broken."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from tl_keras.data.formats import explain_unreadable
from tl_keras.data.sources import Source
from tl_keras.data.splits import SPLITS, UNUSED, carve, check_classes, choose_shots
from tl_keras.errors import UserError

ReportBroken = Callable[[list[tuple[str, str]]], None]


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples that a run uses, and the images that it leaves out.

    Attributes:
        source: the source of the images.
        splits: int8 `(n,)`, index into `SPLITS`; `UNUSED` for images that are left out.
        digests: SHA-256 of each image's bytes, `(n,)` of 32 bytes; zeros for images that are left out.
        broken: position → reason why the image can't be used.
    """

    source: Source
    splits: np.ndarray
    digests: np.ndarray
    broken: dict[int, str]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names, sorted."""
        return self.source.class_names

    def positions(self, split: str) -> np.ndarray:
        """Positions of the examples of a split, int64 `(m,)`, ascending."""
        return np.flatnonzero(self.splits == SPLITS.index(split))

    def labels(self, split: str) -> np.ndarray:
        """Labels of a split, int32 `(m,)`."""
        labels: np.ndarray = self.source.labels[self.positions(split)]
        return labels

    def ids(self, split: str) -> list[str]:
        """Ids of a split."""
        return [self.source.ids[position] for position in self.positions(split)]

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yields id, split and label of every example in use, in source order; without classes only the id is set."""
        names, source = self.class_names, self.source
        for position in np.flatnonzero(self.splits >= 0).tolist():
            described = (SPLITS[self.splits[position]], names[source.labels[position]]) if names else ("", "")
            yield (source.ids[position], *described)

    def without(self, broken: dict[int, str], *, max_broken_fraction: float, report: ReportBroken) -> Examples:
        """Leaves out further broken images.

        Args:
            broken: position → reason.
            max_broken_fraction: allowed fraction of broken images.
            report: called with id and reason of all broken images.

        Raises:
            UserError: too many images are broken.
        """
        both = {**self.broken, **broken}
        total = int(np.sum(self.splits >= 0)) + len(self.broken)
        if both:
            report([(self.source.ids[position], reason) for position, reason in sorted(both.items())])
        check_broken(self.source, both, total, max_broken_fraction=max_broken_fraction)
        splits = self.splits.copy()
        splits[list(broken)] = UNUSED
        return dataclasses.replace(self, splits=splits, broken=both)


def scan(
    source: Source,
    splits: np.ndarray,
    *,
    max_broken_fraction: float,
    show_progress: Callable[[str], None],
    report: ReportBroken,
    look: Callable[[str, bytes], None] | None = None,
) -> Examples:
    """Reads the bytes of every image once, computes their digests, and checks their formats.

    Args:
        source: the labeled images.
        splits: int8 `(n,)`; `UNUSED` images are not read.
        max_broken_fraction: allowed fraction of broken images.
        show_progress: called with the progress as text.
        report: called with the broken images, before they may stop the run.
        look: called with id and bytes of each readable image; None if files are not inspected.

    Returns:
        The examples without unreadable images. Truncated images are found later, when they are decoded.

    Raises:
        UserError: too many images are broken.
    """
    used = np.flatnonzero(splits >= 0)
    digests = np.zeros(len(splits), "V32")
    broken: dict[int, str] = {}
    for done, (position, content) in enumerate(source.read(used), start=1):
        reason = explain_unreadable(content)
        if reason:
            broken[position] = reason
            if len(broken) > max(100, len(used) // 2, max_broken_fraction * len(used)):
                break  # the check below fails
        else:
            digests[position] = np.void(hashlib.sha256(content).digest())
            if look:
                look(source.ids[position], content)
        show_progress(f"reading images {done:,}/{len(used):,}")
    examples = Examples(source, splits, digests, {})
    return examples.without(broken, max_broken_fraction=max_broken_fraction, report=report)


def check_broken(source: Source, broken: dict[int, str], total: int, *, max_broken_fraction: float) -> None:
    """Checks that not too many images are broken.

    Raises:
        UserError: more than `max_broken_fraction` of `total` are broken.
    """
    if len(broken) > max_broken_fraction * total:
        position, reason = next(iter(sorted(broken.items())))
        raise UserError(
            f"{len(broken)} of {total} images are broken, more than --max_broken_fraction={max_broken_fraction:g}. "
            f"The first is {source.ids[position]}: {reason}. Repair or remove the images that "
            "broken.csv in the run folder lists, or allow more with a larger --max_broken_fraction."
        )


def draw_shots(examples: Examples, *, shots: int, seed: int) -> Examples:
    """Keeps `shots` training examples per class; see `splits.choose_shots`.

    Raises:
        UserError: a class has fewer training examples.
    """
    source = examples.source
    splits = choose_shots(source.ids, source.labels, examples.splits, shots=shots, seed=seed)
    return dataclasses.replace(examples, splits=splits)


def split_source(
    source: Source,
    *,
    val_fraction: float,
    test_fraction: float | None,
    shots: int | None,
    seed: int,
    draws: int = 1,
) -> tuple[np.ndarray, list[str]]:
    """Assigns a split to each example, and checks that each class can be trained and evaluated.

    Args:
        source: the labeled images.
        val_fraction: see `splits.carve`.
        test_fraction: see `splits.carve`.
        shots: training examples per class; None for all.
        seed: random seed of the first draw of shots.
        draws: number of draws, with seeds from `seed` on; examples of any draw are kept.

    Returns:
        Splits, int8 `(n,)`, and warnings about classes without val or test examples.

    Raises:
        UserError: there is only one class, val is empty, a class has no training example, or too few for `shots`.
    """
    splits = carve(
        source.ids, source.splits, val_fraction=val_fraction, test_fraction=test_fraction, labels=source.labels
    )
    warnings = check_classes(source.labels, splits, source.class_names)
    if shots is not None:
        drawn = [
            choose_shots(source.ids, source.labels, splits, shots=shots, seed=seed + draw) for draw in range(draws)
        ]
        splits = np.max(drawn, axis=0)
    return splits, warnings
