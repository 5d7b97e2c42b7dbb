"""`tf.data` batches of stored embeddings."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from tl_keras.data.images import without_autotune

_CROP_AREA = (0.5, 1.0)  # fraction of the image's area; Szegedy et al. 2014, section 6, use a smaller minimum
_CROP_ASPECT = (3 / 4, 4 / 3)  # width / height, as in Szegedy et al. 2014, section 6
_LARGEST_DRAW = 2**62

ReadViews = Callable[[np.ndarray, np.ndarray], np.ndarray]


class EpochOrder:
    """Random order of the examples, and a random number for each, in every epoch.

    They depend only on the random seed and the number of the epoch, so that training can continue at any epoch.

    Attributes:
        epoch: the next epoch, from 0; `draw` increments it.
    """

    def __init__(self, seed: int) -> None:
        """Args: seed: random seed."""
        self._seed, self.epoch = seed, 0

    def draw(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws a permutation of the numbers below `count`, and a random number for each; int64 `(count,)` each."""
        random = np.random.default_rng((self._seed, self.epoch))
        self.epoch += 1
        return random.permutation(count), random.integers(0, _LARGEST_DRAW, count)


def make_batches(
    read: ReadViews,
    positions: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int,
    order: EpochOrder | None = None,
    first_step: int = 0,
    num_views: int = 1,
    crop: bool = False,
) -> tf.data.Dataset:
    """Streams embeddings from the store with constant memory.

    Args:
        read: positions and views, int `(b,)` each → embeddings `(b, ...)`.
        positions: int `(n,)`.
        labels: int `(n,)`.
        batch_size: size of every batch except the last; no example is dropped.
        order: order of the examples; each iteration over the batches is one epoch. None keeps the order.
        first_step: number of batches to skip, which were used before an interruption.
        num_views: number of stored views of an image, one of which is drawn in each epoch.
        crop: whether the embeddings are pixels that are randomly cropped and mirrored.

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

    def draw() -> tuple[np.ndarray, np.ndarray]:
        count = len(positions)
        indices, draws = order.draw(count) if order else (np.arange(count), np.zeros(count, np.int64))
        return indices[first_step * batch_size :], draws[first_step * batch_size :]

    def draw_epoch(_: tf.Tensor) -> tf.data.Dataset:
        indices, draws = tf.numpy_function(draw, (), (tf.int64, tf.int64), stateful=True)
        indices, draws = tf.ensure_shape(indices, (None,)), tf.ensure_shape(draws, (None,))
        return tf.data.Dataset.from_tensor_slices((indices, draws)).batch(batch_size)

    batches = tf.data.Dataset.from_tensors(0).flat_map(draw_epoch).map(load_batch)
    steps = -(-len(positions) // batch_size) - first_step
    batches = batches.apply(tf.data.experimental.assert_cardinality(steps)).prefetch(2)
    return batches.with_options(without_autotune())


def crop_and_mirror(images: tf.Tensor, *, seed: tf.Tensor) -> tf.Tensor:
    """Crops images at random, resizes them to the original size, and mirrors half of them.

    Args:
        images: float32 `(b, h, w, 3)`.
        seed: random seed, int64 `(2,)`.

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
    boxes = tf.stack([top, begin, top + height, end], axis=1)  # a box from right to left mirrors the image
    cropped = tf.image.crop_and_resize(images, boxes, tf.range(count), images.shape[1:3])
    return tf.ensure_shape(cropped, images.shape)


def predict_logits(model: keras.Model, read: ReadViews, positions: np.ndarray, *, batch_size: int) -> np.ndarray:
    """Computes the logits of all examples, in order.

    Args:
        model: embeddings `(b, ...)` → logits `(b, classes)`.
        read: see `make_batches`.
        positions: int `(n,)`, n at least 1.
        batch_size: examples per batch.

    Returns:
        `(n, classes)`: float32, or float64 for a probe.
    """

    @tf.function(reduce_retracing=True, autograph=False)
    def predict(embeddings: tf.Tensor) -> tf.Tensor:
        return model(embeddings, training=False)

    batches = make_batches(read, positions, np.zeros(len(positions), np.int32), batch_size=batch_size)
    return np.concatenate([predict(embeddings).numpy() for embeddings, _ in batches])
