"""Whether two images show the same picture: a perceptual hash to find out quickly, correlation to be sure."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy.fft import dctn

THUMB = 64  # side of the images that are compared
BITS = 63
_GRID, _KEPT = 32, 8
_SCALES = (1.0, 0.95, 0.9)  # of the side, from the middle: a crop of one looks like the whole of the other
_MIRROR = (-1.0) ** np.arange(_KEPT)  # what turns a picture's cosines into those of its mirror image


def hash_image(thumb: np.ndarray) -> np.ndarray:
    """The hashes of an image, of the middle of it, and of their mirror images (Zauner 2010, section 3.2.1: pHash).

    A hash is the signs of the 8 by 8 lowest frequencies of a discrete cosine transform against their median, the mean
    left out.

    Args:
        thumb: grey, uint8 `(64, 64)`, the whole image squashed.

    Returns:
        bool `(6, 63)`: three crops as they are, then mirrored; the first is the image itself.
    """
    low = dctn(_crop(thumb), axes=(1, 2), norm="ortho")[:, :_KEPT, :_KEPT]
    both = np.concatenate([low, low * _MIRROR]).reshape(2 * len(_SCALES), -1)[:, 1:]
    return np.asarray(both > np.median(both, axis=1, keepdims=True))


def distance(first: np.ndarray, second: np.ndarray) -> int:
    """Bits that differ, at least, between an image and any view of the other; both bool `(6, 63)`."""
    return int(min((first[0] != second).sum(1).min(), (second[0] != first).sum(1).min()))


def correlate(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation of brightness, at most, between an image and any view of the other; both thumbs, uint8 `(64, 64)`.

    Returns:
        -1 to 1; 0 where one of them is blank.
    """
    one, other = (_standardize(np.concatenate([crops, crops[:, :, ::-1]])) for crops in map(_crop, (first, second)))
    size = _GRID * _GRID
    return float(max((one[0] * other).sum((1, 2)).max(), (other[0] * one).sum((1, 2)).max()) / size)


def _crop(thumb: np.ndarray) -> np.ndarray:
    """The thumb and the middles of it, each float32 `(32, 32)`."""
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
