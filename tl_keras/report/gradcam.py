"""Grad-CAM: heat maps of the evidence for a class (Selvaraju et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from tl_keras.backbones.cut import cut, list_cuts
from tl_keras.classifier import Classifier

_BATCH = 16
_SMALLEST_MAP = 2  # height and width: a map of 1 x 1 has no spatial information


def choose_map(backbone: keras.Model) -> str | None:
    """Chooses the layer of the heat maps: the last layer of the backbone that has spatial information.

    Args:
        backbone: images `(b, h, w, 3)` → embeddings `(b, dim)`.

    Returns:
        A layer at which the backbone can be cut; None if no feature map is larger than one pixel.
    """
    operations = {operation.name: operation for operation in backbone.operations}
    found = None
    for name in list_cuts(backbone):
        shape = operations[name].output.shape
        if len(shape) == 4 and min(shape[1], shape[2]) >= _SMALLEST_MAP:
            found = name
    return found


def explain(classifier: Classifier, at: str, images: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """Computes a heat map of the evidence for one class in each image (equations 1 and 2 of the paper).

    The weight of a channel is the mean gradient of the class's logit with respect to that channel's map. The heat map
    is the positive part of the weighted sum of the maps.

    Args:
        classifier: the classifier to explain; the layers of its head must be sequential.
        at: name of the layer, see `choose_map`.
        images: uint8 `(n, h, w, 3)`.
        classes: n class numbers.

    Returns:
        float32 `(n, map height, map width)`, each scaled to 0..1; all 0 if there is no evidence for the class, or if
        the head has no gradient (nearest neighbors).
    """
    trunk, tail = cut(classifier.embedder, at=at)
    layers = classifier.network.layers
    head = layers[1 + [layer.name for layer in layers].index(classifier.embedding_layer) :]

    heats = []
    for start in range(0, len(images), _BATCH):  # eager: tracing would take longer than these few images
        maps = tf.cast(trunk(images[start : start + _BATCH].astype(np.float32), training=False), tf.float32)
        with tf.GradientTape(watch_accessed_variables=False, persistent=True) as tape:
            tape.watch(maps)
            logits = tail(maps, training=False)
            for layer in head:
                logits = layer(logits)
            wanted = tf.gather(logits, classes[start : start + _BATCH], axis=1, batch_dims=1)
            against = wanted - tf.reduce_mean(logits, axis=1)
        found = [
            tape.gradient(score, maps, unconnected_gradients=tf.UnconnectedGradients.ZERO).numpy()
            for score in (wanted, against)
        ]
        del tape
        # in a probe of two classes one logit is constant 0: for its class, evidence against the other class is used
        idle = ~found[0].any((1, 2, 3), keepdims=True)
        weights = np.where(idle, found[1], found[0]).mean((1, 2), keepdims=True)
        heats.append(np.maximum((weights * maps.numpy()).sum(-1), 0))
    heat = np.concatenate(heats)
    return np.asarray(heat / np.maximum(heat.max((1, 2), keepdims=True), np.finfo(np.float32).tiny), np.float32)
