"""Reads size and EXIF orientation from the headers of images with standard TensorFlow ops, before decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

EXIF_SEARCH_BYTES = 1 << 18  # the orientation is not searched after 256 KiB of other metadata
_MOST_BLOCKS = 1000  # metadata blocks before EXIF or the first frame of a GIF, to limit the time for malicious files
_SCANS = 32  # number of scans of a JPEG that count as one
_GIF_WINDOW = 1 << 14  # bytes per step
_GIF_STEPS = 13  # doublings per window: the smallest sub-block has two bytes
_PADDING = b"\0" * 64  # allows reading headers beyond the end of short files
_SCALAR_STRING = tf.TensorSpec((), tf.string)


@dataclasses.dataclass(frozen=True)
class _Format:
    """Where a format has its width and height, in its first 32 bytes.

    Attributes:
        signature: position → bytes that identify the format.
        sides: position of the first byte of each number, and its bytes from the lowest on (negative: big-endian).
        shifts: lowest bit of width and height.
        bits: number of bits of width and height.
        offset: what is added to width and height.
    """

    signature: Mapping[int, bytes]
    sides: tuple[tuple[int, int], tuple[int, int]]
    shifts: tuple[int, int] = (0, 0)
    bits: int = 32
    offset: int = 0

    def bytes_of_signature(self) -> list[int]:
        """The expected value of each of the 32 bytes; -1 for any."""
        found = [-1] * 32
        for start, content in self.signature.items():
            found[start : start + len(content)] = content
        return found

    def weights(self) -> list[list[int]]:
        """The weight of each of the 32 bytes in width and height."""
        rows = []
        for start, count in self.sides:
            row = [0] * 32
            for place in range(abs(count)):
                row[start + (place if count > 0 else -count - 1 - place)] = 256**place
            rows.append(row)
        return rows


_WEBP = {0: b"RIFF", 8: b"WEBP"}
_FORMATS = (
    # the first chunk must have the size, although libpng would accept it later
    _Format({0: b"\x89PNG\r\n\x1a\n", 12: b"IHDR"}, ((16, -4), (20, -4))),
    _Format({0: b"BM"}, ((18, 4), (22, 4))),
    _Format({**_WEBP, 12: b"VP8X"}, ((24, 3), (27, 3)), offset=1),
    _Format({**_WEBP, 12: b"VP8L", 20: b"\x2f"}, ((21, 4), (21, 4)), shifts=(0, 14), bits=14, offset=1),
    _Format({**_WEBP, 12: b"VP8 ", 23: b"\x9d\x01\x2a"}, ((26, 2), (28, 2)), bits=14),
)
_SIGNATURES = np.array([one.bytes_of_signature() for one in _FORMATS], np.int32)
_SIDES = np.array([row for one in _FORMATS for row in one.weights()], np.int64)
_SHIFTS = np.array([shift for one in _FORMATS for shift in one.shifts], np.int64)
_SIDE_LIMITS = np.array([2**one.bits for one in _FORMATS for _ in range(2)], np.int64)
_OFFSETS = np.array([one.offset for one in _FORMATS for _ in range(2)], np.int64)


def traced_once(*signature: tf.TensorSpec) -> Callable[[Callable[..., Any]], Any]:
    """Makes a `tf.function` that all graphs share: it is traced for the first of them."""
    return lambda function: tf.function(function, input_signature=signature, autograph=False)


@traced_once(_SCALAR_STRING)
def read_orientation(image_bytes: tf.Tensor) -> tf.Tensor:
    """Reads EXIF tag 0x0112 (CIPA DC-008, Exif 2.32, section 4.6.4).

    Args:
        image_bytes: scalar string.

    Returns:
        int32 scalar, 1 to 8; 1 if it is missing or damaged.
    """
    head = tf.strings.join([tf.strings.substr(image_bytes, 0, EXIF_SEARCH_BYTES), _PADDING])
    signature = _bytes_at(head, 0, 16)
    is_jpeg = _equals(signature[:2], b"\xff\xd8")
    is_png = _equals(signature[:4], b"\x89PNG")
    kind = tf.cast(is_jpeg, tf.int32) + 2 * tf.cast(is_png, tf.int32) + 3 * tf.cast(_is_webp(signature), tf.int32)
    start = tf.switch_case(
        kind,
        [
            lambda: tf.constant(-1),
            lambda: _find_jpeg_exif(head),
            lambda: _find_png_exif(head),
            lambda: _find_webp_exif(head),
        ],
    )
    return tf.cond(start >= 0, lambda: _orientation_of_tiff(head, start), lambda: tf.constant(1))


@traced_once(_SCALAR_STRING)
def count_pixels(image_bytes: tf.Tensor) -> tf.Tensor:
    """Reads the number of pixels from the header, because a few bytes may decode to gigabytes.

    Supports JPEG (ITU T.81), PNG (W3C, section 11.2.1), BMP, the first frame of a GIF (GIF89a, section 20), and WebP
    (RFC 9649).

    Args:
        image_bytes: scalar string; a GIF after `cut_gif`, because TensorFlow uses the sizes of the frames.

    Returns:
        int64 scalar; the maximum of int64 if there is no such header, so that the image is not decoded.

    Raises:
        tf.errors.InvalidArgumentError: the header of a JPEG is damaged.
    """
    is_jpeg = tf.strings.substr(image_bytes, 0, 3) == b"\xff\xd8\xff"
    return run_one(is_jpeg, _count_jpeg, _count_no_jpeg, (image_bytes,), tf.TensorSpec((), tf.int64))


def cut_gif(image_bytes: tf.Tensor) -> tf.Tensor:
    """Removes all frames of a GIF after the first, and makes it opaque; other files are not changed.

    TensorFlow decodes all frames to return the first, with the size of the largest. Transparent pixels become black;
    without the transparency flag they have the color of the palette, as in PNG and WebP (TF 2.21).

    Args:
        image_bytes: scalar string.

    Returns:
        Scalar string.
    """
    is_gif = tf.strings.substr(image_bytes, 0, 4) == b"GIF8"
    return run_one(is_gif, _cut, _keep_bytes, (image_bytes,), _SCALAR_STRING)


def run_one(
    condition: tf.Tensor,
    then: Callable[..., tf.Tensor],
    otherwise: Callable[..., tf.Tensor],
    inputs: tuple[tf.Tensor, ...],
    output: tf.TensorSpec,
) -> tf.Tensor:
    """Runs one of two branches, as separate functions.

    TensorFlow would inline `tf.cond`, and every op of the other branch would cost time (0.5 ms per image).

    Args:
        condition: bool scalar.
        then: inputs → output, a plain function or a `tf.function`; without captured tensors, and stateless, except for
            assertions that its output depends on.
        otherwise: the same for False.
        inputs: inputs of both branches.
        output: type of the output of both branches.

    Returns:
        The output of the branch.
    """
    signature = tuple(tf.TensorSpec(value.shape, value.dtype) for value in inputs)
    branches = [
        (
            branch if hasattr(branch, "get_concrete_function") else traced_once(*signature)(branch)
        ).get_concrete_function()
        for branch in (then, otherwise)
    ]
    (result,) = tf.raw_ops.StatelessIf(
        cond=condition,
        input=list(inputs),
        Tout=[output.dtype],
        then_branch=branches[0],
        else_branch=branches[1],
        output_shapes=[output.shape],
    )
    return tf.ensure_shape(result, output.shape)


@traced_once(_SCALAR_STRING)
def _count_jpeg(image_bytes: tf.Tensor) -> tf.Tensor:
    # each scan of a progressive JPEG decodes the whole image again; cameras and editors write about ten
    scans = tf.size(tf.strings.split(image_bytes, b"\xff\xda")) - 1
    area = _area(*tf.unstack(tf.io.extract_jpeg_shape(image_bytes)[:2]))
    return area * (1 + tf.cast(scans // _SCANS, tf.int64))


@traced_once(_SCALAR_STRING)
def _count_no_jpeg(image_bytes: tf.Tensor) -> tf.Tensor:
    is_gif = tf.strings.substr(image_bytes, 0, 4) == b"GIF8"
    return run_one(is_gif, _count_gif, _count_other, (image_bytes,), tf.TensorSpec((), tf.int64))


@traced_once(_SCALAR_STRING)
def _count_gif(image_bytes: tf.Tensor) -> tf.Tensor:
    frame = _walk_gif(image_bytes)[0]
    block = _bytes_at(_pad(image_bytes), frame, 10)
    area = _area(_little_endian(block[5:7]), _little_endian(block[7:9]))
    return tf.where(frame > 0, area, tf.int64.max)


@traced_once(_SCALAR_STRING)
def _count_other(image_bytes: tf.Tensor) -> tf.Tensor:
    """Reads the number of pixels of PNG, BMP and WebP from the first 32 bytes, for all formats at once."""
    header = _bytes_at(_pad(tf.strings.substr(image_bytes, 0, 32)), 0, 32)
    is_format = tf.reduce_all((header == _SIGNATURES) | (_SIGNATURES < 0), axis=1)
    numbers = tf.linalg.matvec(_SIDES, tf.cast(header, tf.int64))
    numbers = tf.minimum(numbers, 2**32 - numbers)  # a negative height is a BMP stored top-down
    sides = tf.bitwise.right_shift(numbers, _SHIFTS) % _SIDE_LIMITS + _OFFSETS
    areas = tf.reduce_prod(tf.reshape(sides, (-1, 2)), axis=1)
    found = tf.reduce_max(tf.where(is_format, areas, 0))
    return tf.where(found > 0, found, tf.int64.max)


def _area(height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
    """Multiplies height and width, int32; a negative height is a BMP stored top-down."""
    return tf.abs(tf.cast(height, tf.int64)) * tf.abs(tf.cast(width, tf.int64))


def _pad(image_bytes: tf.Tensor) -> tf.Tensor:
    return tf.strings.join([image_bytes, _PADDING])


@traced_once(_SCALAR_STRING)
def _keep_bytes(image_bytes: tf.Tensor) -> tf.Tensor:
    return tf.identity(image_bytes)


@traced_once(_SCALAR_STRING)
def _cut(image_bytes: tf.Tensor) -> tf.Tensor:
    """Cuts a GIF behind its first frame, and makes it opaque."""
    frame, control = _walk_gif(image_bytes)
    image_bytes = _make_opaque(image_bytes, control)
    flags = _bytes_at(_pad(image_bytes), frame, 10)[9]
    end = _skip_sub_blocks(image_bytes, frame + 11 + _colour_table_bytes(flags))  # one byte for the LZW code size
    is_whole = (frame > 0) & (end < tf.strings.length(image_bytes))
    first = tf.strings.join([tf.strings.substr(image_bytes, 0, tf.where(is_whole, end, 0)), b";"])
    return tf.where(is_whole, first, image_bytes)


def _colour_table_bytes(flags: tf.Tensor) -> tf.Tensor:
    """Size of the global or local color table of a GIF (GIF89a, sections 18 and 20)."""
    return tf.where(flags & 0x80 > 0, 3 * tf.bitwise.left_shift(2, flags & 7), 0)


def _make_opaque(image_bytes: tf.Tensor, control: tf.Tensor) -> tf.Tensor:
    """Clears the transparency flag in the graphic control extension at `control` (GIF89a, section 23)."""
    flags = _bytes_at(_pad(image_bytes), control, 4)[3]
    every_byte = tf.constant([bytes([value]) for value in range(256)])
    flag = tf.gather(every_byte, tf.bitwise.bitwise_and(flags, 0xFE))
    before = tf.strings.substr(image_bytes, 0, tf.maximum(control, 0) + 3)
    rest = tf.strings.substr(image_bytes, tf.strings.length(before) + 1, tf.strings.length(image_bytes))
    opaque = tf.strings.join([before, flag, rest])
    is_inside = (control >= 0) & (control + 3 < tf.strings.length(image_bytes))
    return tf.where(is_inside, opaque, image_bytes)


@traced_once(_SCALAR_STRING)
def _walk_gif(image_bytes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Finds the first image descriptor of a GIF and its graphic control extension: positions, int32; -1 for none."""
    padded = _pad(image_bytes)
    first = 13 + _colour_table_bytes(_bytes_at(padded, 0, 13)[10])

    def is_extension(position: tf.Tensor, control: tf.Tensor) -> tf.Tensor:
        del control
        return _bytes_at(padded, position, 1)[0] == 0x21

    def skip(position: tf.Tensor, control: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        is_control = _bytes_at(padded, position, 2)[1] == 0xF9
        return _skip_sub_blocks(image_bytes, position + 2), tf.where(is_control, position, control)

    start = (first, tf.constant(-1))
    position, control = tf.while_loop(is_extension, skip, start, maximum_iterations=_MOST_BLOCKS)
    is_inside = position < tf.strings.length(image_bytes)
    is_frame = is_inside & (_bytes_at(padded, position, 1)[0] == 0x2C)
    return tf.where(is_frame, position, -1), tf.where(is_frame, control, -1)


@traced_once(_SCALAR_STRING, tf.TensorSpec((), tf.int32))
def _skip_sub_blocks(image_bytes: tf.Tensor, start: tf.Tensor) -> tf.Tensor:
    """Finds the end of the data sub-blocks that start at `start` (GIF89a, section 15), after their terminator.

    It processes one window at a time with pointer doubling: the next sub-block of each position is known, and the
    distance doubles in each step. A loop from block to block would take thousands of steps.
    """
    length = tf.strings.length(image_bytes)
    beyond = tf.range(_GIF_WINDOW, _GIF_WINDOW + 256)

    def go_on(position: tf.Tensor, ended: tf.Tensor) -> tf.Tensor:
        return ~ended & (position < length)

    def follow(position: tf.Tensor, ended: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        del ended
        window = tf.strings.substr(image_bytes, position, tf.minimum(_GIF_WINDOW, length - position))
        sizes = tf.cast(tf.io.decode_raw(window, tf.uint8), tf.int32)
        sizes = tf.pad(sizes, [[0, _GIF_WINDOW - tf.size(sizes)]])  # pads the file with terminators
        here = tf.range(_GIF_WINDOW)
        following = tf.concat([tf.where(sizes > 0, here + 1 + sizes, here), beyond], 0)
        for _ in range(_GIF_STEPS):
            following = tf.gather(following, following)
        last = following[0]
        ended = last < _GIF_WINDOW
        return position + tf.where(ended, last + 1, last), ended

    start = tf.minimum(start, length)
    return tf.while_loop(go_on, follow, (start, tf.constant(False)))[0]


def is_webp_with_alpha(image_bytes: tf.Tensor) -> tf.Tensor:
    """Reads the alpha bit of an extended or a lossless WebP (RFC 9649, sections 2.7 and 3.4)."""
    header = _bytes_at(_pad(tf.strings.substr(image_bytes, 0, 32)), 0, 25)
    is_extended, is_lossless = _equals(header[12:16], b"VP8X"), _equals(header[12:16], b"VP8L")
    has_bit = tf.where(is_extended, header[20], tf.where(is_lossless, header[24], 0)) & 0x10 > 0
    return _is_webp(header) & has_bit


def _bytes_at(head: tf.Tensor, start: Any, length: int) -> tf.Tensor:
    """Reads bytes as int32 `(length,)`; positions outside of the file give zeros of the padding."""
    last = tf.strings.length(head) - length
    raw = tf.io.decode_raw(tf.strings.substr(head, tf.clip_by_value(start, 0, last), length), tf.uint8)
    return tf.cast(tf.ensure_shape(raw, (length,)), tf.int32)


def _is_webp(header: tf.Tensor) -> tf.Tensor:
    return _equals(header[:4], b"RIFF") & _equals(header[8:12], b"WEBP")


def _equals(values: tf.Tensor, expected: bytes) -> tf.Tensor:
    return tf.reduce_all(values == tf.constant(list(expected)))


def _big_endian(values: tf.Tensor) -> tf.Tensor:
    weights = [256**power for power in reversed(range(values.shape[0]))]
    return tf.reduce_sum(values * tf.constant(weights, tf.int32))  # numbers above 2 GiB become negative


def _little_endian(values: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(values * tf.constant([256**power for power in range(values.shape[0])], tf.int32))


def _walk(
    head: tf.Tensor, start: int, step: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]]
) -> tf.Tensor:
    """Walks from block to block until one contains EXIF.

    Args:
        head: the first bytes of the file.
        start: position of the first block.
        step: position of a block → (next block, position of its TIFF data or -1, whether to continue).

    Returns:
        Position of the TIFF data, int32; -1 if there are none.
    """
    length = tf.strings.length(head)

    def go_on(position: tf.Tensor, _: tf.Tensor) -> tf.Tensor:
        return (position >= 0) & (position < length)

    def advance(position: tf.Tensor, found: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        following, found, more = step(position)
        return tf.where(more & (found < 0) & (following > position), following, -1), found

    first = (tf.constant(start), tf.constant(-1))
    return tf.while_loop(go_on, advance, first, maximum_iterations=_MOST_BLOCKS)[1]


def _find_jpeg_exif(head: tf.Tensor) -> tf.Tensor:
    def step(position: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        block = _bytes_at(head, position, 10)
        is_exif = (block[1] == 0xE1) & _equals(block[4:10], b"Exif\0\0")
        is_fill = block[1] == 0xFF  # fill bytes before a marker (ITU T.81, B.1.1.2)
        is_metadata = ((block[1] >= 0xE0) & (block[1] <= 0xEF)) | (block[1] == 0xFE)
        following = tf.where(is_fill, position + 1, position + 2 + _big_endian(block[2:4]))
        return following, tf.where(is_exif, position + 10, -1), (block[0] == 0xFF) & (is_fill | is_metadata)

    return _walk(head, 2, step)


def _find_png_exif(head: tf.Tensor) -> tf.Tensor:
    def step(position: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        block = _bytes_at(head, position, 8)
        is_exif = _equals(block[4:8], b"eXIf")
        return position + 12 + _big_endian(block[:4]), tf.where(is_exif, position + 8, -1), block[0] < 0x80

    return _walk(head, 8, step)


def _find_webp_exif(head: tf.Tensor) -> tf.Tensor:
    def step(position: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        block = _bytes_at(head, position, 14)
        size = _little_endian(block[4:8])
        prefix = tf.where(_equals(block[8:14], b"Exif\0\0"), 6, 0)
        is_exif = _equals(block[:4], b"EXIF")
        return position + 8 + size + size % 2, tf.where(is_exif, position + 8 + prefix, -1), block[7] < 0x80

    return _walk(head, 12, step)


def _orientation_of_tiff(head: tf.Tensor, start: tf.Tensor) -> tf.Tensor:
    """Reads the orientation from a TIFF header and its first directory (TIFF 6.0, section 2)."""
    header = _bytes_at(head, start, 8)
    is_little = _equals(header[:2], b"II")

    def number(values: tf.Tensor) -> tf.Tensor:
        return _big_endian(tf.where(is_little, tf.reverse(values, [0]), values))

    directory = start + number(header[4:8])
    entries = tf.minimum(number(_bytes_at(head, directory, 2)), 512)
    length = tf.strings.length(head)
    first = tf.clip_by_value(directory + 2, 0, length)
    size = tf.minimum(entries * 12, (length - first) // 12 * 12)
    raw = tf.cast(tf.io.decode_raw(tf.strings.substr(head, first, size), tf.uint8), tf.int32)
    table = tf.reshape(raw, (-1, 12))
    high, low = tf.where(is_little, 1, 0), tf.where(is_little, 0, 1)
    is_orientation = tf.gather(table, high, axis=1) * 256 + tf.gather(table, low, axis=1) == 0x0112
    values = tf.gather(table, 8 + high, axis=1) * 256 + tf.gather(table, 8 + low, axis=1)
    found = tf.reduce_max(tf.where(is_orientation, values, 0))
    return tf.where((found >= 1) & (found <= 8), found, 1)
