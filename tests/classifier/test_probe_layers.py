"""What folded heads do at the edges: embeddings of zeros, all neighbours, classes of unequal numbers of vectors."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.contracts.test_probes import smooth
from tl_keras.classifier.probe_layers import NearestNeighbours, SupportVectors, size_in_bytes
from tl_keras.probes.estimators import PROBES, Recipe, fit_probe
from tl_keras.probes.fold import fold

RNG = np.random.default_rng(0)
LABELS = np.array([0] * 30 + [1] * 8 + [2] * 4, np.int32)
EMBEDDINGS = (RNG.normal(size=(42, 6)) + 2 * np.eye(6)[LABELS]).astype(np.float32)
OTHERS = RNG.normal(size=(50, 6)).astype(np.float32)


def compare(name: str, value: float, *, scale: str, fit: np.ndarray = EMBEDDINGS, others: np.ndarray = OTHERS) -> None:
    fitted = fit_probe(name, value, fit, LABELS, Recipe(scale=scale, max_iter=1000, seed=0))
    answer = tf.nn.softmax(fold(fitted, num_classes=3)(others)).numpy()
    np.testing.assert_allclose(answer, smooth(fitted, others, answer.shape[1]), atol=1e-9)


@pytest.mark.parametrize("name", ["logistic_regression", "linear_svm", "rbf_svm", "ridge"])
def test_an_embedding_of_zeros_has_no_length_to_be_brought_to_one(name):
    compare(name, 1.0, scale="l2", others=np.concatenate([OTHERS, np.zeros((1, 6), np.float32)]))


@pytest.mark.parametrize("scale", ["standard", "l2", "none"])
@pytest.mark.parametrize("name", PROBES)
def test_embeddings_that_are_all_the_same_give_what_scikit_learn_gives(name, scale):
    compare(name, 1.0, scale=scale, fit=np.ones_like(EMBEDDINGS), others=np.ones((3, 6), np.float32))


@pytest.mark.parametrize("scale", ["l2", "none"])
def test_two_classes_with_unequal_numbers_of_support_vectors(scale):
    few = LABELS < 2
    fitted = fit_probe("rbf_svm", 10.0, EMBEDDINGS[few], LABELS[few], Recipe(scale=scale, max_iter=1000, seed=0))
    first, second = fitted.pipeline[-1].n_support_
    assert first != second
    answer = tf.nn.softmax(fold(fitted, num_classes=2)(OTHERS)).numpy()
    np.testing.assert_allclose(answer, fitted.estimator.predict_proba(OTHERS.astype(np.float64)), atol=1e-9)


def test_a_class_that_was_not_fitted_can_not_be_folded():
    few = LABELS < 2
    fitted = fit_probe("ridge", 1.0, EMBEDDINGS[few], LABELS[few], Recipe(scale="none", max_iter=1000, seed=0))
    with pytest.raises(ValueError, match="^the probe has 2 of 3 classes$"):
        fold(fitted, num_classes=3)


@pytest.mark.parametrize("name", ["logistic_regression", "rbf_svm", "knn"])
def test_a_dimension_that_does_not_vary_changes_nothing(name):
    constant = EMBEDDINGS.copy()
    constant[:, 2] = 7
    compare(name, 1.0, scale="standard", fit=constant)


def test_all_of_train_may_vote():
    compare("knn", 42.0, scale="none")
    fitted = fit_probe("knn", 42.0, EMBEDDINGS, LABELS, Recipe(scale="none", max_iter=1000, seed=0))
    shares = tf.nn.softmax(fold(fitted, num_classes=3)(OTHERS[:2])).numpy()
    np.testing.assert_allclose(shares, [[(votes + 1 / 3) / 43 for votes in (30, 8, 4)]] * 2)


def test_a_layer_that_was_saved_without_smoothing_answers_as_it_did():
    config = {"name": "logits", "count": 4, "dim": 2, "unit": False, "num_classes": 3, "k": 4}
    layer = NearestNeighbours.from_config(config)
    layer.spread.assign(np.ones(2))
    shares = tf.nn.softmax(layer(np.zeros((1, 2), np.float32))).numpy()
    np.testing.assert_allclose(shares, [[1, 0, 0]], atol=1e-9)


@pytest.mark.parametrize("value", [0.01, 1.0, 1e4])
def test_classes_with_unequal_numbers_of_support_vectors(value):
    compare("rbf_svm", value, scale="standard")


def test_no_votes_are_no_infinity():
    fitted = fit_probe("knn", 1.0, EMBEDDINGS, LABELS, Recipe(scale="standard", max_iter=1000, seed=0))
    logits = fold(fitted, num_classes=3)(EMBEDDINGS).numpy()
    assert np.isfinite(logits).all()
    assert logits.argmax(1).tolist() == LABELS.tolist()


def test_an_empty_batch_gives_nothing():
    for name in ("knn", "rbf_svm", "ridge"):
        fitted = fit_probe(name, 1.0, EMBEDDINGS, LABELS, Recipe(scale="standard", max_iter=1000, seed=0))
        assert fold(fitted, num_classes=3)(OTHERS[:0]).shape == (0, 3)


def test_a_layer_is_made_again_from_its_config():
    layer = SupportVectors(counts=(1, 2, 3), dim=4, unit=True, gamma=0.5)
    again = SupportVectors.from_config(layer.get_config())
    assert [weight.shape for weight in again.weights] == [weight.shape for weight in layer.weights]
    assert again.get_config() == layer.get_config()
    assert layer.compute_output_shape((None, 4)) == (None, 3)


def test_a_size_counts_each_weights_own_bytes():
    inputs = keras.Input((3,))
    network = keras.Model(inputs, keras.layers.Dense(5, dtype="float64")(keras.layers.Dense(2)(inputs)))
    assert size_in_bytes(network) == (3 * 2 + 2) * 4 + (2 * 5 + 5) * 8
