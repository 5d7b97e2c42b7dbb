"""The part of a backbone that is trained, and the cut before it."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np

from tl_keras.backbones.cut import TrainablePart, choose_trainable, cut
from tl_keras.config import TrainingConfig


@dataclasses.dataclass(frozen=True)
class Plan:
    """The part of a backbone that is trained, and the cut before it.

    Attributes:
        backbone: images `(b, h, w, 3)` → embeddings `(b, dim)`.
        part: the layers that are trained.
        trunk: the frozen part; None if every epoch needs the pixels: they change (--augment=crop), or the stem is
            trained.
        tail: the rest of the backbone.
        pretrained: whether the weights of the backbone are pretrained, so that the head can be trained first.
        crop: whether images are randomly cropped and flipped in every epoch.
        initial_weights: the weights of the tail before training.
    """

    backbone: keras.Model
    part: TrainablePart
    trunk: keras.Model | None
    tail: keras.Model
    pretrained: bool
    crop: bool
    initial_weights: list[np.ndarray]

    @property
    def has_tail(self) -> bool:
        """Whether there are layers between the stored embeddings and the head."""
        return self.trunk is None or bool(self.part.layers)

    @property
    def dim(self) -> int:
        """Size of the backbone's embedding."""
        return int(self.backbone.output_shape[1])

    @property
    def image_size(self) -> int:
        """Height and width of the network's input, in pixels."""
        return int(self.backbone.input_shape[1])

    def reset(self) -> None:
        """Restores the weights that the tail had before training."""
        if self.has_tail:
            self.tail.set_weights(self.initial_weights)


def plan_training(backbone: keras.Model, training: TrainingConfig, *, pretrained: bool, repeated: bool) -> Plan:
    """Plans the training of a backbone.

    Args:
        backbone: images `(b, h, w, 3)` → embeddings `(b, dim)`.
        training: the training settings.
        pretrained: whether the backbone has pretrained weights.
        repeated: whether it is trained several times, each time from its initial weights.

    Raises:
        UserError: the layer of `--trainable` does not exist, or the backbone can't be cut there.
    """
    part = choose_trainable(backbone, training.trainable, pretrained=pretrained)
    crop = training.augment == "crop"
    trunk, tail = (None, backbone) if part.cut is None or crop else cut(backbone, at=part.cut)
    return Plan(backbone, part, trunk, tail, pretrained, crop, tail.get_weights() if repeated else [])
