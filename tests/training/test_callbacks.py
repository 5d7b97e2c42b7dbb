"""The callbacks, on epochs that the test makes up."""

from __future__ import annotations

import math
import os
import signal
import types

import numpy as np
import pytest

from tl_keras.errors import UserError
from tl_keras.training.callbacks import HISTORY_HEADER, BestEpoch, EpochLog, StopOnInterrupt, StopOnNan


class Model:
    """Weights are the number of the epoch."""

    def __init__(self, epoch: int = 0) -> None:
        self.epoch, self.stop_training = epoch, False
        self.optimizer = types.SimpleNamespace(learning_rate=0.25)

    @property
    def weights(self) -> list[Weight]:
        return [Weight(self)]


class Weight:
    """A Keras variable."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def numpy(self) -> np.ndarray:
        return np.array(self._model.epoch)

    def assign(self, value: np.ndarray) -> None:
        self._model.epoch = int(value)


def play(best: BestEpoch, epochs: list[tuple[float, float]], model: Model | None = None) -> Model:
    """Runs through val losses and accuracies as `fit` would."""
    model = model or Model()
    best.set_model(model)
    best.on_train_begin()
    for number, (loss, accuracy) in enumerate(epochs):
        model.epoch = number + 1
        best.on_epoch_end(number, {"val_loss": loss, "val_accuracy": accuracy})
        if model.stop_training:
            break
    return model


LOSSES = [(1.0, 0.5), (0.8, 0.7), (0.5, 0.6), (0.9, 0.8), (0.7, 0.8)]


@pytest.mark.parametrize(
    ("monitor", "epochs", "expected"),
    [
        ("loss", LOSSES, 3),
        ("accuracy", LOSSES, 5),  # the lower loss decides among equals
        ("loss", [(1.0, 0.5), (1.0, 0.6), (1.0, 0.6)], 2),  # the higher accuracy does
        ("accuracy", [(1.0, 0.5), (1.0, 0.5)], 1),
        ("loss", [(3.0, 0.0)], 1),
        ("accuracy", [(3.0, 0.0)], 1),
        ("loss", [(math.nan, 0.5), (2.0, 0.1), (math.nan, 0.9)], 2),
    ],
)
def test_the_best_epochs_weights_are_restored(monitor, epochs, expected):
    best = BestEpoch(monitor=monitor, patience=None)
    model = play(best, epochs)
    assert model.epoch == len(epochs)
    best.restore()
    assert (best.epoch, model.epoch) == (expected, expected)
    assert (best.loss, best.accuracy) == epochs[expected - 1]


@pytest.mark.parametrize(
    ("monitor", "patience", "stops_after"),
    [("loss", 1, 4), ("loss", 2, 5), ("loss", 3, 5), ("accuracy", 1, 3), ("accuracy", 2, 5), ("loss", None, 5)],
)
def test_patience_counts_epochs_that_are_no_better(monitor, patience, stops_after):
    best = BestEpoch(monitor=monitor, patience=patience)
    model = play(best, LOSSES)
    assert model.epoch == stops_after
    assert model.stop_training == (patience in (1, 2) and (stops_after < 5 or (monitor, patience) == ("loss", 2)))


@pytest.mark.parametrize(("before", "expected"), [((0.4, 0.9), 0), ((0.6, 0.9), 3)])
def test_weights_from_before_stay_where_no_epoch_is_better(before, expected):
    best = BestEpoch(monitor="loss", patience=None, before=before)
    model = play(best, LOSSES, Model(epoch=0))
    best.restore()
    assert (best.epoch, model.epoch) == (expected, expected)
    assert best.loss == (0.4 if expected == 0 else 0.5)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_with_advice(loss):
    stop = StopOnNan()
    stop.on_epoch_begin(2)
    stop.on_train_batch_end(6, {"loss": 1e30})
    with pytest.raises(UserError) as error:
        stop.on_train_batch_end(7, {"loss": loss})
    assert str(error.value) == (
        f"the loss became {loss} in epoch 3, step 8. Try a smaller --learning_rate or --backbone_learning_rate, "
        "--warmup_epochs=1, or --optimizer=adamw; check that --weights fit."
    )


def test_a_loss_on_val_that_is_no_number_stops_as_well():
    stop = StopOnNan()
    stop.on_epoch_begin(0)
    stop.on_epoch_end(0, {"val_loss": 1e30})
    with pytest.raises(UserError, match=r"^the loss became nan in epoch 1, on val\. Try a smaller"):
        stop.on_epoch_end(0, {"val_loss": math.nan})


def test_an_epoch_is_shown_and_kept_as_a_row():
    shown, progress, rows = [], [], []
    log = EpochLog("head", 3, shown.append, progress.append, rows.append)
    log.set_model(Model())
    log.set_params({"steps": 7})
    log.on_epoch_begin(1)
    log.on_train_batch_end(4, {"loss": 0.123456})
    log.on_epoch_end(1, {"loss": 0.1234567, "accuracy": 0.5, "val_loss": 2.0, "val_accuracy": 0.25})
    assert progress == ["head epoch 2/3 step 5/7 loss 0.1235"]
    assert shown[0].startswith("head epoch 2/3: loss 0.1235 accuracy 0.500, val loss 2.0000 accuracy 0.250, ")
    row = dict(zip(HISTORY_HEADER, rows[0], strict=True))
    seconds = row.pop("seconds")
    assert 0 <= seconds < 5
    assert row == {
        "stage": "head",
        "epoch": 2,
        "loss": 0.123457,
        "accuracy": 0.5,
        "val_loss": 2.0,
        "val_accuracy": 0.25,
        "learning_rate": "0.25",
    }


def test_the_first_ctrl_c_ends_after_the_step_and_the_second_at_once():
    previous = signal.getsignal(signal.SIGINT)
    stop = StopOnInterrupt()
    model = Model()
    stop.set_model(model)
    stop.on_train_begin()
    try:
        stop.on_train_batch_end(0)
        assert not model.stop_training
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.interrupted
        stop.on_train_batch_end(1)
        assert model.stop_training
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.give_back()
    assert signal.getsignal(signal.SIGINT) is previous


def test_another_thread_leaves_signals_alone():
    import threading

    previous = signal.getsignal(signal.SIGINT)
    stop = StopOnInterrupt()

    def run() -> None:
        stop.on_train_begin()
        stop.give_back()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is previous
