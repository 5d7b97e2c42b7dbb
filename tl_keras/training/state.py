"""Checkpoint of a training stage: everything that its next step depends on.

A resumed stage has bitwise the same result as one without interruption.
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
    """Progress of a stage.

    Attributes:
        identity: a hash of training data and initial weights; a state with another identity is not used.
        epoch: number of complete epochs.
        step: number of complete steps in the next epoch.
        done: whether the stage has ended; then only the weights of the best epoch are kept.
        best_epoch: the best epoch so far, from 1; 0 for the weights before the stage.
        best_loss: its val loss.
        best_accuracy: its val accuracy.
        waited: number of epochs since then.
        diverged: the reason if the stage stopped because its loss became NaN; otherwise empty.
        rows: rows of `history.csv`.
        best: weights of the best epoch.
        model: all variables of the model, including states of random generators.
        optimizer: all variables of the optimizer.
        metrics: variables of the metrics of the current epoch.
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
    """Writes a state atomically as one `.npz` file.

    Raises:
        UserError: the disk is full, or the folder can't be written.
        LostRunError: another process has continued the run.
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
        identity: identity of the stage to resume.

    Returns:
        The state; None if it does not exist, is damaged, or has another identity.
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
    """Copies the values of Keras variables."""
    return [np.array(variable.numpy()) for variable in variables]  # numpy() alone may share memory


def assign_arrays(variables: Sequence[Any], arrays: Sequence[np.ndarray]) -> None:
    """Assigns values to Keras variables, in order."""
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)
