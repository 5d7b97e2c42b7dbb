"""The state of a stage of training on disk: everything that its next step depends on.

A stage that is resumed from it gives the same bits as one that was never interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tl_keras.run import open_atomically

_FORMAT = 1
_ARRAYS = ("best", "model", "optimizer", "metrics")


@dataclasses.dataclass
class StageState:
    """How far a stage is.

    Attributes:
        identity: a hash of what the stage learns from and begins with; another one makes the state useless.
        epoch: complete epochs.
        step: complete steps of the epoch after these.
        done: whether the stage has ended; then only the best epoch's weights are kept.
        best_epoch: the best epoch so far, from 1; 0: the weights from before the stage.
        best_loss: its loss on val.
        best_accuracy: its accuracy on val.
        waited: epochs since then.
        diverged: why the stage ended early, if its loss became NaN.
        rows: rows of `history.csv`.
        best: weights of the best epoch.
        model: all variables of the model, the states of random generators among them.
        optimizer: all variables of the optimizer.
        metrics: variables of the metrics of the epoch under way.
    """

    identity: str
    epoch: int = 0
    step: int = 0
    done: bool = False
    best_epoch: int = 0
    best_loss: float = float("inf")
    best_accuracy: float = 0.0
    waited: int = 0
    diverged: str = ""
    rows: list[Sequence[Any]] = dataclasses.field(default_factory=list)
    best: list[np.ndarray] = dataclasses.field(default_factory=list)
    model: list[np.ndarray] = dataclasses.field(default_factory=list)
    optimizer: list[np.ndarray] = dataclasses.field(default_factory=list)
    metrics: list[np.ndarray] = dataclasses.field(default_factory=list)


def write_state(path: Path, state: StageState) -> None:
    """Writes a state as one `.npz` file, whole or not at all.

    Raises:
        UserError: the disk is full, or the folder can't be written.
    """
    header = {
        field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name not in _ARRAYS
    }
    text = json.dumps({"format": _FORMAT, **header, **{name: len(getattr(state, name)) for name in _ARRAYS}})
    arrays = {f"{name}_{number}": one for name in _ARRAYS for number, one in enumerate(getattr(state, name))}
    with open_atomically(path) as file:
        np.savez(file, allow_pickle=False, header=np.frombuffer(text.encode(), np.uint8), **arrays)


def read_state(path: Path, *, identity: str) -> StageState | None:
    """Reads a state.

    Args:
        path: the file.
        identity: of the stage that is to be resumed.

    Returns:
        The state; None if there is none, if it is damaged, or if it belongs to another stage.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            header: dict[str, Any] = json.loads(file["header"].tobytes())
            if header.pop("format") != _FORMAT or header["identity"] != identity:
                return None
            counts = {name: header.pop(name) for name in _ARRAYS}
            for name in _ARRAYS:
                header[name] = [file[f"{name}_{number}"] for number in range(counts[name])]
            return StageState(**header)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def read_arrays(variables: Sequence[Any]) -> list[np.ndarray]:
    """Copies of the values of Keras variables."""
    return [np.array(variable.numpy()) for variable in variables]  # numpy() alone may share memory


def assign_arrays(variables: Sequence[Any], arrays: Sequence[np.ndarray]) -> None:
    """Gives Keras variables their values, in order."""
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)
