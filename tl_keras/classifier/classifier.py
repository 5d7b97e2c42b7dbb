"""A trained network with everything that turns the bytes of an image into class probabilities."""

from __future__ import annotations

import dataclasses

import keras


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
