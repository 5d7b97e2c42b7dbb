"""The runs that a network went through before this one, and what they were trained on."""

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

_ANCESTORS = 20  # runs upon runs; a circle must end


def load_run_config(run_dir: str | Path) -> Config:
    """How a run was configured.

    Raises:
        UserError: the folder is no run's, or is damaged.
    """
    path = Path(run_dir) / "config.json"
    try:
        return from_dict(read_json(path))
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a run's. Give a run folder whose run has ended.") from error


def trace_weights(weights: str) -> tuple[list[tuple[str, Config]], str]:
    """The runs that a network went through, the latest first, and what it began with.

    That is the folder of `--weights`, if it is a run's, that run's own, and so on.
    """
    found: list[tuple[str, Config]] = []
    while len(found) < _ANCESTORS and is_run(weights) and (Path(weights) / "config.json").is_file():
        found.append((weights, load_run_config(weights)))
        weights = found[-1][1].backbone.weights
    return found, weights


def find_weights(weights: str) -> str:
    """What a network began with: `--weights`, of a run folder that of the run, and so on."""
    return trace_weights(weights)[1]


def list_training_runs(weights: str) -> list[Path]:
    """The earlier runs that changed the network's weights: those that trained more than a head."""
    return [Path(run) for run, config in trace_weights(weights)[0] if config.training.trainable != "head"]


@dataclasses.dataclass(frozen=True)
class Lineage:
    """Evaluated images that the network or its head is trained on.

    Attributes:
        seen: content of the training images of this run and of earlier runs.
        notes: lines that say so before anything is trained.
    """

    seen: TrainedOn
    notes: tuple[str, ...]


def read_lineage(weights: str, examples: Examples) -> Lineage:
    """Compares the evaluated images with what this run and earlier ones are trained on, by their content.

    Args:
        weights: `--weights`.
        examples: of this run.
    """
    notes, trained, chosen = list[str](), set[bytes](), set[bytes]()
    for run in list_training_runs(weights):
        try:
            rows = read_digests(run)
        except UserError as error:
            notes.append(f"warning: {error} Its training images among these can't be told from others")
            continue
        its_own = {digest for _, split, digest in rows if split == "train"}
        trained |= its_own
        chosen |= {digest for _, split, digest in rows if split == "val"}
        notes += _describe(f"{run} was trained on", its_own, examples)
    began = trace_weights(weights)[1]
    if began not in {"imagenet", "none"} and not os.path.exists(began):
        notes.append(
            f"warning: {began}, which the network began with, is not there any more: whether it was trained on these "
            "images can't be known"
        )
    own = {digest.tobytes() for digest in examples.digests[examples.positions("train")]}
    notes += _describe("train has copies, byte for byte, of", own, examples)
    return Lineage(TrainedOn(frozenset(), trained | own, chosen), tuple(notes))


def _describe(subject: str, digests: set[bytes], examples: Examples) -> list[str]:
    counts = {}
    for split in SPLITS[1:]:
        own = examples.digests[examples.positions(split)]
        counts[split] = (int(np.sum([digest.tobytes() in digests for digest in own])), len(own))
    parts = [f"{found:,} of the {count:,} {split} images" for split, (found, count) in counts.items() if found]
    return [f"warning: {subject} {' and '.join(parts)}: accuracy on these is too good"] if parts else []
