"""Odd files: each kind is found, and ordinary ones are not."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.conftest import make_image
from tl_keras.audit.files import inspect_file, look_at


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(width: int = 200, height: int = 160, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(make_image(0, size=(height, width))).convert(mode)


def oriented(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


WIDE = Image.fromarray(np.arange(200 * 160, dtype=np.uint16).reshape(160, 200))
FRAMES = {
    "save_all": True,
    "append_images": [Image.fromarray(make_image(seed, size=(160, 200))).convert("P") for seed in (1, 2)],
}
CASES = {
    "tiny": ("a.jpg", encode(picture(40, 30), "JPEG"), "40 x 30 pixels"),
    "huge": ("a.png", encode(Image.new("1", (10_000, 5_001)), "PNG"), "10000 x 5001 pixels"),
    "aspect": ("a.jpg", encode(picture(900, 200), "JPEG"), "900 x 200 pixels"),
    "animated": ("a.gif", encode(picture().convert("P"), "GIF", **FRAMES), "3 frames"),
    "cmyk": ("a.jpg", encode(picture(mode="CMYK"), "JPEG"), "JPEG in CMYK"),
    "16-bit": ("a.png", encode(WIDE, "PNG"), "PNG with 16 bits per channel"),
    "suffix": ("a.PNG", encode(picture(), "JPEG"), "suffix .png, format JPEG"),
    "rotated": ("a.jpg", encode(picture(), "JPEG", exif=oriented(6)), "EXIF orientation 6"),
}


@pytest.mark.parametrize("kind", CASES)
def test_each_oddity_is_found_alone(kind):
    name, content, evidence = CASES[kind]
    found = inspect_file(name, content, image_size=224)
    assert [(one.id, one.kind, one.evidence) for one in found] == [(name, kind, evidence)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jpg", encode(picture(), "JPEG")),
        ("a.JPEG", encode(picture(), "JPEG", exif=oriented(1))),
        ("a.png", encode(picture(mode="RGBA"), "PNG")),
        ("a.webp", encode(picture(), "WEBP")),
        ("a.bmp", encode(picture(), "BMP")),
        ("a.gif", encode(picture().convert("P"), "GIF")),
        ("n02085620_7", encode(picture(), "JPEG")),  # a TFDS id
        ("a.jpg", b"no image"),
        ("a.jpg", b""),
    ],
)
def test_ordinary_files_and_no_images_give_nothing(name, content):
    assert inspect_file(name, content, image_size=224) == []


def test_huge_ones_that_pillow_does_not_open_are_huge_all_the_same():
    header = encode(Image.new("1", (8, 8)), "PNG")
    large = header[:16] + (20_000).to_bytes(4, "big") * 2 + header[24:29]
    content = large + zlib.crc32(large[12:29]).to_bytes(4, "big") + header[33:]
    (found,) = inspect_file("a.png", content, image_size=224)
    assert (found.kind, found.evidence) == ("huge", "more than 178,956,970 pixels")
    assert look_at(content) is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_no_damage_ends_in_an_exception(kind):
    animated = FRAMES | {"append_images": FRAMES["append_images"]} if kind in {"GIF", "WEBP"} else {}
    exif = {"exif": oriented(6).tobytes()} if kind in {"JPEG", "PNG", "WEBP"} else {}
    content, random = encode(picture(), kind, **animated, **exif), np.random.default_rng(0)
    for number in range(200):
        broken = bytearray(content[: random.integers(8, len(content))] if number % 2 else content)
        for place in random.integers(0, min(len(broken), 400), 4):
            broken[place] = random.integers(0, 256)
        inspect_file("a.jpg", bytes(broken), image_size=224)
        look_at(bytes(broken))


def test_sixteen_bit_images_differ_as_they_look():
    random = np.random.default_rng(0)
    first, second = (
        look_at(encode(Image.fromarray(random.integers(0, 2**16, (90, 90)).astype(np.uint16)), "PNG")) for _ in range(2)
    )
    assert first.digest != second.digest
    assert not first.blank
    assert first.thumb.std() > 1


@pytest.mark.parametrize("value", range(1, 9))
def test_a_turned_copy_looks_the_same(value):
    turned = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[value]  # PIL.Image.Transpose that undoes it
    upright = picture().resize((96, 64))
    stored = upright if turned is None else upright.transpose(turned)
    assert look_at(encode(stored, "PNG", exif=oriented(value))).digest == look_at(encode(upright, "PNG")).digest


@pytest.mark.parametrize(
    ("pixels", "blank"),
    [
        (np.full((300, 300, 3), (90, 20, 160)), True),
        (np.random.default_rng(0).normal(128, 1, (300, 300, 3)), True),
        (np.random.default_rng(0).normal(128, 20, (2500, 2500, 3)), False),
        (np.where(np.random.default_rng(0).random((400, 400, 1)) < 1e-3, 255, 5) * np.ones(3), False),  # stars
    ],
)
def test_blank_is_all_but_one_colour(pixels, blank):
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    assert look_at(encode(image, "JPEG", quality=95)).blank == blank


def test_sixteen_bits_in_colour_that_pillow_opens_as_eight():
    import tensorflow as tf

    content = tf.io.encode_png(np.random.default_rng(0).integers(0, 2**16, (160, 160, 3)).astype(np.uint16)).numpy()
    assert [one.kind for one in inspect_file("a.png", content, image_size=224)] == ["16-bit"]


def test_small_is_worse_the_smaller_it_is():
    severities = [
        inspect_file("a.jpg", encode(picture(side, side), "JPEG"), image_size=224)[0].severity for side in (100, 40)
    ]
    assert severities == ["low", "medium"]
