"""The loss of all stages."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf


def build_loss(
    num_classes: int, *, label_smoothing: float, class_weights: np.ndarray | None
) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """Builds the cross-entropy of logits with label smoothing (Szegedy et al. 2015, section 7) and class weights.

    Args:
        num_classes: number of classes.
        label_smoothing: probability that is distributed over all classes.
        class_weights: float32 `(num_classes,)`, or None.

    Returns:
        Labels, int `(b,)` or `(b, 1)`, and logits, float32 `(b, num_classes)` → losses, float32 `(b,)`.
    """
    weights = None if class_weights is None else tf.constant(class_weights, tf.float32)

    def loss(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        labels = tf.reshape(tf.cast(labels, tf.int32), [-1])
        targets = tf.one_hot(labels, num_classes) * (1 - label_smoothing) + label_smoothing / num_classes
        losses = tf.nn.softmax_cross_entropy_with_logits(targets, logits)
        return losses if weights is None else losses * tf.gather(weights, labels)

    return loss


def balance_classes(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Computes weights that give all classes the same total weight; their mean over the examples is 1.

    Args:
        labels: int `(n,)`, each class at least once.
        num_classes: number of classes.

    Returns:
        float32 `(num_classes,)`: n / (classes * examples of the class), like scikit-learn's `balanced`.
    """
    counts = np.bincount(labels, minlength=num_classes)
    return (len(labels) / (num_classes * np.maximum(counts, 1))).astype(np.float32)
