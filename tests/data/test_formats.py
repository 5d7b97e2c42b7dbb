"""Formats told by content: real files of each kind, and what a user is told about those that can't be read."""

from __future__ import annotations

import io

import pytest
import tensorflow as tf
from PIL import Image

from tests.conftest import make_image
from tl_keras.data.formats import explain_unreadable, name_format


def encode(kind: str, *, frames: int = 1, mode: str = "RGB", **options: object) -> bytes:
    images = [Image.fromarray(make_image(number)).convert(mode) for number in range(frames)]
    if frames > 1:
        options |= {"save_all": True, "append_images": images[1:], "duration": 50}
    file = io.BytesIO()
    images[0].save(file, kind, **options)
    return file.getvalue()


READABLE = {
    "jpeg": {"kind": "JPEG"},
    "progressive JPEG": {"kind": "JPEG", "progressive": True},
    "grey JPEG": {"kind": "JPEG", "mode": "L"},
    "CMYK JPEG": {"kind": "JPEG", "mode": "CMYK"},
    "JPEG with EXIF": {"kind": "JPEG", "exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"},
    "png": {"kind": "PNG"},
    "palette PNG": {"kind": "PNG", "mode": "P"},
    "transparent PNG": {"kind": "PNG", "mode": "RGBA"},
    "black and white PNG": {"kind": "PNG", "mode": "1"},
    "gif": {"kind": "GIF"},
    "animated GIF": {"kind": "GIF", "frames": 3},
    "bmp": {"kind": "BMP"},
    "grey BMP": {"kind": "BMP", "mode": "L"},
    "webp": {"kind": "WEBP"},
    "lossless WebP": {"kind": "WEBP", "lossless": True},
    "transparent WebP": {"kind": "WEBP", "mode": "RGBA"},
    "WebP with EXIF": {"kind": "WEBP", "exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"},
}


@pytest.mark.parametrize("name", READABLE)
def test_what_tensorflow_reads_is_named_in_lower_case_and_is_fine(name):
    content = encode(**READABLE[name])
    assert name_format(content) == name.split()[-1].lower() if " with " not in name else name.split()[0].lower()
    assert explain_unreadable(content) == ""
    assert tf.io.decode_image(content, channels=3, expand_animations=False).shape == (24, 20, 3)


UNREADABLE = {
    "TIFF": {"kind": "TIFF"},
    "animated WebP": {"kind": "WEBP", "frames": 3},
    "AVIF": {"kind": "AVIF"},
    "JPEG 2000": {"kind": "JPEG2000"},
    "icon": {"kind": "ICO", "sizes": [(16, 16)]},
    "PDF": {"kind": "PDF"},
    "BigTIFF": {"kind": "TIFF", "big_tiff": True},
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_tensorflow_does_not_read_is_named_with_the_way_to_convert_it(name):
    content = encode(**UNREADABLE[name])
    assert name_format(content) == name
    assert explain_unreadable(content) == (
        f"{name} is not supported by TensorFlow: convert it, for example with ImageMagick: magick IN OUT.jpg"
    )
    with pytest.raises(tf.errors.InvalidArgumentError):
        tf.io.decode_image(content, channels=3, expand_animations=False)


def box(brand: bytes, *compatible: bytes) -> bytes:
    """The first box of an ISO base media file (ISO/IEC 14496-12, section 4.3)."""
    content = b"ftyp" + brand + bytes(4) + b"".join(compatible)
    return (4 + len(content)).to_bytes(4, "big") + content + bytes(20)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (box(b"heic", b"mif1", b"heic"), "HEIC"),  # an iPhone's
        (box(b"heix"), "HEIC"),
        (box(b"mif1", b"heic"), "HEIF"),
        (box(b"avif", b"mif1"), "AVIF"),
        (box(b"avis"), "AVIF"),
        (b"MM\0*\0\0\0\x08", "TIFF"),
        (b"\xff\x0a\xfa\x1f", "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"8BPS\0\x01", "Photoshop"),
        (b'<?xml version="1.0"?><svg>', "SVG or HTML text"),
        (b"\n <svg xmlns='x'>", "SVG or HTML text"),
        (b"<!DOCTYPE html><title>404 Not Found", "SVG or HTML text"),
        (b"<HTML><body>", "SVG or HTML text"),
    ],
)
def test_files_that_pillow_does_not_write_are_told_by_their_first_bytes(content, name):
    assert name_format(content) == name
    assert explain_unreadable(content).startswith(f"{name} is not supported by TensorFlow: ")


@pytest.mark.parametrize(
    "content",
    [
        b"no image",
        b"\0" * 100,
        b"\xff\xd8",
        b"RIFF\x10\0\0\0WAVEfmt ",
        b"RIFF",
        box(b"mp42"),
        b"PK\x03\x04",
        b"GIF88a",
        b"\x89PNG",
        "红色".encode(),
        b"<svgx",
        b"x",
    ],
    ids=repr,
)
def test_what_is_no_image_is_said_to_be_none(content):
    assert name_format(content) == "unknown"
    assert explain_unreadable(content) == "not an image: supported formats are JPEG, PNG, GIF, BMP and WebP"


def test_an_empty_file_is_empty():
    assert name_format(b"") == "unknown"
    assert explain_unreadable(b"") == "empty or unreadable file"


def test_webp_is_still_unless_its_flag_says_that_it_moves():
    still, moving = encode(**READABLE["WebP with EXIF"]), encode("WEBP", frames=2)
    assert still[12:16] == moving[12:16] == b"VP8X"
    assert (name_format(still), name_format(moving)) == ("webp", "animated WebP")
    assert name_format(moving[:20]) == "webp"  # cut off before the flag: broken, but of that kind


@pytest.mark.parametrize("suffix", [".jpg", ".PNG", ".heic", ".txt", ""])
def test_the_suffix_is_no_matter(tmp_path, suffix):
    for kind, name in (("PNG", "png"), ("JPEG", "jpeg"), ("TIFF", "TIFF")):
        path = tmp_path / f"file{suffix}"
        path.write_bytes(encode(kind))
        assert name_format(path.read_bytes()) == name
