"""Which images are shown."""

from __future__ import annotations

import numpy as np

from tl_keras.report.selection import EACH, LEAST_SURE, PAIRS, WORST, choose_shown


def test_by_hand():
    probabilities = np.array([
        [0.9, 0.1, 0.0],  # right
        [0.2, 0.7, 0.1],  # a for b
        [0.1, 0.8, 0.1],  # a for b, surer
        [0.4, 0.35, 0.25],  # right, least sure
        [0.0, 0.1, 0.9],  # b for c
    ])
    found = choose_shown(probabilities, np.array([0, 0, 0, 0, 1]))
    assert [(pair.label, pair.predicted, pair.count, pair.rows) for pair in found.pairs] == [
        (0, 1, 2, [2, 1]),
        (1, 2, 1, [4]),
    ]
    assert found.worst == []  # all of them stand among the pairs
    assert found.least_sure == [3, 0]
    assert found.rows == [3, 0, 2, 1, 4]


def test_counts_are_bounded_whatever_the_size():
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(30), 3000)
    labels = random.integers(0, 30, 3000)
    found = choose_shown(probabilities, labels)
    assert (len(found.worst), len(found.least_sure), len(found.pairs)) == (WORST, LEAST_SURE, PAIRS)
    assert all(len(pair.rows) <= EACH for pair in found.pairs)
    assert len(found.rows) == len(set(found.rows))
    confidence = probabilities.max(1)
    assert (np.diff(confidence[found.worst]) <= 0).all()
    others = np.setdiff1d(np.flatnonzero(probabilities.argmax(1) != labels), found.rows)
    assert confidence[others].max() <= confidence[found.worst].min()


def test_without_mistakes_the_least_sure_remain():
    found = choose_shown(np.array([[0.9, 0.1], [0.6, 0.4]]), np.array([0, 0]))
    assert (found.worst, found.pairs, found.least_sure) == ([], [], [1, 0])
