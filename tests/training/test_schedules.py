"""Learning rates at single steps, and which variables decay."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tl_keras.training.schedules import build_optimizer, build_schedule


def rate(schedule, step: int) -> float:
    return float(schedule(step)) if callable(schedule) else float(schedule)


@pytest.mark.parametrize(
    ("name", "warmup_steps", "expected"),
    [
        ("constant", 0, {0: 0.1, 50: 0.1, 99: 0.1}),
        ("constant", 10, {0: 0.0, 1: 0.01, 5: 0.05, 10: 0.1, 99: 0.1}),
        # half the rate, times 1 plus the cosine of step / 100 of half a circle
        ("cosine", 0, {0: 0.1, 25: 0.0853553, 50: 0.05, 75: 0.0146447, 100: 0.0, 200: 0.0}),
        # ten steps up, then the same over 90
        ("cosine", 10, {0: 0.0, 5: 0.05, 10: 0.1, 55: 0.05, 40: 0.075, 100: 0.0}),
        ("cosine", 100, {0: 0.0, 50: 0.05, 100: 0.1}),
    ],
)
def test_the_learning_rate_at_single_steps(name, warmup_steps, expected):
    schedule = build_schedule(name, 0.1, steps=100, warmup_steps=warmup_steps)
    for step, value in expected.items():
        assert rate(schedule, step) == pytest.approx(value, abs=1e-6), step


def test_a_stage_of_one_step_has_a_rate():
    for name in ("constant", "cosine"):
        for warmup_steps in (0, 1):
            assert np.isfinite(rate(build_schedule(name, 0.1, steps=1, warmup_steps=warmup_steps), 0))


def build_model() -> keras.Model:
    keras.utils.set_random_seed(0)
    images = keras.Input((6, 6, 3))
    x = keras.layers.DepthwiseConv2D(3)(keras.layers.Conv2D(4, 3)(images))
    x = keras.layers.LayerNormalization()(keras.layers.BatchNormalization()(x))
    model = keras.Model(images, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x)))
    for variable in model.trainable_variables:
        variable.assign(tf.ones_like(variable))
    return model


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_weight_decay_shrinks_kernels_and_spares_biases_and_normalisation(name):
    model = build_model()
    optimizer = build_optimizer(name, 0.1, momentum=0.9, weight_decay=0.5)
    variables = model.trainable_variables
    optimizer.apply([tf.zeros_like(variable) for variable in variables], variables)  # no gradient: decay alone
    for variable in variables:
        factor = 1 - 0.1 * 0.5 if "kernel" in variable.name else 1.0
        np.testing.assert_allclose(variable.numpy(), factor, rtol=1e-6, err_msg=variable.path)
    assert sum("kernel" in variable.name for variable in variables) == 3


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_without_weight_decay_nothing_shrinks(name):
    model = build_model()
    optimizer = build_optimizer(name, 0.1, momentum=0.9, weight_decay=0.0)
    optimizer.apply([tf.zeros_like(one) for one in model.trainable_variables], model.trainable_variables)
    for variable in model.trainable_variables:
        np.testing.assert_array_equal(variable.numpy(), 1.0)


def follow(optimizer: keras.Optimizer, steps: int) -> list[float]:
    """A weight that starts at 1 and has the gradient 1 at each step."""
    weight = keras.Variable(1.0)
    values = []
    for _ in range(steps):
        optimizer.apply([tf.constant(1.0)], [weight])
        values.append(float(weight.numpy()))
    return values


def test_sgd_has_its_momentum():
    # v = 0.9 v - 0.1; w = w + v
    assert follow(build_optimizer("sgd", 0.1, momentum=0.9, weight_decay=0), 3) == pytest.approx([0.9, 0.71, 0.439])
    assert follow(build_optimizer("sgd", 0.1, momentum=0.0, weight_decay=0), 2) == pytest.approx([0.9, 0.8])


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adams_first_steps_are_as_long_as_the_learning_rate(name):
    assert follow(build_optimizer(name, 0.1, momentum=0.9, weight_decay=0), 3) == pytest.approx(
        [0.9, 0.8, 0.7], abs=1e-4
    )


def test_a_schedule_reaches_the_optimiser():
    schedule = build_schedule("constant", 0.1, steps=10, warmup_steps=2)
    values = follow(build_optimizer("sgd", schedule, momentum=0.0, weight_decay=0), 4)
    assert values == pytest.approx([1.0, 0.95, 0.85, 0.75])
