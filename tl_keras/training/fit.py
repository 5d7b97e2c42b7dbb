"""Fits one stage of training with Keras, and selects the best epoch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tl_keras.backbones.embed import hash_weights
from tl_keras.config import TrainingConfig
from tl_keras.errors import UserError
from tl_keras.run import disk_errors
from tl_keras.training.batches import EpochOrder
from tl_keras.training.callbacks import (
    BestEpoch,
    Board,
    DivergedError,
    EpochLog,
    KeepState,
    StartEpoch,
    StopOnInterrupt,
    StopOnNan,
)
from tl_keras.training.schedules import build_optimizer, build_schedule
from tl_keras.training.state import StageState, assign_arrays, read_state


@dataclasses.dataclass(frozen=True)
class Progress:
    """Output of a stage.

    Attributes:
        folder: the run folder, with `checkpoints/` and `logs/`.
        show: shows a line.
        show_progress: called with the progress as text.
        keep: called with rows of `history.csv`.
    """

    folder: Path
    show: Callable[[str], None]
    show_progress: Callable[[str], None]
    keep: Callable[..., None]


@dataclasses.dataclass(frozen=True)
class Epochs:
    """Training batches of all epochs.

    Attributes:
        order: order of the examples in the next epoch.
        steps: number of batches per epoch.
        make: first step → batches of embeddings and labels of the epoch, from this step on.
    """

    order: EpochOrder
    steps: int
    make: Callable[[int], tf.data.Dataset]


@dataclasses.dataclass(frozen=True)
class Stage:
    """The result of a stage.

    Attributes:
        best_epoch: the epoch selected on val; 0 for the weights before the stage.
        val_accuracy: its val accuracy.
        val_loss: its val loss.
        interrupted: whether the user interrupted the stage.
        diverged: the reason if the stage stopped because its loss became NaN; otherwise empty.
    """

    best_epoch: int
    val_accuracy: float
    val_loss: float
    interrupted: bool
    diverged: str = ""


def fit_stage(
    model: keras.Model,
    train: Epochs,
    val: tf.data.Dataset,
    *,
    name: str,
    loss: Callable[[Any, Any], Any],
    learning_rate: float,
    training: TrainingConfig,
    progress: Progress,
    after: Stage | None = None,
    steps_per_execution: int = 1,
    identity: str = "",
) -> Stage:
    """Fits a model, and restores the weights of the best epoch on val.

    After every epoch a checkpoint is written to `checkpoints/NAME.npz`. If the file exists and matches the data and
    the starting weights, training continues from it, with bitwise the same result as without the interruption.

    Args:
        model: embeddings `(b, ...)` → logits `(b, classes)`.
        train: shuffled batches of embeddings and labels.
        val: batches in order.
        name: name of the stage in `history.csv` and `checkpoints/`.
        loss: labels and logits → losses.
        learning_rate: peak learning rate of this stage.
        training: optimizer, schedule, epochs, patience.
        progress: output of the stage.
        after: an earlier stage whose weights the model has; they are kept if no epoch is better.
        steps_per_execution: steps per call of Keras, which is faster for very short steps.
        identity: a hash of the training data.

    Returns:
        The result; best epoch 0 means that the weights of the earlier stage were kept.

    Raises:
        UserError: the loss became NaN before any epoch was complete, or the store or disk failed.
    """
    identity = hashlib.sha256(f"{name} {identity} {hash_weights(model)}".encode()).hexdigest()
    _seed_layers(model, identity)
    accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    _compile(model, accuracy, train, loss, learning_rate, training, steps_per_execution)
    path = progress.folder / "checkpoints" / f"{name}.npz"
    with disk_errors(f"the run folder {progress.folder}"):
        path.parent.mkdir(exist_ok=True)
    fitting = _Fitting(model, train, val, name=name, training=training, progress=progress, after=after, path=path)
    # metrics accumulated over an epoch: the mean loss, which Keras lists first, and the accuracy
    metrics = [*model.metrics[0].variables, *accuracy.variables]
    state = read_state(path, identity=identity)
    if state is None and path.is_file():
        progress.show(
            f"{name}: the checkpoint does not match this data and these starting weights, or is damaged: training "
            "starts from the first epoch"
        )
    return fitting.run(state or StageState(identity), metrics)


class _Fitting:
    """A stage that is being fitted, from the start or from a checkpoint."""

    def __init__(
        self,
        model: keras.Model,
        train: Epochs,
        val: tf.data.Dataset,
        *,
        name: str,
        training: TrainingConfig,
        progress: Progress,
        after: Stage | None,
        path: Path,
    ) -> None:
        self._model, self._train, self._val, self._path = model, train, val, path
        self._name, self._training, self._progress = name, training, progress
        before = (after.val_loss, after.val_accuracy) if after else None
        self._best = BestEpoch(monitor=training.monitor, patience=training.patience, before=before)
        self._best.set_model(model)
        self._interrupt = StopOnInterrupt()
        self._log = EpochLog(name, training.epochs, progress.show, progress.show_progress, progress.keep)

    def run(self, state: StageState, metrics: Sequence[Any]) -> Stage:
        """Fits the remaining epochs; see `fit_stage`."""
        self._resume(state)
        if state.done:
            self._best.restore()
            self._progress.show(f"{self._name}: trained before the interruption; {self._describe_best()}")
            return self._as_stage(diverged=state.diverged)
        keeper = KeepState(self._path, state, log=self._log, best=self._best, metrics=metrics)
        diverged = ""
        try:
            self._fit(keeper)
        except DivergedError as error:
            if not self._best.weights:
                raise
            diverged = str(error)
        except tf.errors.OpError as error:
            raise UserError(_find_user_error(error)) from error
        finally:
            self._interrupt.give_back()
        self._best.restore()
        if self._interrupt.interrupted:
            self._progress.show(
                f"{self._name}: interrupted; the best epoch is evaluated. Interrupt again to stop immediately"
            )
        else:
            keeper.finish(diverged=diverged)
        self._progress.show(f"{self._name}: {self._describe_best()}")
        return self._as_stage(diverged=diverged)

    def _resume(self, state: StageState) -> None:
        """Restores model, optimizer and best epoch from a state."""
        if not (state.epoch or state.step or state.done):
            return
        best = self._best
        best.epoch, best.loss, best.accuracy = state.best_epoch, state.best_loss, state.best_accuracy
        best.waited, best.weights = state.waited, state.best
        self._log.rows = list(state.rows)
        if state.rows:
            self._progress.keep(*state.rows)
        if not state.done:
            optimizer = self._model.optimizer
            assign_arrays(self._model.variables, state.model)
            assign_arrays(optimizer.variables, state.optimizer)
            step = f" and {state.step} steps" if state.step else ""
            self._progress.show(f"{self._name}: resumed after {state.epoch} of {self._training.epochs} epochs{step}")

    def _fit(self, keeper: KeepState) -> None:
        """Calls Keras's `fit`: for the rest of an interrupted epoch, then for all remaining epochs."""
        first, step, epochs = keeper.state.epoch, keeper.state.step, self._training.epochs
        if self._best.is_exhausted:
            return
        parts = [(step, first, first + 1), (0, first + 1, epochs)] if step else [(0, first, epochs)]
        for first_step, begin, end in parts:
            board = Board(self._progress.folder / "logs" / self._name, self._log.warn)
            self._model.fit(
                self._train.make(first_step),
                validation_data=self._val,
                initial_epoch=begin,
                epochs=end,
                verbose=0,
                shuffle=False,
                callbacks=[
                    StartEpoch(self._train.order),
                    StopOnNan(),
                    self._log,
                    self._best,
                    keeper,
                    self._interrupt,
                    board,
                ],
            )
            if self._model.stop_training:
                return

    def _describe_best(self) -> str:
        best = self._best
        if not best.epoch:
            return "no epoch improved on val over the previous stage; its weights are kept"
        monitor = self._training.monitor
        return f"best epoch by val {monitor}: {best.epoch}, val loss {best.loss:.4f}, val accuracy {best.accuracy:.3f}"

    def _as_stage(self, *, diverged: str) -> Stage:
        best = self._best
        return Stage(best.epoch, best.accuracy, best.loss, self._interrupt.interrupted, diverged)


def _seed_layers(model: keras.Model, identity: str) -> None:
    """Seeds the random generators of layers such as Dropout, independently of earlier runs in the process."""
    weights = {id(variable) for variable in model.weights}
    for number, variable in enumerate(one for one in model.variables if id(one) not in weights):
        digest = hashlib.sha256(f"{identity} {number}".encode()).digest()
        variable.assign(np.frombuffer(digest, np.uint32)[: int(np.prod(variable.shape))].reshape(variable.shape))


def _compile(
    model: keras.Model,
    accuracy: keras.metrics.Metric,
    train: Epochs,
    loss: Callable[[Any, Any], Any],
    learning_rate: float,
    training: TrainingConfig,
    steps_per_execution: int,
) -> None:
    schedule = build_schedule(
        training.schedule,
        learning_rate,
        steps=train.steps * training.epochs,
        warmup_steps=round(train.steps * training.warmup_epochs),
    )
    optimizer = build_optimizer(
        training.optimizer, schedule, momentum=training.momentum, weight_decay=training.weight_decay
    )
    optimizer.build(model.trainable_variables)  # Keras would do it inside the training step, which is then traced twice
    # no XLA: on the CPU depthwise convolutions take twenty times as long with it
    model.compile(optimizer, loss=loss, metrics=[accuracy], jit_compile=False, steps_per_execution=steps_per_execution)


def _find_user_error(error: tf.errors.OpError) -> str:
    """Extracts the text of a UserError that was raised inside `tf.data` from TensorFlow's error."""
    text = str(error.message)
    if "UserError: " in text:
        return text.split("UserError: ", 1)[1].splitlines()[0]
    return f"training failed: {type(error).__name__}: {text.splitlines()[0][:300]}. Try a smaller --batch_size."
