"""What is read of an image before it is decoded; bombs, and what they cost."""

from __future__ import annotations

import functools
import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.conftest import make_image
from tests.data.test_images import encode, png_chunk
from tl_keras.data.headers import count_pixels, cut_gif
from tl_keras.data.images import decode, decode_batch, explain_broken

ROOT = Path(__file__).parent.parent.parent
KINDS = {
    "JPEG": ("JPEG", {}),
    "progressive JPEG": ("JPEG", {"progressive": True}),
    "PNG": ("PNG", {}),
    "BMP": ("BMP", {}),
    "GIF": ("GIF", {}),
    "lossy WebP": ("WEBP", {}),
    "lossless WebP": ("WEBP", {"lossless": True}),
    "extended WebP": ("WEBP", {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"}),
}
read_count = tf.function(count_pixels, input_signature=(tf.TensorSpec((), tf.string),), autograph=False)
run_cut = tf.function(cut_gif, input_signature=(tf.TensorSpec((), tf.string),), autograph=False)


def make_png(width: int, height: int | None = None) -> bytes:
    """All black, one bit a pixel: some kilobytes for hundreds of millions of pixels."""
    height = height or width
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def make_gif(frames: list[tuple[int, int]], *, screen: tuple[int, int] = (10, 10), before: bytes = b"") -> bytes:
    """Frames of one colour, compressed as little as possible: a clear code before every 100 pixels."""
    content = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + b"\xff\0\0\0\0\xff" + before
    for width, height in frames:
        data = compress_lzw(width * height)
        blocks = b"".join(bytes([len(part)]) + part for part in (data[i : i + 255] for i in range(0, len(data), 255)))
        content += b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02" + blocks + b"\0"
    return content + b";"


def compress_lzw(pixels: int) -> bytes:
    """GIF's LZW of so many zeros with codes of three bits: a clear code before every two pixels."""
    codes = []
    for start in range(0, pixels, 2):
        codes += [4, *[0] * min(2, pixels - start)]
    bits = sum(code << (3 * number) for number, code in enumerate([*codes, 5]))
    return bits.to_bytes((3 * (len(codes) + 1) + 7) // 8, "little")


@pytest.mark.parametrize("kind", KINDS)
def test_the_header_tells_how_many_pixels_there_are(kind):
    name, options = KINDS[kind]
    for height, width in ((23, 37), (300, 1), (1, 300), (600, 411)):
        assert int(read_count(encode(make_image(1, size=(height, width)), name, **options))) == height * width


def test_a_bmp_that_is_stored_top_down():
    content = bytearray(encode(make_image(1, size=(23, 37)), "BMP"))
    content[22:26] = struct.pack("<i", -23)
    assert int(read_count(bytes(content))) == 23 * 37


@pytest.mark.parametrize(
    "content", [b"", b"x", b"RIFF", b"\xff\x0a rest of a JPEG XL", b"GIF89a", b"\0\0\0\x0cJXL \r\n\x87\n"]
)
def test_what_can_not_be_foreseen_counts_as_too_large(content):
    assert int(read_count(content)) == tf.int64.max


@functools.cache
def compile_decoder(max_pixels: int) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """In a graph, as it is exported; outside of one, a batch would be compiled in each call."""
    return tf.function(
        lambda batch: decode_batch(batch, image_size=8, resize="crop", max_pixels=max_pixels),
        input_signature=[tf.TensorSpec([None], tf.string)],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_limit_is_the_last_size_that_is_decoded(kind):
    name, options = KINDS[kind]
    content = encode(make_image(1, size=(20, 30)), name, **options)
    for count in (1, 3):  # one image is decoded otherwise than several
        batch = tf.constant([content] * count)
        assert compile_decoder(600)(batch)[1].numpy().all()
        assert not compile_decoder(599)(batch)[1].numpy().any()
    assert explain_broken(content, image_size=8, resize="crop", max_pixels=600) == ""
    reason = explain_broken(content, image_size=8, resize="crop", max_pixels=599)
    assert reason == "has 600 pixels; at most 599 are allowed"


def test_a_gif_is_cut_behind_its_first_frame():
    frames = [Image.fromarray(make_image(number, size=(40, 30))) for number in range(5)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], loop=0, comment=b"a comment" * 100)
    cut = run_cut(file.getvalue()).numpy()
    assert len(cut) < len(file.getvalue()) / 3
    expected = np.array(Image.open(file).convert("RGB"))
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(cut)).convert("RGB")), expected)
    np.testing.assert_array_equal(decode(tf.constant(file.getvalue()), image_size=30, resize="crop"), expected[5:35])


def test_a_gif_larger_than_the_window_is_cut_at_the_right_place():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 500), np.uint8).astype(np.uint8))
    file = io.BytesIO()
    noise.save(file, "GIF", save_all=True, append_images=[noise.rotate(90)])
    assert len(file.getvalue()) > 1 << 17
    cut = Image.open(io.BytesIO(run_cut(file.getvalue()).numpy()))
    assert (cut.n_frames, cut.size) == (1, (500, 400))
    np.testing.assert_array_equal(np.array(cut.convert("L")), np.array(Image.open(file).convert("L")))


def test_what_is_no_gif_or_half_a_gif_is_left_as_it_is():
    gif = encode(make_image(1), "GIF")
    for content in (encode(make_image(1), "PNG"), b"", b"GIF89a", gif[: len(gif) // 2]):
        assert run_cut(content).numpy() == content


def test_a_gifs_later_frames_cost_nothing():
    """TensorFlow would decode them all, and make the picture as large as the largest."""
    content = make_gif([(8, 8), (300, 300)])
    assert int(read_count(run_cut(content))) == 64
    assert decode_batch(tf.constant([content]), image_size=8, resize="crop", max_pixels=64)[1].numpy().all()


def test_a_gifs_frame_counts_and_not_its_screen():
    content = make_gif([(300, 200)], screen=(10, 10))
    assert int(read_count(content)) == 60000
    assert explain_broken(content, image_size=8, resize="crop", max_pixels=50000).startswith("has 60,000 pixels")


def test_a_gif_that_hides_its_frame_behind_thousands_of_blocks_is_refused():
    content = make_gif([(300, 200)], before=b"\x21\xfe\x01x\0" * 5000)
    assert int(read_count(content)) == tf.int64.max


def test_a_png_whose_first_chunk_is_not_its_header_is_refused():
    """libpng looks for the header behind other chunks, which may claim another size."""
    real = encode(make_image(1, size=(40, 50)), "PNG")
    disguised = real[:8] + png_chunk(b"aaAa", struct.pack(">II", 1, 1) + bytes(5)) + real[8:]
    assert int(read_count(disguised)) == tf.int64.max


@pytest.mark.parametrize("fourcc", [b"XXXX", b"VP8 ", b"VP8L"])
def test_a_webp_without_its_bitstreams_signature_is_refused(fourcc):
    content = b"RIFF" + struct.pack("<I", 60) + b"WEBP" + fourcc + bytes(48)
    assert int(read_count(content)) == tf.int64.max


def test_a_jpeg_with_very_many_scans_counts_for_more():
    jpeg = encode(make_image(1, size=(20, 30)), "JPEG")
    assert int(read_count(jpeg[:-2] + b"\xff\xda\0\x08" * 320 + jpeg[-2:])) == 600 * 11


@pytest.mark.parametrize("size", [(1, 200_000), (200_000, 1), (3, 40_000)])
@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_a_very_long_picture_is_what_a_turned_one_is(size, resize):
    """A wide one is turned before it is filtered, so that it costs no more than a high one."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    lying = decode(tf.constant(encode(pixels, "PNG")), image_size=16, resize=resize).numpy()
    standing = decode(tf.constant(encode(pixels.transpose(1, 0, 2), "PNG")), image_size=16, resize=resize).numpy()
    assert np.abs(lying.astype(int) - standing.transpose(1, 0, 2)).max() <= 1


BOMBS = """
import json, resource, sys
import tensorflow as tf
from tl_keras.data.images import decode_batch
bombs = [open(path, "rb").read() for path in sys.argv[2:]]
good = open(sys.argv[1], "rb").read()
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
run = tf.function(lambda b: decode_batch(b, image_size=32, resize="crop", max_pixels=50_000_000),
                  input_signature=(tf.TensorSpec((None,), tf.string),), autograph=False)
run(tf.constant([good] * 3)); run(tf.constant([good]))
before = peak()
valid = [run(tf.constant([good, bomb, good]))[1].numpy().tolist() for bomb in bombs]
valid += [[True, *run(tf.constant([bomb]))[1].numpy().tolist(), True] for bomb in bombs]
wide = run(tf.constant([open(sys.argv[1].replace("good.jpg", "wide.png"), "rb").read()] * 3))[1].numpy().tolist()
print(json.dumps({"valid": valid, "wide": wide, "grew": peak() - before}))
"""


def test_bombs_are_invalid_and_cost_no_memory(tmp_path):
    """Peak memory of the process over a set of them, 81 to 400 megapixels each, and what it grew by."""
    black = Image.new("1", (20000, 20000))
    bombs = {"png": make_png(20000)}
    for kind, name, options in (("JPEG", "jpg", {"quality": 10}), ("GIF", "gif", {}), ("BMP", "bmp", {})):
        bombs[name] = encode(black.convert("L") if kind == "JPEG" else black, kind, **options)
    bombs["webp"] = encode(Image.new("RGB", (9000, 9000)), "WEBP", lossless=True, quality=0, method=0)
    patched = bytearray(bombs["gif"])
    patched[6:10] = struct.pack("<HH", 10, 10)  # the screen is small, the frame is not
    bombs["patched.gif"] = bytes(patched)
    for name, content in bombs.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "good.jpg").write_bytes(encode(make_image(1), "JPEG"))
    # small enough to be decoded, and as wide as to cost gigabytes where the filter keeps all of the width
    (tmp_path / "wide.png").write_bytes(make_png(1_000_000, 1))
    paths = [str(tmp_path / name) for name in bombs]
    process = subprocess.run(
        [sys.executable, "-c", BOMBS, str(tmp_path / "good.jpg"), *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    answer = json.loads(process.stdout)
    assert answer["valid"] == [[True, False, True]] * (2 * len(bombs))
    assert answer["wide"] == [True] * 3
    # a BMP is as large as its pixels: its bytes alone are read three times
    assert answer["grew"] < 100 + 4 * sum(map(len, bombs.values())) / 1e6
