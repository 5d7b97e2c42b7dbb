"""Stored embeddings as `tf.data` batches."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from tl_keras.data.images import without_autotune

_CROP_AREA = (0.5, 1.0)  # share of the image that a crop keeps
_CROP_ASPECT = (3 / 4, 4 / 3)  # width to height, both as in Szegedy et al. 2014, section 6, but a larger least area

ReadEmbeddings = Callable[[np.ndarray, np.ndarray], np.ndarray]


def make_batches(
    read: ReadEmbeddings,
    positions: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int,
    seed: int | None = None,
    num_views: int = 1,
    crop: bool = False,
) -> tf.data.Dataset:
    """Streams embeddings from the store; memory does not grow with their number.

    Args:
        read: positions and views, int `(b,)` each → embeddings `(b, ...)`.
        positions: int `(n,)`.
        labels: int `(n,)`.
        batch_size: of every batch but the last; no example is dropped.
        seed: shuffles, differently each epoch; without one the order is kept.
        num_views: stored views of an image, of which each epoch draws one.
        crop: the embeddings are pixels, to be cropped and mirrored at random.

    Returns:
        Batches of embeddings, float32 `(b, ...)`, and labels, int32 `(b,)`.
    """
    shape = read(positions[:1], np.zeros(1, np.int64)).shape[1:]

    def load(indices: np.ndarray, draws: np.ndarray) -> np.ndarray:
        return read(positions[indices], draws % num_views).astype(np.float32)

    def load_batch(indices: tf.Tensor, draws: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        embeddings = tf.ensure_shape(tf.numpy_function(load, (indices, draws), tf.float32), (None, *shape))
        if crop:
            embeddings = crop_and_mirror(embeddings, seed=tf.stack([draws[0], draws[-1]]))
        return embeddings, tf.gather(tf.constant(labels, tf.int32), indices)

    indices = tf.data.Dataset.range(len(positions))
    draws = tf.data.Dataset.from_tensors(tf.constant(0, tf.int64)).repeat(len(positions))
    if seed is not None:
        indices = indices.shuffle(len(positions), seed=seed, reshuffle_each_iteration=True)
        draws = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True).take(len(positions))
    batches = tf.data.Dataset.zip((indices, draws)).batch(batch_size).map(load_batch)
    batches = batches.apply(tf.data.experimental.assert_cardinality(-(-len(positions) // batch_size))).prefetch(2)
    return batches.with_options(without_autotune())


def crop_and_mirror(images: tf.Tensor, *, seed: tf.Tensor) -> tf.Tensor:
    """Random crops, brought back to full size, half of them mirrored.

    Args:
        images: float32 `(b, h, w, 3)`.
        seed: int64 `(2,)`: the same seed gives the same crops.

    Returns:
        float32, the same shape.
    """
    count = tf.shape(images)[0]
    seeds = tf.random.experimental.stateless_split(seed, 5)
    area = tf.random.stateless_uniform([count], seeds[0], *_CROP_AREA)
    aspect = tf.exp(tf.random.stateless_uniform([count], seeds[1], *np.log(_CROP_ASPECT).astype(np.float32)))
    height = tf.minimum(tf.sqrt(area / aspect), 1.0)
    width = tf.minimum(tf.sqrt(area * aspect), 1.0)
    top = tf.random.stateless_uniform([count], seeds[2]) * (1 - height)
    left = tf.random.stateless_uniform([count], seeds[3]) * (1 - width)
    mirrored = tf.random.stateless_uniform([count], seeds[4]) < 0.5
    begin, end = tf.where(mirrored, left + width, left), tf.where(mirrored, left, left + width)
    boxes = tf.stack([top, begin, top + height, end], axis=1)  # a box from right to left is a mirrored one
    cropped = tf.image.crop_and_resize(images, boxes, tf.range(count), images.shape[1:3])
    return tf.ensure_shape(cropped, images.shape)


def predict_logits(model: keras.Model, read: ReadEmbeddings, positions: np.ndarray, *, batch_size: int) -> np.ndarray:
    """Logits of every example, in order.

    Args:
        model: embeddings `(b, ...)` → logits `(b, classes)`.
        read: see `make_batches`.
        positions: int `(n,)`, n at least 1.
        batch_size: examples at once.

    Returns:
        `(n, classes)`: float32, of a probe float64.
    """

    @tf.function(reduce_retracing=True, autograph=False)
    def predict(embeddings: tf.Tensor) -> tf.Tensor:
        return model(embeddings, training=False)

    batches = make_batches(read, positions, np.zeros(len(positions), np.int32), batch_size=batch_size)
    return np.concatenate([predict(embeddings).numpy() for embeddings, _ in batches])
