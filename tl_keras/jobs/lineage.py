"""The earlier runs in which a network was trained, and their training images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence, Set
from pathlib import Path

import numpy as np

from tl_keras.config import Config, from_dict, is_run
from tl_keras.data.examples import Examples
from tl_keras.data.splits import SPLITS
from tl_keras.errors import UserError
from tl_keras.evaluation.leaks import EarlierImages, RunImages, TrainedOn, read_earlier_images, read_run_images
from tl_keras.run import read_json

_ANCESTORS = 20  # limit for chains of runs, in case they form a cycle


def load_run_config(run_dir: str | Path) -> Config:
    """Loads the configuration of a run.

    Raises:
        UserError: the folder is not a run folder, or is damaged.
    """
    path = Path(run_dir) / "config.json"
    try:
        return from_dict(read_json(path))
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the configuration of a run. Give the folder of a complete run.") from error


@dataclasses.dataclass(frozen=True)
class Ancestry:
    """The earlier runs of a network.

    Attributes:
        runs: run folders and their settings, latest first; those before `earlier` are not among them.
        initial: the weights that the earliest run started with.
        earlier: what the last of `runs` has recorded about the runs before it, if it has; they may have been deleted or
            replaced since.
        damaged: records that can't be read, as sentences.
    """

    runs: tuple[tuple[str, Config], ...]
    initial: str
    earlier: EarlierImages | None
    damaged: tuple[str, ...]

    def read_images(self) -> EarlierImages:
        """Reads the images of the runs that trained more than a head, latest first."""
        found, unknown = list[RunImages](), list(self.damaged)
        for run, config in self.runs:
            if config.training.trainable == "head":
                continue
            try:
                found.append(read_run_images(Path(run)))
            except UserError as error:
                unknown.append(f"{error} Its training images can't be recognized among the evaluated images")
        if self.earlier:
            return EarlierImages([*found, *self.earlier.runs], [*unknown, *self.earlier.unknown], self.initial)
        if self.initial not in {"imagenet", "none"} and not os.path.exists(self.initial):
            gone = f"the network started with {self.initial}, which does not exist any more"
            unknown.append(f"{gone}: the training images of that run are unknown")
        return EarlierImages(found, unknown, self.initial)


def trace_weights(weights: str) -> Ancestry:
    """Traces the earlier runs of a network.

    The folder of `--weights`, if it is a run folder, has a `--weights` of its own, and so on, up to a run that has
    recorded the images of the runs before it.
    """
    found, damaged = list[tuple[str, Config]](), list[str]()
    while len(found) < _ANCESTORS and is_run(weights) and (Path(weights) / "config.json").is_file():
        found.append((weights, load_run_config(weights)))
        try:
            earlier = read_earlier_images(Path(weights))
        except UserError as error:
            damaged.append(str(error))
            earlier = None
        if earlier:
            return Ancestry(tuple(found), earlier.initial, earlier, tuple(damaged))
        weights = found[-1][1].backbone.weights
    return Ancestry(tuple(found), weights, None, tuple(damaged))


def find_weights(weights: str) -> str:
    """Finds the weights that a network started with: `--weights`, or that of its earliest run."""
    return trace_weights(weights).initial


@dataclasses.dataclass(frozen=True)
class Lineage:
    """Evaluated images that the network or its head is trained on.

    Attributes:
        seen: digests of the training images of this run and of earlier runs.
        notes: warnings to show before training.
        earlier: images of the earlier runs.
    """

    seen: TrainedOn
    notes: tuple[str, ...]
    earlier: EarlierImages


def read_lineage(ancestry: Ancestry, examples: Examples, *, fitted: Set[str]) -> Lineage:
    """Compares the content of the evaluated images with the training images of this run and of earlier runs.

    Args:
        ancestry: the earlier runs of the network.
        examples: examples of this run.
        fitted: the splits that the final classifier of this run is fitted on.
    """
    earlier = ancestry.read_images()
    notes = [note for run in earlier.runs for note in _describe(f"{run.run} was trained on", run.train, examples)]
    notes += [f"warning: {reason}" for reason in earlier.unknown]
    train, val = ({digest.tobytes() for digest in examples.digests[examples.positions(split)]} for split in SPLITS[:2])
    notes += _describe("train has exact copies of", train, examples)
    notes += _describe("val has exact copies of", val - train, examples, splits=("test",))
    own = train | val if "val" in fitted else train
    seen = TrainedOn(
        frozenset(),
        own.union(*(run.train for run in earlier.runs)),
        val.union(*(run.val for run in earlier.runs)),
    )
    return Lineage(seen, tuple(notes), earlier)


def _describe(subject: str, digests: Set[bytes], examples: Examples, splits: Sequence[str] = SPLITS[1:]) -> list[str]:
    counts = {}
    for split in splits:
        own = examples.digests[examples.positions(split)]
        counts[split] = (int(np.sum([digest.tobytes() in digests for digest in own])), len(own))
    parts = [f"{found:,} of the {count:,} {split} images" for split, (found, count) in counts.items() if found]
    return [f"warning: {subject} {' and '.join(parts)}: accuracy on them is too good"] if parts else []
