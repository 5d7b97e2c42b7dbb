"""Wilson's interval against the values that were published."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats

from tl_keras.statistics.intervals import (
    accuracy_interval,
    auroc_interval,
    f1_intervals,
    mean_interval,
    proportion_intervals,
    wilson,
)

# Newcombe 1998, Statistics in Medicine 17, table I, method 3 (score without continuity correction)
NEWCOMBE = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]


@pytest.mark.parametrize(("correct", "count", "low", "high"), NEWCOMBE)
def test_it_is_the_interval_that_newcombe_printed(correct, count, low, high):
    assert accuracy_interval(correct, count) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("correct", "count"), [(1, 1), (0, 1), (138, 153), (5, 10), (9999, 10_000), (1, 1_000_000)])
def test_it_is_wilsons_formula(correct, count):
    z, share = 1.959963984540054, correct / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    assert accuracy_interval(correct, count) == pytest.approx((middle - half, middle + half), abs=1e-12)


def test_its_ends_are_the_proportions_that_the_score_test_just_rejects():
    correct, count = 138, 153

    def score(proportion):
        return abs(correct / count - proportion) / math.sqrt(proportion * (1 - proportion) / count) - 1.959963984540054

    low, high = accuracy_interval(correct, count)
    assert low == pytest.approx(optimize.brentq(score, 0.5, correct / count), abs=1e-9)
    assert high == pytest.approx(optimize.brentq(score, correct / count, 0.9999), abs=1e-9)


@pytest.mark.parametrize("count", [1, 2, 7, 100, 1000])
def test_none_and_all_right_end_at_0_and_1_and_mirror_each_other(count):
    none, every = accuracy_interval(0, count), accuracy_interval(count, count)
    assert none[0] == 0
    assert every[1] == 1
    assert none[1] == pytest.approx(1 - every[0], abs=1e-12)
    assert 0 < none[1] < 1


def test_it_holds_the_accuracy_and_narrows_with_more_trials():
    widths = []
    for count in (10, 100, 1000, 10_000):
        low, high = accuracy_interval(count * 9 // 10, count)
        assert 0 <= low < 0.9 < high <= 1
        widths.append(high - low)
    np.testing.assert_allclose(np.array(widths[:-1]) / widths[1:], math.sqrt(10), rtol=0.2)


def test_nothing_tried_is_nothing_known():
    assert accuracy_interval(0, 0) == (0.0, 1.0)


def test_the_ends_are_plain_numbers_that_json_takes():
    assert [type(end) for end in accuracy_interval(3, 4)] == [float, float]


def cover(draw, interval, truth: float, trials: int = 2000) -> float:
    """The share of simulated trials whose interval contains the truth."""
    random = np.random.default_rng(0)
    ends = [interval(draw(random)) for _ in range(trials)]
    return float(np.mean([low <= truth <= high for low, high in ends]))


@pytest.mark.parametrize(("accuracy", "count"), [(0.9, 153), (0.6, 50), (0.75, 500), (0.98, 1000)])
def test_intervals_of_an_accuracy_hold_the_truth_in_95_of_100_trials(accuracy, count):
    found = cover(
        lambda random: int(random.binomial(count, accuracy)), lambda right: accuracy_interval(right, count), accuracy
    )
    assert 0.93 <= found <= 0.97


def test_so_do_those_of_an_accuracy_of_about_098_on_50_examples():
    """At 0.98 itself no interval can: fifty trials leave it 92.2 % or 98.2 %, so accuracies around it are drawn."""
    random, hits = np.random.default_rng(0), []
    for _ in range(2000):
        truth = random.uniform(0.96, 1.0)
        low, high = accuracy_interval(int(random.binomial(50, truth)), 50)
        hits.append(low <= truth <= high)
    assert 0.93 <= np.mean(hits) <= 0.97


def test_intervals_of_f1_hold_the_truth():
    def draw(random):
        labels = random.random(300) < 0.3
        predicted = np.where(labels, random.random(300) < 0.85, random.random(300) < 0.1)
        hits = int((labels & predicted).sum())
        return np.array([hits]), np.array([int(labels.sum() + predicted.sum()) - 2 * hits])

    truth = 2 * 0.3 * 0.85 / (0.3 + 0.3 * 0.85 + 0.7 * 0.1)
    assert 0.93 <= cover(draw, lambda counts: f1_intervals(*counts)[0], truth) <= 0.97


def test_intervals_of_an_area_under_the_curve_hold_the_truth():
    from sklearn.metrics import roc_auc_score

    labels = np.repeat([0, 1], [60, 40])

    def draw(random):
        return roc_auc_score(labels, random.normal(size=100) + 1.5 * labels)

    truth = stats.norm.cdf(1.5 / math.sqrt(2))
    assert 0.93 <= cover(draw, lambda area: auroc_interval(area, 40, 60), truth) <= 0.98
    low, high = auroc_interval(1.0, 40, 60)
    assert 0.9 < low < 1
    assert high == 1
    assert auroc_interval(0.0, 5, 5)[0] == 0


def test_an_area_as_near_to_1_or_0_as_numbers_go_has_an_interval():
    for area in (1 - 5e-10, 1 - 2**-53, 5e-10):
        low, high = auroc_interval(area, 50_000, 50_000)
        assert 0 <= low <= area <= high <= 1


def test_intervals_of_a_mean_hold_the_truth():
    found = cover(lambda random: random.exponential(size=200), mean_interval, 1.0, 1000)
    assert 0.92 <= found <= 0.97
    assert mean_interval(np.array([1.0])) is None
    assert mean_interval(np.arange(50.0)) == mean_interval(np.arange(50.0))


def test_a_share_of_an_effective_sample_has_the_interval_of_a_real_one_of_that_size():
    assert wilson(np.array(0.9), np.array(50)) == pytest.approx(accuracy_interval(45, 50))
    assert wilson(np.array(0.9), np.array(50.5))[0] > accuracy_interval(45, 50)[0]


def test_many_proportions_have_scipys_intervals():
    correct, counts = np.array([0, 1, 45, 50, 0]), np.array([7, 1, 50, 50, 0])
    found = proportion_intervals(correct, counts)
    for ends, right, count in zip(found, correct.tolist(), counts.tolist(), strict=True):
        expected = stats.binomtest(right, count).proportion_ci(method="wilson") if count else (0, 1)
        assert ends == pytest.approx(tuple(expected), abs=1e-12)
