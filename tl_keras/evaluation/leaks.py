"""Data leakage: evaluated images that the classifier was trained on, and their effect on accuracy."""

from __future__ import annotations

import csv
import dataclasses
import io
import zipfile
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from tl_keras.data.examples import Examples
from tl_keras.errors import UserError
from tl_keras.evaluation.tables import DIGESTS
from tl_keras.run import count_of, read_csv, read_json, write_atomically
from tl_keras.statistics.intervals import accuracy_interval, with_interval

_EARLIER_IMAGES = "earlier_images.npz"


@dataclasses.dataclass(frozen=True)
class TrainedOn:
    """The images that a classifier was trained on, identified by the SHA-256 of their bytes.

    Attributes:
        ids: ids of the training images.
        digests: digests of the training images, and of their copies that the run's audit found.
        val: digests of the images that were used for selection, and of their copies.
    """

    ids: Set[str]
    digests: Set[bytes]
    val: Set[bytes]

    def seen(self, examples: Examples, split: str) -> np.ndarray:
        """Whether each image of a split, or a copy of it, is a training image: bool `(m,)`, in the split's order."""
        return _among(examples, split, self.digests)

    def chosen_on(self, examples: Examples, split: str) -> np.ndarray:
        """Whether each image of a split was used for selection: bool `(m,)`."""
        return _among(examples, split, self.val - self.digests)

    def same_id(self, examples: Examples, split: str) -> np.ndarray:
        """Whether each image of a split has the id of a training image: bool `(m,)`."""
        own = examples.ids(split)
        return np.fromiter((one in self.ids for one in own), bool, len(own))


def _among(examples: Examples, split: str, digests: Set[bytes]) -> np.ndarray:
    own = examples.digests[examples.positions(split)]
    return np.fromiter((digest.tobytes() in digests for digest in own), bool, len(own))


def read_digests(run_dir: Path) -> list[tuple[str, str, bytes]]:
    """Reads id, split, and SHA-256 of the bytes of each image of a run.

    Raises:
        UserError: the files are missing or damaged.
    """
    try:
        rows = [(row["id"], row["split"]) for row in read_csv(run_dir / "splits.csv")]
        digests = np.load(run_dir / DIGESTS, allow_pickle=False)
        if digests.shape != (len(rows), 32):
            raise ValueError("the number of images differs")
    except (OSError, ValueError, KeyError, EOFError, csv.Error) as error:
        raise UserError(
            f"{run_dir} does not record which images it was trained on: its splits.csv or {DIGESTS} is missing or "
            "damaged. Train again to record them."
        ) from error
    return [(*row, digest.tobytes()) for row, digest in zip(rows, digests, strict=True)]


@dataclasses.dataclass(frozen=True)
class RunImages:
    """The images of one run, identified by the SHA-256 of their bytes.

    Attributes:
        run: the run folder.
        train: digests of the training images.
        val: digests of the images that were used for selection.
    """

    run: str
    train: Set[bytes]
    val: Set[bytes]


def read_run_images(run_dir: Path) -> RunImages:
    """Reads the images of a run.

    Raises:
        UserError: the files are missing or damaged.
    """
    rows = read_digests(run_dir)
    train, val = ({digest for _, split, digest in rows if split == wanted} for wanted in ("train", "val"))
    return RunImages(str(run_dir), train, val)


@dataclasses.dataclass(frozen=True)
class EarlierImages:
    """The images of the earlier runs of a network.

    Attributes:
        runs: images of the earlier runs in which the network was trained, latest first.
        unknown: what is unknown about earlier images, as sentences.
        initial: the weights that the earliest run started with: `imagenet`, `none`, or a file.
    """

    runs: Sequence[RunImages]
    unknown: Sequence[str]
    initial: str


def write_earlier_images(run_dir: Path, earlier: EarlierImages) -> None:
    """Records the images of the earlier runs of a network, in `earlier_images.npz`.

    With it, the images stay known when an earlier run is deleted or replaced. The arrays are `runs`, run folders;
    `unknown`, sentences; `initial`; `digests`, uint8 `(n, 32)`; and per digest `run_of`, an index into `runs`, and
    `is_train`, false for val.

    Args:
        run_dir: the run folder.
        earlier: the images.
    """
    rows = [
        (digest, number, is_train)
        for number, one in enumerate(earlier.runs)
        for is_train, digests in ((True, one.train), (False, one.val))
        for digest in sorted(digests)
    ]
    content = io.BytesIO()
    np.savez(
        content,
        runs=np.array([one.run for one in earlier.runs], np.str_),
        unknown=np.array(earlier.unknown, np.str_),
        initial=np.array(earlier.initial),
        digests=np.frombuffer(b"".join(digest for digest, _, _ in rows), np.uint8).reshape(-1, 32),
        run_of=np.array([number for _, number, _ in rows], np.int32),
        is_train=np.array([is_train for _, _, is_train in rows], bool),
    )
    write_atomically(run_dir / _EARLIER_IMAGES, content.getvalue())


def read_earlier_images(run_dir: Path) -> EarlierImages | None:
    """Reads `earlier_images.npz`, see `write_earlier_images`.

    Returns:
        The images; None if the run has no such file.

    Raises:
        UserError: the file is damaged.
    """
    path = run_dir / _EARLIER_IMAGES
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            digests, run_of, is_train = file["digests"], file["run_of"], file["is_train"]
            names, unknown, initial = file["runs"].tolist(), file["unknown"].tolist(), str(file["initial"])
        found = [
            RunImages(
                name, *({row.tobytes() for row in digests[(run_of == number) & own]} for own in (is_train, ~is_train))
            )
            for number, name in enumerate(names)
        ]
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged. Train again to record the images of earlier runs.") from error
    return EarlierImages(found, unknown, initial)


def read_trained_on(run_dir: Path, splits: Set[str], earlier: Iterable[RunImages]) -> TrainedOn:
    """Reads the images that a run was trained on.

    Args:
        run_dir: the run folder.
        splits: the splits that the final classifier was fitted on.
        earlier: images of the earlier runs in which the network was trained.

    Raises:
        UserError: the folder does not record its images.
    """
    own = read_digests(run_dir)
    copied = read_leaks(run_dir).get("copies_in", {})

    def digests(among: Set[str]) -> set[bytes]:
        copies = {one for split in among for one in copied.get(split, ())}
        return {digest for name, split, digest in own if split in among or name in copies}

    return TrainedOn(
        {name for name, split, _ in own if split in splits},
        digests(splits).union(*(run.train for run in earlier)),
        digests({"val"}),
    )


def read_leaks(run_dir: Path) -> dict[str, Any]:
    """Reads the leaks of a run's audit from `metrics.json`; empty without leaks or without an audit."""
    return _read_entry(run_dir, "audit", "leaks")


def read_leaked(run_dir: Path, split: str) -> int:
    """Reads the number of a split's images that leaked, from the audit or the evaluation of a run."""
    for found in (read_leaks(run_dir), _read_entry(run_dir, "leaks", split)):
        if found.get("split", split) == split and isinstance(found.get("leaked"), int):
            return int(found["leaked"])
    return 0


def _read_entry(run_dir: Path, *names: str) -> dict[str, Any]:
    """Reads an entry of `metrics.json`; empty if it does not exist."""
    try:
        found = read_json(run_dir / "metrics.json")
    except UserError:
        return {}
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def compare_without(leaked: np.ndarray, right: np.ndarray) -> tuple[dict[str, Any], str]:
    """Measures accuracy with and without leaked images.

    Args:
        leaked: bool `(m,)`.
        right: whether each prediction is correct, bool `(m,)`.

    Returns:
        For `metrics.json`: `leaked`, a count, and `accuracy_with` and `accuracy_without` with their 95 % confidence
        intervals, the latter only if an image remains; and the same in words.
    """
    result: dict[str, Any] = {"leaked": int(leaked.sum())}
    texts = []
    for name, own in (("with", np.ones(len(leaked), bool)), ("without", ~leaked)):
        count, correct = int(own.sum()), int(right[own].sum())
        if count:
            interval = accuracy_interval(correct, count)
            result |= {f"accuracy_{name}": correct / count, f"accuracy_{name}_ci95": list(interval)}
            texts.append(f"{with_interval(correct / count, interval)} {name} them")
    return result, ", ".join(texts)


def measure_seen(
    trained: TrainedOn | None,
    examples: Examples,
    probabilities: Mapping[str, np.ndarray],
    *,
    what: str = "the classifier",
    selection_matters: Collection[str] = ("test",),
) -> tuple[dict[str, Any] | None, list[str]]:
    """Measures the effect of evaluated images that the classifier was trained on.

    Args:
        trained: the images that it was trained on; None if they are unknown.
        examples: the evaluated images.
        probabilities: split → float `(n, classes)`.
        what: subject of the warnings.
        selection_matters: splits that are reported as unseen: a warning names images in them that were used for
            selection.

    Returns:
        For `metrics.json`: split → metrics for splits with such images, or None if they are unknown; and warnings.
    """
    if trained is None:
        return None, []
    leaks, warnings, same_ids = {}, [], 0
    for split, values in probabilities.items():
        leaked, count = trained.seen(examples, split), len(values)
        same_ids += int((trained.same_id(examples, split) & ~leaked).sum())
        if leaked.any():
            leaks[split], accuracy = compare_without(leaked, values.argmax(1) == examples.labels(split))
            warnings.append(
                f"warning: {what} was trained on {int(leaked.sum()):,} of the {count:,} {split} images, or on "
                f"copies of them; {split} accuracy: {accuracy}"
            )
        chosen = int(trained.chosen_on(examples, split).sum())
        if chosen and split in selection_matters:
            are = "is a val image" if chosen == 1 else "are val images"
            warnings.append(
                f"warning: {chosen:,} of the {count:,} {split} images {are} of the classifier's run, used for "
                "selection: metrics on such images are slightly too good"
            )
    if same_ids:
        warnings.append(
            f"warning: the classifier was trained on images with the ids of {count_of(same_ids, 'evaluated image')}, "
            "but with different content; if they show the same scenes, these metrics are too good"
        )
    return leaks, warnings
