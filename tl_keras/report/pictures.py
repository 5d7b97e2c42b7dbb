"""Pictures of the report: thumbnails as JPEG, heat maps as brightness, and descriptions of heat maps in words."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

_QUALITY = 80
_DARKEST = 0.2  # fraction of the brightness that is kept where there is no heat: the image stays recognizable
_ROWS, _COLUMNS = ("upper", "middle", "lower"), ("left", "center", "right")
_SPREAD = 0.5  # if more than this fraction of the pixels has at least half the maximum heat, no region is named


def encode_thumb(image: np.ndarray, *, side: int) -> str:
    """Encodes a thumbnail as a `data:` URL.

    Args:
        image: RGB, uint8 `(h, w, 3)`.
        side: maximum height and width of the thumbnail, in pixels.
    """
    picture = Image.fromarray(image)
    picture.thumbnail((side, side))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def light_up(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Applies a heat map to an image as brightness, which needs no color vision.

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
    """Describes the location of the heat for screen readers: `the upper left`; empty if there is no heat.

    Args:
        heat: 0 to 1, float32 `(map height, map width)`.
    """
    if not heat.any():
        return ""
    if (heat >= heat.max() / 2).mean() > _SPREAD:
        return "the whole image"
    total, (height, width) = float(heat.sum()), heat.shape
    row = float((heat.sum(1) * (np.arange(height) + 0.5)).sum()) / total / height
    column = float((heat.sum(0) * (np.arange(width) + 0.5)).sum()) / total / width
    words = _ROWS[min(int(3 * row), 2)], _COLUMNS[min(int(3 * column), 2)]
    return "the center" if words == ("middle", "center") else f"the {words[0]} {words[1]}"
