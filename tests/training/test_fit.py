"""One stage on numbers that the test makes: the epoch that is kept, and each way in which it ends early."""

from __future__ import annotations

import dataclasses
import os
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf

from tl_keras.config import TrainingConfig
from tl_keras.errors import UserError
from tl_keras.training.batches import make_batches
from tl_keras.training.callbacks import HISTORY_HEADER
from tl_keras.training.fit import Progress, Stage, fit_stage
from tl_keras.training.heads import build_head
from tl_keras.training.losses import build_loss

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 3, 120)
VALUES = (RANDOM.normal(size=(120, 5)) + 2 * np.eye(3, 5)[LABELS]).astype(np.float32)
TRAINING = TrainingConfig(
    epochs=5, batch_size=16, optimizer="sgd", learning_rate=0.1, momentum=0.0, schedule="constant"
)


def data(labels: np.ndarray, part: slice, **options) -> tf.data.Dataset:
    return make_batches(lambda p, v: VALUES[p], np.arange(120)[part], labels[part], batch_size=16, **options)


class Run:
    """One call of `fit_stage`, with what it reported."""

    def __init__(self, folder, val_labels=LABELS, seed=1, keep=None, show_progress=None):
        self.rows, self.lines, self.keep = [], [], keep
        self.train, self.val = data(LABELS, slice(0, 80), seed=seed), data(val_labels, slice(80, 120))
        progress = show_progress or (lambda text: None)
        self.progress = Progress(folder, self.lines.append, progress, self.note)
        keras.utils.set_random_seed(0)
        self.model = build_head(5, 3, dropout=0.3, standardize=None)

    def note(self, row) -> None:
        self.rows.append(dict(zip(HISTORY_HEADER, row, strict=True)))
        if self.keep:
            self.keep(self.rows[-1])

    def fit(self, after: Stage | None = None, **changes) -> Stage:
        training = dataclasses.replace(TRAINING, **changes)
        return fit_stage(
            self.model,
            self.train,
            self.val,
            name="head",
            loss=build_loss(3, label_smoothing=0, class_weights=None),
            learning_rate=training.learning_rate,
            training=training,
            progress=self.progress,
            after=after,
        )

    def on_val(self) -> tuple[float, float]:
        """Loss and accuracy of the model as it is, by numpy."""
        logits = self.model.predict(VALUES[80:], verbose=0).astype(np.float64)
        labels = np.concatenate([labels for _, labels in self.val.as_numpy_iterator()])
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return -logs[np.arange(40), labels].mean(), (logits.argmax(1) == labels).mean()


WRONG = (LABELS + 1) % 3  # what is learnt from train is wrong here: val is worse with each epoch


def test_it_learns_and_each_epoch_is_a_row(tmp_path):
    run = Run(tmp_path)
    stage = run.fit(epochs=8)
    assert [row["epoch"] for row in run.rows] == list(range(1, 9))
    assert {row["stage"] for row in run.rows} == {"head"}
    assert run.rows[-1]["loss"] < run.rows[0]["loss"] < np.log(3)
    assert {row["learning_rate"] for row in run.rows} == {"0.1"}
    assert stage.val_accuracy > 0.7
    assert not stage.interrupted
    assert (tmp_path / "checkpoints" / "head.weights.h5").is_file()
    assert list((tmp_path / "logs" / "head").rglob("events*"))


@pytest.mark.parametrize("monitor", ["loss", "accuracy"])
def test_the_model_ends_with_the_epoch_that_was_best_on_val(tmp_path, monitor):
    run = Run(tmp_path)
    stage = run.fit(epochs=12, learning_rate=3.0, monitor=monitor)  # far too large: up and down
    values = [row[f"val_{monitor}"] for row in run.rows]
    best = min(values) if monitor == "loss" else max(values)
    assert values[-1] != best
    assert values[stage.best_epoch - 1] == best
    loss, accuracy = run.on_val()
    assert loss == pytest.approx(stage.val_loss, rel=1e-4)
    assert accuracy == pytest.approx(stage.val_accuracy)
    assert stage.val_loss == pytest.approx(run.rows[stage.best_epoch - 1]["val_loss"], abs=1e-6)
    assert run.lines[-1].startswith(f"head: best on val by {monitor} is epoch {stage.best_epoch}, loss ")


@pytest.mark.parametrize(("patience", "epochs"), [(1, 2), (3, 4), (None, 6)])
def test_patience_ends_a_stage(tmp_path, patience, epochs):
    run = Run(tmp_path, val_labels=WRONG)
    stage = run.fit(epochs=6, patience=patience)
    assert len(run.rows) == epochs
    assert stage.best_epoch == 1


def test_a_stage_that_makes_it_worse_leaves_the_weights_of_the_stage_before(tmp_path):
    run = Run(tmp_path, val_labels=WRONG)
    loss, accuracy = run.on_val()
    before = [variable.numpy() for variable in run.model.weights]
    stage = run.fit(after=Stage(4, accuracy, loss, False))
    assert stage == Stage(0, accuracy, loss, False)
    for variable, value in zip(run.model.weights, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    assert run.lines[-1] == "head: no epoch is better on val than the stage before, whose weights are kept"


def test_the_same_seed_gives_the_same_numbers_and_another_others(tmp_path):
    def numbers(seed):
        run = Run(tmp_path, seed=seed)
        run.fit(epochs=3)
        return [(row["loss"], row["val_loss"]) for row in run.rows]

    assert numbers(1) == numbers(1)
    assert numbers(1) != numbers(2)


def test_ctrl_c_ends_the_stage_after_the_step_and_keeps_the_best_epoch(tmp_path):
    handler = signal.getsignal(signal.SIGINT)

    def interrupt(text):
        if text.startswith("head epoch 3/5 step 2/"):
            os.kill(os.getpid(), signal.SIGINT)

    run = Run(tmp_path, show_progress=interrupt)
    stage = run.fit()
    assert stage.interrupted
    assert len(run.rows) == 3
    assert stage.best_epoch in (1, 2, 3)
    assert run.on_val()[0] == pytest.approx(stage.val_loss, rel=1e-4)
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_in_the_first_epoch_keeps_that(tmp_path):
    run = Run(tmp_path, show_progress=lambda text: os.kill(os.getpid(), signal.SIGINT) if "1/5 step 1/" in text else 0)
    stage = run.fit()
    assert stage.interrupted
    assert stage.best_epoch == 1
    assert np.abs(run.model.get_layer("logits").kernel.numpy()).max() > 0


def test_ctrl_c_between_epochs_is_seen(tmp_path):
    run = Run(tmp_path, keep=lambda row: os.kill(os.getpid(), signal.SIGINT) if row["epoch"] == 2 else None)
    assert run.fit().interrupted
    assert len(run.rows) <= 3


def test_a_loss_that_explodes_is_one_line_of_advice_and_sigint_is_given_back(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    run = Run(tmp_path)
    run.train = run.train.map(lambda values, labels: (values * 1e30, labels))
    with pytest.raises(UserError) as error:
        run.fit()
    assert "\n" not in str(error.value)
    assert "in epoch 1, step 2. Try a smaller --learning_rate" in str(error.value)
    assert signal.getsignal(signal.SIGINT) is handler


def test_weights_that_explode_in_the_very_last_step_are_told_as_well(tmp_path):
    run = Run(tmp_path)
    run.train = run.train.map(lambda values, labels: (values * 1e36, labels)).take(1)
    run.train = run.train.apply(tf.data.experimental.assert_cardinality(1))
    with pytest.raises(UserError, match="Try a smaller --learning_rate"):
        run.fit(epochs=1, learning_rate=1000.0)


def test_what_the_store_says_is_passed_on(tmp_path):
    calls = []

    def cleared(positions, views):
        calls.append(len(positions))
        if len(calls) > 3:
            raise UserError("the embedding store was cleared while it was in use. Run again.")
        return VALUES[positions]

    run = Run(tmp_path)
    run.train = make_batches(cleared, np.arange(80), LABELS[:80], batch_size=16, seed=1)
    with pytest.raises(UserError) as error:
        run.fit()
    assert str(error.value) == "the embedding store was cleared while it was in use. Run again."


def test_the_learning_rate_follows_its_schedule_over_the_whole_stage(tmp_path):
    run = Run(tmp_path)
    run.fit(epochs=4, schedule="cosine", learning_rate=0.1, warmup_epochs=1)
    rates = [float(row["learning_rate"]) for row in run.rows]
    # after 5, 10, 15 and 20 of 20 steps, the first 5 of which rise
    assert rates == pytest.approx([0.1, 0.075, 0.025, 0.0], abs=1e-3)
