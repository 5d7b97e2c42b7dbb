"""Reads the predictions of several runs, and finds the examples that they share."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tl_keras.data.splits import evaluated_split
from tl_keras.errors import UserError
from tl_keras.evaluation.leaks import read_digests
from tl_keras.run import read_csv


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The predictions of a run.

    Attributes:
        name: the last parts of the run folder's path, as many as distinguish it from the other runs.
        split: `test`, or `val` if the run has no test split.
        labels: id → label.
        predicted: id → predicted class.
        digests: id → SHA-256 of the image; empty if the run has no digests.
    """

    name: str
    split: str
    labels: dict[str, str]
    predicted: dict[str, str]
    digests: dict[str, bytes] = dataclasses.field(default_factory=dict)

    def correct(self, ids: list[str]) -> np.ndarray:
        """Whether each prediction is correct, bool `(n,)`."""
        return np.array([self.labels[one] == self.predicted[one] for one in ids], bool)


def read_runs(paths: Sequence[str]) -> list[Predictions]:
    """Reads the predictions of runs for the split that they report.

    Args:
        paths: run folders.

    Raises:
        UserError: a `predictions.csv` is missing or damaged, or the runs report different splits.
    """
    runs = [_read_predictions(path, name) for path, name in zip(paths, _short_names(paths), strict=True)]
    if len({run.split for run in runs}) > 1:
        splits = ", ".join(f"{run.name} has {run.split}" for run in runs)
        raise UserError(
            f"--compare: metrics on val, which is used for selection, can't be compared with metrics on test: {splits}"
            ". Compare runs on the same data with the same splits."
        )
    return runs


def _short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of each path, as many as distinguish all paths."""
    parts = [Path(path).resolve().parts for path in paths]
    longest = max(map(len, parts))
    by_length = (["/".join(one[-length:]) for one in parts] for length in range(1, longest + 1))
    return next(names for names in by_length if len(set(names)) == len(names))


def _read_predictions(path: str, name: str) -> Predictions:
    file = Path(path) / "predictions.csv"
    try:
        rows = [(row["split"], row["id"], row["label"], row["predicted"]) for row in read_csv(file)]
    except (OSError, KeyError, ValueError, csv.Error) as error:
        text = f"it has no column {error}" if isinstance(error, KeyError) else str(error)
        reason = getattr(error, "strerror", None) or text
        raise UserError(f"--compare: {file} can't be read: {reason}. Give the folders of complete runs.") from error
    split = evaluated_split(row[0] for row in rows)
    own = [row for row in rows if row[0] == split]
    try:
        digests = {one: digest for one, its_split, digest in read_digests(Path(path)) if its_split == split}
    except UserError:  # a run of an earlier version
        digests = {}
    labels, predicted = {row[1]: row[2] for row in own}, {row[1]: row[3] for row in own}
    return Predictions(name, split, labels, predicted, digests)


def find_shared(runs: list[Predictions]) -> list[str]:
    """Finds the ids that all runs have predicted, in the order of the first run.

    Ids whose image differs between runs are left out.

    Raises:
        UserError: there are no such ids, or an id has different labels.
    """
    first, names = runs[0], ", ".join(run.name for run in runs)
    named = [one for one in first.labels if all(one in run.labels for run in runs)]
    shared = [one for one in named if len({run.digests[one] for run in runs if one in run.digests}) < 2]
    if named and not shared:
        raise UserError(
            f"--compare: all {len(named):,} ids that {names} have in common name different images: the content of the "
            "files differs. Compare runs on the same images."
        )
    if not shared:
        raise UserError(
            f"--compare: {names} have no {first.split} example in common. Compare runs on the same data with the same "
            "splits."
        )
    for run in runs[1:]:
        for one in shared:
            if run.labels[one] != first.labels[one]:
                raise UserError(
                    f"--compare: {one} has the label {first.labels[one]!r} in {first.name} and {run.labels[one]!r} in "
                    f"{run.name}. Compare runs on the same labels."
                )
    return shared
