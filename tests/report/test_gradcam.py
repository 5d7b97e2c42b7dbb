"""Grad-CAM against gradients taken by finite differences, and on heads of every kind."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tests.conftest import build_classifier
from tl_keras.classifier import Classifier
from tl_keras.report.gradcam import choose_map, explain


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return build_classifier(("ant", "bee", "wasp"))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 12, 12, 3)).astype(np.uint8)


def heat_by_differences(classifier: Classifier, image: np.ndarray, label: int) -> np.ndarray:
    """The definition, without any automatic gradient: each cell of the map is moved a little."""
    layers = classifier.network.layers
    maps = keras.Model(classifier.network.input, classifier.network.get_layer("bn").output)(image[np.newaxis]).numpy()

    def logit(values: np.ndarray) -> float:
        outputs = values
        for layer in layers[[one.name for one in layers].index("bn") + 1 :]:
            outputs = layer(outputs)
        return float(outputs.numpy()[0, label])

    gradients, step = np.zeros_like(maps), 0.5  # the pooling and what is behind it are linear
    for place in np.ndindex(*maps.shape):
        moved = maps.copy()
        moved[place] += step
        gradients[place] = (logit(moved) - logit(maps)) / step
    heat = np.maximum((gradients.mean((1, 2), keepdims=True) * maps).sum(-1)[0], 0)
    return heat / heat.max()


def test_heat_is_that_of_the_papers_definition(classifier, images):
    at = choose_map(classifier.embedder)
    assert at == "bn"
    found = explain(classifier, at, images[:2], [0, 2])
    for row, label in enumerate((0, 2)):
        expected = heat_by_differences(classifier, images[row].astype(np.float32), label)
        np.testing.assert_allclose(found[row], expected, atol=2e-3)


def test_batches_are_joined_and_each_image_has_its_own_class(classifier, images):
    many = np.concatenate([images] * 5)
    labels = [number % 3 for number in range(len(many))]
    together = explain(classifier, "bn", many, labels)
    alone = np.concatenate([explain(classifier, "bn", many[row : row + 1], [labels[row]]) for row in range(len(many))])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert together.shape == (25, 10, 10)
    assert ((together >= 0) & (together <= 1)).all()


def test_a_temperature_changes_no_heat(classifier, images):
    scaled = classifier.divide_logits(2.5)
    np.testing.assert_allclose(
        explain(scaled, "bn", images, [1] * 5), explain(classifier, "bn", images, [1] * 5), atol=1e-5
    )


def test_heat_is_where_the_class_is():
    """A network that counts red on its left and on its right, and an image that is red on its left."""
    inputs = keras.Input((8, 8, 3))
    red = keras.layers.Conv2D(1, 1, use_bias=False, name="red")(inputs)
    pooled = keras.layers.GlobalAveragePooling2D(name="pool")(red)
    dense = keras.layers.Dense(2, name="logits")
    network = keras.Model(inputs, dense(pooled))
    network.get_layer("red").set_weights([np.array([1.0, 0, 0]).reshape(1, 1, 3, 1)])
    dense.set_weights([np.array([[1.0, -1.0]]), np.zeros(2)])
    image = np.zeros((1, 8, 8, 3), np.uint8)
    image[:, :, :4, 0] = 200
    classifier = Classifier(network, "n", ("red", "other"), "Net", "pool", "squash")
    heat = explain(classifier, "red", image, [0])[0]
    np.testing.assert_array_equal(heat[:, :4], 1)
    np.testing.assert_array_equal(heat[:, 4:], 0)
    assert not explain(classifier, "red", image, [1]).any()  # red speaks against it


def test_a_backbone_without_a_map_has_nothing_to_look_at():
    inputs = keras.Input((8, 8, 3))
    flat = keras.layers.Dense(4, name="embedding")(keras.layers.Flatten()(inputs))
    classifier = Classifier(
        keras.Model(inputs, keras.layers.Dense(2, name="logits")(flat)), "n", ("a", "b"), "Net", "embedding", "squash"
    )
    assert choose_map(classifier.embedder) is None


def test_a_class_whose_logit_is_constant_speaks_by_what_speaks_against_the_other():
    """As a probe of two classes is folded: logits 0 and z."""
    inputs = keras.Input((8, 8, 3))
    maps = keras.layers.Conv2D(2, 1, use_bias=False, name="maps")(inputs)
    dense = keras.layers.Dense(2, name="logits")
    network = keras.Model(inputs, dense(keras.layers.GlobalAveragePooling2D(name="pool")(maps)))
    network.get_layer("maps").set_weights([np.eye(3, 2).reshape(1, 1, 3, 2)])  # red, green
    dense.set_weights([np.array([[0.0, 1.0], [0.0, -1.0]]), np.zeros(2)])  # red speaks for class 1, green against it
    image = np.zeros((2, 8, 8, 3), np.uint8)
    image[:, :, :4, 0] = 200
    image[:, :, 4:, 1] = 200
    first, second = explain(Classifier(network, "n", ("a", "b"), "Net", "pool", "squash"), "maps", image, [0, 1])
    assert first[:, 4:].min() == 1
    assert not first[:, :4].any()
    assert second[:, :4].min() == 1
    assert not second[:, 4:].any()
