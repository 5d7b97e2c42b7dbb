"""The examples of one run: labelled, split, known by their content, the broken ones left out."""

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
    """Every example that a run uses, and which it had to leave out.

    Attributes:
        source: where they come from.
        splits: int8 `(n,)`, index into `SPLITS`; `UNUSED` for those left out.
        digests: SHA-256 of each image's bytes, `(n,)` of 32 bytes; zeros for those left out.
        broken: position → why it can't be used.
    """

    source: Source
    splits: np.ndarray
    digests: np.ndarray
    broken: dict[int, str]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes in order of name."""
        return self.source.class_names

    def positions(self, split: str) -> np.ndarray:
        """Positions of a split's examples, int64 `(m,)`, ascending."""
        return np.flatnonzero(self.splits == SPLITS.index(split))

    def labels(self, split: str) -> np.ndarray:
        """A split's labels, int32 `(m,)`."""
        labels: np.ndarray = self.source.labels[self.positions(split)]
        return labels

    def ids(self, split: str) -> list[str]:
        """A split's ids."""
        return [self.source.ids[position] for position in self.positions(split)]

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Id, split and label of every example in use, in the source's order; without classes empty but for the id."""
        names, source = self.class_names, self.source
        for position in np.flatnonzero(self.splits >= 0).tolist():
            described = (SPLITS[self.splits[position]], names[source.labels[position]]) if names else ("", "")
            yield (source.ids[position], *described)

    def without(self, broken: dict[int, str], *, max_broken_fraction: float, report: ReportBroken) -> Examples:
        """The same examples, more of them left out.

        Args:
            broken: position → why.
            max_broken_fraction: more than this, of all, is an error.
            report: is given all broken ones as rows of id and reason.

        Raises:
            UserError: too many are broken.
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
    """Reads every image's bytes once: their digest, and whether TensorFlow reads such a format.

    Args:
        source: the labelled images.
        splits: int8 `(n,)`; `UNUSED` ones are not read.
        max_broken_fraction: more broken files than this stop the run.
        show_progress: shows how far it is.
        report: is given the broken ones, before they may stop the run.
        look: is given the id and the bytes of each that is an image, where someone wants to look at files.

    Returns:
        The examples, without those that are no readable image. Truncated ones are found when they are decoded.

    Raises:
        UserError: too many are broken.
    """
    used = np.flatnonzero(splits >= 0)
    digests = np.zeros(len(splits), "V32")
    broken: dict[int, str] = {}
    for done, (position, content) in enumerate(source.read(used), start=1):
        reason = explain_unreadable(content)
        if reason:
            broken[position] = reason
            if len(broken) > max(100, len(used) // 2, max_broken_fraction * len(used)):
                break  # refused below
        else:
            digests[position] = np.void(hashlib.sha256(content).digest())
            if look:
                look(source.ids[position], content)
        show_progress(f"reading images {done:,}/{len(used):,}")
    examples = Examples(source, splits, digests, {})
    return examples.without(broken, max_broken_fraction=max_broken_fraction, report=report)


def check_broken(source: Source, broken: dict[int, str], total: int, *, max_broken_fraction: float) -> None:
    """Stops where too many images are broken.

    Raises:
        UserError: more than `max_broken_fraction` of `total`.
    """
    if len(broken) > max_broken_fraction * total:
        position, reason = next(iter(sorted(broken.items())))
        raise UserError(
            f"{len(broken)} of {total} images are broken, more than --max_broken_fraction={max_broken_fraction:g}. "
            f"The first is {source.ids[position]}: {reason}. Mend or remove them, or allow more."
        )


def draw_shots(examples: Examples, *, shots: int, seed: int) -> Examples:
    """The same examples with `shots` training examples a class; see `splits.choose_shots`.

    Raises:
        UserError: a class has fewer.
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
    """Decides each example's split, and checks that each class can be learnt and measured.

    Args:
        source: the labelled images.
        val_fraction: see `splits.carve`.
        test_fraction: see `splits.carve`.
        shots: training examples a class; None for all.
        seed: of the draw of shots.
        draws: so many draws, of the seeds from `seed` on: what any of them has is kept.

    Returns:
        int8 `(n,)`, and lines that warn of classes without a val or test example.

    Raises:
        UserError: one class only, an empty split, a class that train lacks, too few shots.
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
