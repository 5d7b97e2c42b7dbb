"""Pictures in the report: small JPEGs inside the page, heat maps as light, and what they show in words."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

_QUALITY = 80
_DARKEST = 0.2  # of the brightness: what does not matter stays recognisable
_ROWS, _COLUMNS = ("upper", "middle", "lower"), ("left", "centre", "right")
_SPREAD = 0.5  # of the pixels at half the heat or more: then no place is meant


def encode_thumb(image: np.ndarray, *, side: int) -> str:
    """A picture as a `data:` address.

    Args:
        image: RGB, uint8 `(h, w, 3)`.
        side: at most so many pixels a side.
    """
    picture = Image.fromarray(image)
    picture.thumbnail((side, side))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def light_up(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """The picture, bright where the heat is and dark elsewhere: that reads without colours too.

    Args:
        image: RGB, uint8 `(h, w, 3)`.
        heat: 0 to 1, float32 `(map height, map width)`.

    Returns:
        uint8 `(h, w, 3)`.
    """
    height, width = image.shape[:2]
    large = Image.fromarray(heat.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    light = _DARKEST + (1 - _DARKEST) * np.clip(np.asarray(large), 0, 1)
    return np.asarray(image * light[..., np.newaxis]).round().astype(np.uint8)


def describe_heat(heat: np.ndarray) -> str:
    """Where the heat is, for those who can't see it: `the upper left`; empty where there is none.

    Args:
        heat: 0 to 1, float32 `(map height, map width)`.
    """
    if not heat.any():
        return ""
    if (heat >= heat.max() / 2).mean() > _SPREAD:
        return "the whole picture"
    total, (height, width) = float(heat.sum()), heat.shape
    row = float((heat.sum(1) * (np.arange(height) + 0.5)).sum()) / total / height
    column = float((heat.sum(0) * (np.arange(width) + 0.5)).sum()) / total / width
    words = _ROWS[min(int(3 * row), 2)], _COLUMNS[min(int(3 * column), 2)]
    return "the centre" if words == ("middle", "centre") else f"the {words[0]} {words[1]}"
