"""The Keras head, which is trained on embeddings."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

# Multiple of the mean variance that is added to each variance, so that units that are nearly constant in train do not
# explode on test. With less, dimensions with little variance count as much as discriminative ones
# (benchmarks/recipe.py).
_VARIANCE_FLOOR = 3.0


def measure_embeddings(batches: tf.data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Computes mean and variance of each dimension in one pass (Chan, Golub & LeVeque 1979, pairwise).

    Args:
        batches: batches of embeddings, float32 `(b, dim)`, and labels.

    Returns:
        Mean and variance, float32 `(dim,)` each.
    """
    count, mean, squares = 0, np.zeros(1), np.zeros(1)
    for embeddings, _ in batches.as_numpy_iterator():
        values = embeddings.astype(np.float64)
        delta = values.mean(0) - mean
        total = count + len(values)
        squares = squares + ((values - values.mean(0)) ** 2).sum(0) + delta**2 * count * len(values) / total
        mean, count = mean + delta * len(values) / total, total
    return mean.astype(np.float32), (squares / count).astype(np.float32)


def build_head(
    dim: int,
    num_classes: int,
    *,
    dropout: float,
    standardize: tuple[np.ndarray, np.ndarray] | None,
    seed: int = 0,
) -> keras.Model:
    """Builds a linear head.

    Its kernel is initialized with zeros: the loss of a linear softmax is convex, so a random initialization would only
    add variance between seeds.

    Args:
        dim: size of an embedding.
        num_classes: number of classes.
        dropout: dropout rate before the dense layer.
        standardize: mean and variance of train, float32 `(dim,)` each; None to keep embeddings unchanged.
        seed: random seed of dropout.

    Returns:
        Embeddings, float32 `(b, dim)` → logits, float32 `(b, num_classes)`.
    """
    inputs = outputs = keras.Input((dim,), name="embeddings")
    if standardize is not None:
        mean, variance = standardize
        floor = max(_VARIANCE_FLOOR * float(variance.mean()), 1e-12)
        layer = keras.layers.Normalization(mean=mean, variance=variance + floor, name="standardize")
        outputs = layer(outputs)
    if dropout:
        outputs = keras.layers.Dropout(dropout, seed=seed, name="dropout")(outputs)
    outputs = keras.layers.Dense(num_classes, kernel_initializer="zeros", name="logits")(outputs)
    return keras.Model(inputs, outputs, name="head")


def attach(head: keras.Model, backbone: keras.Model) -> keras.Model:
    """Attaches a head to a backbone or tail, as one flat graph; all layers are shared.

    Args:
        head: embeddings → logits.
        backbone: any input → embeddings.

    Returns:
        Input of the backbone → logits.
    """
    outputs = backbone.output
    for layer in head.layers[1:]:
        outputs = layer(outputs)
    return keras.Model(backbone.input, outputs, name=backbone.name)
