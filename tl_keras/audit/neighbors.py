"""Nearest neighbors of all embeddings; 100,000 embeddings take minutes on two cores."""

from __future__ import annotations

import dataclasses

import numpy as np
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

_DIMENSIONS = 128  # determines the time of the exact search: half a minute for 100,000 (benchmarks/audit.py)
_FITTED_AT_MOST = 20_000
NEIGHBORS = 10


@dataclasses.dataclass(frozen=True)
class Neighbors:
    """The nearest neighbors of each embedding.

    Attributes:
        points: principal components of embeddings of length 1, float32 `(n, d)`.
        indices: neighbors, nearest first, without the embedding itself, int64 `(n, k)`.
        distances: Euclidean distances between `points`, float32 `(n, k)`.
    """

    points: np.ndarray
    indices: np.ndarray
    distances: np.ndarray


def find_neighbors(embeddings: np.ndarray) -> Neighbors:
    """Finds the nearest neighbors by cosine similarity, with an exact search on 128 principal components.

    Args:
        embeddings: float32 `(n, dim)`, n at least 2.

    Returns:
        At most ten neighbors of each embedding.
    """
    unit = normalize(embeddings.astype(np.float32))
    count, dim = unit.shape
    points = unit
    if dim > _DIMENSIONS and count > _DIMENSIONS:
        rows = np.random.default_rng(0).permutation(count)[:_FITTED_AT_MOST]
        points = PCA(_DIMENSIONS, svd_solver="randomized", random_state=0).fit(unit[rows]).transform(unit)
        points = points.astype(np.float32)
    k = min(NEIGHBORS, count - 1)
    search = NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(points)
    distances, indices = search.kneighbors(points)
    # each row is its own nearest neighbor, but among exact copies the order is arbitrary
    own = indices == np.arange(count)[:, np.newaxis]
    own[~own.any(1), -1] = True
    keep = ~own
    return Neighbors(points, indices[keep].reshape(count, k), distances[keep].reshape(count, k).astype(np.float32))
