"""Calibration, against sums done by hand and against what it must never change."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.calibration import calibration_curve

from tl_keras.statistics.calibration import (
    calibrated_softmax,
    error_interval,
    expected_calibration_error,
    fit_temperature,
    is_supported,
    losses,
    reliability,
)
from tl_keras.statistics.coverage import accuracy_by_coverage, choose_threshold, fewest_for_threshold, measure_threshold


def draw(count: int, classes: int, *, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `temperature` times too large, and labels drawn from what they should say."""
    random = np.random.default_rng(seed)
    honest = random.normal(size=(count, classes)) * 2
    shares = np.exp(log_softmax(honest, axis=1))
    labels = np.array([random.choice(classes, p=row) for row in shares])
    return (honest * temperature).astype(np.float32), labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_labels_were_drawn_with_is_found(temperature):
    logits, labels = draw(4000, 6, temperature=temperature)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.06)


@pytest.mark.parametrize("temperature", [0.4, 2.5])
def test_it_lowers_the_calibration_error_of_other_examples_and_never_changes_the_class(temperature):
    logits, labels = draw(2000, 10, temperature=temperature)
    others, their_labels = draw(2000, 10, temperature=temperature, seed=1)
    found = fit_temperature(logits, labels)
    before, after = calibrated_softmax(others, 1), calibrated_softmax(others, found)
    assert expected_calibration_error(after, their_labels) < 0.5 * expected_calibration_error(before, their_labels)
    assert losses(after, their_labels).mean() < losses(before, their_labels).mean()
    np.testing.assert_array_equal(before.argmax(1), after.argmax(1))


def test_a_small_val_without_an_error_gives_no_boundless_trust():
    logits = np.array([[4.0, 0.0], [0.0, 4.0]] * 10, np.float32)
    labels = np.array([0, 1] * 10)
    confidence = calibrated_softmax(logits, fit_temperature(logits, labels)).max()
    assert 0.95 < confidence < 0.99  # twenty right of twenty: about 1 - 1 / 22 each


def test_votes_of_zero_stay_finite():
    logits = np.log(np.maximum(np.array([[1.0, 0.0, 0.0], [0.6, 0.4, 0.0], [0.0, 0.2, 0.8]]), 1e-300))
    temperature = fit_temperature(logits, np.array([0, 1, 1]))
    assert np.isfinite(temperature)
    np.testing.assert_allclose(calibrated_softmax(logits, temperature).sum(1), 1, rtol=1e-6)


def test_the_reliability_curve_is_scikit_learns():
    logits, labels = draw(3000, 2, temperature=2)
    probabilities = calibrated_softmax(logits, 1)
    found = reliability(probabilities, labels)
    correct = probabilities.argmax(1) == labels
    accuracy, confidence = calibration_curve(correct, probabilities.max(1), n_bins=15)
    np.testing.assert_allclose([row["accuracy"] for row in found], accuracy)
    np.testing.assert_allclose([row["confidence"] for row in found], confidence, rtol=1e-6)
    assert sum(row["n"] for row in found) == 3000
    assert all(row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] for row in found)


HAND = np.array([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
LABELS = np.array([0, 1, 1, 1, 1])


def test_coverage_and_accuracy_by_hand():
    thresholds, coverage, accuracy = accuracy_by_coverage(HAND, LABELS)
    np.testing.assert_allclose(thresholds, [0.9, 0.8, 0.7, 0.6])
    np.testing.assert_allclose(coverage, [0.2, 0.6, 0.8, 1.0])  # two share the probability 0.8: they come together
    np.testing.assert_allclose(accuracy, [1, 2 / 3, 3 / 4, 3 / 5])


def test_few_images_guarantee_nothing_and_a_target_of_nothing_is_always_met():
    assert choose_threshold(HAND, LABELS, target_accuracy=0.5) is None
    assert choose_threshold(HAND, LABELS, target_accuracy=0.0) == pytest.approx(0.6)


@pytest.mark.parametrize(("target", "count"), [(0.5, 5), (0.9, 29), (0.95, 59), (0.99, 299)])
def test_the_fewest_images_that_can_guarantee_a_target(target, count):
    assert fewest_for_threshold(target) == count
    sure = np.tile([[0.9, 0.1]], (count, 1))
    assert choose_threshold(sure, np.zeros(count, int), target_accuracy=target) == pytest.approx(0.9)
    assert choose_threshold(sure[1:], np.zeros(count - 1, int), target_accuracy=target) is None


@pytest.mark.parametrize(("first_error", "covered"), [(72, None), (73, 72), (104, 103), (113, 153)])
def test_a_threshold_is_found_wherever_the_first_error_leaves_enough_images(first_error, covered):
    """153 images with distinct confidences; 0.95^72 is the first power below 0.05 / 2, as two sequences are tested."""
    confidence = np.linspace(0.99, 0.6, 153)
    labels = (np.arange(153) >= first_error - 1).astype(int)  # all wrong from the first error on
    if covered == 153:
        labels = (np.arange(153) == first_error - 1).astype(int)
    found = choose_threshold(np.stack([confidence, 1 - confidence], 1), labels, target_accuracy=0.95)
    assert found == (None if covered is None else pytest.approx(confidence[covered - 1]))


@pytest.mark.parametrize(("count", "shape"), [(100, "calibrated"), (1000, "calibrated"), (300, "too sure")])
def test_a_threshold_keeps_what_it_promises(count, shape):
    """The lowest threshold at which val itself reaches the target breaks its promise in half of the draws."""
    random, broken, answered = np.random.default_rng(0), 0, 0
    for _ in range(200):
        probabilities, labels, true = draw_sure(random, count, shape)
        threshold = choose_threshold(probabilities, labels, target_accuracy=0.85)
        if threshold is not None:
            new, _, share = draw_sure(random, 20_000, shape)
            answered += 1
            broken += share[new.max(1) >= threshold].mean() < 0.85
    assert broken <= 0.05 * 200
    assert answered > 100 or count < 1000 or shape == "too sure"


def test_a_temperature_that_val_says_nothing_about_is_told():
    logits, labels = draw(400, 5, temperature=3.0)
    assert is_supported(logits, labels, fit_temperature(logits, labels))
    few = np.array([[4.0, 0, 0], [0, 4, 0], [0, 0, 4], [4, 0, 0]])
    assert not is_supported(few, np.array([0, 1, 2, 0]), fit_temperature(few, np.array([0, 1, 2, 0])))
    votes = np.log(np.maximum(np.eye(3)[[0, 1, 2, 0] * 30], 1e-300))  # nearest neighbours without smoothing
    labels = np.array([0, 1, 2, 0] * 29 + [1, 1, 1, 1])
    assert not is_supported(votes, labels, fit_temperature(votes, labels))


def test_a_target_out_of_reach():
    assert choose_threshold(HAND, 1 - LABELS, target_accuracy=0.99) is None


def test_what_a_threshold_does():
    found = measure_threshold(HAND, LABELS, 0.8)
    assert (found["n"], found["coverage"]) == (3, 0.6)
    assert found["accuracy"] == pytest.approx(2 / 3)
    nobody = measure_threshold(HAND, LABELS, 0.95)
    assert (nobody["n"], nobody["accuracy"], nobody["accuracy_ci95"]) == (0, None, [0.0, 1.0])


SHAPES = {
    "calibrated": lambda confidence: confidence,
    "a little too sure": lambda confidence: confidence - 0.02,
    "too sure": lambda confidence: confidence - 0.1,
    "too sure at the top": lambda confidence: np.where(confidence > 14 / 15, confidence - 0.15, confidence),
    "too sure below 0.8": lambda confidence: np.where(confidence < 0.8, confidence - 0.2, confidence),
    "now this, now that": lambda confidence: np.where(confidence < 0.8, confidence + 0.1, confidence - 0.1),
}
FAST_SHAPES = {"calibrated", "too sure", "too sure below 0.8"}


def draw_sure(random: np.random.Generator, count: int, shape: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities of two classes, labels, and how often each prediction is right in truth."""
    confidence = 0.5 + 0.5 * random.beta(4, 1.3, count)
    true = np.clip(SHAPES[shape](confidence), 0, 1)
    return np.stack([confidence, 1 - confidence], 1), (random.random(count) > true).astype(int), true


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        pytest.param(shape, count, marks=() if (count == 50 and shape in FAST_SHAPES) else pytest.mark.slow)
        for shape in SHAPES
        for count in (50, 200, 1000)
    ],
)
def test_intervals_of_a_calibration_error_hold_the_true_one(shape, count):
    """Where there is none, the low end is 0 but in 2.5 of 100 trials, and nothing is missed above."""
    random, held = np.random.default_rng(0), 0
    many, _, true = draw_sure(random, 1_000_000, shape)
    bins = np.clip(np.ceil(many.max(1) * 15).astype(int) - 1, 0, 14)
    truth = float(np.abs(np.bincount(bins, many.max(1) - true)).sum() / len(many))
    trials = 200
    for _ in range(trials):
        probabilities, labels, _ = draw_sure(random, count, shape)
        low, high = error_interval(probabilities, labels)
        assert 0 <= low <= expected_calibration_error(probabilities, labels) <= high <= 1
        held += low <= truth + 1e-12 and truth <= high
    assert (0.9 if count == 50 else 0.925) <= held / trials <= 0.995


def test_a_calibration_error_of_0_on_few_images_is_no_certainty():
    sure = np.tile([1.0, 0.0], (60, 1))
    assert error_interval(sure, np.zeros(60, int)) == pytest.approx((0, 1 - 0.025 ** (1 / 60)), abs=0.01)
    two = np.tile([0.9, 0.1], (2, 1))
    assert error_interval(two, np.zeros(2, int)) == pytest.approx((0, 0.9 - 0.025**0.5), abs=0.02)
