"""`assets.extra/tf_serving_warmup_requests`: requests that TF Serving runs before a model is available to clients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2
from tensorflow_serving.apis import (
    classification_pb2,
    model_pb2,
    predict_pb2,
    prediction_log_pb2,
)

from tl_keras.classifier import EXAMPLE_FEATURE

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
_FILE = "assets.extra/tf_serving_warmup_requests"
_PHOTOGRAPH = (375, 500)  # height and width in pixels, the median of ImageNet


def write_warmup(folder: Path, name: str, *, image_size: int, batch_sizes: Sequence[int] = BATCH_SIZES) -> None:
    """Writes a request for each signature and batch size, because TensorFlow is slow on the first request of a size.

    The tensors store a single value for all elements, so that the file is small.

    Args:
        folder: the version folder.
        name: name of the model.
        image_size: height and width of the network's input, in pixels.
        batch_sizes: batch sizes of the batching configuration.

    Raises:
        OSError: the disk is full, or the folder can't be written.
    """
    path = folder / _FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    photograph = make_photograph()
    try:
        with tf.io.TFRecordWriter(str(path)) as writer:
            for size in batch_sizes:
                for request in _make_requests(name, photograph, image_size, size):
                    writer.write(request.SerializeToString())
    except tf.errors.OpError as error:
        raise OSError(None, error.message) from error


def read_warmup(folder: Path) -> list[prediction_log_pb2.PredictionLog]:
    """Reads the requests of a version folder, in order; empty without such a file."""
    path = folder / _FILE
    if not path.is_file():
        return []
    records = tf.data.TFRecordDataset(str(path)).as_numpy_iterator()
    return [prediction_log_pb2.PredictionLog.FromString(record) for record in records]


def make_photograph(seed: int = 0) -> bytes:
    """Makes a JPEG with the size of a photograph: gradients with a little noise, no data of the user.

    Args:
        seed: random seed of color and noise.
    """
    height, width = _PHOTOGRAPH
    shades = np.linspace(60, 190, height)[:, None, None] + np.linspace(-40, 40, width)[None, :, None]
    generator = np.random.default_rng(seed)
    colour, noise = generator.uniform(-50, 50, 3), generator.normal(0, 8, (height, width, 3))
    return bytes(tf.io.encode_jpeg(np.clip(shades + colour + noise, 0, 255).astype(np.uint8), quality=85).numpy())


def _make_requests(name: str, photograph: bytes, image_size: int, size: int) -> list[prediction_log_pb2.PredictionLog]:
    grey = tf.make_tensor_proto(127.0, tf.float32, (size, image_size, image_size, 3))
    strings = tf.make_tensor_proto(photograph, tf.string, (size,))
    requests = [
        _predict(name, "serving_default", "image_bytes", strings),
        _predict(name, "pixels", "images", grey),
        _predict(name, "embeddings", "image_bytes", strings),
    ]
    example = tf.train.Example()
    example.features.feature[EXAMPLE_FEATURE].bytes_list.value.append(photograph)
    classify = classification_pb2.ClassificationRequest(model_spec=_spec(name, "classify"))
    # features that all examples share are sent once, as context
    classify.input.example_list_with_context.context.CopyFrom(example)
    classify.input.example_list_with_context.examples.extend([tf.train.Example()] * size)
    log = prediction_log_pb2.PredictionLog(classify_log=prediction_log_pb2.ClassifyLog(request=classify))
    return [*requests, log]


def _predict(name: str, signature: str, key: str, tensor: tensor_pb2.TensorProto) -> prediction_log_pb2.PredictionLog:
    request = predict_pb2.PredictRequest(model_spec=_spec(name, signature))
    request.inputs[key].CopyFrom(tensor)
    return prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))


def _spec(name: str, signature: str) -> model_pb2.ModelSpec:
    return model_pb2.ModelSpec(name=name, signature_name=signature)
