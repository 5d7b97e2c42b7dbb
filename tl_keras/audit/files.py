"""Files that are odd in how they are stored, told by their headers; and what images show, for comparison. By Pillow."""

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
    "MPO": {".jpg", ".jpeg", ".mpo"},  # a JPEG with further ones behind it, as phones write
    "PNG": {".png"},
    "GIF": {".gif"},
    "BMP": {".bmp", ".dib"},
    "WEBP": {".webp"},
}
_HUGE_PIXELS = 50_000_000
_LONGEST = 4.0  # times as long as wide
_ORIENTATION = 0x0112  # EXIF 2.3, table 4
_TURNS = {  # what stands the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LOOKED_AT = 256  # pixels a side, at least
_BLANK_SPREAD, _BLANK_RANGE = 2.0, 32  # of a channel's levels, of 255: standard deviation, and highest less lowest
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I", "F")


def inspect_file(example_id: str, content: bytes, *, image_size: int) -> list[Finding]:
    """What is odd about how an image is stored.

    Args:
        example_id: its path, whose suffix is compared with what it is; a TFDS id has none.
        content: its bytes.
        image_size: side of the network's input in pixels.

    Returns:
        What was found; nothing for bytes that Pillow can't open: decoding tells about these.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images: so do we
            with Image.open(io.BytesIO(content)) as image:
                return [Finding(example_id, *found) for found in _list_oddities(image, example_id, image_size)]
    except Image.DecompressionBombError:  # Pillow does not open what is above twice its own limit
        return [Finding(example_id, "huge", "medium", f"more than {2 * int(Image.MAX_IMAGE_PIXELS or 0):,} pixels")]
    except Exception:  # of a broken file Pillow's readers raise whatever they stumble over
        return []


def look_at(content: bytes) -> Look | None:
    """What an image shows, for comparison; None for bytes that Pillow can't decode.

    A large JPEG is decoded at the smallest of libjpeg's scales that leaves 256 pixels a side. Pillow warns of large
    images, which is the caller's to silence: filters of warnings belong to all threads.

    Args:
        content: encoded bytes.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.draft("RGB", (_LOOKED_AT, _LOOKED_AT))
            upright = _stand_upright(_to_rgb(image), _read_orientation(image))
    except Exception:  # of a broken file Pillow's readers raise whatever they stumble over
        return None
    digest = hashlib.sha256(f"{upright.size}".encode() + upright.tobytes()).digest()
    spread = max(ImageStat.Stat(upright).stddev)
    lowest, highest = zip(*upright.getextrema(), strict=True)
    blank = spread < _BLANK_SPREAD and max(high - low for low, high in zip(lowest, highest, strict=True)) < _BLANK_RANGE
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
        found.append(("16-bit", "low", f"{image.format} with 16 bits a channel"))
    if suffix and known and suffix not in known:
        found.append(("suffix", "low", f"{suffix} is a {image.format}"))
    orientation = _read_orientation(image)
    if orientation in _TURNS:
        found.append(("rotated", "low", f"EXIF orientation {orientation}"))
    return found


def _read_orientation(image: Image.Image) -> int:
    """Without Pillow's own getexif, which decodes a whole PNG to look for it behind the pixels."""
    exif = Image.Exif()
    exif.load(image.info.get("exif", b""))
    orientation = exif.get(_ORIENTATION, 1)
    return orientation if isinstance(orientation, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """As 8 bits a channel; of 16 bits Pillow would cut off what is above 255."""
    if image.mode not in _SIXTEEN_BITS:
        return image.convert("RGB")
    levels = np.asarray(image, np.float64)
    return Image.fromarray(np.clip(levels / 257, 0, 255).round().astype(np.uint8)).convert("RGB")


def _stand_upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _has_wide_channels(image: Image.Image) -> bool:
    """A PNG of 16 bits in colour, which Pillow opens as 8: its header says so (PNG, section 11.2.2)."""
    tiles: list[Any] = getattr(image, "tile", [])
    return bool(tiles) and image.format == "PNG" and ";16" in str(tiles[0][3])
