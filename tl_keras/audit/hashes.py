"""Similarity of two images: perceptual hashes as a fast filter, correlation to confirm."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy.fft import dctn

THUMB = 64  # height and width of the compared images
BITS = 63
_GRID, _KEPT = 32, 8
_SCALES = (1.0, 0.95, 0.9)  # center crops, as fractions of the side, to recognize cropped copies
VIEWS = 2 * len(_SCALES)  # each crop, and its mirror image
_MIRROR = (-1.0) ** np.arange(_KEPT)  # factors that turn the cosine transform of an image into that of its mirror image


def hash_image(thumb: np.ndarray) -> np.ndarray:
    """Computes perceptual hashes of an image, its center crops, and their mirror images (pHash, Zauner 2010).

    A hash compares the 8 x 8 lowest frequencies of a discrete cosine transform, without the mean, to their median
    (section 3.2.1).

    Args:
        thumb: grayscale, uint8 `(64, 64)`, the whole image squashed.

    Returns:
        bool `(6, 63)`: three crops, then their mirror images; the first crop is the whole image.
    """
    low = dctn(_crop(thumb), axes=(1, 2), norm="ortho")[:, :_KEPT, :_KEPT]
    both = np.concatenate([low, low * _MIRROR]).reshape(VIEWS, -1)[:, 1:]
    return np.asarray(both > np.median(both, axis=1, keepdims=True))


def distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Minimum number of different bits between images and any view of others, int64 `(...)`; bool `(..., 6, 63)`."""
    one, other = ((a[..., :1, :] != b).sum(-1).min(-1) for a, b in ((first, second), (second, first)))
    return np.asarray(np.minimum(one, other))


def correlate(first: np.ndarray, second: np.ndarray) -> float:
    """Maximum correlation of brightness between an image and any view of the other; both uint8 `(64, 64)`.

    Returns:
        -1 to 1; 0 if one of them is blank.
    """
    one, other = (_standardize(np.concatenate([crops, crops[:, :, ::-1]])) for crops in map(_crop, (first, second)))
    size = _GRID * _GRID
    return float(max((one[0] * other).sum((1, 2)).max(), (other[0] * one).sum((1, 2)).max()) / size)


def _crop(thumb: np.ndarray) -> np.ndarray:
    """Crops the thumbnail: the whole and its centers, each float32 `(32, 32)`."""
    image, views = Image.fromarray(thumb), []
    for scale in _SCALES:
        margin = (1 - scale) / 2 * THUMB
        box = (margin, margin, THUMB - margin, THUMB - margin)
        views.append(np.asarray(image.resize((_GRID, _GRID), Image.Resampling.BILINEAR, box=box), np.float32))
    return np.stack(views)


def _standardize(views: np.ndarray) -> np.ndarray:
    centred = views - views.mean((1, 2), keepdims=True)
    spread = centred.std((1, 2), keepdims=True)
    return np.asarray(np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0))
