"""The earlier runs in which a network was trained, and their training images."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np

from tl_keras.config import Config, from_dict, is_run
from tl_keras.data.examples import Examples
from tl_keras.data.splits import SPLITS
from tl_keras.errors import UserError
from tl_keras.evaluation.leaks import TrainedOn, read_digests
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
        runs: run folders and their settings, latest first.
        initial: the weights that the first of them started with.
    """

    runs: tuple[tuple[str, Config], ...]
    initial: str

    @property
    def training_runs(self) -> list[Path]:
        """The runs that changed the network's weights: those that trained more than a head."""
        return [Path(run) for run, config in self.runs if config.training.trainable != "head"]


def trace_weights(weights: str) -> Ancestry:
    """Traces the earlier runs of a network.

    The folder of `--weights`, if it is a run folder, has a `--weights` of its own, and so on.
    """
    found: list[tuple[str, Config]] = []
    while len(found) < _ANCESTORS and is_run(weights) and (Path(weights) / "config.json").is_file():
        found.append((weights, load_run_config(weights)))
        weights = found[-1][1].backbone.weights
    return Ancestry(tuple(found), weights)


def find_weights(weights: str) -> str:
    """Finds the weights that a network started with: `--weights`, or that of its earliest run."""
    return trace_weights(weights).initial


@dataclasses.dataclass(frozen=True)
class Lineage:
    """Evaluated images that the network or its head is trained on.

    Attributes:
        seen: digests of the training images of this run and of earlier runs.
        notes: warnings to show before training.
    """

    seen: TrainedOn
    notes: tuple[str, ...]


def read_lineage(ancestry: Ancestry, examples: Examples) -> Lineage:
    """Compares the content of the evaluated images with the training images of this run and of earlier runs.

    Args:
        ancestry: the earlier runs of the network.
        examples: examples of this run.
    """
    notes, trained, chosen = list[str](), set[bytes](), set[bytes]()
    for run in ancestry.training_runs:
        try:
            rows = read_digests(run)
        except UserError as error:
            notes.append(f"warning: {error} Its training images can't be recognized among the evaluated images")
            continue
        its_own = {digest for _, split, digest in rows if split == "train"}
        trained |= its_own
        chosen |= {digest for _, split, digest in rows if split == "val"}
        notes += _describe(f"{run} was trained on", its_own, examples)
    began = ancestry.initial
    if began not in {"imagenet", "none"} and not os.path.exists(began):
        notes.append(
            f"warning: {began}, with which the network was initialized, does not exist any more: it is unknown whether "
            "it was trained on these images"
        )
    own = {digest.tobytes() for digest in examples.digests[examples.positions("train")]}
    notes += _describe("train has exact copies of", own, examples)
    return Lineage(TrainedOn(frozenset(), trained | own, chosen), tuple(notes))


def _describe(subject: str, digests: set[bytes], examples: Examples) -> list[str]:
    counts = {}
    for split in SPLITS[1:]:
        own = examples.digests[examples.positions(split)]
        counts[split] = (int(np.sum([digest.tobytes() in digests for digest in own])), len(own))
    parts = [f"{found:,} of the {count:,} {split} images" for split, (found, count) in counts.items() if found]
    return [f"warning: {subject} {' and '.join(parts)}: accuracy on them is too good"] if parts else []
