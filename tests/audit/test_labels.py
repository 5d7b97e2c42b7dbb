"""Confident learning: by hand, and on labels that were flipped."""

from __future__ import annotations

import numpy as np

from tl_keras.audit.labels import cross_validate, find_label_issues


def test_three_examples_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.95, 0.05], [0.3, 0.7], [0.2, 0.8]])
    labels = np.array([0, 0, 1, 1, 1])
    # class 0 is reached at (0.9 + 0.8) / 2 = 0.85, class 1 at (0.05 + 0.7 + 0.8) / 3 = 0.52
    rows, looks_like, margins = find_label_issues(probabilities, labels)
    assert rows.tolist() == [2]
    assert looks_like.tolist() == [0]
    np.testing.assert_allclose(margins, [0.9])


def test_flipped_labels_come_first():
    random = np.random.default_rng(0)
    truth = random.integers(0, 4, 400)
    points = 3 * np.eye(4)[truth] + random.normal(size=(400, 4))
    labels, flipped = truth.copy(), random.choice(400, 20, replace=False)
    labels[flipped] = (labels[flipped] + 1) % 4
    judged, probabilities = cross_validate(points, labels)
    assert judged.tolist() == list(range(400))
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
    rows, looks_like, margins = find_label_issues(probabilities, labels)
    assert np.isin(rows[:15], flipped).mean() > 0.9
    assert (looks_like[:10] == truth[rows[:10]]).all()
    assert (np.diff(margins) <= 0).all()


def test_very_many_are_judged_by_a_cheaper_model_and_too_many_not_at_all(monkeypatch):
    from tl_keras.audit import labels as module

    random = np.random.default_rng(0)
    truth = random.integers(0, 4, 400)
    points = 3 * np.eye(4)[truth] + random.normal(size=(400, 4))
    monkeypatch.setattr(module, "_REGRESSION_AT_MOST", 100)
    judged, probabilities = cross_validate(points, truth)
    assert len(judged) == 400
    assert (probabilities.argmax(1) == truth).mean() > 0.9
    monkeypatch.setattr(module, "_CELLS_AT_MOST", 100)
    assert module.too_many(400, 4)
    assert len(cross_validate(points, truth)[0]) == 0


def test_classes_of_one_example_are_not_judged():
    points = np.random.default_rng(0).normal(size=(9, 3))
    judged, probabilities = cross_validate(points, np.array([0, 0, 0, 0, 1, 1, 1, 1, 2]))
    assert judged.tolist() == list(range(8))
    assert (probabilities[:, 2] == 0).all()
    judged, _ = cross_validate(points[:3], np.array([0, 1, 2]))
    assert len(judged) == 0
