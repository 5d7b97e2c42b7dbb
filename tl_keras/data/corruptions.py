"""Image corruptions: noise, blur, brightness, contrast, compression, rotation and crops, at five strengths each.

Formulas and strengths are those of ImageNet-C (Hendrycks & Dietterich 2019, appendix B, and the authors' code), applied
to images at the network's size. Rotation and crop are additions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf
from scipy import ndimage

STRENGTHS = 5
_NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # standard deviation, for values from 0 to 1
_BLUR = (1.0, 2.0, 3.0, 4.0, 6.0)  # standard deviation in pixels
_BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)  # added to the value of HSV
_CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # factor of the distance to the mean
_JPEG = (25, 18, 15, 10, 7)  # quality
_PIXELS = (0.6, 0.5, 0.4, 0.3, 0.25)  # fraction of the side
_DEGREES = (5.0, 10.0, 20.0, 30.0, 45.0)
_CROP = (0.95, 0.9, 0.8, 0.7, 0.6)  # fraction of the side, center crop


def corrupt(image: np.ndarray, name: str, strength: int, *, seed: int) -> np.ndarray:
    """Corrupts one image.

    Args:
        image: RGB, uint8 `(size, size, 3)`.
        name: one of `CORRUPTIONS`.
        strength: 1 to 5.
        seed: random seed of the noise.

    Returns:
        uint8 `(size, size, 3)`.
    """
    values = CORRUPTIONS[name](image, strength - 1, np.random.default_rng(seed))
    return np.asarray(np.clip(np.rint(values), 0, 255), np.uint8)


def _add_noise(image: np.ndarray, level: int, random: np.random.Generator) -> np.ndarray:
    return np.asarray(image + 255 * _NOISE[level] * random.normal(size=image.shape))


def _blur(image: np.ndarray, level: int, random: np.random.Generator) -> np.ndarray:
    del random
    sigma = (_BLUR[level], _BLUR[level], 0)
    blurred: np.ndarray = ndimage.gaussian_filter(image.astype(np.float32), sigma, mode="nearest", truncate=4.0)
    return blurred


def _brighten(image: np.ndarray, level: int, random: np.random.Generator) -> np.ndarray:
    """Increases the value of HSV, which is the largest channel; a common factor keeps hue and saturation."""
    del random
    values = image.astype(np.float32) / 255
    value = values.max(-1, keepdims=True)
    brighter = np.minimum(value + _BRIGHTNESS[level], 1)
    # black has no hue: it becomes gray
    return np.asarray(255 * np.where(value > 0, values * brighter / np.where(value > 0, value, 1), brighter))


def _flatten_contrast(image: np.ndarray, level: int, random: np.random.Generator) -> np.ndarray:
    del random
    mean = image.mean((0, 1), keepdims=True)
    return np.asarray((image - mean) * _CONTRAST[level] + mean)


def _compress(image: np.ndarray, level: int, random: np.random.Generator) -> np.ndarray:
    del random
    encoded = tf.io.encode_jpeg(image, quality=_JPEG[level])
    return np.asarray(tf.io.decode_jpeg(encoded, channels=3))


def _pixelate(image: np.ndarray, level: int, random: np.random.Generator) -> np.ndarray:
    del random
    size = image.shape[0]
    small = tf.image.resize(image, [max(1, int(size * _PIXELS[level]))] * 2, method="area")
    return np.asarray(tf.image.resize(small, [size, size], method="nearest"))


def _rotate(image: np.ndarray, level: int, random: np.random.Generator) -> np.ndarray:
    degrees = _DEGREES[level] * random.choice((-1, 1))
    turned: np.ndarray = ndimage.rotate(image.astype(np.float32), degrees, reshape=False, order=1, mode="reflect")
    return turned


def _crop(image: np.ndarray, level: int, random: np.random.Generator) -> np.ndarray:
    del random
    size = image.shape[0]
    kept = max(1, round(size * _CROP[level]))
    start = (size - kept) // 2
    cut = image[start : start + kept, start : start + kept].astype(np.float32)
    return np.asarray(tf.image.resize(cut, [size, size], method="bilinear"))


CORRUPTIONS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "noise": _add_noise,
    "blur": _blur,
    "brightness": _brighten,
    "contrast": _flatten_contrast,
    "jpeg": _compress,
    "pixelation": _pixelate,
    "rotation": _rotate,
    "crop": _crop,
}
