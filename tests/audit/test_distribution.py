"""Outliers and shift, on points whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from tl_keras.audit import distribution
from tl_keras.audit.distribution import find_outliers, measure_shift
from tl_keras.audit.neighbors import find_neighbors


def test_the_farthest_point_is_the_first_outlier():
    points = 5 + np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    points[17] = -points[17]
    rows, scores = find_outliers(find_neighbors(points))
    assert rows[0] == 17
    assert scores[0] > 10
    assert len(rows) < 12  # 200 draws of a normal distribution have hardly any


def test_equal_points_have_no_outlier():
    rows, _ = find_outliers(find_neighbors(np.ones((20, 4), np.float32)))
    assert len(rows) == 0


@pytest.mark.parametrize(("moved", "low", "high"), [(0.0, 0.35, 0.65), (2.0, 0.85, 1.0)])
def test_shift_is_seen_where_there_is_one(moved, low, high):
    points = np.random.default_rng(1).normal(size=(400, 6))
    is_test = np.arange(400) % 4 == 0
    points[is_test, 0] += moved
    found = measure_shift(points, is_test)
    assert low < found["auroc"] <= high
    assert (found["train"], found["test"]) == (300, 100)


def test_a_rare_test_split_is_drawn_whole(monkeypatch):
    monkeypatch.setattr(distribution, "_SHIFT_AT_MOST", 100)
    points = np.random.default_rng(1).normal(size=(5000, 3))
    found = measure_shift(points, np.arange(5000) < 12)
    assert (found["train"], found["test"]) == (100, 12)


def test_too_few_examples_give_no_shift():
    assert measure_shift(np.zeros((30, 2)), np.arange(30) < 9) is None
    assert measure_shift(np.zeros((30, 2)), np.zeros(30, bool)) is None
