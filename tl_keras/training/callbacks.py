"""What happens beside Keras's `fit`: a line an epoch, the best epoch, a stop on NaN and on Ctrl-C."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from tl_keras.errors import UserError

HISTORY_HEADER = ("stage", "epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "seconds")


class EpochLog(keras.callbacks.Callback):  # type: ignore[misc]
    """Shows each epoch, and keeps it as a row of `history.csv`."""

    def __init__(
        self,
        stage: str,
        epochs: int,
        show: Callable[[str], None],
        show_progress: Callable[[str], None],
        keep: Callable[[tuple[Any, ...]], None],
    ) -> None:
        """Args: keep: is given each row of `HISTORY_HEADER`'s columns."""
        super().__init__()
        self._stage, self._epochs, self._show, self._show_progress, self._keep = (
            stage,
            epochs,
            show,
            show_progress,
            keep,
        )

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Starts the clock."""
        del logs
        self._epoch, self._start = epoch, time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Shows how far the epoch is."""
        steps = self.params.get("steps") or 0
        loss = float((logs or {}).get("loss", math.nan))
        self._show_progress(
            f"{self._stage} epoch {self._epoch + 1}/{self._epochs} step {min(batch + 1, steps)}/{steps} loss {loss:.4f}"
        )

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Shows the epoch and keeps its row."""
        seconds = time.perf_counter() - self._start
        values = {name: float(value) for name, value in (logs or {}).items()}
        rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        self._show(
            f"{self._stage} epoch {epoch + 1}/{self._epochs}: loss {values['loss']:.4f} accuracy "
            f"{values['accuracy']:.3f}, val loss {values['val_loss']:.4f} accuracy {values['val_accuracy']:.3f}, "
            f"{seconds:.1f} s"
        )
        numbers = [round(values[name], 6) for name in ("loss", "accuracy", "val_loss", "val_accuracy")]
        self._keep((self._stage, epoch + 1, *numbers, f"{rate:.3g}", round(seconds, 2)))


class BestEpoch(keras.callbacks.Callback):  # type: ignore[misc]
    """Keeps the weights of the epoch that is best on val by loss or accuracy; the other decides among equals.

    Keras's ModelCheckpoint takes the first among equals, which by accuracy on a small val is an epoch that has hardly
    learnt.
    """

    def __init__(
        self, path: Path, *, monitor: str, patience: int | None, before: tuple[float, float] | None = None
    ) -> None:
        """Args: path: the checkpoint.

        monitor: `loss` or `accuracy`.
        patience: epochs without a better one that end the stage.
        before: val loss and accuracy that the model has already.
        """
        super().__init__()
        self.path, self.epoch, self.before = path, 0, before
        self.loss, self.accuracy = before or (math.inf, 0.0)
        self._monitor, self._patience, self._waited = monitor, patience, 0

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        """Keeps the weights that the model has already."""
        del logs
        if self.before:
            self.model.optimizer.build(self.model.trainable_variables)  # the file holds its state too
            self._save()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Compares the epoch with the best so far."""
        values = logs or {}
        loss, accuracy = float(values["val_loss"]), float(values["val_accuracy"])
        score, best = self._score(loss, accuracy), self._score(self.loss, self.accuracy)
        self._waited = 0 if score[0] > best[0] else self._waited + 1
        if score > best:
            self.loss, self.accuracy, self.epoch = loss, accuracy, epoch + 1
            self._save()
        if self._patience is not None and self._waited >= self._patience:
            self.model.stop_training = True

    def restore(self) -> None:
        """Gives the model the best epoch's weights."""
        if self.path.exists():
            self.model.load_weights(self.path)

    def _save(self) -> None:
        """Writes the checkpoint whole: a process that is killed leaves the epoch before."""
        unfinished = self.path.with_name(f"unfinished.{self.path.name}")  # Keras insists on the suffix
        self.model.save_weights(unfinished)
        os.replace(unfinished, self.path)

    def _score(self, loss: float, accuracy: float) -> tuple[float, float]:
        return (-loss, accuracy) if self._monitor == "loss" else (accuracy, -loss)


class StopOnNan(keras.callbacks.Callback):  # type: ignore[misc]
    """Stops a run whose loss is no number any more."""

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Remembers the epoch."""
        del logs
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Looks at the loss.

        Raises:
            UserError: it is NaN or infinite.
        """
        self._check(float((logs or {}).get("loss", 0.0)), f"step {batch + 1}")

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Looks at the loss on val: after the very last step no other tells.

        Raises:
            UserError: it is NaN or infinite.
        """
        del epoch
        self._check(float((logs or {}).get("val_loss", 0.0)), "on val")

    def _check(self, loss: float, where: str) -> None:
        if not math.isfinite(loss):
            raise UserError(
                f"the loss became {loss} in epoch {self._epoch + 1}, {where}. Try a smaller --learning_rate "
                "or --backbone_learning_rate, --warmup_epochs=1, or --optimizer=adamw; check that --weights fit."
            )


class StopOnInterrupt(keras.callbacks.Callback):  # type: ignore[misc]
    """The first Ctrl-C ends training after the step under way; the second ends the process."""

    interrupted = False

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        """Takes over SIGINT."""
        del logs
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Ends the epoch where Ctrl-C was pressed; Keras still evaluates it on val."""
        del batch, logs
        if self.interrupted:
            self.model.stop_training = True

    def give_back(self) -> None:
        """Gives SIGINT back to whoever had it."""
        if hasattr(self, "_previous"):
            signal.signal(signal.SIGINT, self._previous)

    def _note(self, number: int, frame: Any) -> None:
        del number, frame
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
