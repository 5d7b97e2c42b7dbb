"""Findings about files from their headers, and properties of pixels for the search for duplicates, with Pillow."""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageStat

from tl_keras.audit.duplicates import Look
from tl_keras.audit.findings import Finding
from tl_keras.audit.hashes import THUMB, hash_image

_SUFFIXES = {
    "JPEG": {".jpg", ".jpeg", ".jpe", ".jfif"},
    "MPO": {".jpg", ".jpeg", ".mpo"},  # a JPEG followed by further images, as phones write it
    "PNG": {".png"},
    "GIF": {".gif"},
    "BMP": {".bmp", ".dib"},
    "WEBP": {".webp"},
}
_HUGE_PIXELS = 50_000_000
_LONGEST = 4.0  # times as long as wide
_ORIENTATION = 0x0112  # EXIF 2.3, table 4
_TURNS = {  # EXIF orientation → operation that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LOOKED_AT = 256  # minimum height and width of the decoded image, in pixels
_BLANK_SPREAD, _BLANK_RANGE = 2.0, 32  # levels of a channel (0 to 255): standard deviation, and maximum minus minimum
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I", "F")


def inspect_file(example_id: str, content: bytes, *, image_size: int) -> list[Finding]:
    """Finds unusual properties of an image file.

    Args:
        example_id: path of the image, whose suffix is compared with the format; a TFDS id has no suffix.
        content: bytes of the file.
        image_size: height and width of the network's input, in pixels.

    Returns:
        The findings; empty if Pillow can't open the file, which is reported when it is decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about large images, which are a finding here
            with Image.open(io.BytesIO(content)) as image:
                return [Finding(example_id, *found) for found in _list_oddities(image, example_id, image_size)]
    except Image.DecompressionBombError:  # Pillow does not open images beyond twice its own limit
        return [Finding(example_id, "huge", "medium", f"more than {2 * int(Image.MAX_IMAGE_PIXELS or 0):,} pixels")]
    except Exception:  # on broken files Pillow's readers raise exceptions of many types
        return []


def look_at(content: bytes) -> Look | None:
    """Computes the properties of an image's pixels; None if Pillow can't decode it.

    Large JPEGs are decoded at the smallest scale of libjpeg with at least 256 pixels per side. The caller silences
    Pillow's warnings about large images, because warning filters are global to all threads.

    Args:
        content: encoded bytes.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.draft("RGB", (_LOOKED_AT, _LOOKED_AT))
            upright = _stand_upright(_to_rgb(image), _read_orientation(image))
    except Exception:  # on broken files Pillow's readers raise exceptions of many types
        return None
    digest = hashlib.sha256(f"{upright.size}".encode() + upright.tobytes()).digest()
    lowest, highest = zip(*upright.getextrema(), strict=True)
    is_flat = max(high - low for low, high in zip(lowest, highest, strict=True)) < _BLANK_RANGE
    blank = is_flat and max(ImageStat.Stat(upright).stddev) < _BLANK_SPREAD
    thumb = np.asarray(upright.convert("L").resize((THUMB, THUMB), Image.Resampling.BOX, reducing_gap=2.0))
    return Look(digest, hash_image(thumb), thumb, blank)


def _list_oddities(image: Image.Image, example_id: str, image_size: int) -> list[tuple[str, str, str]]:
    found, (width, height) = list[tuple[str, str, str]](), image.size
    shorter, longer, size = min(width, height), max(width, height), f"{width} x {height} pixels"
    suffix, known = PurePosixPath(example_id).suffix.lower(), _SUFFIXES.get(image.format or "", set())
    frames = getattr(image, "n_frames", 1)
    if shorter < image_size / 2:
        found.append(("tiny", "medium" if shorter < image_size / 4 else "low", size))
    if width * height > _HUGE_PIXELS:
        found.append(("huge", "medium", size))
    if shorter and longer / shorter > _LONGEST:
        found.append(("aspect", "low", size))
    if frames > 1 and image.format != "MPO":
        found.append(("animated", "low", f"{frames} frames"))
    if image.mode == "CMYK":
        found.append(("cmyk", "low", f"{image.format} in CMYK"))
    if image.mode in _SIXTEEN_BITS or _has_wide_channels(image):
        found.append(("16-bit", "low", f"{image.format} with 16 bits per channel"))
    if suffix and known and suffix not in known:
        found.append(("suffix", "low", f"suffix {suffix}, format {image.format}"))
    orientation = _read_orientation(image)
    if orientation in _TURNS:
        found.append(("rotated", "low", f"EXIF orientation {orientation}"))
    return found


def _read_orientation(image: Image.Image) -> int:
    """Reads the EXIF orientation without Pillow's `getexif`, which decodes a whole PNG to find EXIF at its end."""
    exif = Image.Exif()
    exif.load(image.info.get("exif", b""))
    orientation = exif.get(_ORIENTATION, 1)
    return orientation if isinstance(orientation, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts to 8 bits per channel; with 16 bits Pillow would clip values above 255."""
    if image.mode not in _SIXTEEN_BITS:
        return image.convert("RGB")
    levels = np.asarray(image, np.float64)
    return Image.fromarray(np.clip(levels / 257, 0, 255).round().astype(np.uint8)).convert("RGB")


def _stand_upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _has_wide_channels(image: Image.Image) -> bool:
    """Whether an image is a color PNG with 16 bits per channel, which Pillow opens as 8 (PNG, section 11.2.2)."""
    tiles: list[Any] = getattr(image, "tile", [])
    return bool(tiles) and image.format == "PNG" and ";16" in str(tiles[0][3])
