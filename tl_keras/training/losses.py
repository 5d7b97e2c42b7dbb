"""The loss of every stage."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf


def build_loss(
    num_classes: int, *, label_smoothing: float, class_weights: np.ndarray | None
) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """Cross-entropy of logits, with label smoothing (Szegedy et al. 2015, section 7) and class weights.

    Args:
        num_classes: classes.
        label_smoothing: share of probability given to all classes alike.
        class_weights: float32 `(num_classes,)`, or None.

    Returns:
        labels, int `(b,)` or `(b, 1)`, and logits, float32 `(b, num_classes)` → losses, float32 `(b,)`.
    """
    weights = None if class_weights is None else tf.constant(class_weights, tf.float32)

    def loss(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        labels = tf.reshape(tf.cast(labels, tf.int32), [-1])
        targets = tf.one_hot(labels, num_classes) * (1 - label_smoothing) + label_smoothing / num_classes
        losses = tf.nn.softmax_cross_entropy_with_logits(targets, logits)
        return losses if weights is None else losses * tf.gather(weights, labels)

    return loss


def balance_classes(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Weights by which each class counts as much as any other, their mean over the examples 1.

    Args:
        labels: int `(n,)`, each class at least once.
        num_classes: classes.

    Returns:
        float32 `(num_classes,)`: n / (classes * examples of the class), as scikit-learn's `balanced`.
    """
    counts = np.bincount(labels, minlength=num_classes)
    return (len(labels) / (num_classes * np.maximum(counts, 1))).astype(np.float32)
