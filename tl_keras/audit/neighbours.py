"""Nearest neighbours of all embeddings, in minutes for a hundred thousand of them on two cores."""

from __future__ import annotations

import dataclasses

import numpy as np
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

_DIMENSIONS = 128  # the time of an exact search grows with it: half a minute for 100,000 (benchmarks/audit.py)
_FITTED_AT_MOST = 20_000
NEIGHBOURS = 10


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Of each embedding the nearest others.

    Attributes:
        points: float32 `(n, d)`: embeddings of length 1, on their main components.
        indices: int64 `(n, k)`, the nearest first, itself left out.
        distances: float32 `(n, k)`, Euclidean between `points`.
    """

    points: np.ndarray
    indices: np.ndarray
    distances: np.ndarray


def find_neighbours(embeddings: np.ndarray) -> Neighbours:
    """Finds the nearest neighbours by cosine, exactly, on the 128 main components.

    Args:
        embeddings: float32 `(n, dim)`, n at least 2.

    Returns:
        At most ten of each.
    """
    unit = normalize(embeddings.astype(np.float32))
    count, dim = unit.shape
    points = unit
    if dim > _DIMENSIONS and count > _DIMENSIONS:
        rows = np.random.default_rng(0).permutation(count)[:_FITTED_AT_MOST]
        points = PCA(_DIMENSIONS, svd_solver="randomized", random_state=0).fit(unit[rows]).transform(unit)
        points = points.astype(np.float32)
    k = min(NEIGHBOURS, count - 1)
    search = NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(points)
    distances, indices = search.kneighbors(points)
    # itself comes first, but among exact copies anyone may
    own = indices == np.arange(count)[:, np.newaxis]
    own[~own.any(1), -1] = True
    keep = ~own
    return Neighbours(points, indices[keep].reshape(count, k), distances[keep].reshape(count, k).astype(np.float32))
