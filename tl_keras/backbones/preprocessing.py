"""The one step between pixels and a network of keras.applications, as a Keras layer that saves and loads."""

from __future__ import annotations

from typing import Any

import keras


@keras.saving.register_keras_serializable(package="tl_keras")
class Preprocessing(keras.layers.Layer):  # type: ignore[misc]  # Keras is untyped: its Layer is Any to mypy
    """Turns RGB pixels into what a network was trained on, by Keras's own formula.

    Images `(batch, height, width, 3)`, float32, RGB 0 to 255 → the same shape, float32. It computes in float32 under
    any dtype policy: bfloat16 has 8 significant bits, too few for resized pixels.

    Args:
        mode: `caffe` (BGR, minus the ImageNet means), `tf` (-1 to 1) or `torch` (0 to 1, minus mean, over deviation).
        name: the layer's name in the backbone.
        **kwargs: what `keras.layers.Layer` takes; `dtype` is float32 unless given.
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
        """The shape stays."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """What `from_config` needs."""
        return {**super().get_config(), "mode": self.mode}
