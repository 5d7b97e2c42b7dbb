"""Grad-CAM: where in an image the classifier found its class (Selvaraju et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from tl_keras.backbones.cut import cut, list_cuts
from tl_keras.classifier import Classifier

_BATCH = 16
_SMALLEST_MAP = 2  # pixels a side: a map of one says nothing about where


def choose_map(backbone: keras.Model) -> str | None:
    """The layer whose feature maps are looked at: the last of the backbone that still knows where things are.

    Args:
        backbone: images `(b, h, w, 3)` → embeddings `(b, dim)`.

    Returns:
        A layer that it can be cut at; None where no map is larger than one pixel.
    """
    operations = {operation.name: operation for operation in backbone.operations}
    found = None
    for name in list_cuts(backbone):
        shape = operations[name].output.shape
        if len(shape) == 4 and min(shape[1], shape[2]) >= _SMALLEST_MAP:
            found = name
    return found


def explain(classifier: Classifier, at: str, images: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """Heat maps of what speaks for one class of each image (the paper's equations 1 and 2).

    The weight of a channel is the mean gradient of the class's logit by that channel's map; the heat is the positive
    part of the weighted sum of the maps.

    Args:
        classifier: what is explained; its head's layers follow each other.
        at: see `choose_map`.
        images: uint8 `(n, h, w, 3)`.
        classes: n class numbers.

    Returns:
        float32 `(n, map height, map width)`, each 0 to 1; all 0 where nothing speaks for the class, or the head has no
        gradient (the votes of nearest neighbours).
    """
    trunk, tail = cut(classifier.embedder, at=at)
    layers = classifier.network.layers
    head = layers[1 + [layer.name for layer in layers].index(classifier.embedding_layer) :]

    heats = []
    for start in range(0, len(images), _BATCH):  # eagerly: tracing takes longer than these few images
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
        # a probe of two classes has a logit for one of them alone: the other's is 0, and speaks by what speaks against
        idle = ~found[0].any((1, 2, 3), keepdims=True)
        weights = np.where(idle, found[1], found[0]).mean((1, 2), keepdims=True)
        heats.append(np.maximum((weights * maps.numpy()).sum(-1), 0))
    heat = np.concatenate(heats)
    return np.asarray(heat / np.maximum(heat.max((1, 2), keepdims=True), np.finfo(np.float32).tiny), np.float32)
