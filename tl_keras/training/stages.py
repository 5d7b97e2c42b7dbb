"""The stages of training: the head first, then what of the backbone is asked for (Kumar et al. 2022)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tl_keras.backbones.embed import Embedded
from tl_keras.config import TrainingConfig
from tl_keras.data.examples import Examples
from tl_keras.training.batches import make_batches
from tl_keras.training.fit import Progress, Stage, fit_stage
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
    train, val = _batches(task, embedded, seed=task.seed, crop=False)
    return head, fit_stage(
        head,
        train,
        val,
        name="head",
        loss=_loss(task),
        learning_rate=task.training.learning_rate,
        training=task.training,
        progress=task.progress,
        steps_per_execution=_HEAD_STEPS,
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
    train, val = _batches(task, embedded, seed=task.seed + 1, crop=crop)
    gentle = after is not None and bool(layers)
    training = task.training
    return fit_stage(
        model,
        train,
        val,
        name="tail" if after else "network",
        loss=_loss(task),
        learning_rate=training.backbone_learning_rate if gentle else training.learning_rate,
        training=training,
        progress=task.progress,
        after=after,
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
    return build_head(dim, task.num_classes, dropout=task.training.dropout, standardize=standardize)


def _batches(task: Task, embedded: Embedded, *, seed: int, crop: bool) -> tuple[Any, Any]:
    examples, training = task.examples, task.training
    train = make_batches(
        embedded.read,
        examples.positions("train"),
        examples.labels("train"),
        batch_size=training.batch_size,
        seed=seed,
        num_views=task.num_views,
        crop=crop,
    )
    val = make_batches(
        embedded.read,
        examples.positions("val"),
        examples.labels("val"),
        batch_size=min(_EVALUATE_BATCH, 4 * training.batch_size),
    )
    return train, val


def _loss(task: Task) -> Any:
    weights: np.ndarray | None = None
    if task.training.class_weights == "balanced":
        weights = balance_classes(task.examples.labels("train"), task.num_classes)
    return build_loss(task.num_classes, label_smoothing=task.training.label_smoothing, class_weights=weights)
