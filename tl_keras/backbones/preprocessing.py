"""Preprocessing of pixels for the networks of keras.applications, as a serializable Keras layer."""

from __future__ import annotations

from typing import Any

import keras


@keras.saving.register_keras_serializable(package="tl_keras")
class Preprocessing(keras.layers.Layer):  # type: ignore[misc]  # Keras is untyped: its Layer is Any to mypy
    """Preprocesses RGB pixels with the formula of Keras that a network was trained with.

    Images `(batch, height, width, 3)`, float32, RGB 0 to 255 → the same shape, float32. It computes in float32 with any
    dtype policy, because the 8 significant bits of bfloat16 are too few for resized pixels.

    Args:
        mode: `caffe` (BGR, minus the ImageNet means), `tf` (-1 to 1) or `torch` (0 to 1, minus mean, over deviation).
        name: name of the layer.
        **kwargs: arguments of `keras.layers.Layer`; the default of `dtype` is float32.
    """

    def __init__(self, mode: str, *, name: str = "preprocessing", **kwargs: Any) -> None:
        """Args: mode: see the class."""
        kwargs.setdefault("dtype", "float32")
        super().__init__(name=name, **kwargs)
        self.mode = mode

    def call(self, images: Any) -> Any:
        """Images `(batch, height, width, 3)`, RGB 0 to 255 → the same shape, preprocessed."""
        return keras.applications.imagenet_utils.preprocess_input(images, mode=self.mode)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """The shape does not change."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The arguments of `from_config`."""
        return {**super().get_config(), "mode": self.mode}
