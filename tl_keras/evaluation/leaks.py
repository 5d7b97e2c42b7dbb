"""Leaks: evaluated images that the classifier was trained on, and what they do to its accuracy."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

import numpy as np

from tl_keras.data.examples import Examples
from tl_keras.errors import UserError
from tl_keras.evaluation.intervals import accuracy_interval, with_interval
from tl_keras.evaluation.tables import DIGESTS
from tl_keras.run import read_csv


@dataclasses.dataclass(frozen=True)
class TrainedOn:
    """What a classifier was fitted on.

    Attributes:
        ids: of each image.
        digests: SHA-256 of each image's bytes.
    """

    ids: Set[str]
    digests: Set[bytes]

    def same_content(self, examples: Examples, split: str) -> np.ndarray:
        """Which of a split's images it was fitted on, under whatever id: bool `(m,)`, in the order of its positions."""
        own = examples.digests[examples.positions(split)]
        return np.fromiter((digest.tobytes() in self.digests for digest in own), bool, len(own))

    def same_id(self, examples: Examples, split: str) -> np.ndarray:
        """Which of a split's images have the id of one that it was fitted on: bool `(m,)`."""
        own = examples.ids(split)
        return np.fromiter((one in self.ids for one in own), bool, len(own))


def read_digests(run_dir: Path) -> list[tuple[str, str, bytes]]:
    """What a run was made of: id, split, and SHA-256 of the bytes, of each image.

    Raises:
        UserError: the folder does not say, or is damaged.
    """
    try:
        rows = [(row["id"], row["split"]) for row in read_csv(run_dir / "splits.csv")]
        digests = np.load(run_dir / DIGESTS, allow_pickle=False)
        if digests.shape != (len(rows), 32):
            raise ValueError("another number of images")
    except (OSError, ValueError, KeyError, EOFError, csv.Error) as error:
        raise UserError(
            f"{run_dir} does not say which images it was trained on: splits.csv or {DIGESTS} in it is missing or "
            "damaged. Train again for that."
        ) from error
    return [(*row, digest.tobytes()) for row, digest in zip(rows, digests, strict=True)]


def read_trained_on(runs: Iterable[tuple[Path, Set[str]]]) -> TrainedOn:
    """Reads what runs were fitted on together.

    Args:
        runs: the folder of each, and the splits that it was fitted on in the end.

    Raises:
        UserError: one does not say.
    """
    used = [row for run_dir, splits in runs for row in read_digests(run_dir) if row[1] in splits]
    return TrainedOn({row[0] for row in used}, {row[2] for row in used})


def compare_without(leaked: np.ndarray, right: np.ndarray) -> tuple[dict[str, Any], str]:
    """The accuracy with and without images that leaked.

    Args:
        leaked: bool `(m,)`.
        right: bool `(m,)`, whether each image's class was predicted.

    Returns:
        For `metrics.json`: `leaked`, a count, and `accuracy_with`, `accuracy_without` with their 95 % intervals, the
        latter only where an image remains; and the same in words.
    """
    result: dict[str, Any] = {"leaked": int(leaked.sum())}
    told = []
    for name, own in (("with", np.ones(len(leaked), bool)), ("without", ~leaked)):
        count, correct = int(own.sum()), int(right[own].sum())
        if count:
            interval = accuracy_interval(correct, count)
            result |= {f"accuracy_{name}": correct / count, f"accuracy_{name}_ci95": list(interval)}
            told.append(f"{with_interval(correct / count, interval)} {name} them")
    return result, ", ".join(told)
