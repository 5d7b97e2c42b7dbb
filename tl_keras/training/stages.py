"""The stages of training: first the head, then the requested layers of the backbone (Kumar et al. 2022)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tl_keras.backbones.embed import Embedded
from tl_keras.config import TrainingConfig
from tl_keras.data.examples import Examples
from tl_keras.training.batches import EpochOrder, make_batches
from tl_keras.training.fit import Epochs, Progress, Stage, fit_stage
from tl_keras.training.heads import attach, build_head, measure_embeddings
from tl_keras.training.losses import balance_classes, build_loss

_EVALUATE_BATCH = 256
_HEAD_STEPS = 8  # steps per call for a linear head, because the overhead of Keras is larger than a step
_FEW_STEPS = 200  # such a call takes half a second longer to trace, which fewer steps do not save


@dataclasses.dataclass(frozen=True)
class Task:
    """Data and settings of a training, for all stages.

    Attributes:
        examples: labeled images; epochs are selected on their val split.
        training: the training settings.
        seed: random seed of the order of examples and of dropout.
        progress: output of the stages.
    """

    examples: Examples
    training: TrainingConfig
    seed: int
    progress: Progress

    @property
    def num_views(self) -> int:
        """Number of stored views of a training image."""
        return 2 if self.training.augment == "flip" else 1

    @property
    def predict_batch(self) -> int:
        """Batch size of predictions: without gradients, four times the training batch fits in memory."""
        return min(_EVALUATE_BATCH, 4 * self.training.batch_size)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.examples.class_names)


def fit_head(task: Task, embedded: Embedded) -> tuple[keras.Model, Stage]:
    """Trains a head on stored embeddings.

    Args:
        task: data and settings.
        embedded: embeddings of the backbone, `(dim,)` each.

    Returns:
        The head, embeddings `(b, dim)` → logits `(b, classes)`, with the weights of its best epoch; and the stage.

    Raises:
        UserError: see `fit_stage`.
    """
    head = new_head(task, embedded)
    epochs = _epochs(task, embedded, seed=task.seed, crop=False)
    return head, fit_stage(
        head,
        epochs,
        _val_batches(task, embedded),
        name="head",
        loss=_loss(task),
        learning_rate=task.training.learning_rate,
        training=task.training,
        progress=task.progress,
        steps_per_execution=_HEAD_STEPS if epochs.steps * task.training.epochs > _FEW_STEPS else 1,
        identity=_identify(task, embedded),
    )


def fit_tail(
    task: Task,
    embedded: Embedded,
    tail: keras.Model,
    head: keras.Model,
    *,
    layers: Sequence[keras.layers.Layer],
    crop: bool,
    after: Stage | None,
) -> Stage:
    """Trains layers of the backbone together with the head, on stored feature maps or pixels.

    Args:
        task: data and settings.
        embedded: outputs of the trunk: feature maps, or pixels without a trunk.
        tail: the rest of the backbone → `(b, dim)`.
        head: a trained or new head.
        layers: layers of the tail to train; others stay frozen, BatchNormalization in inference mode.
        crop: whether pixels are randomly cropped and mirrored in each epoch.
        after: the stage of the head, whose weights are kept if no epoch is better on val; None if the head is new.

    Returns:
        The stage; tail and head have the weights of its best epoch.

    Raises:
        UserError: see `fit_stage`.
    """
    trained = set(map(id, layers))
    for layer in tail.layers:
        layer.trainable = id(layer) in trained
    model = attach(head, tail)
    gentle = after is not None and bool(layers)
    training = task.training
    return fit_stage(
        model,
        _epochs(task, embedded, seed=task.seed + 1, crop=crop),
        _val_batches(task, embedded),
        name="tail" if after else "network",
        loss=_loss(task),
        learning_rate=training.backbone_learning_rate if gentle else training.learning_rate,
        training=training,
        progress=task.progress,
        after=after,
        identity=_identify(task, embedded),
    )


def new_head(task: Task, embedded: Embedded | None = None, *, dim: int = 0) -> keras.Model:
    """Builds an untrained head.

    Args:
        task: data and settings.
        embedded: embeddings for standardization, if the settings ask for it; None for no standardization.
        dim: size of an embedding, if no embeddings are given.

    Returns:
        Embeddings `(b, dim)` → logits `(b, classes)`.
    """
    standardize = None
    if embedded is not None:
        positions = task.examples.positions("train")
        dim = embedded.read(positions[:1]).shape[1]
        if task.training.standardize:
            batches = make_batches(embedded.read, positions, task.examples.labels("train"), batch_size=_EVALUATE_BATCH)
            standardize = measure_embeddings(batches)
    return build_head(dim, task.num_classes, dropout=task.training.dropout, standardize=standardize, seed=task.seed)


def _epochs(task: Task, embedded: Embedded, *, seed: int, crop: bool) -> Epochs:
    examples, order = task.examples, EpochOrder(seed)

    def make(first_step: int) -> Any:
        return make_batches(
            embedded.read,
            examples.positions("train"),
            examples.labels("train"),
            batch_size=task.training.batch_size,
            order=order,
            first_step=first_step,
            num_views=task.num_views,
            crop=crop,
        )

    return Epochs(order, -(-len(examples.positions("train")) // task.training.batch_size), make)


def _val_batches(task: Task, embedded: Embedded) -> Any:
    examples = task.examples
    return make_batches(embedded.read, examples.positions("val"), examples.labels("val"), batch_size=task.predict_batch)


def _identify(task: Task, embedded: Embedded) -> str:
    """Hashes the training data of a stage: embeddings, images, labels, splits and settings."""
    examples = task.examples
    digest = hashlib.sha256(f"{embedded.name} {task.seed} {task.training}".encode())
    for split in ("train", "val"):
        positions = examples.positions(split)
        digest.update(examples.digests[positions].tobytes() + examples.source.labels[positions].tobytes())
    return digest.hexdigest()


def _loss(task: Task) -> Any:
    weights: np.ndarray | None = None
    if task.training.class_weights == "balanced":
        weights = balance_classes(task.examples.labels("train"), task.num_classes)
    return build_loss(task.num_classes, label_smoothing=task.training.label_smoothing, class_weights=weights)
