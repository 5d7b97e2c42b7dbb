"""The stages on a network of nine layers: what is trained changes, what is frozen does not, by a single bit."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from tl_keras.config import TrainingConfig
from tl_keras.data.examples import Examples
from tl_keras.data.sources import Source
from tl_keras.data.splits import UNUSED
from tl_keras.training import stages
from tl_keras.training.callbacks import HISTORY_HEADER
from tl_keras.training.fit import Progress, Stage
from tl_keras.training.heads import attach
from tl_keras.training.stages import Task, fit_head, fit_tail, new_head

COUNT, CLASSES = 90, 3
LABELS = (np.arange(COUNT) * 7 % CLASSES).astype(np.int32)
SPLITS = np.where(np.arange(COUNT) < 60, 0, 1).astype(np.int8)
SPLITS[[5, 70]] = UNUSED
RANDOM = np.random.default_rng(0)
MAPS = (RANDOM.normal(size=(COUNT, 6, 6, 3)) + 1.5 * np.eye(3)[LABELS][:, None, None]).astype(np.float32)
TRAINING = TrainingConfig(
    epochs=2,
    batch_size=16,
    optimizer="sgd",
    learning_rate=0.1,
    backbone_learning_rate=0.02,
    momentum=0.9,
    schedule="constant",
    monitor="loss",
)


class Stored:
    """Stands for the embedding store, and notes what is read."""

    name = "stored"

    def __init__(self, values: np.ndarray = MAPS):
        self.values, self.asked = values, []

    def read(self, positions, views=None):
        views = np.zeros(len(positions), int) if views is None else views
        self.asked += list(zip(positions.tolist(), views.tolist(), strict=True))
        values = self.values[positions]
        mirrored = values[:, :, ::-1] if values.ndim > 2 else -values
        return np.where(views.reshape(-1, *[1] * (values.ndim - 1)) == 1, mirrored, values)


class Job:
    """One task, and what its stages reported."""

    def __init__(self, folder, seed: int = 0, **changes):
        self.rows, self.lines = [], []
        source = Source(
            "x", [str(n) for n in range(COUNT)], LABELS, ("a", "b", "c"), SPLITS, lambda positions: iter(())
        )
        training = dataclasses.replace(TRAINING, **changes)
        if (folder / "checkpoints").exists():  # a second job would continue the first one
            folder = Path(tempfile.mkdtemp(dir=folder))
        progress = Progress(folder, self.lines.append, lambda text: None, self.rows.append)
        self.task = Task(Examples(source, SPLITS, np.zeros(COUNT, "V32"), {}), training, seed, progress)
        keras.utils.set_random_seed(seed)

    def column(self, name: str) -> list:
        return [row[HISTORY_HEADER.index(name)] for row in self.rows]


def build_tail(seed: int = 3) -> keras.Model:
    """Two convolutions with BatchNormalization, whose statistics are not those of any batch."""
    keras.utils.set_random_seed(seed)
    inputs = x = keras.Input((6, 6, 3), name="maps")
    for number in (1, 2):
        x = keras.layers.Conv2D(8, 3, padding="same", use_bias=False, name=f"conv{number}")(x)
        x = keras.layers.BatchNormalization(name=f"bn{number}")(x)
        x = keras.layers.ReLU(name=f"relu{number}")(x)
    tail = keras.Model(inputs, keras.layers.GlobalAveragePooling2D(name="pool")(x), name="Toy")
    for number in (1, 2):
        tail.get_layer(f"bn{number}").moving_mean.assign(np.linspace(-0.3, 0.3, 8))
        tail.get_layer(f"bn{number}").moving_variance.assign(np.linspace(0.5, 2, 8))
    return tail


def values_of(*models: keras.Model) -> dict[str, np.ndarray]:
    return {variable.path: variable.numpy().copy() for model in models for variable in model.weights}


def changed(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name].tobytes() != after[name].tobytes()}


def run_tail(folder, names=("conv2",), *, after=None, seed=0, crop=False, values=MAPS, **changes):
    """Job, tail, head, stage, and which weights changed."""
    job, tail = Job(folder, seed, **changes), build_tail()
    head = new_head(job.task, dim=8)
    before = values_of(tail, head)
    layers = [tail.get_layer(name) for name in names]
    stage = fit_tail(job.task, Stored(values), tail, head, layers=layers, crop=crop, after=after)
    return job, tail, head, stage, changed(before, values_of(tail, head))


WORSE = Stage(best_epoch=4, val_accuracy=0.0, val_loss=100.0, interrupted=False)
BETTER = Stage(best_epoch=4, val_accuracy=1.0, val_loss=0.0, interrupted=False)
HEAD = {"logits/kernel", "logits/bias"}


# the head

VECTORS = MAPS.mean((1, 2)) * [1, 10, 0.1] + [0, 5, 1]


def test_a_head_learns_from_train_and_is_measured_on_all_of_val(tmp_path):
    job = Job(tmp_path, epochs=4)
    stored = Stored(VECTORS.astype(np.float32))
    head, stage = fit_head(job.task, stored)
    assert job.column("stage") == ["head"] * 4
    assert stage.val_accuracy > 0.9
    val = np.flatnonzero(SPLITS == 1)
    logits = head.predict(stored.values[val], verbose=0)
    assert np.mean(logits.argmax(1) == LABELS[val]) == pytest.approx(stage.val_accuracy)
    assert set(stored.asked) == {(position, 0) for position in np.flatnonzero(SPLITS >= 0)}


def test_a_head_standardises_by_train_alone(tmp_path):
    stored = Stored(VECTORS.astype(np.float32))
    head, _ = fit_head(Job(tmp_path, standardize=True).task, stored)
    train = stored.values[SPLITS == 0]
    np.testing.assert_allclose(np.ravel(head.get_layer("standardize").mean), train.mean(0), rtol=1e-5)
    assert [layer.name for layer in head.layers][1:] == ["standardize", "logits"]
    head, _ = fit_head(Job(tmp_path, standardize=False, dropout=0.5).task, stored)
    assert [layer.name for layer in head.layers][1:] == ["dropout", "logits"]


def test_a_new_head_gives_all_classes_alike(tmp_path):
    job = Job(tmp_path)
    for head in (new_head(job.task, dim=8), new_head(job.task, Stored(np.ones((COUNT, 8), np.float32)))):
        assert head.input_shape == (None, 8)
        assert head.output_shape == (None, 3)
        assert not head.predict(np.ones((4, 8), np.float32), verbose=0).any()


def test_mirrored_views_are_drawn_for_train_and_never_for_val(tmp_path):
    stored = Stored(VECTORS.astype(np.float32))
    fit_head(Job(tmp_path, augment="flip", epochs=3).task, stored)
    assert {view for position, view in stored.asked if SPLITS[position] == 0} == {0, 1}
    assert {view for position, view in stored.asked if SPLITS[position] == 1} == {0}


def test_the_loss_is_what_the_recipe_says(tmp_path, monkeypatch):
    seen = []
    build_loss = stages.build_loss

    def note(num_classes, **options):
        seen.append((num_classes, options))
        return build_loss(num_classes, **options)

    monkeypatch.setattr(stages, "build_loss", note)
    stored = Stored(VECTORS.astype(np.float32))
    fit_head(Job(tmp_path, epochs=1, label_smoothing=0.2).task, stored)
    fit_head(Job(tmp_path, epochs=1, class_weights="balanced").task, stored)
    assert seen[0] == (3, {"label_smoothing": 0.2, "class_weights": None})
    counts = np.bincount(LABELS[SPLITS == 0])
    np.testing.assert_allclose(seen[1][1]["class_weights"], counts.sum() / (3 * counts), rtol=1e-6)


def test_the_same_seed_gives_the_same_head_to_the_bit_and_another_does_not(tmp_path):
    def weights(seed):
        return values_of(fit_head(Job(tmp_path, seed, dropout=0.3).task, Stored(VECTORS.astype(np.float32)))[0])

    first = weights(1)
    assert changed(first, weights(1)) == set()
    assert changed(first, weights(2)) >= HEAD


# the tail


def test_only_the_layers_that_are_named_and_the_head_change(tmp_path):
    job, _, _, stage, found = run_tail(tmp_path, ["conv2"], after=WORSE)
    assert found == {"conv2/kernel", *HEAD}
    assert job.column("stage") == ["tail", "tail"]
    assert stage.best_epoch in (1, 2)


def test_every_layer_that_is_named_changes(tmp_path):
    assert run_tail(tmp_path, ["conv1", "conv2"], after=WORSE)[4] == {"conv1/kernel", "conv2/kernel", *HEAD}


def test_frozen_batch_normalization_keeps_its_statistics_and_stays_in_inference_mode(tmp_path):
    _, tail, head, _, found = run_tail(tmp_path, ["conv1", "conv2"], after=WORSE, epochs=3)
    assert not {name for name in found if name.startswith("bn")}
    np.testing.assert_array_equal(tail.get_layer("bn1").moving_mean, np.linspace(-0.3, 0.3, 8).astype(np.float32))
    model = attach(head, tail)
    np.testing.assert_array_equal(model(MAPS[:8], training=True), model(MAPS[:8], training=False))


def test_batch_normalization_that_is_trained_from_scratch_learns_its_statistics(tmp_path):
    job, _, _, _, found = run_tail(tmp_path, ["conv1", "bn1", "conv2", "bn2"])
    parts = ("gamma", "beta", "moving_mean", "moving_variance")
    assert found == {"conv1/kernel", "conv2/kernel", *HEAD} | {f"bn{n}/{part}" for n in (1, 2) for part in parts}
    assert job.column("stage") == ["network", "network"]


def test_without_layers_only_the_head_is_trained_on_the_frozen_tail(tmp_path):
    job, _, _, _, found = run_tail(tmp_path, [], after=WORSE, crop=True)
    assert found == HEAD
    assert set(job.column("learning_rate")) == {"0.1"}


def test_what_was_trainable_before_is_frozen_unless_it_is_named(tmp_path):
    job, tail = Job(tmp_path), build_tail()
    for layer in tail.layers:
        layer.trainable = layer.name == "conv1"
    head = new_head(job.task, dim=8)
    before = values_of(tail, head)
    fit_tail(job.task, Stored(), tail, head, layers=[tail.get_layer("conv2")], crop=False, after=WORSE)
    assert changed(before, values_of(tail, head)) == {"conv2/kernel", *HEAD}


@pytest.mark.parametrize(("after", "rate", "name"), [(WORSE, "0.02", "tail"), (None, "0.1", "network")])
def test_layers_that_were_pretrained_learn_gently(tmp_path, after, rate, name):
    job, *_ = run_tail(tmp_path, ["conv2"], after=after)
    assert set(job.column("learning_rate")) == {rate}
    assert (tmp_path / "checkpoints" / f"{name}.npz").is_file()
    assert (tmp_path / "logs" / name).is_dir()


def test_tail_and_head_end_with_the_best_epoch(tmp_path):
    job, tail, head, stage, _ = run_tail(tmp_path, ["conv1", "conv2"], learning_rate=2.0, epochs=4, momentum=0.0)
    assert stage.val_loss == pytest.approx(min(job.column("val_loss")), abs=1e-6)
    assert job.column("val_loss")[stage.best_epoch - 1] == pytest.approx(stage.val_loss, abs=1e-6)
    val = SPLITS == 1
    logits = head.predict(tail.predict(MAPS[val], verbose=0), verbose=0)
    losses = keras.losses.sparse_categorical_crossentropy(LABELS[val], logits, from_logits=True)
    assert float(tf.reduce_mean(losses)) == pytest.approx(stage.val_loss, rel=1e-4)


@pytest.mark.parametrize("monitor", ["loss", "accuracy"])
def test_a_tail_that_makes_it_worse_leaves_everything_as_it_was(tmp_path, monitor):
    job, _, _, stage, found = run_tail(tmp_path, ["conv1", "bn1", "conv2"], after=BETTER, monitor=monitor)
    assert found == set()
    assert stage == Stage(0, 1.0, 0.0, False)
    assert len(job.rows) == 2
    assert job.lines[-1] == "tail: no epoch improved on val over the previous stage; its weights are kept"


def test_the_tail_begins_where_the_head_ended(tmp_path):
    job, tail = Job(tmp_path, epochs=8), build_tail()
    head, stage = fit_head(job.task, Stored(tail.predict(MAPS, verbose=0)))
    after = fit_tail(job.task, Stored(), tail, head, layers=[tail.get_layer("conv2")], crop=False, after=stage)
    first = job.rows[8]
    assert first[:2] == ("tail", 1)
    assert first[HISTORY_HEADER.index("loss")] < job.rows[0][HISTORY_HEADER.index("loss")]
    assert after.val_loss <= stage.val_loss
    assert after.val_accuracy > 0.9


@pytest.mark.parametrize("changes", [{"crop": True, "dropout": 0.3}, {"augment": "flip"}], ids=str)
def test_the_same_seed_gives_the_same_tail_to_the_bit_and_another_does_not(tmp_path, changes):
    def run(seed):
        job, tail, head, *_ = run_tail(tmp_path, ["conv1", "conv2"], after=WORSE, seed=seed, **changes)
        return job.column("loss"), values_of(tail, head)

    (losses, first), (again, second), (others, third) = run(1), run(1), run(2)
    assert losses == again
    assert changed(first, second) == set()
    assert losses != others
    assert changed(first, third) >= {"conv1/kernel", "conv2/kernel"}


def test_crops_are_of_train_alone(tmp_path, monkeypatch):
    seen = []
    make_batches = stages.make_batches

    def note(read, positions, labels, **options):
        order = options.get("order")
        seen.append((int(SPLITS[positions[0]]), options.get("crop", False), order and order._seed))
        return make_batches(read, positions, labels, **options)

    monkeypatch.setattr(stages, "make_batches", note)
    run_tail(tmp_path, ["conv2"], crop=True, seed=5, epochs=1)
    assert sorted(seen) == [(0, True, 6), (1, False, None)]


def test_whole_images_are_trained_on_as_they_are_stored(tmp_path):
    pixels = (MAPS * 40 + 128).clip(0, 255).astype(np.uint8)
    _, _, _, stage, found = run_tail(tmp_path, ["conv1"], values=pixels, epochs=1)
    assert found == {"conv1/kernel", *HEAD}
    assert np.isfinite(stage.val_loss)
