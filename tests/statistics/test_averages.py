"""Averages over classes: their intervals hold the truth, also where classes are small, many, or nearly always right."""

from __future__ import annotations

import numpy as np
import pytest

from tl_keras.statistics.averages import average
from tl_keras.statistics.intervals import accuracy_interval


def count(predicted: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, np.ndarray]:
    """What `measure_classes` says, without its intervals, which take long."""
    support, taken = np.bincount(labels, minlength=classes), np.bincount(predicted, minlength=classes)
    hits = np.bincount(labels[predicted == labels], minlength=classes)
    return {
        "support": support,
        "predicted": taken,
        "precision": hits / np.maximum(taken, 1),
        "recall": hits / np.maximum(support, 1),
        "f1": 2 * hits / np.maximum(support + taken, 1),
    }


def make_confusion(accuracies: np.ndarray, random: np.random.Generator, *, even: bool) -> np.ndarray:
    """The chance of each prediction, by label, `(classes, classes)`."""
    classes = len(accuracies)
    wrong = np.ones((classes, classes)) if even else random.gamma(0.3, 1, (classes, classes)) + 1e-6
    np.fill_diagonal(wrong, 0)
    chances = wrong / wrong.sum(1, keepdims=True) * (1 - accuracies)[:, np.newaxis]
    np.fill_diagonal(chances, accuracies)
    return chances


def true_averages(chances: np.ndarray, support: np.ndarray) -> dict[str, float]:
    """What macro averages come to with endlessly many images in these proportions."""
    expected = chances * support[:, np.newaxis]
    hits, labels, taken = np.diag(expected), expected.sum(1), expected.sum(0)
    return {
        "precision": float(np.mean(hits / taken)),
        "recall": float(np.mean(hits / labels)),
        "f1": float(np.mean(2 * hits / (labels + taken))),
    }


# classes, images of each, accuracy
SHAPES = [
    *((2, 50, 0.9), (10, 30, 0.9), (20, 10, 0.7), (120, 10, 0.9)),
    *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((3, 50, 0.9), (10, 70, 0.8), (120, 70, 0.8))),
]


@pytest.mark.parametrize("alike", [True, False], ids=["classes alike", "classes apart"])
@pytest.mark.parametrize(("classes", "each", "accuracy"), SHAPES)
def test_intervals_of_macro_averages_hold_the_truth(classes, each, accuracy, alike):
    random = np.random.default_rng(classes)
    spread = np.where(np.arange(classes) % 2, 1 - accuracy, accuracy - 1) * (0 if alike else 0.9)
    chances = make_confusion(accuracy + spread, random, even=alike)
    support = np.full(classes, each)
    truth, labels = true_averages(chances, support), np.repeat(np.arange(classes), each)
    weights, steps, held = np.full(classes, 1 / classes), chances.cumsum(1), dict.fromkeys(truth, 0)
    trials = 2000 if classes < 100 else 1000
    for _ in range(trials):
        predicted = np.minimum((random.random(len(labels))[:, np.newaxis] > steps[labels]).sum(1), classes - 1)
        found = average(predicted, labels, count(predicted, labels, classes), weights)
        for figure, (value, (low, high)) in found.items():
            assert 0 <= low <= value <= high <= 1
            held[figure] += low <= truth[figure] <= high
    assert {figure: 0.93 <= count / trials <= 0.97 for figure, count in held.items()} == dict.fromkeys(truth, True), (
        held
    )


@pytest.mark.parametrize(
    ("support", "accuracies", "low", "high"),
    [
        ([500, 100, 20, 10, 5], [0.98, 0.95, 0.8, 0.6, 0.5], 0.89, 0.95),
        ([10, 300] * 10, [0.6, 0.95] * 10, 0.86, 0.95),
        ([500, 100, 20, 10, 5], [0.8, 0.85, 0.9, 0.95, 0.99], 0.97, 1.0),
    ],
)
def test_where_small_classes_differ_from_large_ones_intervals_are_off_as_the_docs_say(support, accuracies, low, high):
    random, labels = np.random.default_rng(1), np.repeat(np.arange(len(support)), support)
    chances = make_confusion(np.array(accuracies), random, even=True)
    truth, steps = true_averages(chances, np.array(support)), chances.cumsum(1)
    weights, held = np.full(len(support), 1 / len(support)), dict.fromkeys(truth, 0)
    for _ in range(1000):
        predicted = np.minimum((random.random(len(labels))[:, np.newaxis] > steps[labels]).sum(1), len(support) - 1)
        for figure, (_, ends) in average(predicted, labels, count(predicted, labels, len(support)), weights).items():
            held[figure] += ends[0] <= truth[figure] <= ends[1]
    assert {figure: low <= times / 1000 <= high for figure, times in held.items()} == dict.fromkeys(held, True), held


def test_classes_of_very_different_sizes_weigh_as_much_in_the_interval_as_in_the_average():
    random, support = np.random.default_rng(0), np.array([500, 100, 20, 10, 5])
    labels, truth = np.repeat(np.arange(5), support), 0.9
    weights, held = np.full(5, 0.2), 0
    for _ in range(1000):
        predicted = np.where(random.random(635) < truth, labels, (labels + random.integers(1, 5, 635)) % 5)
        _, (low, high) = average(predicted, labels, count(predicted, labels, 5), weights)["recall"]
        held += low <= truth <= high
    assert 0.93 <= held / 1000 <= 0.97


def test_the_weighted_average_of_recalls_is_the_accuracy_and_about_as_sure():
    random = np.random.default_rng(0)
    labels = random.integers(0, 6, 400)
    predicted = np.where(random.random(400) < 0.85, labels, random.integers(0, 6, 400))
    classes = count(predicted, labels, 6)
    value, interval = average(predicted, labels, classes, classes["support"] / 400)["recall"]
    right = int((predicted == labels).sum())
    assert value == pytest.approx(right / 400)
    assert interval == pytest.approx(accuracy_interval(right, 400), abs=0.003)


def test_all_right_is_no_certainty_nor_is_all_wrong():
    labels = np.repeat([0, 1], [10, 20])
    classes = count(labels, labels, 2)
    for value, (low, high) in average(labels, labels, classes, np.array([0.5, 0.5])).values():
        assert value == high == 1
        assert 0.8 < low < 0.95
    classes = count(1 - labels, labels, 2)
    for value, (low, high) in average(1 - labels, labels, classes, np.array([0.5, 0.5])).values():
        assert value == low == 0
        assert 0.05 < high < 0.2


@pytest.mark.parametrize("predicted", [0, 1])
def test_one_image_says_next_to_nothing(predicted):
    labels = np.array([0])
    classes = count(np.array([predicted]), labels, 3)
    found = average(np.array([predicted]), labels, classes, np.array([1.0, 0.0, 0.0]))
    assert found["recall"][1] == pytest.approx(accuracy_interval(1 - predicted, 1))
    assert all(high - low > 0.4 for _, (low, high) in found.values())
