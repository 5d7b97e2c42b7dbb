"""The stages of training: the head first, then what of the backbone is asked for (Kumar et al. 2022)."""

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
_HEAD_STEPS = 8  # of a linear head at once: Keras's own work on a step takes longer than the step


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learnt, and how: the same for all stages.

    Attributes:
        examples: labelled images; epochs are chosen on their val.
        training: the recipe.
        seed: of the order of examples and of dropout.
        progress: where stages report to.
    """

    examples: Examples
    training: TrainingConfig
    seed: int
    progress: Progress

    @property
    def num_views(self) -> int:
        """Stored views of a training image."""
        return 2 if self.training.augment == "flip" else 1

    @property
    def predict_batch(self) -> int:
        """Examples at once where nothing is learned: what fits into memory then is four times a training step's."""
        return min(_EVALUATE_BATCH, 4 * self.training.batch_size)

    @property
    def num_classes(self) -> int:
        """Classes."""
        return len(self.examples.class_names)


def fit_head(task: Task, embedded: Embedded) -> tuple[keras.Model, Stage]:
    """Trains a head on stored embeddings.

    Args:
        task: what is learnt.
        embedded: the backbone's embeddings, `(dim,)` each.

    Returns:
        The head, embeddings `(b, dim)` → logits `(b, classes)`, with the weights of its best epoch; and the stage.

    Raises:
        UserError: see `fit_stage`.
    """
    head = new_head(task, embedded)
    return head, fit_stage(
        head,
        _epochs(task, embedded, seed=task.seed, crop=False),
        _val_batches(task, embedded),
        name="head",
        loss=_loss(task),
        learning_rate=task.training.learning_rate,
        training=task.training,
        progress=task.progress,
        steps_per_execution=_HEAD_STEPS,
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
        task: what is learnt.
        embedded: what the trunk gave: feature maps, or pixels where there is no trunk.
        tail: the rest of the backbone → `(b, dim)`.
        head: trained already, or new.
        layers: the layers of the tail to train; the others stay frozen, BatchNormalization in inference mode.
        crop: whether pixels are cropped and mirrored, anew each epoch.
        after: the head's stage: it stays where no epoch is better on val. None: the head is new.

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
    """A head that is not trained yet.

    Args:
        task: what is learnt.
        embedded: embeddings that it standardises by, where the recipe says so; without them it does not.
        dim: size of an embedding, where there are none.

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
    """A hash of what a stage learns from: embeddings, images, labels, splits and recipe."""
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
