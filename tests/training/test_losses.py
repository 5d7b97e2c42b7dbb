"""The loss, held against its formula in numpy, Keras's own, and scikit-learn."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight

from tl_keras.training.losses import balance_classes, build_loss

LOGITS = np.random.default_rng(0).normal(0, 3, (6, 4)).astype(np.float32)
LABELS = np.array([0, 1, 2, 3, 1, 1])
WEIGHTS = np.array([0.5, 2, 1, 10], np.float32)


def by_formula(smoothing: float, weights: np.ndarray | None) -> np.ndarray:
    targets = np.eye(4)[LABELS] * (1 - smoothing) + smoothing / 4
    losses = -(targets * log_softmax(LOGITS.astype(np.float64), axis=1)).sum(1)
    return losses if weights is None else losses * weights[LABELS]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("shape", [(6,), (6, 1)], ids=str)
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32])  # Keras hands labels over as floats
def test_the_loss_is_its_formula(smoothing, weights, shape, dtype):
    loss = build_loss(4, label_smoothing=smoothing, class_weights=weights)
    found = loss(LABELS.reshape(shape).astype(dtype), LOGITS).numpy()
    assert found.shape == (6,)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, by_formula(smoothing, weights), rtol=1e-5)


def test_without_smoothing_and_weights_it_is_the_log_loss_of_scikit_learn():
    loss = build_loss(4, label_smoothing=0.0, class_weights=None)
    probabilities = np.exp(log_softmax(LOGITS.astype(np.float64), axis=1))
    assert float(np.mean(loss(LABELS, LOGITS))) == pytest.approx(log_loss(LABELS, probabilities), rel=1e-5)


def test_smoothing_is_that_of_keras():
    loss = build_loss(4, label_smoothing=0.2, class_weights=None)
    other = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.2, reduction="none")
    np.testing.assert_allclose(loss(LABELS, LOGITS), other(np.eye(4, dtype=np.float32)[LABELS], LOGITS), rtol=1e-5)


def test_very_large_logits_give_numbers():
    loss = build_loss(2, label_smoothing=0.1, class_weights=None)
    assert np.isfinite(loss(np.array([0, 1]), np.float32([[1e30, -1e30], [1e5, 0]])).numpy()).all()


@pytest.mark.parametrize("counts", [[1, 2, 3, 94], [25, 25, 25, 25], [1000, 1]], ids=str)
def test_balanced_weights_are_those_of_scikit_learn(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    weights = balance_classes(labels, len(counts))
    assert weights.dtype == np.float32
    expected = compute_class_weight("balanced", classes=np.arange(len(counts)), y=labels)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert weights[labels].mean() == pytest.approx(1, rel=1e-5)


def test_a_class_without_examples_has_a_finite_weight():
    assert np.isfinite(balance_classes(np.array([0, 0, 2]), 3)).all()
