"""Layers for nonlinear probes: a support vector machine with an RBF kernel, and nearest neighbors.

They compute in float64 like scikit-learn, from the same float32 embeddings: votes are discontinuous, so that a rounding
error of a distance can change the predicted class. Training embeddings are stored as float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

_TINY = 1e-300  # keeps the logarithm of a probability of 0 finite


def size_in_bytes(network: keras.Model) -> int:
    """Size of a network's weights in an exported model, in bytes."""
    return sum(int(np.prod(weight.shape)) * np.dtype(weight.dtype).itemsize for weight in network.weights)


def has_votes(network: keras.Model) -> bool:
    """Whether probabilities change in steps because they are votes, so that only decisions can be compared."""
    return any(isinstance(layer, _Scaled) for layer in network.layers)


class _Scaled(keras.layers.Layer):  # type: ignore[misc]
    """Base class: stored training embeddings, and the scaling of stored and new embeddings.

    Args:
        count: number of stored embeddings, n.
        dim: size of an embedding, d.
        unit: whether embeddings are scaled to length 1, instead of centered and divided.
    """

    def __init__(self, *, count: int, dim: int, unit: bool, name: str = "logits") -> None:
        super().__init__(name=name, dtype="float64", autocast=False)
        self._sizes: dict[str, Any] = {"count": count, "dim": dim, "unit": unit}
        self.kept = self._add("kept", (count, dim), "float32")
        self.center = self._add("center", (dim,), "float64")
        self.spread = self._add("spread", (dim,), "float64")

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {"name": self.name, **self._sizes}

    def _add(self, name: str, shape: tuple[int, ...], dtype: str) -> Any:
        return self.add_weight(name=name, shape=shape, dtype=dtype, initializer="zeros", trainable=False)

    def _scale(self, embeddings: tf.Tensor) -> tf.Tensor:
        values = tf.cast(embeddings, tf.float64)
        if self._sizes["unit"]:
            norms = tf.norm(values, axis=1, keepdims=True)
            return values / tf.where(norms > 0, norms, 1.0)
        return (values - self.center) / self.spread

    def _square_distances(self, embeddings: tf.Tensor) -> tf.Tensor:
        """Squared Euclidean distances to the stored embeddings, float64 `(b, n)`."""
        a, b = self._scale(embeddings), self._scale(tf.convert_to_tensor(self.kept))
        squares = tf.reduce_sum(a**2, 1)[:, tf.newaxis] + tf.reduce_sum(b**2, 1)
        return tf.maximum(squares - 2 * tf.matmul(a, b, transpose_b=True), 0.0)


@keras.saving.register_keras_serializable("tl_keras")
class NearestNeighbours(_Scaled):
    """Log fractions of the classes among the k nearest stored embeddings.

    Args:
        count: number of stored embeddings, n.
        dim: size of an embedding, d.
        unit: see `_Scaled`.
        num_classes: number of classes.
        k: number of neighbors.
        smoothing: additional votes, distributed over all classes. Without them, classes without votes would have
            extreme logits, which dominate when a temperature is fitted. Layers saved before version 0.2 have none.
    """

    def __init__(
        self,
        *,
        count: int,
        dim: int,
        unit: bool,
        num_classes: int,
        k: int,
        smoothing: float = 0.0,
        name: str = "logits",
    ) -> None:
        """See the class."""
        super().__init__(count=count, dim=dim, unit=unit, name=name)
        self._sizes |= {"num_classes": num_classes, "k": k, "smoothing": smoothing}
        self.labels = self._add("labels", (count,), "int32")

    def call(self, embeddings: tf.Tensor) -> tf.Tensor:
        """Embeddings, float32 `(b, d)` → logarithms of probabilities, float64 `(b, classes)`."""
        nearest = tf.math.top_k(-self._square_distances(embeddings), self._sizes["k"]).indices
        labels = tf.gather(tf.convert_to_tensor(self.labels), nearest)
        k, num_classes, smoothing = (self._sizes[name] for name in ("k", "num_classes", "smoothing"))
        votes = tf.reduce_sum(tf.one_hot(labels, num_classes, dtype=tf.float64), axis=1)
        return tf.math.log(tf.maximum((votes + smoothing / num_classes) / (k + smoothing), _TINY))

    def compute_output_shape(self, input_shape: tuple[Any, ...]) -> tuple[Any, ...]:
        """`(b, classes)`."""
        return (input_shape[0], self._sizes["num_classes"])


@keras.saving.register_keras_serializable("tl_keras")
class SupportVectors(_Scaled):
    """A support vector machine with an RBF kernel (one against one, as in libsvm), calibrated with sigmoids.

    The stored embeddings are the support vectors, sorted by class.

    Args:
        counts: number of support vectors of each class.
        dim: size of an embedding, d.
        unit: see `_Scaled`.
        gamma: gamma of the kernel exp(-gamma |x - s|²).
    """

    def __init__(self, *, counts: Sequence[int], dim: int, unit: bool, gamma: float, name: str = "logits") -> None:
        """See the class."""
        super().__init__(count=sum(counts), dim=dim, unit=unit, name=name)
        self._sizes = {"counts": list(counts), "dim": dim, "unit": unit, "gamma": gamma}
        num_classes = len(counts)
        sigmoids = 1 if num_classes == 2 else num_classes
        # weight of each vector against each other class; 0 for its own class
        self.dual = self._add("dual", (sum(counts), num_classes), "float64")
        self.intercepts = self._add("intercepts", (num_classes, num_classes), "float64")
        self.slope = self._add("slope", (sigmoids,), "float64")
        self.offset = self._add("offset", (sigmoids,), "float64")

    def call(self, embeddings: tf.Tensor) -> tf.Tensor:
        """Embeddings, float32 `(b, d)` → logits, float64 `(b, classes)`."""
        counts = self._sizes["counts"]
        classes = len(counts)
        kernel = tf.exp(-self._sizes["gamma"] * self._square_distances(embeddings))
        parts = zip(tf.split(kernel, counts, 1), tf.split(tf.convert_to_tensor(self.dual), counts, 0), strict=True)
        halves = tf.stack([tf.matmul(*part) for part in parts], 1)
        # [b, i, j] for i < j: i against j, positive if i wins
        against = halves + tf.transpose(halves, (0, 2, 1)) + self.intercepts
        if classes == 2:
            decision = -against[:, 0, 1:2]  # in scikit-learn positive for the second class
            return tf.concat([tf.zeros_like(decision), -(self.slope * decision + self.offset)], 1)
        decision = _join_votes(against, classes)
        return tf.math.log_sigmoid(-(self.slope * decision + self.offset))

    def compute_output_shape(self, input_shape: tuple[Any, ...]) -> tuple[Any, ...]:
        """`(b, classes)`."""
        return (input_shape[0], len(self._sizes["counts"]))


def _join_votes(against: tf.Tensor, classes: int) -> tf.Tensor:
    """Combines pairwise decisions to one decision per class: votes, plus less than 1/3 for the sum of confidences.

    The formula is that of scikit-learn (`sklearn.utils.multiclass._ovr_decision_function`).

    Args:
        against: float64 `(b, classes, classes)`; only the upper triangle is used.
        classes: number of classes.

    Returns:
        float64 `(b, classes)`.
    """
    upper = tf.linalg.band_part(tf.ones((classes, classes), tf.float64), 0, -1) - tf.eye(classes, dtype=tf.float64)
    wins = tf.cast(against >= 0, tf.float64) * upper
    losses = upper - wins
    votes = tf.reduce_sum(wins, 2) + tf.reduce_sum(losses, 1)
    confidences = tf.reduce_sum(against * upper, 2) - tf.reduce_sum(against * upper, 1)
    return votes + confidences / (3 * (tf.abs(confidences) + 1))
