"""Decoder for BMP made of standard TensorFlow ops, without `tf.io.decode_bmp`.

`tf.io.decode_bmp` returns the indices of a palette instead of its colors, ignores the channel masks of a file, and
rejects files with a single byte after the pixels (TF 2.21). Layout: Microsoft, "Bitmap Storage",
https://learn.microsoft.com/windows/win32/gdi/bitmap-storage.
"""

from __future__ import annotations

import tensorflow as tf

_HEADER_BYTES = 70  # file header, and the used part of the image header
_PALETTE = 256
_MASKS_16 = (0x7C00, 0x03E0, 0x001F)  # default: five bits per channel
_MASKS_32 = (0xFF0000, 0x00FF00, 0x0000FF)
_BITFIELDS = (3, 6)


@tf.autograph.experimental.do_not_convert
def decode_bmp(image_bytes: tf.Tensor) -> tf.Tensor:
    """Decodes an uncompressed BMP with 1, 4, 8, 16, 24 or 32 bits per pixel; alpha is dropped.

    Args:
        image_bytes: scalar string.

    Returns:
        RGB, uint8, `(height, width, 3)`.

    Raises:
        tf.errors.InvalidArgumentError: the file is compressed, has another format, or is truncated.
    """
    header = _read(image_bytes, 0, _HEADER_BYTES)
    size, offset = _number(header[14:18]), _number(header[10:14])
    width, height = _number(header[18:22]), _signed(header[22:26])
    bits, compression = _number(header[28:30]), _number(header[30:34])
    known = tf.reduce_any(bits == [1, 4, 8, 16, 24, 32]) & tf.reduce_any(compression == [0, *_BITFIELDS])
    is_whole = (size >= 40) & known & (width > 0) & (height != 0)
    with tf.control_dependencies([
        tf.debugging.Assert(is_whole, ["BMP of a kind that is not read", bits, compression])
    ]):
        stride = (width * bits + 31) // 32 * 4
        rows = tf.abs(height)
        content = tf.strings.substr(image_bytes, offset, rows * stride)
    raw = tf.reshape(tf.io.decode_raw(content, tf.uint8), tf.stack([rows, stride]))

    def of_palette() -> tf.Tensor:
        colours = _read_palette(image_bytes, 14 + size, offset)
        return tf.gather(colours, _unpack(raw, bits)[:, :width])

    def of_bytes() -> tf.Tensor:
        return tf.reshape(raw[:, : 3 * width], tf.stack([rows, width, tf.constant(3, tf.int64)]))[..., ::-1]

    def of_masks() -> tf.Tensor:
        each = bits // 8
        values = tf.reshape(tf.cast(raw[:, : each * width], tf.int64), tf.stack([rows, width, each]))
        values = tf.reduce_sum(values * tf.bitwise.left_shift(tf.constant(1, tf.int64), 8 * tf.range(each)), 2)
        default = tf.where(bits == 16, tf.constant(_MASKS_16, tf.int64), tf.constant(_MASKS_32, tf.int64))
        own = tf.stack([_number(header[54 + 4 * channel : 58 + 4 * channel]) for channel in range(3)])
        masks = tf.where(tf.reduce_any(compression == list(_BITFIELDS)), own, default)
        lowest = tf.maximum(tf.bitwise.bitwise_and(masks, -masks), 1)
        channels = tf.bitwise.bitwise_and(values[..., tf.newaxis], masks) // lowest
        return tf.cast(channels * 255 // tf.maximum(masks // lowest, 1), tf.uint8)

    kind = tf.where(bits <= 8, 0, tf.where(bits == 24, 1, 2))
    pixels = tf.switch_case(kind, [of_palette, of_bytes, of_masks])
    return tf.cond(height > 0, lambda: pixels[::-1], lambda: pixels)  # rows are stored bottom-up


def _read_palette(image_bytes: tf.Tensor, start: tf.Tensor, end: tf.Tensor) -> tf.Tensor:
    """Reads the colors between two positions, uint8 `(256, 3)`, padded with black."""
    count = tf.clip_by_value((end - start) // 4, 0, _PALETTE)
    raw = tf.io.decode_raw(tf.strings.substr(image_bytes, start, 4 * count), tf.uint8)
    colours = tf.reshape(raw, (-1, 4))[:, 2::-1]
    return tf.pad(colours, [[0, _PALETTE - tf.shape(colours)[0]], [0, 0]])


def _unpack(raw: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
    """Unpacks bytes that contain eight, two or one number each, high bits first, to int32 `(rows, n)`."""
    shifts = tf.cast(tf.range(8 - bits, -1, -bits), tf.int32)
    mask = tf.bitwise.left_shift(1, tf.cast(bits, tf.int32)) - 1
    numbers = tf.bitwise.bitwise_and(tf.bitwise.right_shift(tf.cast(raw, tf.int32)[..., tf.newaxis], shifts), mask)
    return tf.reshape(numbers, tf.stack([tf.shape(raw)[0], -1]))


def _read(image_bytes: tf.Tensor, start: int, length: int) -> tf.Tensor:
    padded = tf.strings.join([tf.strings.substr(image_bytes, 0, start + length), b"\0" * length])
    raw = tf.io.decode_raw(tf.strings.substr(padded, start, length), tf.uint8)
    return tf.cast(tf.ensure_shape(raw, (length,)), tf.int64)


def _number(values: tf.Tensor) -> tf.Tensor:
    """Reads an unsigned little-endian number, int64."""
    return tf.reduce_sum(values * tf.constant([256**power for power in range(values.shape[0])], tf.int64))


def _signed(values: tf.Tensor) -> tf.Tensor:
    found = _number(values)
    return tf.where(found >= 2**31, found - 2**32, found)
