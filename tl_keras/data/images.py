"""Decodes images to upright RGB at the network's size, with standard TensorFlow ops.

Training, evaluation, prediction and the exported graph use the same decoder, so that metrics hold for the served model.

Conventions: the first frame of a GIF is used; transparency is dropped, and the color below it is kept; color profiles
are ignored; 16-bit images keep their high byte; EXIF orientation is applied to JPEG, PNG and WebP.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

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
    traced_once,
)
from tl_keras.run import map_ahead

DECODER_VERSION = 4  # part of the address of every embedding: increment it if any pixel changes
_JPEG_RATIOS = (1, 2, 4, 8)  # scales of libjpeg (libjpeg.txt, "DCT scaling")
_TOO_LARGE = "image with too many pixels:"
_DECODERS, _DECODERS_PER_CORE = 16, 2  # images decoded in parallel; those that read or wait leave the core to others
_CALLERS_THREAD = -1  # tf.ConfigProto: no threads of the session's own
_WIDE = 4  # width / height
_ENLARGED_AT_MOST = 4  # times the target size: beyond that most of the enlarged image would be cropped away
_SCALAR_STRING, _PIXELS = tf.TensorSpec((), tf.string), tf.TensorSpec((None, None, 3), tf.uint8)
Decoder = Callable[[tf.Tensor], tf.Tensor]


def decode(image_bytes: tf.Tensor, *, image_size: int, resize: str, max_pixels: int | None = None) -> tf.Tensor:
    """Decodes one image, applies its EXIF orientation, and resizes it to the network's size.

    Resizing is bilinear and antialiased (a triangle filter as wide as the scale) and rounded to integers, as in Pillow
    and torchvision. JPEGs are decoded at the smallest scale of libjpeg that covers the target.

    Args:
        image_bytes: scalar string: JPEG, PNG, GIF, BMP or still WebP, detected by content.
        image_size: height and width of the result, in pixels.
        resize: `crop` (shorter side, then center crop), `squash` (both sides) or `pad` (longer side, black borders).
        max_pixels: pixel limit; larger images are rejected before they are decoded. None for no limit.

    Returns:
        RGB, uint8, `(image_size, image_size, 3)`.

    Raises:
        tf.errors.InvalidArgumentError: the bytes are not an image, or the image is broken or too large.
    """
    return _make_decoder(image_size, resize, max_pixels)(image_bytes)


def _make_decoder(image_size: int, resize: str, max_pixels: int | None) -> Decoder:
    decode_up_to, limit = _compile_decoder(image_size, resize), _limit(max_pixels)
    return lambda image_bytes: decode_up_to(image_bytes, tf.constant(limit, tf.int64))


def _limit(max_pixels: int | None) -> int:
    return int(tf.int64.max if max_pixels is None else max_pixels)


@functools.cache
def _compile_decoder(image_size: int, resize: str) -> Any:
    """Compiles the decoder to a graph, because eager nested branches deadlock: each one blocks a TensorFlow thread.

    With two cores there are two such threads, but a photograph with EXIF needs three (TF 2.21).

    Returns:
        A concrete function: bytes of an image, scalar string, and the limit of pixels, int64 → uint8 `(image_size,
        image_size, 3)`. It is cached, because tracing it takes longer than decoding a hundred images; a `tf.function`
        would be traced once for eager calls, once for graphs, and once more while a model is saved.
    """

    @traced_once(_SCALAR_STRING, tf.TensorSpec((), tf.int64))
    def decode_up_to(image_bytes: tf.Tensor, max_pixels: tf.Tensor) -> tf.Tensor:
        image_bytes = _refuse_above(max_pixels, cut_gif(image_bytes))
        pixels = _decode_pixels(image_bytes, image_size=image_size, resize=resize)
        return _resize(_stand_upright(pixels, image_bytes), image_size=image_size, resize=resize)

    with tf.init_scope():
        return decode_up_to.get_concrete_function()


@tf.autograph.experimental.do_not_convert
def decode_batch(
    image_bytes: tf.Tensor,
    *,
    image_size: int,
    resize: str,
    max_pixels: int | None = None,
    read: Callable[[tf.Tensor], tf.Tensor] | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes a batch inside a graph; broken images do not affect others.

    A `tf.data` pipeline inside the graph skips broken images, and the others are scattered back by index. A single
    image is decoded without threads, because starting them takes longer than decoding.

    Args:
        image_bytes: string `(n,)`; n may be 0.
        image_size: see `decode`.
        resize: see `decode`.
        max_pixels: see `decode`.
        read: scalar string → bytes of an image, if `image_bytes` has another format, which may be broken too.

    Returns:
        Images, uint8 `(n, image_size, image_size, 3)`, black if broken; and whether they are valid, bool `(n,)`.
    """
    count = tf.shape(image_bytes, out_type=tf.int64)[0]
    shape = (image_size, image_size, 3)
    decoder = _make_decoder(image_size, resize, max_pixels)  # a single function in the graph

    def decode_one(index: tf.Tensor, one: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return index, decoder(one if read is None else read(one))

    def decode_all(decoders: int | None) -> tuple[tf.Tensor, tf.Tensor]:
        images = tf.data.Dataset.from_tensor_slices((tf.range(count), image_bytes))
        images = images.map(decode_one, num_parallel_calls=decoders).ignore_errors(log_warning=False)
        # one black image at the end, removed below: get_single_element needs a batch even if all images are broken
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
    """Streams decoded images in batches, in background threads; broken images are left out.

    Args:
        read: positions → pairs of position and encoded bytes, in any order.
        positions: int `(n,)`.
        image_size: see `decode`.
        resize: see `decode`.
        batch_size: size of every batch except the last.
        digests: expected SHA-256 of each image's bytes, `(n,)` of 32 bytes, by position; changed files are left out.
            None to skip this check.

    Yields:
        Positions, int64 `(b,)`, and images, uint8 `(b, image_size, image_size, 3)`.

    Raises:
        Exception: the exception of `read`, after all images that it returned before.
    """
    failed: list[Exception] = []

    def list_images() -> Iterator[tuple[int, tuple[int, bytes]]]:
        try:
            for position, content in read(positions):
                yield position, (position, content)
        except Exception as error:  # raised again below, after the images before it
            failed.append(error)

    decode_one = functools.partial(_decode_unchanged, open_decoder(image_size=image_size, resize=resize), digests)
    threads = min(_DECODERS_PER_CORE * (os.cpu_count() or 1), _DECODERS)
    decoded = map_ahead(decode_one, list_images(), threads=threads, ahead=2 * batch_size + threads)
    whole = ((position, pixels) for position, pixels in decoded if pixels is not None)
    while batch := list(itertools.islice(whole, batch_size)):
        yield np.array([position for position, _ in batch], np.int64), np.stack([pixels for _, pixels in batch])
    if failed:
        raise failed[0]


def _decode_unchanged(
    decoder: Callable[[bytes], np.ndarray], digests: np.ndarray | None, image: tuple[int, bytes]
) -> np.ndarray | None:
    """Decodes an image; None if it is broken, or changed after it was hashed, as its embedding would get the old key.

    Args:
        decoder: from `open_decoder`.
        digests: see `make_images`.
        image: position and bytes.
    """
    position, content = image
    if digests is not None and hashlib.sha256(content).digest() != digests[position].tobytes():
        return None
    try:
        return decoder(content)
    except tf.errors.OpError:
        return None


def open_decoder(*, image_size: int, resize: str, max_pixels: int | None = None) -> Callable[[bytes], np.ndarray]:
    """Opens a decoder that several threads can call, each of which does its own work.

    Args:
        image_size: see `decode`.
        resize: see `decode`.
        max_pixels: see `decode`.

    Returns:
        A function from encoded bytes to uint8 `(image_size, image_size, 3)`, which raises `tf.errors.OpError` for
        invalid images.
    """
    run, limit = _open_session(image_size, resize), np.int64(_limit(max_pixels))
    return lambda content: run(content, limit)


@functools.cache
def _open_session(image_size: int, resize: str) -> Callable[[bytes, np.int64], np.ndarray]:
    """Opens a session for the decoder: its graph is prepared once per process.

    Every `tf.data` pipeline prepares its functions again (half a second to a second), and a `tf.function` hands each
    call to other threads (2 cores, TF 2.21: 3.2 ms of CPU time per image, a session 2.5 ms).
    """
    traced = _compile_decoder(image_size, resize)
    graph = tf.Graph()
    with graph.as_default():
        tf.graph_util.import_graph_def(traced.graph.as_graph_def(), name="decoder")
        *inputs, output = (graph.get_tensor_by_name(f"decoder/{one.name}") for one in (*traced.inputs, *traced.outputs))
        config = tf.compat.v1.ConfigProto(inter_op_parallelism_threads=_CALLERS_THREAD, device_count={"GPU": 0})
        config.graph_options.rewrite_options.disable_meta_optimizer = True  # it takes longer than a thousand images
        run: Callable[..., np.ndarray] = tf.compat.v1.Session(config=config).make_callable(output, feed_list=inputs)
    return run


def without_autotune() -> tf.data.Options:
    """Makes options for short pipelines: with autotuning, their end waits for a thread that sleeps for seconds.

    The sleep doubles up to a minute (`Model::OptimizeLoop`, TF 2.21).
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return options


def explain_broken(image_bytes: bytes, *, image_size: int, resize: str, max_pixels: int | None = None) -> str:
    """Explains in a few words why an image can't be decoded; empty if it can."""
    try:
        open_decoder(image_size=image_size, resize=resize, max_pixels=max_pixels)(image_bytes)
    except tf.errors.OpError as error:
        # the message of the op is before the line with its node name
        message = str(error.message).split("\n\t [[{{")[0].strip() or "unknown error"
        if _TOO_LARGE in message:
            count = int(re.findall(r"\d+", message.rpartition(_TOO_LARGE)[2])[0])
            if count == tf.int64.max:
                return f"has no readable size, so the limit of {max_pixels:,} pixels can't be checked"
            return f"has {count:,} pixels; at most {max_pixels:,} are allowed"
        reason = message.splitlines()[-1][:160]
        cut = "the file is truncated or damaged: " if "Invalid JPEG data" in reason else ""
        return f"can't be decoded: {cut}{reason}"
    return ""


@traced_once(_SCALAR_STRING)
def _count_nothing(image_bytes: tf.Tensor) -> tf.Tensor:
    del image_bytes
    return tf.constant(0, tf.int64)


def _refuse_above(max_pixels: tf.Tensor, image_bytes: tf.Tensor) -> tf.Tensor:
    """Returns the bytes unchanged; fails before decoding if the image is too large."""
    is_limited = max_pixels < tf.int64.max
    count = run_one(is_limited, count_pixels, _count_nothing, (image_bytes,), tf.TensorSpec((), tf.int64))
    check = tf.debugging.Assert(count <= max_pixels, [_TOO_LARGE, count])
    with tf.control_dependencies([check]):
        return tf.identity(image_bytes)


def _decode_pixels(image_bytes: tf.Tensor, *, image_size: int, resize: str) -> tf.Tensor:
    def decode_jpeg(image_bytes: tf.Tensor) -> tf.Tensor:
        return _decode_jpeg(image_bytes, image_size, resize)

    is_jpeg = tf.strings.substr(image_bytes, 0, 3) == b"\xff\xd8\xff"
    return run_one(is_jpeg, decode_jpeg, _decode_no_jpeg, (image_bytes,), _PIXELS)


@traced_once(_SCALAR_STRING)
def _decode_no_jpeg(image_bytes: tf.Tensor) -> tf.Tensor:
    # never channels=0, with which an animated WebP corrupts the heap (TF 2.21)
    def decode_channels(channels: int) -> tf.Tensor:
        return tf.io.decode_image(image_bytes, channels=channels, expand_animations=False)[:, :, :3]

    def decode_by_tensorflow() -> tf.Tensor:
        # only for WebP, TensorFlow needs the exact number of channels
        return tf.cond(is_webp_with_alpha(image_bytes), lambda: decode_channels(4), lambda: decode_channels(3))

    is_bmp = tf.strings.substr(image_bytes, 0, 2) == b"BM"
    return tf.cond(is_bmp, lambda: decode_bmp(image_bytes), decode_by_tensorflow)


def _decode_jpeg(image_bytes: tf.Tensor, image_size: int, resize: str) -> tf.Tensor:
    sides = tf.io.extract_jpeg_shape(image_bytes)[:2]
    side = tf.reduce_max(sides) if resize == "pad" else tf.reduce_min(sides)
    covers = [(side + ratio - 1) // ratio >= image_size for ratio in _JPEG_RATIOS[1:]]
    choice = tf.add_n([tf.cast(cover, tf.int32) for cover in covers])

    def at(ratio: int) -> Callable[[], tf.Tensor]:
        return lambda: tf.io.decode_jpeg(image_bytes, channels=3, ratio=ratio, dct_method="INTEGER_ACCURATE")

    return tf.switch_case(choice, [at(ratio) for ratio in _JPEG_RATIOS])


def _stand_upright(pixels: tf.Tensor, image_bytes: tf.Tensor) -> tf.Tensor:
    """Applies the EXIF orientation; a fast search avoids reading the blocks of images without EXIF."""
    head = tf.strings.substr(image_bytes, 0, EXIF_SEARCH_BYTES)
    without = tf.strings.regex_replace(head, "Exif\\x00|eXIf|EXIF", "", replace_global=False)
    has_exif = tf.strings.length(without) < tf.strings.length(head)
    return run_one(has_exif, _turn, _keep_pixels, (pixels, image_bytes), _PIXELS)


@traced_once(_PIXELS, _SCALAR_STRING)
def _turn(pixels: tf.Tensor, image_bytes: tf.Tensor) -> tf.Tensor:
    return _orient(pixels, read_orientation(image_bytes))


@traced_once(_PIXELS, _SCALAR_STRING)
def _keep_pixels(pixels: tf.Tensor, image_bytes: tf.Tensor) -> tf.Tensor:
    del image_bytes
    return tf.identity(pixels)


def _orient(pixels: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Applies one of the eight EXIF orientations, like Pillow's `ImageOps.exif_transpose`."""

    def undo() -> tf.Tensor:
        turned = tf.cond(orientation >= 5, lambda: tf.transpose(pixels, (1, 0, 2)), lambda: pixels)
        mirrored = tf.reduce_any(orientation == [2, 3, 6, 7])
        flipped = tf.reduce_any(orientation == [3, 4, 7, 8])
        turned = tf.cond(mirrored, lambda: tf.reverse(turned, [1]), lambda: turned)
        return tf.cond(flipped, lambda: tf.reverse(turned, [0]), lambda: turned)

    return tf.cond(orientation > 1, undo, lambda: pixels)


def _resize(pixels: tf.Tensor, *, image_size: int, resize: str) -> tf.Tensor:
    """Resizes and crops (or pads) in one op, so that only the result is computed, even for 1 x 10,000 pixels.

    Size and center are rounded exactly like in torchvision's `Resize` and `CenterCrop`.
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
        # the op resizes the height first and keeps the full width in float32, which would be gigabytes for an image
        # that is a million pixels wide
        is_wide = sides[1] > _WIDE * sides[0]
        result = tf.TensorSpec((image_size, image_size, 3), tf.float32)
        return run_one(is_wide, filter_lying_down, filter_and_crop, (pixels, scale, offset), result)

    # enlarging needs no filter: a faster op gives the same pixels in a third of the time
    is_enlarged = tf.reduce_all(scaled >= sides) & (tf.reduce_max(scaled) <= _ENLARGED_AT_MOST * image_size)
    to_enlarge = tf.cast(tf.minimum(scaled, _ENLARGED_AT_MOST * image_size), tf.int32)
    resized = tf.cond(is_enlarged, lambda: _enlarge(pixels, to_enlarge, tf.cast(offset, tf.int32), image_size), shrink)
    # a triangle filter stays within 0 to 255, so adding 0.5 and truncating rounds correctly
    return tf.ensure_shape(tf.cast(resized + 0.5, tf.uint8), (image_size, image_size, 3))


def _enlarge(pixels: tf.Tensor, scaled: tf.Tensor, offset: tf.Tensor, image_size: int) -> tf.Tensor:
    """Enlarges to `scaled`, then crops (negative offsets) or pads to the network's size; float32."""
    enlarged = tf.image.resize(pixels, scaled)
    first, before = tf.maximum(-offset, 0), tf.maximum(offset, 0)
    kept = tf.minimum(scaled, image_size)
    cropped = tf.slice(enlarged, [first[0], first[1], 0], [kept[0], kept[1], 3])
    after = image_size - before - kept
    return tf.pad(cropped, [[before[0], after[0]], [before[1], after[1]], [0, 0]])
