"""Decoding and resizing, held against Pillow: eagerly, inside `tf.data` and inside a `tf.function`."""

from __future__ import annotations

import functools
import io
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from tests.conftest import make_image
from tl_keras.data.images import decode, decode_batch, explain_broken, make_images, read_orientation

ROOT = Path(__file__).parent.parent.parent
EXIF_FORMATS = {"JPEG": {"quality": 95}, "PNG": {}, "WEBP": {"lossless": True, "exact": True}}
BYTE_ORDERS = {"little": "<", "big": ">"}


def encode(pixels: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def make_tiff(orientation: int, order: str = "<", thumbnail: int | None = None) -> bytes:
    """EXIF's TIFF block: maker, orientation, resolution unit; behind it a thumbnail's directory, if any."""
    entries = [(0x010F, 2, 4, b"Foo\0"), (0x0112, 3, 1, struct.pack(order + "HH", orientation, 0))]
    entries.append((0x0128, 3, 1, struct.pack(order + "HH", 2, 0)))
    directory = struct.pack(order + "H", len(entries))
    for tag, kind, count, value in entries:
        directory += struct.pack(order + "HHI", tag, kind, count) + value
    next_directory = 8 + len(directory) + 4 if thumbnail else 0
    block = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8) + directory
    block += struct.pack(order + "I", next_directory)
    if thumbnail:
        entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, thumbnail, 0)
        block += struct.pack(order + "H", 1) + entry + struct.pack(order + "I", 0)
    return block


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def behind_start(jpeg: bytes, *segments: bytes) -> bytes:
    """A JPEG with segments put right behind its first two bytes."""
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def decode_all(contents: list[bytes], how: str, *, image_size: int, resize: str) -> list[np.ndarray]:
    def one(content: tf.Tensor) -> tf.Tensor:
        return decode(content, image_size=image_size, resize=resize)

    if how == "eager":
        return [one(tf.constant(content)).numpy() for content in contents]
    if how == "tf.data":
        return list(tf.data.Dataset.from_tensor_slices(contents).map(one).as_numpy_iterator())
    function = compile_decoder(image_size, resize)
    return [function(content).numpy() for content in contents]


@functools.cache
def compile_decoder(image_size: int, resize: str) -> Callable[[bytes], tf.Tensor]:
    return tf.function(
        lambda content: decode(content, image_size=image_size, resize=resize),
        input_signature=[tf.TensorSpec((), tf.string)],
    )


def decode_one(content: bytes, *, image_size: int, resize: str = "squash") -> np.ndarray:
    return decode(tf.constant(content), image_size=image_size, resize=resize).numpy()


def as_pillow(content: bytes, *, image_size: int, resize: str) -> np.ndarray:
    """Upright, resized by Pillow's BILINEAR, cropped or padded."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    return resize_by_pillow(image, image_size=image_size, resize=resize)


def resize_by_pillow(image: Image.Image, *, image_size: int, resize: str) -> np.ndarray:
    if resize == "squash":
        return np.array(image.resize((image_size, image_size), Image.Resampling.BILINEAR))
    if resize == "pad":
        width, height = (max(round(side * image_size / max(image.size)), 1) for side in image.size)
    else:
        width, height = (int(image_size * side / min(image.size)) for side in image.size)  # torchvision's Resize
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)  # and its CenterCrop
    return np.array(resized.crop((left, top, left + image_size, top + image_size)))  # beyond the image: black


def assert_close(actual: np.ndarray, expected: np.ndarray, *, most: int, mean: float) -> None:
    assert actual.dtype == np.uint8
    assert actual.shape == expected.shape
    difference = np.abs(actual.astype(int) - expected.astype(int))
    assert difference.max() <= most
    assert difference.mean() <= mean


@pytest.mark.parametrize("how", ["eager", "tf.data", "tf.function"])
@pytest.mark.parametrize("order", BYTE_ORDERS)
@pytest.mark.parametrize("kind", EXIF_FORMATS)
def test_all_eight_orientations_are_those_of_pillow(kind, order, how):
    pixels = make_image(1, size=(18, 24))
    tiffs = [make_tiff(orientation, BYTE_ORDERS[order]) for orientation in range(1, 9)]
    contents = [encode(pixels, kind, exif=b"Exif\0\0" + tiff, **EXIF_FORMATS[kind]) for tiff in tiffs]
    expected = [as_pillow(content, image_size=24, resize="pad") for content in contents]
    assert len({image.tobytes() for image in expected}) == 8
    for actual, wanted in zip(decode_all(contents, how, image_size=24, resize="pad"), expected, strict=True):
        assert_close(actual, wanted, most=0 if kind != "JPEG" else 2, mean=0.1)


def orientation_of(content: bytes) -> int:
    found = int(read_orientation(tf.constant(content)))
    # the search that spares images without EXIF must not miss what read_orientation finds
    upright = decode_one(content, image_size=24, resize="pad")
    size = Image.open(io.BytesIO(content)).size
    assert size == (24, 16)
    is_turned = bool((upright[:, :4] == 0).all())  # black borders at the sides: it stands
    assert is_turned == (found >= 5)
    return found


def pillow_orientation_of(content: bytes) -> int:
    image = Image.open(io.BytesIO(content))
    image.load()
    return int(image.getexif().get(0x0112, 1))


PICTURE = make_image(2, size=(16, 24))
JPEG = encode(PICTURE, "JPEG", quality=95)
XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description exif:Foo='Exif' Bar='eXIf EXIF'/></x:xmpmeta>"
ICC = b"ICC_PROFILE\0\x01\x03" + b"\x55" * 60_000
EXIF = segment(0xE1, b"Exif\0\0" + make_tiff(6))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(behind_start(JPEG, EXIF), id="at once"),
        pytest.param(behind_start(JPEG, segment(0xE1, XMP), EXIF), id="behind XMP"),
        pytest.param(behind_start(JPEG, segment(0xE2, ICC), EXIF), id="behind an ICC profile"),
        pytest.param(behind_start(JPEG, *[segment(0xE2, ICC)] * 3, segment(0xE1, XMP), EXIF), id="behind 180 kB"),
        pytest.param(behind_start(JPEG, segment(0xFE, b"a comment"), EXIF), id="behind a comment"),
        pytest.param(behind_start(JPEG, segment(0xED, b"Photoshop 3.0\0" + b"8BIM" * 9), EXIF), id="behind Photoshop"),
        pytest.param(behind_start(JPEG, EXIF, segment(0xE1, XMP)), id="before XMP"),
        pytest.param(behind_start(JPEG, b"\xff\xff", EXIF), id="behind fill bytes (ITU T.81, B.1.1.2)"),
        pytest.param(
            behind_start(JPEG, segment(0xE1, b"Exif\0\0" + make_tiff(6, thumbnail=3))), id="thumbnail lies otherwise"
        ),
        pytest.param(
            behind_start(JPEG, segment(0xE1, b"Exif\0\0" + make_tiff(6, ">", thumbnail=8))), id="big endian, thumbnail"
        ),
    ],
)
def test_exif_is_found_where_cameras_and_editors_put_it(content):
    assert pillow_orientation_of(content) == 6
    assert orientation_of(content) == 6


def test_exif_behind_a_pngs_pixels_is_found():
    png = encode(PICTURE, "PNG")
    end = png.index(b"IEND") - 4
    content = png[:end] + png_chunk(b"eXIf", make_tiff(8)) + png[end:]
    assert pillow_orientation_of(content) == orientation_of(content) == 8


def test_exif_with_a_prefix_in_webp_is_found():
    webp = encode(PICTURE, "WEBP", lossless=True, exif=b"Exif\0\0" + make_tiff(8))
    at = webp.index(b"EXIF")
    (size,) = struct.unpack("<I", webp[at + 4 : at + 8])
    block = b"Exif\0\0" + webp[at + 8 : at + 8 + size]
    block += b"\0" * (len(block) % 2)
    content = webp[:at] + b"EXIF" + struct.pack("<I", size + 6) + block
    content = b"RIFF" + struct.pack("<I", len(content) - 8) + content[8:]
    assert orientation_of(webp) == 8
    assert orientation_of(content) == 8


@pytest.mark.parametrize("kind", EXIF_FORMATS)
def test_pictures_without_exif_stay_as_they_are(kind):
    content = encode(PICTURE, kind, **EXIF_FORMATS[kind])
    assert orientation_of(content) == 1


def test_the_text_of_other_metadata_is_no_orientation():
    assert orientation_of(behind_start(JPEG, segment(0xE1, XMP), segment(0xFE, b"Exif\0\0" + make_tiff(6)))) == 1


def damaged_tiffs() -> dict[str, bytes]:
    good, big = make_tiff(6), make_tiff(6, ">")
    offsets = {f"offset {value:#x}": value for value in (0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0x7FFFFFF0, 5000, 0)}
    return {
        "nothing": b"",
        "two bytes": good[:2],
        "header alone": good[:8],
        "half an entry": good[:16],
        "ends before the value": good[:28],
        "zeros": b"\0" * 30,
        **{f"{name}, little": good[:4] + struct.pack("<I", value) + good[8:] for name, value in offsets.items()},
        **{f"{name}, big": big[:4] + struct.pack(">I", value) + big[8:] for name, value in offsets.items()},
        "no entries": good[:8] + b"\0\0" + good[10:],
        **{f"orientation {value}": make_tiff(value) for value in (0, 9, 255, 65535)},
    }


@pytest.mark.parametrize("kind", EXIF_FORMATS)
def test_damaged_exif_leaves_the_image_readable_as_it_lies(kind):
    tiffs = damaged_tiffs()
    if kind == "JPEG":
        contents = [behind_start(JPEG, segment(0xE1, b"Exif\0\0" + tiff)) for tiff in tiffs.values()]
    elif kind == "PNG":
        png = encode(PICTURE, "PNG")
        contents = [png[:33] + png_chunk(b"eXIf", tiff) + png[33:] for tiff in tiffs.values()]
    else:
        options = EXIF_FORMATS[kind]
        contents = [encode(PICTURE, kind, exif=b"Exif\0\0" + tiff, **options) for tiff in tiffs.values() if tiff]
    images, valid = decode_batch(tf.constant(contents), image_size=24, resize="squash")
    assert valid.numpy().all()
    plain = decode_one(encode(PICTURE, kind, **EXIF_FORMATS[kind]), image_size=24)
    for name, image in zip(tiffs if kind != "WEBP" else list(tiffs)[1:], images.numpy(), strict=True):
        np.testing.assert_array_equal(image, plain, err_msg=name)


def test_no_noise_in_exif_breaks_an_image():
    random = np.random.default_rng(0)
    contents = []
    for _ in range(300):
        tiff = np.frombuffer(make_tiff(6, random.choice(["<", ">"]), thumbnail=3), np.uint8).copy()
        places = random.integers(0, len(tiff), random.integers(1, 8))
        tiff[places] = random.integers(0, 256, len(places))
        contents.append(behind_start(JPEG, segment(0xE1, b"Exif\0\0" + tiff.tobytes())))
    _, valid = decode_batch(tf.constant(contents), image_size=8, resize="crop")
    assert valid.numpy().all()


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize(
    "size",
    [
        (40, 60),
        (60, 40),
        (96, 32),
        (11, 13),
        (97, 64),
        (64, 97),
        (130, 87),
        (16, 16),
        (8, 12),
        (5, 5),
        (200, 300),
        (33, 33),
    ],
    ids=str,
)
def test_resizing_is_that_of_pillow(size, resize):
    image_size = 16 if size != (11, 13) else 143
    content = encode(make_image(3, size=size), "PNG")
    expected = as_pillow(content, image_size=image_size, resize=resize)
    assert_close(decode_one(content, image_size=image_size, resize=resize), expected, most=2, mean=0.5)


def test_an_image_of_the_networks_size_is_not_touched():
    pixels = make_image(4, size=(32, 32))
    for resize in ("crop", "squash", "pad"):
        np.testing.assert_array_equal(decode_one(encode(pixels, "PNG"), image_size=32, resize=resize), pixels)


def test_crop_takes_the_middle_and_pad_adds_black():
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, :8], pixels[:, 8:16], pixels[:, 16:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    content = encode(pixels, "PNG")
    np.testing.assert_array_equal(decode_one(content, image_size=8, resize="crop"), pixels[:, 8:16])
    padded = decode_one(content, image_size=24, resize="pad")
    np.testing.assert_array_equal(padded[8:16], pixels)
    assert not padded[:8].any()
    assert not padded[16:].any()


GREY = make_image(5, size=(16, 16))[..., 0]
SMOOTH = np.array(Image.fromarray(make_image(6, size=(4, 4))).resize((16, 16), Image.Resampling.BICUBIC))


def sixteen_bits(channels: int) -> tuple[bytes, np.ndarray]:
    wide = np.random.default_rng(7).integers(0, 65536, (16, 16, channels)).astype(np.uint16)
    return tf.io.encode_png(wide).numpy(), np.broadcast_to((wide >> 8).astype(np.uint8), (16, 16, 3))


def formats() -> dict[str, tuple[bytes, np.ndarray, int]]:
    """Name → content, what it should be decoded to, and by how many levels it may differ."""
    colour, grey = Image.fromarray(SMOOTH), np.stack([GREY] * 3, -1)
    palette = colour.quantize(16)
    bits = Image.fromarray(GREY).convert("1")
    rgba = np.concatenate([SMOOTH, GREY[..., np.newaxis]], -1)
    cmyk = colour.convert("CMYK")
    frames = [palette, Image.fromarray(GREY)]

    def by_pillow(content: bytes) -> np.ndarray:
        return np.array(Image.open(io.BytesIO(content)).convert("RGB"))

    jpegs = {
        "JPEG": encode(SMOOTH, "JPEG"),
        "grey JPEG": encode(GREY, "JPEG"),
        "progressive JPEG": encode(SMOOTH, "JPEG", progressive=True),
        "CMYK JPEG": encode(cmyk, "JPEG"),
        "JPEG without subsampling": encode(SMOOTH, "JPEG", subsampling=0),
        "arithmetic of Huffman tables": encode(SMOOTH, "JPEG", optimize=True),
        "lossy WebP": encode(SMOOTH, "WEBP", quality=90),
    }
    return {
        "grey PNG": (encode(GREY, "PNG"), grey, 0),
        "grey PNG with alpha": (encode(Image.merge("LA", [Image.fromarray(GREY)] * 2), "PNG"), grey, 0),
        "palette PNG": (encode(palette, "PNG"), np.array(palette.convert("RGB")), 0),
        "1-bit PNG": (encode(bits, "PNG"), np.array(bits.convert("RGB")), 0),
        "RGBA PNG": (encode(rgba, "PNG"), SMOOTH, 0),
        "interlaced 16-bit grey PNG": (*sixteen_bits(1), 0),
        "16-bit RGB PNG": (*sixteen_bits(3), 0),
        "BMP": (encode(SMOOTH, "BMP"), SMOOTH, 0),
        "grey BMP": (tf_bmp_of_grey(), grey, 0),
        "GIF": (encode(palette, "GIF"), np.array(palette.convert("RGB")), 0),
        "animated GIF": (
            encode(palette, "GIF", save_all=True, append_images=frames[1:], duration=50),
            np.array(palette.convert("RGB")),
            0,
        ),
        "lossless WebP": (encode(SMOOTH, "WEBP", lossless=True), SMOOTH, 0),
        "WebP with alpha": (encode(rgba, "WEBP", lossless=True, exact=True), SMOOTH, 0),
        **{name: (content, by_pillow(content), 3) for name, content in jpegs.items()},
    }


def tf_bmp_of_grey() -> bytes:
    return encode(GREY, "BMP")


FORMATS = formats()


@pytest.mark.parametrize("name", FORMATS)
def test_every_kind_of_image_becomes_rgb(name):
    content, expected, most = FORMATS[name]
    assert_close(decode_one(content, image_size=16), expected, most=most, mean=1.0)


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_one_pixel_fills_the_image(kind, resize):
    content = encode(np.full((1, 1, 3), 200, np.uint8), kind)
    assert_close(decode_one(content, image_size=32, resize=resize), np.full((32, 32, 3), 200, np.uint8), most=1, mean=1)


@pytest.mark.parametrize("turned", [False, True])
def test_very_long_images(turned):
    ramp = np.linspace(0, 255, 3000).astype(np.uint8)
    pixels = np.repeat(ramp[np.newaxis, :, np.newaxis], 3, axis=2)
    content = encode(pixels.transpose(1, 0, 2).copy() if turned else pixels, "PNG")
    for resize in ("crop", "squash"):
        expected = as_pillow(content, image_size=16, resize=resize)
        assert_close(decode_one(content, image_size=16, resize=resize), expected, most=2, mean=0.5)
    padded = decode_one(content, image_size=16, resize="pad")
    line = padded[:, 7 if not padded[:, 8].any() else 8] if turned else padded[7 if not padded[8].any() else 8]
    assert (np.diff(line[:, 0].astype(int)) > 0).all()
    assert np.count_nonzero(padded.any(axis=(1 if not turned else 0, 2))) == 1


def large_picture() -> np.ndarray:
    """2000 x 3000 pixels: waves of several lengths, and grain that a scale of 1/8 averages away."""
    y, x = np.mgrid[:2000, :3000].astype(np.float32)
    waves = [np.sin(x / 170 + y / 300), np.cos(x / 90 - y / 140), np.sin(y / 60)]
    picture = np.stack(waves, -1) * 60 + 128
    return (picture + np.random.default_rng(8).normal(0, 12, (2000, 3000, 1))).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def large_jpeg():
    return encode(large_picture(), "JPEG", quality=92)


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_a_large_jpeg_is_all_but_what_full_decoding_gives(large_jpeg, resize):
    full = Image.open(io.BytesIO(large_jpeg)).convert("RGB")
    expected = resize_by_pillow(full, image_size=224 if resize != "pad" else 225, resize=resize)
    actual = decode_one(large_jpeg, image_size=len(expected), resize=resize)
    assert np.abs(actual.astype(int) - expected).mean() < 3


@pytest.mark.parametrize(("image_size", "side"), [(224, 250), (250, 250), (300, 500), (500, 500), (1002, 2000)])
def test_a_large_jpeg_is_decoded_at_the_smallest_scale_that_covers(large_jpeg, image_size, side):
    image = Image.open(io.BytesIO(large_jpeg))
    image.draft("RGB", (side * 3 // 2, side))  # Pillow asks libjpeg for the same scales
    assert min(image.size) == side
    expected = resize_by_pillow(image, image_size=image_size, resize="squash")
    actual = decode_one(large_jpeg, image_size=image_size, resize="squash")
    assert_close(actual, expected, most=3, mean=0.5)


def test_an_upright_large_jpeg(large_jpeg):
    content = behind_start(large_jpeg, EXIF)
    expected = as_pillow(content, image_size=200, resize="crop")
    actual = decode_one(content, image_size=200, resize="crop")
    assert np.abs(actual.astype(int) - expected).mean() < 3


@pytest.mark.slow
def test_a_jpeg_of_144_megapixels():
    pixels = np.zeros((12000, 12000, 3), np.uint8)
    pixels[:, 6000:] = 200
    image = decode_one(encode(pixels, "JPEG"), image_size=32, resize="crop")
    assert_close(image, np.repeat(np.array([[[0] * 3] * 16 + [[200] * 3] * 16], np.uint8), 32, 0), most=12, mean=2)


def good_and_broken() -> list[tuple[bytes, bool]]:
    jpeg, png = encode(make_image(1), "JPEG"), encode(make_image(2), "PNG")
    return [
        (jpeg, True),
        (b"", False),
        (b"no image", False),
        (png, True),
        (jpeg[: len(jpeg) // 2], False),
        (png[: len(png) // 2], False),
        (b"\xff\xd8\xff", False),
        (b"\x89PNG\r\n\x1a\n", False),
        (b"RIFF\x10\0\0\0WEBPVP8 ", False),
        (b"GIF89a", False),
        (b"BM", False),
        (b"II*\0" + bytes(100), False),
        (encode(make_image(3), "WEBP"), True),
        (jpeg, True),
    ]


def check_batch(contents: list[bytes], expected: list[bool]) -> None:
    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string)], autograph=False)
    def in_graph(batch):
        return decode_batch(batch, image_size=16, resize="crop")

    batch = tf.constant(contents, tf.string, shape=(len(contents),))
    for images, valid in (decode_batch(batch, image_size=16, resize="crop"), in_graph(batch)):
        assert images.shape == (len(contents), 16, 16, 3)
        assert images.dtype == tf.uint8
        assert valid.numpy().tolist() == expected
        for content, is_valid, image in zip(contents, expected, images.numpy(), strict=True):
            wanted = decode_one(content, image_size=16, resize="crop") if is_valid else np.zeros((16, 16, 3), np.uint8)
            np.testing.assert_array_equal(image, wanted)


def test_a_broken_image_leaves_its_neighbours_alone():
    check_batch(*map(list, zip(*good_and_broken(), strict=True)))


def test_a_batch_of_nothing_but_broken_images():
    broken = [content for content, is_good in good_and_broken() if not is_good]
    check_batch(broken, [False] * len(broken))


def test_an_empty_batch():
    check_batch([], [])


def test_an_animated_webp_is_refused_and_never_crashes(tmp_path):
    frames = [Image.fromarray(make_image(seed, size=(40, 60))) for seed in range(5)]
    (tmp_path / "a.webp").write_bytes(encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], duration=40))
    # in a process of its own: in TF 2.21 the wrong call corrupts the heap
    code = f"""
import tensorflow as tf
from tl_keras.data.images import decode_batch, explain_broken
content = open({str(tmp_path / "a.webp")!r}, "rb").read()
decode = tf.function(
    lambda batch: decode_batch(batch, image_size=16, resize="crop"), input_signature=[tf.TensorSpec([None], tf.string)]
)
for number in range(10):
    images, valid = decode(tf.constant([content] * 4))
    assert not valid.numpy().any() and not images.numpy().any()
print(explain_broken(content, image_size=16, resize="crop"))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-500:]
    assert result.stdout.startswith("can't be decoded: ")


def reader(contents: list[bytes], order: np.ndarray | None = None):
    def read(positions: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        wanted = [int(position) for position in positions]
        for position in wanted if order is None else [int(p) for p in order if int(p) in wanted]:
            yield position, contents[position]

    return read


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_every_good_image_arrives_once_whatever_the_batch(batch_size):
    colours = np.random.default_rng(9).integers(0, 256, (150, 3)).astype(np.uint8)
    contents = [encode(np.broadcast_to(colour, (4, 4, 3)).copy(), "PNG") for colour in colours]
    broken = {0, 63, 64, 65, 100, 149}
    for position in broken:
        contents[position] = contents[position][:40]
    positions = np.setdiff1d(np.arange(150), [3, 70])
    read = reader(contents, order=np.random.default_rng(10).permutation(150))
    sizes, arrived = [], []
    for where, images in make_images(read, positions, image_size=8, resize="crop", batch_size=batch_size):
        assert where.dtype == np.int64
        assert images.shape == (len(where), 8, 8, 3)
        np.testing.assert_array_equal(images[:, 3, 3], colours[where])
        sizes.append(len(where))
        arrived += where.tolist()
    assert sorted(arrived) == sorted(set(positions.tolist()) - broken)
    assert set(sizes[:-1]) <= {batch_size}


def test_no_images_are_no_batches():
    arguments = {"image_size": 8, "resize": "crop", "batch_size": 4}
    assert list(make_images(reader([]), np.array([], np.int64), **arguments)) == []
    assert list(make_images(reader([b"broken"] * 3), np.arange(3), **arguments)) == []


def test_an_error_of_the_source_is_no_broken_image():
    content = encode(make_image(1), "PNG")

    def read(positions: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        for position in positions:
            if position == 100:
                raise RuntimeError("the disk is gone")
            yield int(position), content

    with pytest.raises(Exception, match="the disk is gone"):
        list(make_images(read, np.arange(200), image_size=8, resize="crop", batch_size=16))


def test_a_good_image_has_no_explanation():
    assert explain_broken(encode(make_image(1), "JPEG"), image_size=16, resize="crop") == ""


@pytest.mark.parametrize(
    ("content", "word"),
    [
        pytest.param(JPEG[: len(JPEG) // 2], "jpeg", id="half a JPEG"),
        pytest.param(encode(PICTURE, "PNG")[:200], "png", id="half a PNG"),
        pytest.param(b"no image", "unknown image", id="text"),
        pytest.param(encode(PICTURE, "WEBP")[:60], "webp", id="half a WebP"),
        pytest.param(b"GIF89a" + bytes(20), "gif", id="no GIF"),
        pytest.param(b"", "", id="nothing"),
    ],
)
def test_a_broken_image_is_explained_in_one_short_line(content, word):
    text = explain_broken(content, image_size=16, resize="crop")
    assert text.startswith("can't be decoded: ")
    assert word in text.lower()
    assert "\n" not in text
    assert not any(word in text for word in ("{{", "}}", "__wrapped__", "/job:"))
    assert len(text) < 190


def test_one_thread_is_enough(tmp_path):
    (tmp_path / "turned.jpg").write_bytes(behind_start(JPEG, EXIF))
    # branches within branches that each hold a thread would wait for one another for ever
    code = f"""
import tensorflow as tf
tf.config.threading.set_inter_op_parallelism_threads(1)
from tl_keras.data.images import decode, decode_batch
content = open({str(tmp_path / "turned.jpg")!r}, "rb").read()
alone = decode(tf.constant(content), image_size=16, resize="crop").numpy()
images, valid = decode_batch(tf.constant([content] * 8), image_size=16, resize="crop")
assert valid.numpy().all() and (images.numpy() == alone).all()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr[-500:]


def test_a_jpeg_made_of_tiny_blocks_costs_no_seconds():
    tiny = segment(0xE9, b"") * 60_000  # the EXIF behind them is not looked for
    start = time.perf_counter()
    decode_one(behind_start(JPEG, tiny, EXIF), image_size=16)
    decode_one(behind_start(JPEG, b"\xff" * 250_000, EXIF), image_size=16)
    assert time.perf_counter() - start < 10
