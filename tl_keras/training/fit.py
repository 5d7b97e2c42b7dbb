"""One stage of training: compile, fit, best epoch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from tl_keras.config import TrainingConfig
from tl_keras.errors import UserError
from tl_keras.run import disk_errors
from tl_keras.training.callbacks import BestEpoch, EpochLog, StopOnInterrupt, StopOnNan
from tl_keras.training.schedules import build_optimizer, build_schedule


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a stage reports to, and what it leaves.

    Attributes:
        folder: the run folder; `checkpoints/` and `logs/` lie in it.
        show: shows a line.
        show_progress: shows how far it is.
        keep: is given each epoch's row of `history.csv`.
    """

    folder: Path
    show: Callable[[str], None]
    show_progress: Callable[[str], None]
    keep: Callable[[tuple[Any, ...]], None]


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage came to: its best epoch (chosen on val), and whether the user interrupted it."""

    best_epoch: int
    val_accuracy: float
    val_loss: float
    interrupted: bool


def fit_stage(
    model: keras.Model,
    train: tf.data.Dataset,
    val: tf.data.Dataset,
    *,
    name: str,
    loss: Callable[[Any, Any], Any],
    learning_rate: float,
    training: TrainingConfig,
    progress: Progress,
    after: Stage | None = None,
    steps_per_execution: int = 1,
) -> Stage:
    """Fits a model; it ends with the weights of the epoch that was best on val.

    Args:
        model: embeddings `(b, ...)` → logits `(b, classes)`.
        train: shuffled batches of embeddings and labels.
        val: batches in order.
        name: the stage's name, in `history.csv` and `checkpoints/`.
        loss: labels and logits → losses.
        learning_rate: of this stage.
        training: optimiser, schedule, epochs, patience.
        progress: where it reports to.
        after: an earlier stage whose weights the model has; it keeps them where no epoch is better.
        steps_per_execution: steps that run as one, which is faster where a step takes a millisecond.

    Returns:
        The stage; best epoch 0: the earlier stage's weights were kept.

    Raises:
        UserError: the loss became NaN, or the store or disk failed.
    """
    steps = int(train.cardinality())
    schedule = build_schedule(
        training.schedule,
        learning_rate,
        steps=steps * training.epochs,
        warmup_steps=round(steps * training.warmup_epochs),
    )
    optimizer = build_optimizer(
        training.optimizer, schedule, momentum=training.momentum, weight_decay=training.weight_decay
    )
    accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    # XLA is a trap on the CPU: depthwise networks run twenty times slower (DESIGN.md)
    model.compile(optimizer, loss=loss, metrics=[accuracy], jit_compile=False, steps_per_execution=steps_per_execution)
    with disk_errors(f"the run folder {progress.folder}"):
        (progress.folder / "checkpoints").mkdir(exist_ok=True)
    checkpoint = progress.folder / "checkpoints" / f"{name}.weights.h5"
    before = (after.val_loss, after.val_accuracy) if after else None
    best = BestEpoch(checkpoint, monitor=training.monitor, patience=training.patience, before=before)
    interrupt = StopOnInterrupt()
    log = EpochLog(name, training.epochs, progress.show, progress.show_progress, progress.keep)
    board = keras.callbacks.TensorBoard(str(progress.folder / "logs" / name), write_graph=False)
    try:
        model.fit(
            train,
            validation_data=val,
            epochs=training.epochs,
            verbose=0,
            shuffle=False,
            callbacks=[StopOnNan(), log, best, interrupt, board],
        )
    except tf.errors.OpError as error:
        raise UserError(_find_user_error(error)) from error
    finally:
        interrupt.give_back()
    best.restore()
    progress.show(
        f"{name}: best on val by {training.monitor} is epoch {best.epoch}, loss {best.loss:.4f}, "
        f"accuracy {best.accuracy:.3f}"
        if best.epoch
        else f"{name}: no epoch is better on val than the stage before, whose weights are kept"
    )
    return Stage(best.epoch, best.accuracy, best.loss, interrupt.interrupted)


def _find_user_error(error: tf.errors.OpError) -> str:
    """A UserError raised inside `tf.data` comes back as text inside TensorFlow's own error."""
    text = str(error.message)
    if "UserError: " in text:
        return text.split("UserError: ", 1)[1].splitlines()[0]
    return f"training failed: {type(error).__name__}: {text.splitlines()[0][:300]}. Try a smaller --batch_size."
