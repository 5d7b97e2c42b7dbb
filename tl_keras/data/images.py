"""Encoded images → upright RGB at the network's size, by stock TensorFlow ops.

Training, evaluation, prediction and the exported graph all decode here, so that what was measured is what is served.

Decided: the first frame of a GIF; transparency is dropped; colour profiles are ignored; 16-bit images keep their high
byte; EXIF orientation is honoured in JPEG, PNG and WebP.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

DECODER_VERSION = 2  # part of every embedding's address: raise it when a pixel changes
_EXIF_SEARCH_BYTES = 1 << 18  # orientation behind more than 256 KiB of other metadata is not looked for
_MOST_BLOCKS = 1000  # of metadata before EXIF: a file made of tiny blocks must not cost seconds
_PADDING = b"\0" * 64  # so that reading a header never runs over the end of a short file
_JPEG_RATIOS = (1, 2, 4, 8)  # libjpeg's own scales (libjpeg.txt, "DCT scaling")
_READ_CHUNK = 64
_DECODERS = 16  # images decoded at once, or as many as there are threads
_ENLARGED_AT_MOST = 4  # sides of the target: beyond that most of what is enlarged would be cropped away


@tf.autograph.experimental.do_not_convert
def decode(image_bytes: tf.Tensor, *, image_size: int, resize: str) -> tf.Tensor:
    """Decodes one image, stands it upright and brings it to the network's size.

    Resizing is bilinear and antialiased (a triangle filter as wide as the scale), as Pillow's and torchvision's are,
    and rounded to whole levels as theirs. A JPEG is decoded at the smallest of libjpeg's scales that covers the target.

    Args:
        image_bytes: scalar string: JPEG, PNG, GIF, BMP or still WebP, told by content.
        image_size: side of the result in pixels.
        resize: `crop` (shortest side, then centre crop), `squash` (both sides) or `pad` (longest side, black borders).

    Returns:
        RGB, uint8, `(image_size, image_size, 3)`.

    Raises:
        tf.errors.InvalidArgumentError: the bytes are no image, or a broken one.
    """
    if tf.executing_eagerly():
        return _compile_decoder(image_size, resize)(image_bytes)
    pixels = _decode_pixels(image_bytes, image_size=image_size, resize=resize)
    pixels = _stand_upright(pixels, image_bytes)
    return _resize(pixels, image_size=image_size, resize=resize)


@functools.cache
def _compile_decoder(image_size: int, resize: str) -> Callable[[tf.Tensor], tf.Tensor]:
    """Decoding as a graph: eagerly, each branch inside a branch holds one of TensorFlow's threads until none is left.

    Two cores have two such threads, and a photograph with EXIF needs three (TF 2.21).
    """
    function: Callable[[tf.Tensor], tf.Tensor] = tf.function(
        functools.partial(decode, image_size=image_size, resize=resize),
        input_signature=(tf.TensorSpec((), tf.string),),
        autograph=False,
    )
    return function


@tf.autograph.experimental.do_not_convert
def decode_batch(image_bytes: tf.Tensor, *, image_size: int, resize: str) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes a batch inside a graph; a broken image leaves its neighbours alone.

    A `tf.data` pipeline inside the graph skips what can't be decoded, and the rest is scattered back by index.

    Args:
        image_bytes: string `(n,)`; n may be 0.
        image_size: see `decode`.
        resize: see `decode`.

    Returns:
        Images, uint8 `(n, image_size, image_size, 3)`, black where broken; and which are valid, bool `(n,)`.
    """
    count = tf.shape(image_bytes, out_type=tf.int64)[0]
    shape = (image_size, image_size, 3)

    def decode_one(index: tf.Tensor, one: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return index, decode(one, image_size=image_size, resize=resize)

    images = tf.data.Dataset.from_tensor_slices((tf.range(count), image_bytes))
    images = images.map(decode_one, num_parallel_calls=_DECODERS).ignore_errors(log_warning=False)
    # one black image at the end, cut off again below: get_single_element must find a batch where all are broken
    images = images.concatenate(tf.data.Dataset.from_tensors((count, tf.zeros(shape, tf.uint8))))
    indices, pixels = images.batch(count + 1).with_options(without_autotune()).get_single_element()
    indices, pixels = indices[:-1, tf.newaxis], pixels[:-1]
    all_pixels = tf.scatter_nd(indices, pixels, tf.concat([[count], tf.constant(shape, tf.int64)], 0))
    valid = tf.scatter_nd(indices, tf.ones_like(indices[:, 0], tf.int32), [count]) > 0
    return tf.ensure_shape(all_pixels, (None, *shape)), valid


def make_images(
    read: Callable[[Iterable[int]], Iterator[tuple[int, bytes]]],
    positions: np.ndarray,
    *,
    image_size: int,
    resize: str,
    batch_size: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Streams decoded images in batches, beside whatever consumes them; what can't be decoded is left out.

    Args:
        read: gives (position, encoded bytes) for the positions asked for, in any order.
        positions: int `(n,)`.
        image_size: see `decode`.
        resize: see `decode`.
        batch_size: of every batch but the last.

    Yields:
        Positions, int64 `(b,)`, and images, uint8 `(b, image_size, image_size, 3)`.

    Raises:
        Exception: what `read` raised, after the images that it gave before.
    """
    failed: list[Exception] = []

    def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        found: list[tuple[int, bytes]] = []
        try:
            for item in read(positions):
                found.append(item)
                if len(found) == _READ_CHUNK:
                    yield _as_arrays(found)
                    found = []
        except Exception as error:  # ignore_errors would take it for a broken image: it is raised again below
            failed.append(error)
        if found:
            yield _as_arrays(found)

    def decode_one(position: tf.Tensor, one: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return position, decode(one, image_size=image_size, resize=resize)

    signature = (tf.TensorSpec((None,), tf.int64), tf.TensorSpec((None,), tf.string))
    images = tf.data.Dataset.from_generator(chunks, output_signature=signature).unbatch()
    images = images.map(decode_one, num_parallel_calls=_DECODERS).ignore_errors(log_warning=False)
    yield from images.batch(batch_size).prefetch(4).with_options(without_autotune()).as_numpy_iterator()
    if failed:
        raise failed[0]


def without_autotune() -> tf.data.Options:
    """Options for a pipeline that is soon over: with autotuning, its end waits for a thread that sleeps for seconds.

    The sleep doubles up to a minute (`Model::OptimizeLoop`, TF 2.21).
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return options


def explain_broken(image_bytes: bytes, *, image_size: int, resize: str) -> str:
    """Says in a few words why an image can't be decoded; an empty text where it can."""
    try:
        decode(tf.constant(image_bytes), image_size=image_size, resize=resize)
    except tf.errors.OpError as error:
        # the op's own message stands before the line that names its node, behind where in our code that was built
        message = str(error.message).split("\n\t [[{{node")[0].strip() or "unknown error"
        return f"can't be decoded: {message.splitlines()[-1][:160]}"
    return ""


@tf.autograph.experimental.do_not_convert
def read_orientation(image_bytes: tf.Tensor) -> tf.Tensor:
    """Reads EXIF tag 0x0112 (CIPA DC-008, Exif 2.32, section 4.6.4).

    Args:
        image_bytes: scalar string.

    Returns:
        int32 scalar, 1 to 8; 1 where there is none, or it is damaged.
    """
    head = tf.strings.join([tf.strings.substr(image_bytes, 0, _EXIF_SEARCH_BYTES), _PADDING])
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


def _as_arrays(found: list[tuple[int, bytes]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([item[0] for item in found], np.int64), np.array([item[1] for item in found], object)


def _decode_pixels(image_bytes: tf.Tensor, *, image_size: int, resize: str) -> tf.Tensor:
    is_jpeg = tf.strings.substr(image_bytes, 0, 3) == b"\xff\xd8\xff"

    # never channels=0, with which an animated WebP corrupts the heap (TF 2.21)
    def decode_channels(channels: int) -> tf.Tensor:
        return tf.io.decode_image(image_bytes, channels=channels, expand_animations=False)[:, :, :3]

    def decode_other() -> tf.Tensor:
        # of WebP alone TensorFlow wants to be asked for as many channels as there are
        return tf.cond(_is_webp_with_alpha(image_bytes), lambda: decode_channels(4), lambda: decode_channels(3))

    pixels = tf.cond(is_jpeg, lambda: _decode_jpeg(image_bytes, image_size, resize), decode_other)
    return tf.ensure_shape(pixels, (None, None, 3))


def _is_webp_with_alpha(image_bytes: tf.Tensor) -> tf.Tensor:
    """Reads the alpha bit of an extended or a lossless WebP (RFC 9649, sections 2.7 and 3.4)."""
    header = _bytes_at(tf.strings.join([tf.strings.substr(image_bytes, 0, 32), _PADDING]), 0, 25)
    is_extended, is_lossless = _equals(header[12:16], b"VP8X"), _equals(header[12:16], b"VP8L")
    has_bit = tf.where(is_extended, header[20], tf.where(is_lossless, header[24], 0)) & 0x10 > 0
    return _is_webp(header) & has_bit


def _decode_jpeg(image_bytes: tf.Tensor, image_size: int, resize: str) -> tf.Tensor:
    sides = tf.io.extract_jpeg_shape(image_bytes)[:2]
    side = tf.reduce_max(sides) if resize == "pad" else tf.reduce_min(sides)
    covers = [(side + ratio - 1) // ratio >= image_size for ratio in _JPEG_RATIOS[1:]]
    choice = tf.add_n([tf.cast(cover, tf.int32) for cover in covers])

    def at(ratio: int) -> Callable[[], tf.Tensor]:
        return lambda: tf.io.decode_jpeg(image_bytes, channels=3, ratio=ratio, dct_method="INTEGER_ACCURATE")

    return tf.switch_case(choice, [at(ratio) for ratio in _JPEG_RATIOS])


def _stand_upright(pixels: tf.Tensor, image_bytes: tf.Tensor) -> tf.Tensor:
    """Undoes the EXIF orientation; one cheap search spares images without EXIF the reading of their blocks."""
    head = tf.strings.substr(image_bytes, 0, _EXIF_SEARCH_BYTES)
    without = tf.strings.regex_replace(head, "Exif\\x00|eXIf|EXIF", "", replace_global=False)
    shape, pixels_spec = (None, None, 3), tf.TensorSpec((None, None, 3), tf.uint8)

    @tf.function(input_signature=(pixels_spec, tf.TensorSpec((), tf.string)), autograph=False)
    def turn(pixels: tf.Tensor, image_bytes: tf.Tensor) -> tf.Tensor:
        return _orient(pixels, read_orientation(image_bytes))

    @tf.function(input_signature=(pixels_spec, tf.TensorSpec((), tf.string)), autograph=False)
    def keep(pixels: tf.Tensor, image_bytes: tf.Tensor) -> tf.Tensor:
        del image_bytes
        return tf.identity(pixels)

    # not tf.cond, which TensorFlow inlines: every op of the branch not taken would then cost time (0.5 ms an image)
    (upright,) = tf.raw_ops.StatelessIf(
        cond=tf.strings.length(without) < tf.strings.length(head),
        input=[pixels, image_bytes],
        Tout=[tf.uint8],
        then_branch=turn.get_concrete_function(),
        else_branch=keep.get_concrete_function(),
        output_shapes=[shape],
    )
    return tf.ensure_shape(upright, shape)


def _orient(pixels: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Undoes one of the eight EXIF orientations, as Pillow's `ImageOps.exif_transpose`."""

    def undo() -> tf.Tensor:
        turned = tf.cond(orientation >= 5, lambda: tf.transpose(pixels, (1, 0, 2)), lambda: pixels)
        mirrored = tf.reduce_any(orientation == [2, 3, 6, 7])
        flipped = tf.reduce_any(orientation == [3, 4, 7, 8])
        turned = tf.cond(mirrored, lambda: tf.reverse(turned, [1]), lambda: turned)
        return tf.cond(flipped, lambda: tf.reverse(turned, [0]), lambda: turned)

    return tf.cond(orientation > 1, undo, lambda: pixels)


def _resize(pixels: tf.Tensor, *, image_size: int, resize: str) -> tf.Tensor:
    """Resizes and crops (or pads) in one op, so that only what is kept is computed: 1 x 10,000 pixels cost no more.

    Sides and middle are rounded as torchvision's `Resize` and `CenterCrop` round them, to the pixel.
    """
    sides = tf.shape(pixels)[:2]
    if resize == "squash":
        scaled = tf.fill([2], image_size)
    elif resize == "pad":
        exact = tf.cast(sides, tf.float64) * image_size / tf.cast(tf.reduce_max(sides), tf.float64)
        scaled = tf.maximum(tf.cast(tf.round(exact), tf.int32), 1)
    else:
        scaled = tf.cast(tf.cast(sides, tf.int64) * image_size // tf.cast(tf.reduce_min(sides), tf.int64), tf.int32)
    offset = tf.round(tf.cast(image_size - scaled, tf.float32) / 2)

    def filter_and_crop() -> tf.Tensor:
        return tf.raw_ops.ScaleAndTranslate(
            images=pixels[tf.newaxis],
            size=(image_size, image_size),
            scale=tf.cast(scaled / sides, tf.float32),
            translation=offset,
            kernel_type="triangle",
            antialias=True,
        )[0]

    # enlarged, there is nothing to filter: the same pixels from an op that takes a third of the time
    is_enlarged = tf.reduce_all(scaled >= sides) & (tf.reduce_max(scaled) <= _ENLARGED_AT_MOST * image_size)
    resized = tf.cond(
        is_enlarged, lambda: _enlarge(pixels, scaled, tf.cast(offset, tf.int32), image_size), filter_and_crop
    )
    # a triangle filter never leaves 0 to 255, so that adding a half and cutting off rounds
    return tf.ensure_shape(tf.cast(resized + 0.5, tf.uint8), (image_size, image_size, 3))


def _enlarge(pixels: tf.Tensor, scaled: tf.Tensor, offset: tf.Tensor, image_size: int) -> tf.Tensor:
    """Enlarges to `scaled`, then crops (negative offsets) or pads to the network's size; float32."""
    enlarged = tf.image.resize(pixels, scaled)
    first, before = tf.maximum(-offset, 0), tf.maximum(offset, 0)
    kept = tf.minimum(scaled, image_size)
    cropped = tf.slice(enlarged, [first[0], first[1], 0], [kept[0], kept[1], 3])
    after = image_size - before - kept
    return tf.pad(cropped, [[before[0], after[0]], [before[1], after[1]], [0, 0]])


def _bytes_at(head: tf.Tensor, start: Any, length: int) -> tf.Tensor:
    """Bytes as int32 `(length,)`; a position outside the file gives the padding's zeros."""
    last = tf.strings.length(head) - length
    raw = tf.io.decode_raw(tf.strings.substr(head, tf.clip_by_value(start, 0, last), length), tf.uint8)
    return tf.cast(tf.ensure_shape(raw, (length,)), tf.int32)


def _is_webp(header: tf.Tensor) -> tf.Tensor:
    return _equals(header[:4], b"RIFF") & _equals(header[8:12], b"WEBP")


def _equals(values: tf.Tensor, expected: bytes) -> tf.Tensor:
    return tf.reduce_all(values == tf.constant(list(expected)))


def _big_endian(values: tf.Tensor) -> tf.Tensor:
    weights = [256**power for power in reversed(range(values.shape[0]))]
    return tf.reduce_sum(values * tf.constant(weights, tf.int32))  # above 2 GiB wraps to a negative number


def _walk(
    head: tf.Tensor, start: int, step: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]]
) -> tf.Tensor:
    """Walks from block to block until one holds EXIF.

    Args:
        head: the file's first bytes.
        start: position of the first block.
        step: position of a block → (next block, where its TIFF data begin or -1, whether to go on).

    Returns:
        Where the TIFF data begin, int32; -1 where there are none.
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
        is_fill = block[1] == 0xFF  # any number of these may stand before a marker (ITU T.81, B.1.1.2)
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
        size = _big_endian(tf.reverse(block[4:8], [0]))
        prefix = tf.where(_equals(block[8:14], b"Exif\0\0"), 6, 0)
        is_exif = _equals(block[:4], b"EXIF")
        return position + 8 + size + size % 2, tf.where(is_exif, position + 8 + prefix, -1), block[7] < 0x80

    return _walk(head, 12, step)


def _orientation_of_tiff(head: tf.Tensor, start: tf.Tensor) -> tf.Tensor:
    """Orientation from a TIFF header and its first directory (TIFF 6.0, section 2)."""
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
