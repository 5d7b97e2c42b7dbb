"""Checks that a network fits in memory, before the operating system kills the process."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import keras
import numpy as np

from tl_keras.errors import UserError
from tl_keras.run import free_memory_bytes

# Simultaneous copies of the weights in a whole run, measured on MobileNetV2 (alpha 1, 4 and 7), VGG16 and ResNet152
# with the process that checks the export: copies of Keras, of the graph in Python and C++, and of the engine. An export
# needs no more than the trunk. With --engine=auto both engines may be built.
_COPIES = {"openvino": 11, "tensorflow": 19, "auto": 19}
_MAPS = 3.5  # simultaneous copies of the largest feature map in inference: input, output and workspace of an operation
_TRAINED_MAPS = 2.0  # copies of all feature maps in training: values and gradients
_FLOAT_BYTES = 4
_WIDEST_PARAMETERS = 3_300_000  # parameters of the largest network with --backbone_kwargs=alpha, alpha=1, without top


def check_width(name: str, kwargs: Mapping[str, float | int | bool]) -> None:
    """Checks that the weights of a widened network fit in the free memory, before Keras allocates them.

    Raises:
        UserError: they do not fit.
    """
    width = float(kwargs.get("alpha", 1)) ** 2 * float(kwargs.get("depth_multiplier", 1))
    need, free = width * _WIDEST_PARAMETERS * _FLOAT_BYTES * 2, free_memory_bytes()
    if width > 1 and need > free:
        settings = ", ".join(f"{key}={value}" for key, value in kwargs.items())
        raise UserError(
            f"{name} with {settings} has about {need / 2 / 1e9:,.0f} GB of weights, but only {free / 1e9:.1f} GB of "
            "memory are free. Give smaller --backbone_kwargs."
        )


def check_network(
    backbone: keras.Model,
    *,
    batch_size: int,
    engine: str = "auto",
    trained: keras.Model | None = None,
    training_batch: int = 0,
) -> None:
    """Checks that a network fits in the free memory, before anything is computed.

    Args:
        backbone: images `(batch, h, w, 3)` → embeddings; its weights are in memory already.
        batch_size: batch size of the frozen backbone; 0 if nothing is frozen.
        engine: value of --engine.
        trained: the part that is trained; None if it is frozen.
        training_batch: batch size of training.

    Raises:
        UserError: it does not fit.
    """
    weights = sum(int(np.prod(weight.shape)) for weight in backbone.weights) * _FLOAT_BYTES
    maps = _map_bytes(backbone)
    activations = batch_size * max(maps, default=0) * _MAPS
    if trained is not None:
        activations += training_batch * sum(_map_bytes(trained)) * _TRAINED_MAPS
    need, free = weights * (_COPIES[engine] - 1) + activations, free_memory_bytes()
    if need > free:
        ways = "Choose a smaller --backbone or --image_size"
        ways += ", or a smaller --batch_size" if trained is not None else ""
        fits = weights * (_COPIES["openvino"] - 1) + activations <= free
        if fits and batch_size and importlib.util.find_spec("openvino"):
            ways += ", or give --engine=openvino"
        largest = max(maps, default=0) / 1e6
        raise UserError(
            f"{backbone.name} needs about {need / 1e9:.1f} GB of memory here ({weights / 1e9:.1f} GB of weights in "
            f"several copies, and feature maps of up to {largest:,.0f} MB per image), but only {free / 1e9:.1f} GB are "
            f"free. {ways}."
        )


def _map_bytes(network: keras.Model) -> list[int]:
    """Size of the output of each layer for one image, in bytes."""
    outputs = [tensor for operation in network.operations for tensor in keras.tree.flatten(operation.output)]
    return [int(np.prod([side or 1 for side in tensor.shape[1:]])) * _FLOAT_BYTES for tensor in outputs]
