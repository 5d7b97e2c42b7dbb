"""Nearest neighbors against their definition."""

from __future__ import annotations

import numpy as np
import pytest

from tl_keras.audit.neighbors import NEIGHBORS, find_neighbors


def test_they_are_those_of_the_definition():
    embeddings = np.random.default_rng(0).normal(size=(60, 12)).astype(np.float32)
    found = find_neighbors(embeddings)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    distances = np.linalg.norm(unit[:, np.newaxis] - unit, axis=2)
    np.fill_diagonal(distances, np.inf)
    np.testing.assert_array_equal(found.indices, np.argsort(distances, axis=1)[:, :NEIGHBORS])
    np.testing.assert_allclose(found.distances, np.sort(distances, axis=1)[:, :NEIGHBORS], atol=1e-4)


@pytest.mark.parametrize("count", [2, 5, 40])
def test_copies_never_count_as_themselves(count):
    found = find_neighbors(np.ones((count, 3), np.float32))
    assert found.indices.shape == (count, min(NEIGHBORS, count - 1))
    assert not (found.indices == np.arange(count)[:, np.newaxis]).any()


def test_many_dimensions_are_reduced_and_neighbors_stay():
    random = np.random.default_rng(0)
    originals = random.normal(size=(200, 300)).astype(np.float32)
    copies = originals + 0.01 * random.normal(size=originals.shape).astype(np.float32)
    found = find_neighbors(np.concatenate([originals, copies]))
    assert found.points.shape == (400, 128)
    np.testing.assert_array_equal(found.indices[:200, 0], np.arange(200, 400))


def test_a_single_image_has_none():
    found = find_neighbors(np.ones((1, 3), np.float32))
    assert found.indices.shape == (1, 0)
