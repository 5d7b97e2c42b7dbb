"""The classifier as a TensorFlow graph with decoding, preprocessing, network and labels, and its signatures."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tl_keras.classifier.classifier import Classifier
from tl_keras.data.images import decode_batch

TOP_K = 5
NETWORK_FUNCTION = "tl_keras_network"  # part of its name in the graph, by which the local server finds it
EXAMPLE_FEATURE = "image_bytes"  # feature of tf.train.Example in the signature `classify`
_LARGEST_CONSTANT_BYTES = 1 << 16  # vectors and small kernels: a few MB in all, even in networks of hundreds of layers


class Servable:
    """A classifier as a graph, with the signatures of the exported model.

    Large weights are variables that all signatures share. As constants they would be copied for each signature that a
    session runs: a served ResNet50 would need four times as much memory, and a graph can't be larger than 2 GB. Small
    weights are constants, which TensorFlow loads faster than variables and folds into other operations.

    The variables are the weights' own `tf.Variable`s. The Keras model itself must not be tracked: its variables would
    be saved as copies, and a TensorFlow 1 session, as in TF Serving, would not find them.

    Attributes:
        endpoints: name of the signature → `tf.function`.
        module: what is saved with the signatures: the variables only, as TensorFlow would trace functions again.
    """

    def __init__(self, classifier: Classifier, *, max_pixels: int | None = None) -> None:
        """Makes the signatures; they are traced when they are first called or saved.

        The large weights are read from the network itself: it must not be trained afterwards.

        Args:
            classifier: the trained classifier.
            max_pixels: pixel limit; larger images are invalid. None for no limit.
        """
        self._image_size, self._resize, self._max_pixels = classifier.image_size, classifier.resize, max_pixels
        self._decode_images = tf.function(
            self._decode, input_signature=(tf.TensorSpec((None,), tf.string),), autograph=False
        )
        self._network, variables = _make_function(classifier.network, classifier.embedding_layer)
        self.module = tf.Module(name="classifier")
        self.module.shared_variables = variables
        self._labels = classifier.labels
        self.endpoints = self._make_endpoints()

    def _make_endpoints(self) -> dict[str, Any]:
        image_bytes = tf.TensorSpec((None,), tf.string, name="image_bytes")
        side = self._image_size
        pixels = tf.TensorSpec((None, side, side, 3), tf.float32, name="images")
        examples = tf.TensorSpec((None,), tf.string, name="inputs")  # name required by the Classify API

        @tf.function(input_signature=(image_bytes,), autograph=False)
        def serve(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
            return self._classify(*self._decode_images(image_bytes))

        @tf.function(input_signature=(pixels,), autograph=False)
        def serve_pixels(images: tf.Tensor) -> dict[str, tf.Tensor]:
            # ReLU6 clips infinite values, so that invalid pixels would get probabilities like an image
            is_valid = tf.reduce_all(tf.math.is_finite(images), axis=(1, 2, 3))
            return self._answer(self._run(images)[1], is_valid)

        @tf.function(input_signature=(image_bytes,), autograph=False)
        def serve_embeddings(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
            images, valid = self._decode_images(image_bytes)
            embeddings = self._run(tf.cast(images, tf.float32))[0]
            return {"embeddings": tf.where(valid[:, tf.newaxis], embeddings, 0.0)}

        @tf.function(input_signature=(examples,), autograph=False)
        def serve_examples(inputs: tf.Tensor) -> dict[str, tf.Tensor]:
            answer = self._classify(*self._decode(inputs, read=_read_example))
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

    def _classify(self, images: tf.Tensor, valid: tf.Tensor) -> dict[str, tf.Tensor]:
        return self._answer(self._run(tf.cast(images, tf.float32))[1], valid)

    def _run(self, images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Computes embeddings and probabilities; an empty batch is padded, because convolutions need one row."""
        count = tf.shape(images)[0]
        filler = tf.zeros((tf.maximum(1 - count, 0), *images.shape[1:]))
        embeddings, probabilities = self._network(tf.concat([images, filler], 0))
        return embeddings[:count], probabilities[:count]

    def _answer(self, probabilities: tf.Tensor, valid: tf.Tensor) -> dict[str, tf.Tensor]:
        """Makes the outputs of a signature: zeros, empty labels and -1 for invalid images."""
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


def _make_function(network: keras.Model, embedding_layer: str) -> tuple[Any, list[tf.Variable]]:
    """Images → embeddings and probabilities, as one function, and the variables that it reads."""
    both = keras.Model(network.input, [network.get_layer(embedding_layer).output, network.output])
    trainable, other = [
        [_as_value(one) for one in group] for group in (both.trainable_variables, both.non_trainable_variables)
    ]

    def compute(images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        weights = [[tf.convert_to_tensor(one) for one in group] for group in (trainable, other)]
        (embeddings, logits), _ = both.stateless_call(*weights, images, training=False)
        return embeddings, tf.cast(tf.nn.softmax(logits), tf.float32)  # a probe's logits are float64

    compute.__name__ = NETWORK_FUNCTION
    signature = (tf.TensorSpec((None, *network.input_shape[1:]), tf.float32),)
    run = tf.function(compute, input_signature=signature, autograph=False)
    return run, [one for one in trainable + other if isinstance(one, tf.Variable)]


def _as_value(weight: keras.Variable) -> tf.Variable | np.ndarray:
    """The variable itself if it is large, otherwise a copy of its value."""
    variable: tf.Variable = weight.value
    is_large = variable.dtype.size * variable.shape.num_elements() > _LARGEST_CONSTANT_BYTES
    return variable if is_large else variable.numpy()
