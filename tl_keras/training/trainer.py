"""The trainer: the head first, then the layers of the backbone that are trained (Kumar et al. 2022)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import keras
import numpy as np

from tl_keras.backbones.embed import Embedded
from tl_keras.data.examples import Examples
from tl_keras.training.batches import predict_logits
from tl_keras.training.heads import attach
from tl_keras.training.plan import Plan
from tl_keras.training.stages import Task, fit_head, fit_tail, new_head

KeepHead = Callable[[keras.Model, np.ndarray], None]  # a trained head, and logits of val, `(n, classes)`


@dataclasses.dataclass(frozen=True)
class Material:
    """The embeddings that a network is trained on.

    Attributes:
        trunk: outputs of the trunk: feature maps, vectors, or pixels if there is no trunk.
        backbone: outputs of the pretrained backbone, `(dim,)` each, which the head is trained on first.
    """

    trunk: Embedded
    backbone: Embedded


class Trainer:
    """Trains head and tail of a plan on stored embeddings."""

    def __init__(self, plan: Plan, material: Material) -> None:
        """Takes the plan and its embeddings.

        Args:
            plan: what is trained; its tail has the weights from before training.
            material: what it is trained on.
        """
        self._plan, self._material = plan, material

    def fit(self, task: Task, *, keep_head: KeepHead | None = None) -> Trained:
        """Trains the head, then the tail if the plan has one.

        Args:
            task: labels, settings and random seed.
            keep_head: called with the trained head before the tail is trained, if there is a val split.

        Returns:
            The head, and the tail of the plan, with the weights of their best epochs.

        Raises:
            UserError: see `fit_stage`.
        """
        plan, stage = self._plan, None
        head = new_head(task, dim=plan.dim)
        if plan.pretrained or not plan.has_tail:
            head, stage = fit_head(task, self._material.backbone)
        diverged = stage.diverged if stage else ""
        if plan.has_tail and not (stage and stage.interrupted):
            is_begun = (task.progress.folder / "checkpoints" / "tail.npz").is_file()
            if stage and keep_head and not is_begun and len(task.examples.positions("val")):
                keep_head(head, self._predict_head(task, head))
            stage = fit_tail(
                task, self._material.trunk, plan.tail, head, layers=plan.part.layers, crop=plan.crop, after=stage
            )
        diverged = (stage.diverged if stage else "") or diverged
        return Trained(plan, self._material, head, bool(stage and stage.interrupted), diverged, task.predict_batch)

    def _predict_head(self, task: Task, head: keras.Model) -> np.ndarray:
        positions = task.examples.positions("val")
        return predict_logits(head, self._material.backbone.read, positions, batch_size=task.predict_batch)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network.

    Attributes:
        plan: what was trained; its tail has the weights of the best epoch.
        material: what it was trained on.
        head: embeddings `(b, dim)` → logits `(b, classes)`.
        interrupted: whether the user interrupted the training.
        diverged: why a stage ended early, if its loss became NaN.
        batch_size: images per batch of predictions.
    """

    plan: Plan
    material: Material
    head: keras.Model
    interrupted: bool
    diverged: str
    batch_size: int

    def build_network(self) -> keras.Model:
        """The whole network as one flat graph: images → logits `(b, classes)`."""
        return attach(self.head, self.plan.backbone)

    def predict(self, examples: Examples, split: str) -> np.ndarray:
        """Logits of a split's examples, float32 `(n, classes)`."""
        model = attach(self.head, self.plan.tail) if self.plan.has_tail else self.head
        positions = examples.positions(split)
        return predict_logits(model, self.material.trunk.read, positions, batch_size=self.batch_size)

    def read_embeddings(self, positions: np.ndarray) -> np.ndarray:
        """Embeddings of the trained backbone, float32 `(m, dim)`, of positions, int `(m,)`."""
        if self.plan.has_tail:
            return predict_logits(self.plan.tail, self.material.trunk.read, positions, batch_size=self.batch_size)
        return self.material.trunk.read_float32(positions)

    def read_pretrained(self, positions: np.ndarray) -> np.ndarray:
        """Embeddings of the backbone before training, which has learned no wrong label, if it was pretrained."""
        if self.plan.pretrained or not self.plan.has_tail:
            return self.material.backbone.read_float32(positions)
        return self.read_embeddings(positions)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Restores the tail's trained weights on exit."""
        weights = self.plan.tail.get_weights() if self.plan.has_tail else []
        try:
            yield
        finally:
            if weights:
                self.plan.tail.set_weights(weights)
