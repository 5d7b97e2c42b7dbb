"""Wilson's interval against the values that were published."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize

from tl_keras.evaluation.intervals import accuracy_interval

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
