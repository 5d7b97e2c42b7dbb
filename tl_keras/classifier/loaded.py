"""Classifiers ready for prediction, loaded from a run folder or from an exported model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import PIL.Image
import PIL.ImageOps
import tensorflow as tf

from tl_keras.classifier.classifier import Classifier
from tl_keras.classifier.files import is_exported, load_trained, read_decoding, read_labels
from tl_keras.classifier.graph import Servable
from tl_keras.data.formats import explain_unreadable
from tl_keras.data.images import explain_broken
from tl_keras.errors import UserError
from tl_keras.run import Interrupts

_PREDICT_BATCH = 32
_IMAGE_AXES, _CHANNELS = 3, 3  # of an array
_PILLOW_MODES = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"))

OneImage = str | os.PathLike[str] | bytes | bytearray | np.ndarray | PIL.Image.Image


class LoadedClassifier:
    """A classifier to be used: from a run folder or an exported model, the same graph either way."""

    def __init__(
        self,
        serve: Any,
        pixels: Any,
        labels: Sequence[str],
        decoding: dict[str, Any],
        trained: Classifier | None = None,
    ) -> None:
        """Takes what runs it.

        Args:
            serve: the signature `serving_default`.
            pixels: the signature `pixels`.
            labels: the classes.
            decoding: the keywords of `images.decode` that it uses.
            trained: the classifier with its Keras network; an exported model has none.
        """
        self._serve, self._pixels, self.labels, self.decoding = serve, pixels, tuple(labels), decoding
        self.trained = trained

    def predict_pixels(self, images: np.ndarray) -> np.ndarray:
        """Probabilities, float32 `(b, classes)`, of images at the network's size, float32 RGB 0 to 255."""
        return np.asarray(self._pixels(images=tf.constant(images))["probabilities"])

    def predict(self, images: OneImage | Iterable[OneImage]) -> list[dict[str, Any]]:
        """Classifies images.

        Args:
            images: one image or several: paths, encoded bytes, RGB arrays (uint8 `(height, width, 3)`), or Pillow
                images, which are turned as their EXIF orientation says.

        Returns:
            For each image `predicted`, `probability`, `labels` and `scores` (the best five), `probabilities` (all
            classes, float32) and `error`, empty where the image is good.

        Raises:
            UserError: something is none of these.
        """
        items = cast("Iterable[OneImage]", [images] if _is_single(images) else images)
        unread: dict[int, str] = {}

        def contents() -> Iterator[bytes]:
            for number, image in enumerate(items):
                try:
                    yield _read_image(image)
                except OSError as error:
                    unread[number] = f"can't be read: {error.strerror or error}"
                    yield b""

        predictions = [prediction for batch in self.predict_batches(contents()) for prediction in batch]
        for number, reason in unread.items():
            predictions[number]["error"] = reason
        return predictions

    def predict_batches(self, contents: Iterable[bytes]) -> Iterator[list[dict[str, Any]]]:
        """Classifies a stream of encoded images, a batch at a time; memory does not grow with their number."""
        batch: list[bytes] = []
        for content in contents:
            batch.append(content)
            if len(batch) == _PREDICT_BATCH:
                yield self._predict_batch(batch)
                batch = []
        if batch:
            yield self._predict_batch(batch)

    def _predict_batch(self, batch: list[bytes]) -> list[dict[str, Any]]:
        answer = self._serve(image_bytes=tf.constant(batch, tf.string))
        rows = {name: values.numpy() for name, values in answer.items()}
        return [
            self._as_prediction({name: values[row] for name, values in rows.items()}, content)
            for row, content in enumerate(batch)
        ]

    def _as_prediction(self, row: Mapping[str, Any], content: bytes) -> dict[str, Any]:
        labels = [label.decode("utf-8") for label in row["labels"]]
        error = ""
        if not row["valid"]:
            error = explain_unreadable(content) or explain_broken(content, **self.decoding) or "can't be decoded"
        return {
            "predicted": labels[0],
            "probability": float(row["scores"][0]),
            "labels": labels,
            "scores": [float(score) for score in row["scores"]],
            "probabilities": row["probabilities"],
            "error": error,
        }


def _is_single(images: Any) -> bool:
    """Whether something is one image, or something that is none; arrays of numbers are one up to three axes."""
    if isinstance(images, np.ndarray):
        return images.dtype.kind not in "OUS" and images.ndim <= _IMAGE_AXES
    return not isinstance(images, Iterable) or isinstance(images, (str, bytes, bytearray, os.PathLike, Mapping))


def _read_image(image: OneImage) -> bytes:
    """The encoded bytes of an image that is given in one of several forms.

    Raises:
        OSError: it is a file that can't be read.
        UserError: it is not an image.
    """
    if isinstance(image, (bytes, bytearray)):
        return bytes(image)
    if isinstance(image, (str, os.PathLike)):
        return Path(image).read_bytes()
    if isinstance(image, PIL.Image.Image):
        if image.mode not in _PILLOW_MODES:
            raise UserError(
                f"can't classify a Pillow image of mode {image.mode}, which has more than 8 bits per channel. Give its "
                "file, or convert it to RGB."
            )
        image = np.asarray(PIL.ImageOps.exif_transpose(image).convert("RGB"))
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != _IMAGE_AXES or pixels.shape[-1] != _CHANNELS or not pixels.size:
        raise UserError(
            f"can't classify a {type(image).__name__} of {pixels.dtype} {pixels.shape}. Allowed: a path, encoded "
            "bytes, a Pillow image, or an RGB array of uint8 (height, width, 3)."
        )
    return bytes(tf.io.encode_png(pixels).numpy())  # lossless


def load(path: str) -> LoadedClassifier:
    """Loads a classifier to be used.

    Args:
        path: a run folder, or an exported version folder.

    Returns:
        The classifier.

    Raises:
        UserError: there is none at `path`, or it is damaged.
    """
    if is_exported(Path(path)):
        return _load_exported(Path(path))
    classifier = load_trained(path)
    servable = Servable(classifier)
    return LoadedClassifier(
        servable.endpoints["serving_default"],
        servable.endpoints["pixels"],
        classifier.labels,
        {"image_size": classifier.image_size, "resize": classifier.resize},
        classifier,
    )


def _load_exported(path: Path) -> LoadedClassifier:
    labels = read_labels(path)
    try:
        with Interrupts.restored():
            model = tf.saved_model.load(str(path))
        serve = model.signatures["serving_default"]
        size = int(model.signatures["pixels"].structured_input_signature[1]["images"].shape[1])
    except Exception as error:  # TensorFlow raises several, none of its own for a damaged model
        first = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"the exported model {path} is damaged: {type(error).__name__}: {first}. Export it again."
        ) from error
    pixels = _Kept(model, model.signatures["pixels"])
    return LoadedClassifier(_Kept(model, serve), pixels, labels, {"image_size": size, **read_decoding(path)})


class _Kept:
    """A signature that keeps its model alive."""

    def __init__(self, model: Any, serve: Any) -> None:
        self._model, self._serve = model, serve

    def __call__(self, **inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        answer: dict[str, tf.Tensor] = self._serve(**inputs)
        return answer
