"""Optimizers and learning rate schedules."""

from __future__ import annotations

from typing import Any

import keras

_FROM_DECAY_EXCLUDED = ["bias", "gamma", "beta"]


def build_schedule(name: str, learning_rate: float, *, steps: int, warmup_steps: int) -> Any:
    """Builds the learning rate schedule of a stage.

    Args:
        name: `constant` or `cosine` (Loshchilov & Hutter 2017, without restarts).
        learning_rate: peak learning rate.
        steps: number of steps of the stage.
        warmup_steps: number of steps of the linear warm-up from 0 (Goyal et al. 2017, section 2.2).

    Returns:
        A number or a Keras schedule.
    """
    schedules = keras.optimizers.schedules
    if name == "cosine" and warmup_steps:
        return schedules.CosineDecay(
            0.0, max(steps - warmup_steps, 1), warmup_target=learning_rate, warmup_steps=warmup_steps
        )
    if name == "cosine":
        return schedules.CosineDecay(learning_rate, steps)
    if warmup_steps:
        return schedules.PolynomialDecay(0.0, warmup_steps, end_learning_rate=learning_rate)
    return learning_rate


def build_optimizer(name: str, learning_rate: Any, *, momentum: float, weight_decay: float) -> keras.Optimizer:
    """Builds a Keras optimizer; decoupled weight decay does not apply to biases and normalization layers.

    Args:
        name: `sgd`, `adam` or `adamw`.
        learning_rate: a number or a schedule.
        momentum: momentum of `sgd`.
        weight_decay: 0 for none.

    Returns:
        The optimizer.
    """
    if name == "sgd":
        optimizer = keras.optimizers.SGD(learning_rate, momentum=momentum, weight_decay=weight_decay or None)
    elif name == "adam":
        optimizer = keras.optimizers.Adam(learning_rate, weight_decay=weight_decay or None)
    else:
        optimizer = keras.optimizers.AdamW(learning_rate, weight_decay=weight_decay)
    if weight_decay:
        optimizer.exclude_from_weight_decay(var_names=_FROM_DECAY_EXCLUDED)
    return optimizer
