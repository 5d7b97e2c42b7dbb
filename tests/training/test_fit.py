"""One stage on numbers that the test makes: the epoch that is kept, and each way in which it ends early."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf

from tl_keras.config import TrainingConfig
from tl_keras.errors import UserError
from tl_keras.training import callbacks
from tl_keras.training.batches import EpochOrder, make_batches
from tl_keras.training.callbacks import HISTORY_HEADER
from tl_keras.training.fit import Epochs, Progress, Stage, fit_stage
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


def epochs(seed: int, change=lambda batches: batches, read=lambda positions, views: VALUES[positions]) -> Epochs:
    """Training batches of the first eighty examples."""
    order = EpochOrder(seed)

    def make(first_step: int) -> tf.data.Dataset:
        return change(make_batches(read, np.arange(80), LABELS[:80], batch_size=16, order=order, first_step=first_step))

    return Epochs(order, 5, make)


WRONG = (LABELS + 1) % 3  # what is learnt from train is wrong here: val is worse with each epoch


class Run:
    """One call of `fit_stage`, with what it reported."""

    def __init__(self, folder, val_labels=LABELS, seed=1, keep=None, show_progress=None):
        self.rows, self.lines, self.keep, self.identity = [], [], keep, ""
        self.train, self.val = epochs(seed), data(val_labels, slice(80, 120))
        folder.mkdir(exist_ok=True)
        progress = show_progress or (lambda text: None)
        self.progress = Progress(folder, self.lines.append, progress, self.note)
        keras.utils.set_random_seed(0)
        self.model = build_head(5, 3, dropout=0.3, standardize=None)

    def note(self, *rows) -> None:
        for row in rows:
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
            identity=self.identity,
        )

    def learn(self, labels: np.ndarray) -> None:
        """Fits the model by plain Keras, to begin with known weights."""
        self.model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        self.model.fit(VALUES, labels, epochs=20, verbose=0)

    def on_val(self) -> tuple[float, float]:
        """Loss and accuracy of the model as it is, by numpy."""
        logits = self.model.predict(VALUES[80:], verbose=0).astype(np.float64)
        labels = np.concatenate([labels for _, labels in self.val.as_numpy_iterator()])
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return -logs[np.arange(40), labels].mean(), (logits.argmax(1) == labels).mean()


def test_it_learns_and_each_epoch_is_a_row(tmp_path):
    run = Run(tmp_path)
    stage = run.fit(epochs=8)
    assert [row["epoch"] for row in run.rows] == list(range(1, 9))
    assert {row["stage"] for row in run.rows} == {"head"}
    assert run.rows[-1]["loss"] < run.rows[0]["loss"] < np.log(3)
    assert {row["learning_rate"] for row in run.rows} == {"0.1"}
    assert stage.val_accuracy > 0.7
    assert not stage.interrupted
    assert (tmp_path / "checkpoints" / "head.npz").is_file()
    assert list((tmp_path / "logs" / "head").rglob("events*"))


@pytest.mark.parametrize("monitor", ["loss", "accuracy"])
def test_the_model_ends_with_the_epoch_that_was_best_on_val(tmp_path, monitor):
    run = Run(tmp_path, val_labels=WRONG)
    run.learn(WRONG)  # training then unlearns it: the first epochs are the best on val
    stage = run.fit(epochs=12, monitor=monitor)
    values = [row[f"val_{monitor}"] for row in run.rows]
    best = min(values) if monitor == "loss" else max(values)
    assert values[-1] != best
    assert values[stage.best_epoch - 1] == best
    loss, accuracy = run.on_val()
    assert loss == pytest.approx(stage.val_loss, rel=1e-4)
    assert accuracy == pytest.approx(stage.val_accuracy)
    assert stage.val_loss == pytest.approx(run.rows[stage.best_epoch - 1]["val_loss"], abs=1e-6)
    assert run.lines[-1].startswith(f"head: best epoch by val {monitor}: {stage.best_epoch}, val loss ")


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
    assert run.lines[-1] == "head: no epoch improved on val over the previous stage; its weights are kept"


def test_the_same_seed_gives_the_same_numbers_and_another_others(tmp_path):
    def numbers(seed, folder):
        run = Run(tmp_path / folder, seed=seed)
        run.fit(epochs=3)
        return [(row["loss"], row["val_loss"]) for row in run.rows]

    first = numbers(1, "a")
    assert first == numbers(1, "b")
    assert first != numbers(2, "c")


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
    run.train = epochs(1, lambda batches: batches.map(lambda values, labels: (values * 1e30, labels)))
    with pytest.raises(UserError) as error:
        run.fit()
    assert "\n" not in str(error.value)
    assert "in epoch 1, step 2. Try a smaller --learning_rate" in str(error.value)
    assert signal.getsignal(signal.SIGINT) is handler


def test_weights_that_explode_in_the_very_last_step_are_told_as_well(tmp_path):
    run = Run(tmp_path)

    def explode(batches):
        one = batches.map(lambda values, labels: (values * 1e36, labels)).take(1)
        return one.apply(tf.data.experimental.assert_cardinality(1))

    run.train = epochs(1, explode)
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
    run.train = epochs(1, read=cleared)
    with pytest.raises(UserError) as error:
        run.fit()
    assert str(error.value) == "the embedding store was cleared while it was in use. Run again."


def test_the_learning_rate_follows_its_schedule_over_the_whole_stage(tmp_path):
    run = Run(tmp_path)
    run.fit(epochs=4, schedule="cosine", learning_rate=0.1, warmup_epochs=1)
    rates = [float(row["learning_rate"]) for row in run.rows]
    # after 5, 10, 15 and 20 of 20 steps, the first 5 of which rise
    assert rates == pytest.approx([0.1, 0.075, 0.025, 0.0], abs=1e-3)


# interruptions


class Killed(BaseException):
    """Ends a stage as SIGKILL would: nothing of it runs any more."""


def kill_at(number: int):
    """Shows progress, and ends the process that it stands for after so many steps."""
    calls = []

    def show(text: str) -> None:
        calls.append(text)
        if len(calls) == number:
            raise Killed

    return show


def weights(run: Run) -> list[np.ndarray]:
    return [variable.numpy() for variable in run.model.weights]


def assert_same_bits(first: list[np.ndarray], second: list[np.ndarray]) -> None:
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


ADAM = {"optimizer": "adamw", "learning_rate": 0.05, "schedule": "cosine", "weight_decay": 0.01}


PATIENT = {"patience": 2, "learning_rate": 3.0}
WITHIN_AND_AFTER = [
    (ADAM, 0.0),
    (PATIENT, 600.0),
    *(pytest.param(*one, marks=pytest.mark.slow) for one in ((ADAM, 600.0), (PATIENT, 0.0), ({"momentum": 0.9}, 0.0))),
]


@pytest.mark.parametrize(("changes", "write_seconds"), WITHIN_AND_AFTER)
def test_a_stage_that_is_killed_twice_ends_with_the_same_bits(tmp_path, monkeypatch, changes, write_seconds):
    monkeypatch.setattr(callbacks, "WRITE_SECONDS", write_seconds)
    whole = Run(tmp_path / "whole")
    expected = whole.fit(**changes)
    steps = 5 * len(whole.rows)
    rows = [{**row, "seconds": 0} for row in whole.rows]
    for first, second in [(1, 1), (steps // 3, 4), (steps // 2 + 1, steps), (steps, 2)]:
        folder = tmp_path / f"{first}-{second}"
        for steps_until in (first, second):
            with contextlib.suppress(Killed):
                Run(folder, show_progress=kill_at(steps_until)).fit(**changes)
        last = Run(folder)
        assert last.fit(**changes) == expected
        assert_same_bits(weights(last), weights(whole))
        assert [{**row, "seconds": 0} for row in last.rows] == rows


def test_within_an_epoch_only_the_steps_since_the_last_state_are_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "WRITE_SECONDS", 0.0)
    with pytest.raises(Killed):
        Run(tmp_path, show_progress=kill_at(8)).fit()
    shown = []
    run = Run(tmp_path, show_progress=shown.append)
    run.fit()
    assert run.lines[0] == "head: resumed after 1 of 5 epochs and 2 steps"
    assert len(shown) == 25 - 7


def test_a_stage_that_has_ended_is_not_trained_again(tmp_path):
    first = Run(tmp_path)
    stage = first.fit()
    second = Run(tmp_path, show_progress=kill_at(1))
    assert second.fit() == stage
    assert_same_bits(weights(second), weights(first))
    assert second.rows == first.rows
    assert second.lines[-1].startswith("head: trained before the interruption; best epoch by val accuracy: ")


UNUSED = (
    "head: the checkpoint does not match this data and these starting weights, or is damaged: training starts from the "
    "first epoch"
)


def test_a_state_of_other_images_is_not_taken(tmp_path):
    Run(tmp_path).fit()
    other = Run(tmp_path)
    other.identity = "other images"
    other.fit()
    assert other.lines[0] == UNUSED
    assert other.lines[1].startswith("head epoch 1/5")


@pytest.mark.parametrize("content", [b"", b"PK no archive", None])
def test_a_damaged_state_begins_the_stage_anew(tmp_path, content):
    whole = Run(tmp_path)
    whole.fit()
    path = tmp_path / "checkpoints" / "head.npz"
    path.write_bytes(path.read_bytes()[:900] if content is None else content)
    again = Run(tmp_path)
    again.fit()
    assert again.lines[0] == UNUSED
    assert again.lines[1].startswith("head epoch 1/5")
    assert_same_bits(weights(again), weights(whole))


def test_ctrl_c_in_an_epoch_and_then_again_gives_the_same_bits(tmp_path):
    whole = Run(tmp_path / "whole")
    whole.fit()

    def interrupt(text):
        if text.startswith("head epoch 3/5 step 2/"):
            os.kill(os.getpid(), signal.SIGINT)

    assert Run(tmp_path / "cut", show_progress=interrupt).fit().interrupted
    rest = Run(tmp_path / "cut")
    assert not rest.fit().interrupted
    assert rest.lines[0] == "head: resumed after 2 of 5 epochs"
    assert_same_bits(weights(rest), weights(whole))


def test_a_full_disk_costs_the_checkpoint_and_not_the_training(tmp_path, monkeypatch):
    whole = Run(tmp_path / "whole")
    expected = whole.fit()

    def full(path, state):
        raise UserError(f"the disk is full: {path} could not be written. Free some space and run again.")

    monkeypatch.setattr(callbacks, "write_state", full)
    run = Run(tmp_path / "full")
    assert run.fit() == expected
    assert_same_bits(weights(run), weights(whole))
    warnings = [line for line in run.lines if line.startswith("warning: ")]
    assert warnings == [
        f"warning: the disk is full: {tmp_path}/full/checkpoints/head.npz could not be written. Free some space and "
        "run again. Training continues in memory, without a new checkpoint"
    ]


def test_a_history_that_cannot_be_written_does_not_end_the_training(tmp_path):
    def full(row):
        raise UserError("the disk is full: history.csv could not be written. Free some space and run again.")

    run = Run(tmp_path, keep=full)
    run.fit()
    assert len(run.rows) == 5
    assert sum(line.startswith("warning: the disk is full: history.csv") for line in run.lines) == 1


@pytest.mark.parametrize("after", [True, False])
def test_a_loss_that_explodes_later_leaves_the_best_weights_from_before(tmp_path, after):
    run = Run(tmp_path)
    loss, accuracy = run.on_val()
    calls = []

    def explode(values, labels):
        calls.append(None)
        return values * np.float32(1e36 if len(calls) > (0 if after else 5) else 1), labels

    def change(batches):
        def apply(values, labels):
            values, labels = tf.numpy_function(explode, (values, labels), (tf.float32, tf.int32))
            return tf.ensure_shape(values, (None, 5)), tf.ensure_shape(labels, (None,))

        return batches.map(apply)

    run.train = epochs(1, change)
    stage = run.fit(after=Stage(4, accuracy, loss, False) if after else None, learning_rate=1000.0 if after else 0.1)
    assert stage.diverged.startswith("the loss became ")
    assert stage.best_epoch == (0 if after else 1)
    assert run.on_val()[0] == pytest.approx(stage.val_loss, rel=1e-4)
    again = Run(tmp_path)
    assert again.fit(after=Stage(4, accuracy, loss, False) if after else None).diverged == stage.diverged
