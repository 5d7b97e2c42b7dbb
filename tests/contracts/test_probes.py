"""Every probe, folded, gives scikit-learn's probabilities: two classes and many, any scaling, any batch."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits

from tl_keras.backbones.engines import TensorFlowEngine
from tl_keras.backbones.zoo import build_backbone, find_preset
from tl_keras.classifier.probe_layers import size_in_bytes
from tl_keras.probes.estimators import PROBES, Fitted, Recipe, fit_probe
from tl_keras.probes.fold import fold

TRAIN = 300


@functools.cache
def embed_digits() -> tuple[np.ndarray, np.ndarray]:
    """Real images through a network: embeddings float32 (n, 128), labels."""
    keras.utils.set_random_seed(0)
    digits = load_digits()
    backbone = build_backbone(find_preset("SmallConvNet"), weights="none", image_size=8)
    engine = TensorFlowEngine(backbone, batch_size=256, precision="float32")
    pixels = np.repeat(np.round(digits.images * (255 / 16)).astype(np.uint8)[..., np.newaxis], 3, axis=3)
    parts = [engine.run(pixels[start : start + 256])[0] for start in range(0, len(pixels), 256)]
    return np.concatenate(parts), digits.target.astype(np.int32)


def pick(classes: int) -> tuple[np.ndarray, np.ndarray]:
    embeddings, labels = embed_digits()
    kept = labels < classes
    return embeddings[kept], labels[kept]


VALUES = {"logistic_regression": 10.0, "linear_svm": 1.0, "rbf_svm": 100.0, "knn": 7.0, "ridge": 0.1}


@functools.cache
def fitted_on(name: str, classes: int, scale: str) -> Fitted:
    embeddings, labels = pick(classes)
    recipe = Recipe(scale=scale, max_iter=5000, seed=0)
    return fit_probe(name, VALUES[name], embeddings[:TRAIN], labels[:TRAIN], recipe)


def smooth(fitted: Fitted, embeddings: np.ndarray, classes: int) -> np.ndarray:
    """scikit-learn's probabilities; of nearest neighbours with one vote more, spread over all classes."""
    shares = fitted.estimator.predict_proba(embeddings.astype(np.float64))
    if fitted.name != "knn":
        return shares
    return (shares * fitted.value + 1 / classes) / (fitted.value + 1)


def test_every_probe_is_here():
    assert VALUES.keys() == PROBES.keys()


@pytest.mark.parametrize("scale", ["standard", "l2", "none"])
@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("name", PROBES)
def test_the_folded_head_is_scikit_learns(tmp_path, name, classes, scale):
    embeddings, labels = pick(classes)
    fitted = fitted_on(name, classes, scale)
    head = fold(fitted, num_classes=classes)
    expected = smooth(fitted, embeddings, classes)
    assert (expected.argmax(1) == labels).mean() > (0.9 if classes == 2 else 0.6)  # it has learnt something
    assert expected.std() > 0.05

    @tf.function(reduce_retracing=True)
    def serve(batch):
        return tf.cast(tf.nn.softmax(head(batch, training=False)), tf.float32)

    assert embeddings.dtype == np.float32
    batches = np.concatenate([serve(embeddings[start : start + 64]).numpy() for start in range(0, len(embeddings), 64)])
    alone = np.concatenate([serve(embeddings[row : row + 1]).numpy() for row in range(40)])
    np.testing.assert_allclose(batches, expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(alone, expected[:40], atol=1e-5, rtol=0)

    head.save(tmp_path / "head.keras")
    loaded = keras.models.load_model(tmp_path / "head.keras", compile=False, safe_mode=True)
    again = tf.nn.softmax(loaded(embeddings[:64])).numpy()
    np.testing.assert_allclose(again, expected[:64], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["linear_svm", "rbf_svm", "ridge"])
def test_a_probe_without_probabilities_is_calibrated_on_examples_held_out(name):
    """Sigmoids fitted on the training margins themselves would be surer: these answer as often as they claim."""
    embeddings, labels = pick(10)
    probabilities = fitted_on(name, 10, "standard").estimator.predict_proba(embeddings[TRAIN:].astype(np.float64))
    claimed, true = probabilities.max(1).mean(), (probabilities.argmax(1) == labels[TRAIN:]).mean()
    assert claimed == pytest.approx(true, abs=0.12)


def test_the_sizes_are_those_of_what_is_kept():
    neighbours = fold(fitted_on("knn", 10, "standard"), num_classes=10)
    assert size_in_bytes(neighbours) == TRAIN * 128 * 4 + TRAIN * 4 + 2 * 128 * 8
    assert size_in_bytes(fold(fitted_on("ridge", 10, "standard"), num_classes=10)) == (128 + 1) * 10 * 8
