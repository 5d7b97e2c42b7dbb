"""The classifier: image bytes → class probabilities; decoding, preprocessing, trunk, tail, head and labels in one."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import (  # the documented way has no public name (TF 2.21)
    convert_variables_to_constants_v2,
)

from tl_keras.backbones import preprocessing  # noqa: F401 (makes Keras know our layer when it loads a network)
from tl_keras.data.formats import explain_unreadable
from tl_keras.data.images import decode_batch, explain_broken
from tl_keras.errors import UserError
from tl_keras.folded import size_in_bytes  # and makes Keras know the layers there
from tl_keras.run import disk_errors, read_json, replace_folder, write_atomically

TOP_K = 5
EXAMPLE_FEATURE = "image_bytes"  # of the tf.train.Examples that the signature `classify` takes
GRAPH_LIMIT_BYTES = 2_000_000_000  # a protobuf holds at most 2 GiB
_FORMAT = 1
_PREDICT_BATCH = 32
_DECODING_FILE = "tl_keras.json"
_NETWORK_FILE, _DESCRIPTION_FILE, _SAMPLES_FILE = "network.keras", "classifier.json", "samples.npz"


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained network with all that turns an image's bytes into probabilities.

    Attributes:
        network: one flat graph: images, float32 RGB 0 to 255 `(b, size, size, 3)` → logits `(b, classes)`.
        name: of the data set and the backbone.
        labels: the classes, in the order of the logits.
        backbone: the preset's name.
        embedding_layer: the backbone's last layer, which gives the embedding.
        resize: how images are brought to size.
    """

    network: keras.Model
    name: str
    labels: tuple[str, ...]
    backbone: str
    embedding_layer: str
    resize: str

    @property
    def embedder(self) -> keras.Model:
        """The trained backbone alone: images → embeddings `(b, dim)`."""
        return keras.Model(self.network.input, self.network.get_layer(self.embedding_layer).output, name=self.backbone)

    @property
    def image_size(self) -> int:
        """Side of the network's input in pixels."""
        return int(self.network.input_shape[1])

    def divide_logits(self, temperature: float) -> Classifier:
        """The classifier with a temperature inside: its logits divided by it (Guo et al. 2017)."""
        dtype = self.network.layers[-1].dtype_policy  # a probe computes in float64
        layer = keras.layers.Rescaling(1 / temperature, name="temperature", dtype=dtype)
        network = keras.Model(self.network.input, layer(self.network.output), name=self.network.name)
        return dataclasses.replace(self, network=network)

    def save(self, folder: Path, *, samples: Sequence[bytes], expected: np.ndarray) -> None:
        """Writes `network.keras`, `classifier.json`, and `samples.npz` for whoever exports it later.

        Args:
            folder: where; made where it does not exist.
            samples: m encoded images.
            expected: their probabilities as evaluated, float32 `(m, classes)`.

        Raises:
            UserError: the disk is full, or the folder can't be written.
        """
        description = {
            "format": _FORMAT,
            "name": self.name,
            "backbone": self.backbone,
            "embedding_layer": self.embedding_layer,
            "resize": self.resize,
            "image_size": self.image_size,
            "labels": list(self.labels),
        }
        images = {f"image_{number}": np.frombuffer(sample, np.uint8) for number, sample in enumerate(samples)}
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **{"expected": expected, **images})
        unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        with disk_errors(str(folder)):
            try:
                unfinished.mkdir(parents=True, exist_ok=True)
                self.network.save(unfinished / _NETWORK_FILE)
                (unfinished / _SAMPLES_FILE).write_bytes(content.getvalue())
                text = json.dumps(description, indent=2, ensure_ascii=False)
                (unfinished / _DESCRIPTION_FILE).write_text(text, encoding="utf-8")
                replace_folder(unfinished, folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)


class Servable(tf.Module):  # type: ignore[misc]
    """A classifier as a graph: the signatures of the exported model.

    The network is frozen to constants: no variable is tracked, so that it loads through a TF1 session as in TF Serving,
    and TensorFlow's optimiser can fold and fuse it.
    """

    def __init__(self, classifier: Classifier, *, max_pixels: int | None = None) -> None:
        """Freezes the classifier's network.

        Args:
            classifier: what was trained.
            max_pixels: larger images are invalid; None: there is no limit.

        Raises:
            UserError: the network is too large for one graph.
        """
        super().__init__(name="classifier")
        size = size_in_bytes(classifier.network)
        if size > GRAPH_LIMIT_BYTES:
            raise UserError(
                f"the network has {size / 1e9:.1f} GB of weights; one graph holds 2 GB. Choose a smaller backbone."
            )
        self._image_size, self._resize, self._max_pixels = classifier.image_size, classifier.resize, max_pixels
        self._network = _freeze(classifier.network, classifier.embedding_layer)
        self._labels = classifier.labels
        self.endpoints = self._make_endpoints()  # "signatures" is a name that SavedModel keeps for itself

    def _make_endpoints(self) -> dict[str, Any]:
        image_bytes = tf.TensorSpec((None,), tf.string, name="image_bytes")
        side = self._image_size
        pixels = tf.TensorSpec((None, side, side, 3), tf.float32, name="images")
        examples = tf.TensorSpec((None,), tf.string, name="inputs")  # TF Serving's Classify API wants these names

        @tf.function(input_signature=(image_bytes,), autograph=False)
        def serve(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
            return self._classify(image_bytes)

        @tf.function(input_signature=(pixels,), autograph=False)
        def serve_pixels(images: tf.Tensor) -> dict[str, tf.Tensor]:
            # ReLU6 makes a number of any pixel: what is not finite would get a probability like an image
            is_valid = tf.reduce_all(tf.math.is_finite(images), axis=(1, 2, 3))
            return self._answer(self._run(images)[1], is_valid)

        @tf.function(input_signature=(image_bytes,), autograph=False)
        def serve_embeddings(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
            images, valid = self._decode(image_bytes)
            embeddings = self._run(tf.cast(images, tf.float32))[0]
            return {"embeddings": tf.where(valid[:, tf.newaxis], embeddings, 0.0)}

        @tf.function(input_signature=(examples,), autograph=False)
        def serve_examples(inputs: tf.Tensor) -> dict[str, tf.Tensor]:
            answer = self._classify(inputs, read=_read_example)
            return {"classes": answer["labels"], "scores": answer["scores"]}

        return {
            "serving_default": serve,
            "pixels": serve_pixels,
            "embeddings": serve_embeddings,
            "classify": serve_examples,
        }

    def _decode(self, image_bytes: tf.Tensor, read: Any = None) -> tuple[tf.Tensor, tf.Tensor]:
        decoded: tuple[tf.Tensor, tf.Tensor] = decode_batch(
            image_bytes, image_size=self._image_size, resize=self._resize, max_pixels=self._max_pixels, read=read
        )
        return decoded

    def _classify(self, image_bytes: tf.Tensor, read: Any = None) -> dict[str, tf.Tensor]:
        images, valid = self._decode(image_bytes, read)
        return self._answer(self._run(tf.cast(images, tf.float32))[1], valid)

    def _run(self, images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Embeddings and probabilities; an empty batch gets one row, which no convolution can do without."""
        count = tf.shape(images)[0]
        filler = tf.zeros((tf.maximum(1 - count, 0), *images.shape[1:]))
        embeddings, probabilities = self._network(tf.concat([images, filler], 0))
        return embeddings[:count], probabilities[:count]

    def _answer(self, probabilities: tf.Tensor, valid: tf.Tensor) -> dict[str, tf.Tensor]:
        """The outputs that DESIGN.md lists; zeros, empty labels and -1 where the image is not valid."""
        probabilities = tf.where(valid[:, tf.newaxis], probabilities, 0.0)
        scores, class_ids = tf.math.top_k(probabilities, min(TOP_K, len(self._labels)))
        labels = tf.gather(tf.constant(self._labels), class_ids)
        return {
            "probabilities": probabilities,
            "labels": tf.where(valid[:, tf.newaxis], labels, ""),
            "scores": scores,
            "class_ids": tf.where(valid[:, tf.newaxis], tf.cast(class_ids, tf.int64), tf.constant(-1, tf.int64)),
            "valid": valid,
        }


def _read_example(serialized: tf.Tensor) -> tf.Tensor:
    """The image in a serialized `tf.train.Example`; empty where it has none."""
    features = {EXAMPLE_FEATURE: tf.io.FixedLenFeature((), tf.string, default_value="")}
    return tf.io.parse_single_example(serialized, features)[EXAMPLE_FEATURE]


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

    def predict(self, images: Sequence[str | Path | bytes] | str | Path | bytes) -> list[dict[str, Any]]:
        """Classifies images.

        Args:
            images: paths or encoded bytes, one or several.

        Returns:
            For each image `predicted`, `probability`, `labels` and `scores` (the best five), `probabilities` (all
            classes, float32) and `error`, empty where the image is good.
        """
        items = [images] if isinstance(images, (str, bytes, Path)) else list(images)
        unread: dict[int, str] = {}

        def contents() -> Iterator[bytes]:
            for number, item in enumerate(items):
                try:
                    yield item if isinstance(item, bytes) else Path(item).read_bytes()
                except OSError as error:
                    unread[number] = f"can't be read: {error.strerror}"
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


def load_trained(path: str) -> Classifier:
    """Loads the classifier of a run folder, with its Keras network.

    Raises:
        UserError: there is none at `path`, or it is damaged.
    """
    root, folder = Path(path), find_folder(path)
    if not os.path.exists(root):
        raise UserError(f"{path} does not exist. Give a run folder (runs/NAME) or an exported version folder.")
    if is_exported(root):
        raise UserError(f"{path} is an exported model; here a run folder (runs/NAME) is needed.")
    if not os.path.isfile(folder / _DESCRIPTION_FILE) or not os.path.isfile(folder / _NETWORK_FILE):
        raise UserError(
            f"{path} holds no classifier. Give a run folder whose run has ended, or saved_models/NAME/VERSION."
        )
    description = read_json(folder / _DESCRIPTION_FILE)
    try:
        network = keras.models.load_model(folder / _NETWORK_FILE, compile=False)
        labels = tuple(description["labels"])
        classifier = Classifier(
            network,
            description["name"],
            labels,
            description["backbone"],
            description["embedding_layer"],
            description["resize"],
        )
        _check_fit(classifier)
        return classifier
    except Exception as error:  # Keras raises the exceptions of zipfile, h5py and json
        first = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"the classifier in {path} is damaged: {type(error).__name__}: {first}. Train it again."
        ) from error


def load_samples(path: str) -> tuple[list[bytes], np.ndarray]:
    """Real images of a run with the probabilities that were evaluated.

    Args:
        path: the run folder.

    Returns:
        m encoded images, and float32 `(m, classes)`.

    Raises:
        UserError: the run has none.
    """
    file = find_folder(path) / _SAMPLES_FILE
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images = [arrays[f"image_{number}"].tobytes() for number in range(len(arrays["expected"]))]
            return images, arrays["expected"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is missing or damaged: {error}. Train the classifier again.") from error


def find_folder(path: str) -> Path:
    """The folder `classifier` of a run folder; it may be given itself."""
    root = Path(path)
    return root if os.path.isfile(root / _DESCRIPTION_FILE) else root / "classifier"


def is_exported(path: Path) -> bool:
    """Whether a folder is an exported version folder."""
    return os.path.isfile(path / "saved_model.pb")


def read_labels(path: Path) -> list[str]:
    """The labels of an exported version folder.

    Raises:
        UserError: it has none.
    """
    try:
        return (path / "assets" / "labels.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise UserError(f"{path} has no assets/labels.txt: it was not exported by tl_keras.") from error


def read_decoding(path: Path) -> dict[str, Any]:
    """How an exported model brings images to size, and its limit of pixels; as `write_decoding` wrote it.

    A model that an earlier version exported does not say; its images are taken to be cropped, without a limit.
    """
    file = path / "assets.extra" / _DECODING_FILE
    known = read_json(file) if file.is_file() else {}
    return {"resize": known.get("resize", "crop"), "max_pixels": known.get("max_pixels")}


def read_run_id(path: Path) -> str:
    """The run that exported a version folder, see `RunFolder.run_id`; empty if it does not say."""
    file = path / "assets.extra" / _DECODING_FILE
    return str(read_json(file).get("run_id", "")) if file.is_file() else ""


def write_decoding(path: Path, classifier: Classifier, *, max_pixels: int | None, run_id: str = "") -> None:
    """Keeps beside an exported model what its graph does not tell: see `read_decoding` and `read_run_id`."""
    content = {"resize": classifier.resize, "image_size": classifier.image_size, "max_pixels": max_pixels}
    content |= {"run_id": run_id} if run_id else {}
    write_atomically(path / "assets.extra" / _DECODING_FILE, json.dumps(content).encode())


def _check_fit(classifier: Classifier) -> None:
    """Checks that the description is this network's.

    Raises:
        ValueError: it is another's.
    """
    network = classifier.network
    network.get_layer(classifier.embedding_layer)
    if network.output_shape[1] != len(classifier.labels):
        raise ValueError(f"{len(classifier.labels)} labels for {network.output_shape[1]} outputs")


def _load_exported(path: Path) -> LoadedClassifier:
    labels = read_labels(path)
    try:
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


def _freeze(network: keras.Model, embedding_layer: str) -> Any:
    """Images → embeddings and probabilities, as one function without variables."""
    both = keras.Model(network.input, [network.get_layer(embedding_layer).output, network.output])

    @tf.function(input_signature=(tf.TensorSpec((None, *network.input_shape[1:]), tf.float32),), autograph=False)
    def run(images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        embeddings, logits = both(images, training=False)
        return embeddings, tf.cast(tf.nn.softmax(logits), tf.float32)  # a probe's logits are float64

    return convert_variables_to_constants_v2(run.get_concrete_function())
