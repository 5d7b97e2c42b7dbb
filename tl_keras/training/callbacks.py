"""Keras callbacks: a line per epoch, the best epoch, checkpoints, and stops on NaN and Ctrl-C."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tl_keras.errors import UserError
from tl_keras.training.batches import EpochOrder
from tl_keras.training.state import StageState, assign_arrays, read_arrays, write_state

WRITE_SECONDS = 600.0  # interval of checkpoints within long epochs
HISTORY_HEADER = ("stage", "epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "seconds")


class StartEpoch(keras.callbacks.Callback):  # type: ignore[misc]
    """Passes the number of the epoch to the batches."""

    def __init__(self, order: EpochOrder) -> None:
        """Args: order: order of the examples."""
        super().__init__()
        self._order = order

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Sets the epoch."""
        del logs
        self._order.epoch = epoch


class EpochLog(keras.callbacks.Callback):  # type: ignore[misc]
    """Shows each epoch, and collects the rows of `history.csv`.

    Attributes:
        rows: rows of the stage so far.
    """

    def __init__(
        self,
        stage: str,
        epochs: int,
        show: Callable[[str], None],
        show_progress: Callable[[str], None],
        keep: Callable[..., None],
    ) -> None:
        """Args: keep: called with each row, in the columns of `HISTORY_HEADER`."""
        super().__init__()
        self._stage, self._epochs, self._show = stage, epochs, show
        self._show_progress, self._keep = show_progress, keep
        self.rows: list[Any] = []
        self._warned: set[str] = set()

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Starts the clock."""
        del logs
        self._epoch, self._start = epoch, time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Shows the progress of the epoch."""
        steps = self.params.get("steps") or 0
        loss = float((logs or {}).get("loss", math.nan))
        self._show_progress(
            f"{self._stage} epoch {self._epoch + 1}/{self._epochs} step {min(batch + 1, steps)}/{steps} loss {loss:.4f}"
        )

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Shows the epoch and stores its row."""
        seconds = time.perf_counter() - self._start
        values = {name: float(value) for name, value in (logs or {}).items()}
        rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        self._show(
            f"{self._stage} epoch {epoch + 1}/{self._epochs}: loss {values['loss']:.4f} accuracy "
            f"{values['accuracy']:.3f}, val loss {values['val_loss']:.4f} accuracy {values['val_accuracy']:.3f}, "
            f"{seconds:.1f} s"
        )
        numbers = [round(values[name], 6) for name in ("loss", "accuracy", "val_loss", "val_accuracy")]
        self.rows.append((self._stage, epoch + 1, *numbers, f"{rate:.3g}", round(seconds, 2)))
        try:
            self._keep(self.rows[-1])
        except UserError as error:
            self.warn(f"warning: {error} Training continues without the last epochs in history.csv")

    def warn(self, text: str) -> None:
        """Shows a line once."""
        if text not in self._warned:
            self._show(text)
        self._warned.add(text)


class BestEpoch(keras.callbacks.Callback):  # type: ignore[misc]
    """Keeps the weights of the best epoch on val by loss or accuracy; the other metric breaks ties.

    Keras's ModelCheckpoint keeps the first of equal epochs, which by accuracy on a small val split is a very early one.

    Attributes:
        epoch: the best epoch so far, from 1; 0 for the weights before the stage.
        loss: its val loss.
        accuracy: its val accuracy.
        waited: number of epochs since then.
        weights: weights of the model after it.
    """

    def __init__(self, *, monitor: str, patience: int | None, before: tuple[float, float] | None = None) -> None:
        """Starts without a best epoch.

        Args:
            monitor: `loss` or `accuracy`.
            patience: number of epochs without improvement after which the stage stops; None for no early stopping.
            before: val loss and accuracy of the model before the stage.
        """
        super().__init__()
        self.epoch, self.before, self.waited = 0, before, 0
        self.loss, self.accuracy = before or (math.inf, 0.0)
        self.weights: list[np.ndarray] = []
        self._monitor, self._patience = monitor, patience

    @property
    def is_exhausted(self) -> bool:
        """Whether `patience` has run out."""
        return self._patience is not None and self.waited >= self._patience

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        """Stores the weights before the stage."""
        del logs
        if self.before and not self.weights:
            self.weights = read_arrays(self.model.weights)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Compares the epoch with the best so far."""
        values = logs or {}
        loss, accuracy = float(values["val_loss"]), float(values["val_accuracy"])
        score, best = self._score(loss, accuracy), self._score(self.loss, self.accuracy)
        self.waited = 0 if score[0] > best[0] else self.waited + 1
        if score > best:
            self.loss, self.accuracy, self.epoch = loss, accuracy, epoch + 1
            self.weights = read_arrays(self.model.weights)
        if self.is_exhausted:
            self.model.stop_training = True

    def restore(self) -> None:
        """Restores the weights of the best epoch."""
        if self.weights:
            assign_arrays(self.model.weights, self.weights)

    def _score(self, loss: float, accuracy: float) -> tuple[float, float]:
        return (-loss, accuracy) if self._monitor == "loss" else (accuracy, -loss)


class Board(keras.callbacks.TensorBoard):  # type: ignore[misc]
    """TensorBoard logs; if they can't be written, training continues without them."""

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        """Args: warn: shows a line."""
        super().__init__(str(folder), write_graph=False)
        self._warn, self._failed = warn, False

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Writes the metrics of the epoch."""
        self._attempt(super().on_epoch_end, epoch, logs)

    def on_test_end(self, logs: dict[str, float] | None = None) -> None:
        """Writes the metrics on val."""
        self._attempt(super().on_test_end, logs)

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        """Closes the files."""
        self._attempt(super().on_train_end, logs)

    def _attempt(self, write: Callable[..., None], *arguments: Any) -> None:
        if self._failed:
            return
        try:
            write(*arguments)
        except (OSError, tf.errors.OpError) as error:
            self._failed = True
            reason = (str(error).splitlines() or [""])[0][:200]
            self._warn(f"warning: TensorBoard logs can't be written: {reason}. Training continues without them")


class KeepState(keras.callbacks.Callback):  # type: ignore[misc]
    """Writes checkpoints of the stage after every epoch, and within long epochs.

    If they can't be written, training continues without them.
    """

    def __init__(
        self, path: Path, state: StageState, *, log: EpochLog, best: BestEpoch, metrics: Sequence[Any]
    ) -> None:
        """Continues from a state.

        Args:
            path: path of the checkpoint.
            state: state to continue from.
            log: callback with the rows of the history.
            best: callback with the best epoch.
            metrics: variables of the metrics of an epoch.
        """
        super().__init__()
        self.state = state
        self._path, self._log, self._best, self._metrics = path, log, best, metrics
        self._written, self._first_step = time.monotonic(), 0

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Continues an interrupted epoch."""
        del logs
        self._first_step = self.state.step if epoch == self.state.epoch else 0
        self._step = self._first_step
        if self._first_step:
            assign_arrays(self._metrics, self.state.metrics)

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Writes the state if the last checkpoint is old."""
        del logs
        self._step = self._first_step + min(batch + 1, int(self.params.get("steps") or 0))
        if time.monotonic() - self._written > WRITE_SECONDS:
            self.state.step, self.state.metrics = self._step, read_arrays(self._metrics)
            self._write()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Writes the state, unless the epoch was interrupted: training can't continue from there."""
        del logs
        if self._step - self._first_step >= int(self.params.get("steps") or 0):
            self.state.epoch, self.state.step, self.state.metrics = epoch + 1, 0, []
            self._write()

    def finish(self, *, diverged: str) -> None:
        """Writes the final state, which has only the weights of the best epoch."""
        self.state = dataclasses.replace(self.state, done=True, diverged=diverged, model=[], optimizer=[], metrics=[])
        self._copy_best()
        self._try_to_write()

    def _write(self) -> None:
        self.state.model = read_arrays(self.model.variables)
        self.state.optimizer = read_arrays(self.model.optimizer.variables)
        self._copy_best()
        self._try_to_write()
        self._written = time.monotonic()

    def _copy_best(self) -> None:
        state, best = self.state, self._best
        state.best_epoch, state.best_loss, state.best_accuracy = best.epoch, best.loss, best.accuracy
        state.waited, state.best, state.rows = best.waited, best.weights, self._log.rows

    def _try_to_write(self) -> None:
        try:
            write_state(self._path, self.state)
        except UserError as error:
            self._log.warn(f"warning: {error} Training continues in memory, without a new checkpoint")


class DivergedError(UserError):
    """The loss became NaN or infinite."""


class StopOnNan(keras.callbacks.Callback):  # type: ignore[misc]
    """Stops training if the loss becomes NaN or infinite."""

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Stores the number of the epoch."""
        del logs
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Checks the loss.

        Raises:
            DivergedError: it is NaN or infinite.
        """
        self._check(float((logs or {}).get("loss", 0.0)), f"step {batch + 1}")

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Checks the val loss, which also shows divergence in the very last step.

        Raises:
            DivergedError: it is NaN or infinite.
        """
        del epoch
        self._check(float((logs or {}).get("val_loss", 0.0)), "on val")

    def _check(self, loss: float, where: str) -> None:
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss became {loss} in epoch {self._epoch + 1}, {where}. Try a smaller --learning_rate "
                "or --backbone_learning_rate, --warmup_epochs=1, or --optimizer=adamw; check that --weights fit."
            )


class StopOnInterrupt(keras.callbacks.Callback):  # type: ignore[misc]
    """Stops training after the current step on the first Ctrl-C; the second one ends the process."""

    interrupted = False

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        """Installs a handler for SIGINT."""
        del logs
        if not hasattr(self, "_previous") and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Stops the epoch if Ctrl-C was pressed; Keras still evaluates it on val."""
        del batch, logs
        if self.interrupted:
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Stops training if Ctrl-C was pressed during the evaluation of the epoch."""
        del epoch, logs
        if self.interrupted:
            self.model.stop_training = True

    def give_back(self) -> None:
        """Restores the previous handler of SIGINT."""
        if hasattr(self, "_previous"):
            signal.signal(signal.SIGINT, self._previous)

    def _note(self, number: int, frame: Any) -> None:
        del number, frame
        self.interrupted = True
        self.give_back()
