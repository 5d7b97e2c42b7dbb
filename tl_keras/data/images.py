"""Encoded images → upright RGB at the network's size, by stock TensorFlow ops.

Training, evaluation, prediction and the exported graph all decode here, so that what was measured is what is served.

Decided: the first frame of a GIF; transparency is dropped, and the colour under it is kept; colour profiles are
ignored; 16-bit images keep their high byte; EXIF orientation is honoured in JPEG, PNG and WebP.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tensorflow as tf

from tl_keras.data.bmp import decode_bmp
from tl_keras.data.headers import (
    EXIF_SEARCH_BYTES,
    count_pixels,
    cut_gif,
    is_webp_with_alpha,
    read_orientation,
    run_one,
)

DECODER_VERSION = 4  # part of every embedding's address: raise it when a pixel changes
_JPEG_RATIOS = (1, 2, 4, 8)  # libjpeg's own scales (libjpeg.txt, "DCT scaling")
_TOO_LARGE = "image with too many pixels:"
_READ_CHUNK = 64
_DECODERS = 16  # images decoded at once, or as many as there are threads
_WIDE = 4  # times as wide as high
_ENLARGED_AT_MOST = 4  # sides of the target: beyond that most of what is enlarged would be cropped away


@tf.autograph.experimental.do_not_convert
def decode(image_bytes: tf.Tensor, *, image_size: int, resize: str, max_pixels: int | None = None) -> tf.Tensor:
    """Decodes one image, stands it upright and brings it to the network's size.

    Resizing is bilinear and antialiased (a triangle filter as wide as the scale), as Pillow's and torchvision's are,
    and rounded to whole levels as theirs. A JPEG is decoded at the smallest of libjpeg's scales that covers the target.

    Args:
        image_bytes: scalar string: JPEG, PNG, GIF, BMP or still WebP, told by content.
        image_size: side of the result in pixels.
        resize: `crop` (shortest side, then centre crop), `squash` (both sides) or `pad` (longest side, black borders).
        max_pixels: larger images are refused before they are decoded; None: there is no limit.

    Returns:
        RGB, uint8, `(image_size, image_size, 3)`.

    Raises:
        tf.errors.InvalidArgumentError: the bytes are no image, a broken or a too large one.
    """
    if tf.executing_eagerly():
        return _compile_decoder(image_size, resize, max_pixels)(image_bytes)
    image_bytes = cut_gif(image_bytes)
    if max_pixels is not None:
        image_bytes = _refuse_above(max_pixels, image_bytes)
    pixels = _decode_pixels(image_bytes, image_size=image_size, resize=resize)
    pixels = _stand_upright(pixels, image_bytes)
    return _resize(pixels, image_size=image_size, resize=resize)


@functools.cache
def _compile_decoder(image_size: int, resize: str, max_pixels: int | None) -> Callable[[tf.Tensor], tf.Tensor]:
    """Decoding as a graph: eagerly, each branch inside a branch holds one of TensorFlow's threads until none is left.

    Two cores have two such threads, and a photograph with EXIF needs three (TF 2.21).
    """
    function: Callable[[tf.Tensor], tf.Tensor] = tf.function(
        functools.partial(decode, image_size=image_size, resize=resize, max_pixels=max_pixels),
        input_signature=(tf.TensorSpec((), tf.string),),
        autograph=False,
    )
    return function


@tf.autograph.experimental.do_not_convert
def decode_batch(
    image_bytes: tf.Tensor,
    *,
    image_size: int,
    resize: str,
    max_pixels: int | None = None,
    read: Callable[[tf.Tensor], tf.Tensor] | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes a batch inside a graph; a broken image leaves its neighbors alone.

    A `tf.data` pipeline inside the graph skips what can't be decoded, and the rest is scattered back by index. One
    image alone is decoded without the pipeline's threads, which take longer to start than to work.

    Args:
        image_bytes: string `(n,)`; n may be 0.
        image_size: see `decode`.
        resize: see `decode`.
        max_pixels: see `decode`.
        read: scalar string → an image's bytes, where `image_bytes` holds something else that may be broken as well.

    Returns:
        Images, uint8 `(n, image_size, image_size, 3)`, black where broken; and which are valid, bool `(n,)`.
    """
    count = tf.shape(image_bytes, out_type=tf.int64)[0]
    shape = (image_size, image_size, 3)
    decoder = _compile_decoder(image_size, resize, max_pixels)  # one function in the graph, however often it is called

    def decode_one(index: tf.Tensor, one: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return index, decoder(one if read is None else read(one))

    def decode_all(decoders: int | None) -> tuple[tf.Tensor, tf.Tensor]:
        images = tf.data.Dataset.from_tensor_slices((tf.range(count), image_bytes))
        images = images.map(decode_one, num_parallel_calls=decoders).ignore_errors(log_warning=False)
        # one black image at the end, cut off again below: get_single_element must find a batch where all are broken
        images = images.concatenate(tf.data.Dataset.from_tensors((count, tf.zeros(shape, tf.uint8))))
        found: tuple[tf.Tensor, tf.Tensor] = (
            images.batch(count + 1).with_options(without_autotune()).get_single_element()
        )
        return found

    indices, pixels = tf.cond(count == 1, lambda: decode_all(None), lambda: decode_all(_DECODERS))
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
    digests: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Streams decoded images in batches, beside whatever consumes them; what can't be decoded is left out.

    Args:
        read: gives (position, encoded bytes) for the positions asked for, in any order.
        positions: int `(n,)`.
        image_size: see `decode`.
        resize: see `decode`.
        batch_size: of every batch but the last.
        digests: SHA-256 that each image's bytes must have, `(n,)` of 32 bytes, by position; other bytes are left out.
            None: any will do.

    Yields:
        Positions, int64 `(b,)`, and images, uint8 `(b, image_size, image_size, 3)`.

    Raises:
        Exception: what `read` raised, after the images that it gave before.
    """
    failed: list[Exception] = []
    decoder = _compile_decoder(image_size, resize, None)  # building it takes longer than decoding a hundred images

    def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        found: list[tuple[int, bytes]] = []
        try:
            for item in read(positions):
                if digests is not None and hashlib.sha256(item[1]).digest() != digests[item[0]].tobytes():
                    continue  # the file was replaced after it was hashed: its embedding must not get the old key
                found.append(item)
                if len(found) == _READ_CHUNK:
                    yield _as_arrays(found)
                    found = []
        except Exception as error:  # ignore_errors would take it for a broken image: it is raised again below
            failed.append(error)
        if found:
            yield _as_arrays(found)

    def decode_one(position: tf.Tensor, one: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return position, decoder(one)

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


def explain_broken(image_bytes: bytes, *, image_size: int, resize: str, max_pixels: int | None = None) -> str:
    """Says in a few words why an image can't be decoded; an empty text where it can."""
    try:
        decode(tf.constant(image_bytes), image_size=image_size, resize=resize, max_pixels=max_pixels)
    except tf.errors.OpError as error:
        # the op's own message stands before the line that names its node, behind where in our code that was built
        message = str(error.message).split("\n\t [[{{")[0].strip() or "unknown error"
        if _TOO_LARGE in message:
            count = int(re.findall(r"\d+", message.rpartition(_TOO_LARGE)[2])[0])
            size = "no size that can be read" if count == tf.int64.max else f"{count:,} pixels"
            return f"has {size}: more than the {max_pixels:,} that are allowed"
        reason = message.splitlines()[-1][:160]
        cut = "the file is cut off or damaged: " if "Invalid JPEG data" in reason else ""
        return f"can't be decoded: {cut}{reason}"
    return ""


def _refuse_above(max_pixels: int, image_bytes: tf.Tensor) -> tf.Tensor:
    """The same bytes, or an error before any of them is decoded."""
    count = count_pixels(image_bytes)
    check = tf.debugging.Assert(count <= max_pixels, [_TOO_LARGE, count])
    with tf.control_dependencies([check]):
        return tf.identity(image_bytes)


def _as_arrays(found: list[tuple[int, bytes]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([item[0] for item in found], np.int64), np.array([item[1] for item in found], object)


def _decode_pixels(image_bytes: tf.Tensor, *, image_size: int, resize: str) -> tf.Tensor:
    is_jpeg = tf.strings.substr(image_bytes, 0, 3) == b"\xff\xd8\xff"

    # never channels=0, with which an animated WebP corrupts the heap (TF 2.21)
    def decode_channels(channels: int) -> tf.Tensor:
        return tf.io.decode_image(image_bytes, channels=channels, expand_animations=False)[:, :, :3]

    def decode_by_tensorflow() -> tf.Tensor:
        # of WebP alone TensorFlow wants to be asked for as many channels as there are
        return tf.cond(is_webp_with_alpha(image_bytes), lambda: decode_channels(4), lambda: decode_channels(3))

    def decode_other() -> tf.Tensor:
        is_bmp = tf.strings.substr(image_bytes, 0, 2) == b"BM"
        return tf.cond(is_bmp, lambda: decode_bmp(image_bytes), decode_by_tensorflow)

    pixels = tf.cond(is_jpeg, lambda: _decode_jpeg(image_bytes, image_size, resize), decode_other)
    return tf.ensure_shape(pixels, (None, None, 3))


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
    head = tf.strings.substr(image_bytes, 0, EXIF_SEARCH_BYTES)
    without = tf.strings.regex_replace(head, "Exif\\x00|eXIf|EXIF", "", replace_global=False)

    def turn(pixels: tf.Tensor, image_bytes: tf.Tensor) -> tf.Tensor:
        return _orient(pixels, read_orientation(image_bytes))

    def keep(pixels: tf.Tensor, image_bytes: tf.Tensor) -> tf.Tensor:
        del image_bytes
        return tf.identity(pixels)

    has_exif = tf.strings.length(without) < tf.strings.length(head)
    return run_one(has_exif, turn, keep, (pixels, image_bytes), tf.TensorSpec((None, None, 3), tf.uint8))


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
    sides = tf.shape(pixels, out_type=tf.int64)[:2]
    if resize == "squash":
        scaled = tf.fill([2], tf.constant(image_size, tf.int64))
    elif resize == "pad":
        exact = tf.cast(sides, tf.float64) * image_size / tf.cast(tf.reduce_max(sides), tf.float64)
        scaled = tf.maximum(tf.cast(tf.round(exact), tf.int64), 1)
    else:
        scaled = sides * image_size // tf.reduce_min(sides)
    offset = tf.round(tf.cast(image_size - scaled, tf.float32) / 2)
    scale = tf.cast(scaled / sides, tf.float32)

    def filter_and_crop(pixels: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
        return tf.raw_ops.ScaleAndTranslate(
            images=pixels[tf.newaxis],
            size=(image_size, image_size),
            scale=scale,
            translation=offset,
            kernel_type="triangle",
            antialias=True,
        )[0]

    def filter_lying_down(pixels: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
        turned = filter_and_crop(tf.transpose(pixels, (1, 0, 2)), scale[::-1], offset[::-1])
        return tf.transpose(turned, (1, 0, 2))

    def shrink() -> tf.Tensor:
        # the op brings the height to size first, and keeps all of the width in float32: of a picture a million pixels
        # wide gigabytes
        is_wide = sides[1] > _WIDE * sides[0]
        result = tf.TensorSpec((image_size, image_size, 3), tf.float32)
        return run_one(is_wide, filter_lying_down, filter_and_crop, (pixels, scale, offset), result)

    # enlarged, there is nothing to filter: the same pixels from an op that takes a third of the time
    is_enlarged = tf.reduce_all(scaled >= sides) & (tf.reduce_max(scaled) <= _ENLARGED_AT_MOST * image_size)
    to_enlarge = tf.cast(tf.minimum(scaled, _ENLARGED_AT_MOST * image_size), tf.int32)
    resized = tf.cond(is_enlarged, lambda: _enlarge(pixels, to_enlarge, tf.cast(offset, tf.int32), image_size), shrink)
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
