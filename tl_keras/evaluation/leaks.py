"""Leaks: evaluated images that the classifier was trained on, and what they do to its accuracy."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np

from tl_keras.data.examples import Examples
from tl_keras.errors import UserError
from tl_keras.evaluation.tables import DIGESTS
from tl_keras.run import read_csv, read_json
from tl_keras.statistics.intervals import accuracy_interval, with_interval


@dataclasses.dataclass(frozen=True)
class TrainedOn:
    """What a classifier was fitted on; images are known by SHA-256 of their bytes.

    Attributes:
        ids: of each image of the run.
        digests: of each image, and of those of which the run's audit found copies among these.
        val: of the images on which choices were made, and of their copies.
    """

    ids: Set[str]
    digests: Set[bytes]
    val: Set[bytes]

    def seen(self, examples: Examples, split: str) -> np.ndarray:
        """Which of a split's images, or copies of them, it was fitted on: bool `(m,)`, as its positions stand."""
        return _among(examples, split, self.digests)

    def chosen_on(self, examples: Examples, split: str) -> np.ndarray:
        """On which of a split's images choices were made: bool `(m,)`."""
        return _among(examples, split, self.val - self.digests)

    def same_id(self, examples: Examples, split: str) -> np.ndarray:
        """Which of a split's images have the id of one that it was fitted on: bool `(m,)`."""
        own = examples.ids(split)
        return np.fromiter((one in self.ids for one in own), bool, len(own))


def _among(examples: Examples, split: str, digests: Set[bytes]) -> np.ndarray:
    own = examples.digests[examples.positions(split)]
    return np.fromiter((digest.tobytes() in digests for digest in own), bool, len(own))


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


def read_trained_on(run_dir: Path, splits: Set[str], earlier: Iterable[Path]) -> TrainedOn:
    """Reads what a run was fitted on.

    Args:
        run_dir: its folder.
        splits: those that it was fitted on in the end.
        earlier: folders of runs in which its network was trained before.

    Raises:
        UserError: one does not say.
    """
    own = read_digests(run_dir)
    before = [row for run in earlier for row in read_digests(run) if row[1] == "train"]
    copied = read_leaks(run_dir).get("copies_in", {})

    def digests(among: Set[str]) -> set[bytes]:
        copies = {one for split in among for one in copied.get(split, ())}
        return {digest for name, split, digest in own if split in among or name in copies}

    return TrainedOn(
        {name for name, split, _ in own if split in splits},
        digests(splits) | {digest for _, _, digest in before},
        digests({"val"}),
    )


def read_leaks(run_dir: Path) -> dict[str, Any]:
    """What a run's audit says of leaks in `metrics.json`; empty where it found none, or there was no audit."""
    return _read_entry(run_dir, "audit", "leaks")


def read_leaked(run_dir: Path, split: str) -> int:
    """How many of a split's images leaked, by a run's audit, or by what an evaluation found."""
    for found in (read_leaks(run_dir), _read_entry(run_dir, "leaks", split)):
        if found.get("split", split) == split and isinstance(found.get("leaked"), int):
            return int(found["leaked"])
    return 0


def _read_entry(run_dir: Path, *names: str) -> dict[str, Any]:
    """An entry of `metrics.json`; empty where there is none."""
    try:
        found = read_json(run_dir / "metrics.json")
    except UserError:
        return {}
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


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


def measure_seen(
    trained: TrainedOn | None,
    examples: Examples,
    probabilities: Mapping[str, np.ndarray],
    *,
    what: str = "the classifier",
) -> tuple[dict[str, Any] | None, list[str]]:
    """What images that the classifier was trained on do to its figures.

    Args:
        trained: what it was fitted on; None: it does not say.
        examples: what is evaluated.
        probabilities: split → float `(n, classes)`.
        what: was trained, for the warnings.

    Returns:
        For `metrics.json` split → figures where there are such images, none where it can't be known; and warnings.
    """
    if trained is None:
        return None, []
    leaks, told, namesakes = {}, [], 0
    for split, values in probabilities.items():
        leaked, count = trained.seen(examples, split), len(values)
        namesakes += int((trained.same_id(examples, split) & ~leaked).sum())
        if leaked.any():
            leaks[split], accuracy = compare_without(leaked, values.argmax(1) == examples.labels(split))
            told.append(
                f"warning: {what} was trained on {int(leaked.sum()):,} of the {count:,} {split} images, or on "
                f"copies of them; {split} accuracy: {accuracy}"
            )
        chosen = int(trained.chosen_on(examples, split).sum())
        if chosen and split == "test":
            told.append(
                f"warning: {chosen:,} of the {count:,} test images are val images of the classifier's run, on which "
                "choices were made: figures on them are a little too good"
            )
    if namesakes:
        told.append(
            f"warning: the classifier was trained on {namesakes:,} other images of the same ids; where they show the "
            "same, these figures are too good"
        )
    return leaks, told
