"""A trained network, with everything needed to compute class probabilities from the bytes of an image."""

from __future__ import annotations

import dataclasses

import keras


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained network, with everything needed to compute class probabilities from the bytes of an image.

    Attributes:
        network: one flat graph: images, float32 RGB 0 to 255 `(b, size, size, 3)` → logits `(b, classes)`.
        name: name of the data set and the backbone.
        labels: class names, in the order of the logits.
        backbone: name of the preset.
        embedding_layer: last layer of the backbone, whose output is the embedding.
        resize: how images are resized, see `--resize`.
    """

    network: keras.Model
    name: str
    labels: tuple[str, ...]
    backbone: str
    embedding_layer: str
    resize: str

    @property
    def embedder(self) -> keras.Model:
        """The trained backbone without the head: images → embeddings `(b, dim)`."""
        return keras.Model(self.network.input, self.network.get_layer(self.embedding_layer).output, name=self.backbone)

    @property
    def image_size(self) -> int:
        """Height and width of the network's input, in pixels."""
        return int(self.network.input_shape[1])

    def divide_logits(self, temperature: float) -> Classifier:
        """Adds a temperature layer that divides the logits (Guo et al. 2017)."""
        dtype = self.network.layers[-1].dtype_policy  # a probe computes in float64
        layer = keras.layers.Rescaling(1 / temperature, name="temperature", dtype=dtype)
        network = keras.Model(self.network.input, layer(self.network.output), name=self.network.name)
        return dataclasses.replace(self, network=network)
