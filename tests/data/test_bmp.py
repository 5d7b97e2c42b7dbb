"""BMP of every kind that is written today, against Pillow."""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.conftest import make_image
from tl_keras.data.bmp import decode_bmp
from tl_keras.data.formats import explain_unreadable
from tl_keras.data.images import decode, decode_batch

PIXELS = make_image(3, (200, 60, 40), (11, 13))


@functools.cache
def compile_decoder(resize: str) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    return tf.function(
        lambda batch: decode_batch(batch, image_size=8, resize=resize, max_pixels=10**6),
        input_signature=[tf.TensorSpec([None], tf.string)],
    )


def save(image: Image.Image, kind: str = "BMP", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def make_bmp(bits: int, masks: tuple[int, ...], compression: int = 3, height: int = 11, header: int = 40) -> bytes:
    """A BMP whose channels lie where the masks say."""
    values = np.zeros(PIXELS.shape[:2], np.int64)
    for channel, mask in enumerate(masks[:3]):
        low = mask & -mask
        values |= (PIXELS[..., channel].astype(np.int64) * (mask // low) // 255) * low
    rows = values[::-1] if height > 0 else values
    width, each = PIXELS.shape[1], bits // 8
    stride = (width * bits + 31) // 32 * 4
    lines = [b"".join(int(one).to_bytes(each, "little") for one in row).ljust(stride, b"\0") for row in rows]
    offset = 14 + header + (12 if header == 40 and compression else 0)
    info = struct.pack("<IiiHHIIiiII", header, width, height, 1, bits, compression, 0, 0, 0, 0, 0)
    rest = struct.pack(f"<{len(masks)}I", *masks) if compression else b""
    content = b"".join(lines)
    start = struct.pack("<2sIHHI", b"BM", offset + len(content), 0, 0, offset)
    return start + (info + rest).ljust(offset - 14, b"\0") + content


BITFIELDS = {
    "565": make_bmp(16, (0xF800, 0x07E0, 0x001F)),
    "555": make_bmp(16, (0x7C00, 0x03E0, 0x001F), compression=0),
    "BGRX": make_bmp(32, (0xFF0000, 0xFF00, 0xFF), compression=0),
    "RGBA": make_bmp(32, (0xFF, 0xFF00, 0xFF0000, 0xFF000000), header=108),
    "ABGR": make_bmp(32, (0xFF000000, 0xFF0000, 0xFF00, 0xFF), header=108),
    "top down": make_bmp(32, (0xFF0000, 0xFF00, 0xFF), compression=0, height=-11),
}
PILLOW = {
    "24": save(Image.fromarray(PIXELS)),
    "grey": save(Image.fromarray(PIXELS).convert("L")),
    "palette": save(Image.fromarray(PIXELS).quantize(64)),
    "palette of 5": save(Image.fromarray(PIXELS).quantize(5)),
    "1 bit": save(Image.fromarray(PIXELS).convert("1")),
    "32": save(Image.fromarray(np.dstack([PIXELS, PIXELS[..., :1]]))),
    "Photoshop's two bytes more": save(Image.fromarray(PIXELS)) + b"\0\0",
}


@pytest.mark.parametrize("content", [*PILLOW.values(), *BITFIELDS.values()], ids=[*PILLOW, *BITFIELDS])
def test_pixels_are_pillows(content):
    expected = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    assert explain_unreadable(content) == ""
    np.testing.assert_array_equal(decode_bmp(tf.constant(content)).numpy(), expected)


def test_masks_that_pillow_does_not_read():
    content = make_bmp(32, (0xFF00, 0xFF, 0xFF0000))
    np.testing.assert_array_equal(decode_bmp(tf.constant(content)).numpy(), PIXELS)


def test_four_bits_a_pixel_are_two_in_a_byte():
    colours = np.array([[10 * n, 5 * n, 255 - n] for n in range(16)], np.uint8)
    info = struct.pack("<IiiHHIIiiII", 40, 3, 2, 1, 4, 0, 0, 0, 0, 0, 0)
    palette = b"".join(bytes([*colour[::-1], 0]) for colour in colours)
    content = struct.pack("<2sIHHI", b"BM", 0, 0, 0, 54 + 64) + info + palette + b"\x12\x30\0\0" + b"\xfe\xd0\0\0"
    np.testing.assert_array_equal(decode_bmp(tf.constant(content)).numpy(), colours[[[15, 14, 13], [1, 2, 3]]])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (save(Image.fromarray(PIXELS))[:40], "truncated BMP"),
        (
            make_bmp(16, (0xF800, 0x07E0, 0x001F))[:30] + b"\1\0\0\0" + b"\0" * 99,
            "compressed BMP is not supported: convert",
        ),
        (b"BM" + b"\0" * 12 + b"\x0c" + b"\0" * 60, "OS/2 BMP is not supported: convert it, for example with"),
        (
            save(Image.fromarray(PIXELS))[:28] + b"\2" + b"\0" * 99,
            "BMP with 2 bits per pixel is not supported: convert",
        ),
    ],
)
def test_other_kinds_are_refused_with_a_reason_and_leave_their_neighbours_alone(content, reason):
    assert explain_unreadable(content).startswith(reason)
    images, valid = compile_decoder("squash")(tf.constant([PILLOW["24"], content, PILLOW["palette"]]))
    assert valid.numpy().tolist() == [True, False, True]
    assert not images.numpy()[1].any()


@pytest.mark.parametrize("seed", range(8))
def test_damaged_headers_do_no_harm(seed):
    random = np.random.default_rng(seed)
    content = bytearray([*PILLOW.values()][seed % len(PILLOW)])
    for position in random.integers(2, 60, 6):
        content[position] = random.integers(256)
    _, valid = compile_decoder("crop")(tf.constant([bytes(content), PILLOW["24"]]))
    assert valid.numpy()[1]


def test_a_palette_and_a_png_of_the_same_picture_look_alike():
    image = Image.fromarray(PIXELS).quantize(64)
    bmp, png = (decode(tf.constant(save(image, kind)), image_size=8, resize="crop").numpy() for kind in ("BMP", "PNG"))
    np.testing.assert_array_equal(bmp, png)


def test_transparent_pixels_of_a_gif_keep_their_colour_as_in_a_png():
    image = Image.fromarray(PIXELS).quantize(16)
    gif, png = (
        decode(tf.constant(save(image, kind, transparency=3)), image_size=8, resize="squash").numpy()
        for kind in ("GIF", "PNG")
    )
    np.testing.assert_array_equal(gif, png)
