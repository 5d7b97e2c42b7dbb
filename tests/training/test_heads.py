"""The head, held against numpy and scikit-learn."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from tl_keras.training import heads
from tl_keras.training.heads import attach, build_head, measure_embeddings

VALUES = np.random.default_rng(0).gamma(2, 3, (101, 7)).astype(np.float32) * np.float32([1, 10, 0.1, 1, 5, 1, 0])


def batches(values: np.ndarray, batch_size: int) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices((values, np.zeros(len(values), np.int32))).batch(batch_size)


@pytest.mark.parametrize("batch_size", [1, 10, 100, 101, 1000])
@pytest.mark.parametrize("offset", [0, 1e4])
def test_mean_and_variance_are_those_of_numpy_in_whatever_batches(batch_size, offset):
    values = VALUES + np.float32(offset)
    mean, variance = measure_embeddings(batches(values, batch_size))
    assert mean.dtype == variance.dtype == np.float32
    np.testing.assert_allclose(mean, values.astype(np.float64).mean(0), rtol=1e-6)
    np.testing.assert_allclose(variance, values.astype(np.float64).var(0), rtol=1e-5, atol=1e-12)


def as_standardised(head: keras.Model, values: np.ndarray) -> np.ndarray:
    return keras.Model(head.input, head.get_layer("standardize").output).predict(values, verbose=0)


def test_without_its_floor_the_head_standardises_as_scikit_learn(monkeypatch):
    monkeypatch.setattr(heads, "_VARIANCE_FLOOR", 0.0)
    head = build_head(6, 3, dropout=0, standardize=measure_embeddings(batches(VALUES[:, :6], 32)))
    expected = StandardScaler().fit(VALUES[:, :6].astype(np.float64))
    np.testing.assert_allclose(as_standardised(head, VALUES[:, :6]), expected.transform(VALUES[:, :6]), atol=1e-4)
    unseen = np.float32([[1, 2, 3, 4, 5, 6]])
    np.testing.assert_allclose(as_standardised(head, unseen), expected.transform(unseen), rtol=1e-4)


def test_the_floor_is_a_share_of_the_mean_variance():
    mean, variance = VALUES.mean(0), VALUES.var(0)
    head = build_head(7, 3, dropout=0, standardize=(mean, variance))
    floor = heads._VARIANCE_FLOOR * variance.mean()
    np.testing.assert_allclose(as_standardised(head, VALUES), (VALUES - mean) / np.sqrt(variance + floor), atol=1e-4)


def test_a_unit_that_is_constant_in_train_does_not_explode():
    head = build_head(7, 3, dropout=0, standardize=measure_embeddings(batches(VALUES, 32)))
    unseen = VALUES[:1].copy()
    unseen[0, 6] = 1.0  # it was always 0
    assert abs(as_standardised(head, unseen)[0, 6]) < 40


def test_embeddings_that_are_all_the_same_give_numbers():
    same = np.ones((5, 4), np.float32)
    head = build_head(4, 2, dropout=0, standardize=measure_embeddings(batches(same, 2)))
    np.testing.assert_array_equal(head.predict(same, verbose=0), np.zeros((5, 2)))


@pytest.mark.parametrize("standardize", [None, (np.zeros(7, np.float32), np.ones(7, np.float32))])
def test_a_new_head_finds_all_classes_alike(standardize):
    head = build_head(7, 5, dropout=0.5, standardize=standardize)
    expected = ["embeddings", *(["standardize"] if standardize else []), "dropout", "logits"]
    assert [layer.name for layer in head.layers] == expected
    np.testing.assert_array_equal(head.predict(VALUES, verbose=0), np.zeros((101, 5)))
    assert [tuple(variable.shape) for variable in head.trainable_variables] == [(7, 5), (5,)]


def test_dropout_is_for_training_alone():
    head = build_head(7, 2, dropout=0.5, standardize=None)
    head.get_layer("logits").kernel.assign(np.ones((7, 2)))
    still = head(VALUES, training=False).numpy()
    np.testing.assert_allclose(still, np.repeat(VALUES.sum(1, keepdims=True), 2, 1), rtol=1e-5)
    assert np.abs(head(VALUES, training=True).numpy() - still).max() > 1


def test_a_head_behind_a_backbone_is_one_flat_graph_of_the_same_layers():
    images = keras.Input((4, 4, 3), name="images")
    backbone = keras.Model(images, keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(6, 3)(images)), name="Toy")
    head = build_head(6, 3, dropout=0.1, standardize=(np.full(6, 0.5, np.float32), np.full(6, 2, np.float32)))
    head.get_layer("logits").kernel.assign(np.random.default_rng(1).normal(size=(6, 3)))
    model = attach(head, backbone)
    assert not any(isinstance(layer, keras.Model) for layer in model.layers)
    assert {id(layer) for layer in model.layers} == {id(layer) for layer in backbone.layers + head.layers[1:]}
    assert model.name == "Toy"
    pixels = np.random.default_rng(2).uniform(0, 255, (2, 4, 4, 3)).astype(np.float32)
    np.testing.assert_allclose(
        model.predict(pixels, verbose=0), head.predict(backbone.predict(pixels, verbose=0), verbose=0), rtol=1e-4
    )


def test_a_head_learns_what_logistic_regression_learns():
    labels = np.random.default_rng(3).integers(0, 3, 101)
    scaled = StandardScaler().fit_transform(VALUES[:, :6]).astype(np.float32)
    head = build_head(6, 3, dropout=0, standardize=None)
    head.compile(keras.optimizers.SGD(0.5, momentum=0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    head.fit(tf.data.Dataset.from_tensors((scaled, labels)).repeat(400), shuffle=False, verbose=0)
    exact = LogisticRegression(C=np.inf, max_iter=1000, tol=1e-8).fit(scaled, labels)
    probabilities = tf.nn.softmax(head.predict(scaled, verbose=0)).numpy()
    np.testing.assert_allclose(probabilities, exact.predict_proba(scaled), atol=2e-3)
