"""The figures of metrics.json, against scikit-learn and against sums done by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_score,
    recall_score,
    top_k_accuracy_score,
)

from tl_keras.evaluation.metrics import confuse, headline, measure, measure_classes, most_confused
from tl_keras.statistics.calibration import expected_calibration_error
from tl_keras.statistics.intervals import accuracy_interval


def make(count: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Softmax in float32, and labels that it half foresees."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, count)
    logits = random.normal(size=(count, classes)) + 1.5 * np.eye(classes)[labels]
    values = np.exp(logits)
    return (values / values.sum(1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize(("count", "classes"), [(2000, 2), (500, 3), (1000, 12), (1500, 120)])
def test_every_figure_is_scikit_learns(count, classes):
    probabilities, labels = make(count, classes)
    found = measure(probabilities, labels)
    exact = probabilities.astype(np.float64) / probabilities.astype(np.float64).sum(1, keepdims=True)
    predicted = probabilities.argmax(1)
    assert found["n"] == count
    assert found["accuracy"] == np.mean(predicted == labels)
    assert found["accuracy_ci95"] == list(accuracy_interval(int(np.sum(predicted == labels)), count))
    assert found["mean_per_class_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted), abs=1e-12)
    assert found["nll"] == pytest.approx(log_loss(labels, exact, labels=range(classes)), abs=1e-12)
    if classes > 5:
        top5 = top_k_accuracy_score(labels, probabilities, k=5, labels=range(classes))
        assert found["top5_accuracy"] == pytest.approx(top5, abs=1e-12)


HAND = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.5, 0.25, 0.25]], np.float32)
LABELS = np.array([0, 1, 1, 1])


def test_four_examples_by_hand():
    found = measure(HAND, LABELS)
    assert found["accuracy"] == 0.5
    assert found["mean_per_class_accuracy"] == pytest.approx((1 + 1 / 3) / 2)  # class 2 does not occur
    assert found["nll"] == pytest.approx(-np.mean(np.log([0.7, 0.8, 0.3, 0.25])), abs=1e-6)
    assert found["top5_accuracy"] == 1
    # each in a bin of its own: 0.3 and 0.2 too modest, 0.4 and 0.5 too sure
    assert found["ece"] == pytest.approx((0.3 + 0.2 + 0.4 + 0.5) / 4, abs=1e-6)


def test_bins_are_filled_before_confidence_and_accuracy_are_compared():
    confidence = np.array([0.61, 0.62, 0.63, 0.95, 0.99, 0.68])
    right = [1, 0, 0, 1, 1, 0]
    probabilities = np.stack([confidence, 1 - confidence], 1)
    labels = np.where(right, 0, 1)
    # (9/15, 10/15]: three of mean 0.62, a third right; (10/15, 11/15]: 0.68, wrong; (14/15, 1]: 0.97, both right
    expected = 3 / 6 * (0.62 - 1 / 3) + 1 / 6 * 0.68 + 2 / 6 * (1 - 0.97)
    assert expected_calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-12)


def test_fifteen_bins_of_equal_width_closed_on_the_right():
    probabilities, labels = make(3000, 4)
    confidence, right = probabilities.max(1).astype(np.float64), probabilities.argmax(1) == labels
    expected = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert expected > 0.05
    assert expected_calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-9)


def test_a_bin_holds_its_upper_end():
    probabilities = np.array([[0.6, 0.4], [0.55, 0.45]])  # 9/15, and within (8/15, 9/15)
    assert expected_calibration_error(probabilities, np.array([0, 1])) == pytest.approx(0.575 - 0.5, abs=1e-12)
    assert expected_calibration_error(probabilities.astype(np.float32), np.array([0, 1])) == pytest.approx(
        0.075, abs=1e-6
    )


@pytest.mark.parametrize(("right", "expected"), [(True, 0.0), (False, 1.0)])
def test_full_confidence_is_calibrated_where_it_is_right(right, expected):
    probabilities = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    labels = probabilities.argmax(1) if right else (probabilities.argmax(1) + 1) % 3
    assert expected_calibration_error(probabilities, labels) == expected


def test_a_coin_that_says_so_is_calibrated():
    assert expected_calibration_error(np.full((10, 2), 0.5), np.array([0, 1] * 5)) == 0


def test_a_class_that_a_split_lacks_keeps_its_column_and_is_no_part_of_the_mean():
    probabilities, labels = make(400, 6)
    labels = np.where(labels == 2, 3, labels)
    found = measure(probabilities, labels)
    assert found["mean_per_class_accuracy"] == pytest.approx(
        np.mean([np.mean(probabilities.argmax(1)[labels == label] == label) for label in (0, 1, 3, 4, 5)])
    )
    exact = probabilities.astype(np.float64)
    picked = exact[np.arange(400), labels] / exact.sum(1)
    assert found["nll"] == pytest.approx(-np.log(picked).mean(), abs=1e-12)


def test_one_class_alone_can_be_measured():
    found = measure(HAND[:1], np.array([2]))
    assert (found["n"], found["accuracy"], found["mean_per_class_accuracy"]) == (1, 0, 0)
    assert found["accuracy_ci95"] == list(accuracy_interval(0, 1))
    assert found["nll"] == pytest.approx(-math.log(0.1), abs=1e-6)
    assert found["ece"] == pytest.approx(0.7, abs=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_five_classes_or_fewer_are_all_among_the_top_five(classes):
    assert measure(*make(200, classes))["top5_accuracy"] == 1.0


def test_the_fifth_counts_and_the_sixth_does_not():
    probabilities = np.tile(np.array([0.3, 0.2, 0.15, 0.14, 0.11, 0.1], np.float32), (6, 1))
    assert measure(probabilities, np.arange(6))["top5_accuracy"] == pytest.approx(5 / 6)
    assert measure(probabilities, np.full(6, 4))["top5_accuracy"] == 1
    assert measure(probabilities, np.full(6, 5))["top5_accuracy"] == 0


def test_among_equals_the_first_class_is_taken_in_all_figures():
    probabilities = np.full((8, 8), 1 / 8, np.float32)
    found = measure(probabilities, np.arange(8))
    assert (found["accuracy"], found["top5_accuracy"]) == (1 / 8, 5 / 8)
    assert found["nll"] == pytest.approx(math.log(8), abs=1e-6)


def test_a_probability_of_0_for_the_label_is_a_large_number_not_an_infinite_one():
    found = measure(np.array([[1, 0], [0, 1]], np.float32), np.array([1, 1]))
    assert found["nll"] == pytest.approx(-math.log(np.finfo(float).eps) / 2, rel=1e-6)


def test_all_figures_are_plain_numbers_that_json_takes():
    found = measure(*make(50, 3))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    figures = ("accuracy", "mean_per_class_accuracy", "top5_accuracy", "nll", "ece")
    assert list(found) == ["n", *(f"{name}{end}" for name in figures for end in ("", "_ci95")), "macro", "weighted"]


@pytest.mark.parametrize("classes", [2, 4, 120])
def test_averages_and_figures_of_each_class_are_scikit_learns(classes):
    probabilities, labels = make(900, classes)
    predicted, found = probabilities.argmax(1), measure(probabilities, labels)
    scores = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
    each = measure_classes(predicted, labels, num_classes=classes)
    for name, score in scores.items():
        for average in ("macro", "weighted"):
            expected = score(labels, predicted, average=average, zero_division=0)
            assert found[average][name] == pytest.approx(expected, abs=1e-12)
            low, high = found[average][f"{name}_ci95"]
            assert low < expected < high
        np.testing.assert_allclose(each[name], score(labels, predicted, average=None, zero_division=0))
        ends = each[f"{name}_ci95"]
        assert (ends[:, 0] <= each[name] + 1e-12).all()
        assert (each[name] <= ends[:, 1] + 1e-12).all()
    assert each["support"].sum() == each["predicted"].sum() == 900


def test_two_classes_have_an_area_under_the_curve():
    probabilities, labels = make(300, 2)
    found = measure(probabilities, labels)
    scores = probabilities[:, 1]
    others = scores[labels == 0]
    wins = [np.mean(others < one) + np.mean(others == one) / 2 for one in scores[labels == 1]]  # Mann & Whitney
    assert found["auroc"] == pytest.approx(np.mean(wins))
    assert found["auroc_ci95"][0] < found["auroc"] < found["auroc_ci95"][1]
    assert "auroc" not in measure(probabilities, np.zeros(300, int))  # one class alone has no such area
    assert "auroc" not in measure(*make(300, 3))


def test_an_area_is_the_same_whichever_class_is_sure_and_whatever_the_temperature():
    """Near 1 float32 has no room for the differences that it has near 0."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 400)
    margin = 20 + 3 * random.normal(size=400) + 8 * labels
    areas = []
    for temperature in (1, 4):
        exact = 1 / (1 + np.exp(margin / temperature))
        sure = np.stack([exact, 1 - exact], 1).astype(np.float32)
        areas += [measure(sure, labels)["auroc"], measure(sure[:, ::-1], 1 - labels)["auroc"]]
    assert min(areas) > 0.9
    assert areas == pytest.approx([areas[0]] * 4, abs=1e-4)


def test_confusion_and_the_pairs_that_are_confused_most():
    labels = np.array([0, 0, 0, 1, 1, 2, 2])
    predicted = np.array([0, 1, 1, 2, 1, 0, 2])
    matrix = confuse(predicted, labels, num_classes=4)
    np.testing.assert_array_equal(matrix, confusion_matrix(labels, predicted, labels=range(4)))
    assert most_confused(predicted, labels, at_most=9) == [(0, 1, 2), (1, 2, 1), (2, 0, 1)]
    assert most_confused(predicted, labels, at_most=1) == [(0, 1, 2)]


def test_the_headline_is_designs():
    metrics = {"accuracy": 138 / 153, "accuracy_ci95": list(accuracy_interval(138, 153)), "n": 153}
    assert headline("test", metrics) == "test accuracy 0.902 [0.845, 0.940] n=153"
