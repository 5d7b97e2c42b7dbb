"""`--mode=finetune`: a pretrained backbone with a new head, evaluated and exported."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from tl_keras.backbones.capacity import check_network
from tl_keras.backbones.cut import TrainablePart, choose_trainable, cut
from tl_keras.backbones.embed import Embedded, embed_tail
from tl_keras.backbones.engines import BATCH_SIZE
from tl_keras.backbones.zoo import Preset
from tl_keras.classifier import Classifier
from tl_keras.config import Config
from tl_keras.data.examples import Examples
from tl_keras.data.splits import SPLITS, evaluated_split
from tl_keras.errors import UserError
from tl_keras.evaluation.metrics import describe_spread, summarize
from tl_keras.evaluation.tables import write_examples
from tl_keras.export.parity import ParityProcess
from tl_keras.modes.inspection import read_embeddings
from tl_keras.modes.steps import Job, Views, load_backbone, load_job, wanted_views
from tl_keras.run import History, Result, Screen, Stopwatch
from tl_keras.training.batches import predict_logits
from tl_keras.training.callbacks import HISTORY_HEADER
from tl_keras.training.fit import Progress
from tl_keras.training.heads import attach
from tl_keras.training.stages import Task, fit_head, fit_tail, new_head


def run(config: Config) -> Result:
    """Trains a head, and what of the backbone is asked for, on labelled images; evaluates and exports it.

    Epochs are chosen on val; test is looked at once, at the end.
    """
    screen, watch = Screen(), Stopwatch()
    keras.utils.set_random_seed(config.run.seed)
    with watch.stage("backbone"):
        preset, backbone = load_backbone(config.backbone)
        plan = Plan.make(backbone, config)
        _check_memory(plan, config)
    job = load_job(config, preset, screen, watch, image_size=int(backbone.input_shape[1]))
    _introduce(screen, preset, plan.part, config)
    trainer = Trainer(job, preset)
    with watch.stage("trunk"):
        material = trainer.embed(plan)
    drawn, job.examples = job.examples, job.draw(config.run.seed)
    write_examples(job.folder, job.examples)  # a run that is killed has said what was used for what

    # the process that checks the export loads TensorFlow while the head is trained
    with ParityProcess() if config.run.export else contextlib.nullcontext() as parity:
        with watch.stage("training"):
            history = History(job.folder, HISTORY_HEADER)
            progress = Progress(job.folder.path, screen.line, screen.progress, history.keep)
            trained = trainer.fit(plan, material, Task(job.examples, config.training, config.run.seed, progress))
        with watch.stage("evaluation"):
            splits = [split for split in SPLITS[1:] if len(job.examples.positions(split))]
            logits = {split: trained.predict(job.examples, split) for split in splits}
        seeds = config.evaluation.seeds
        if trained.interrupted:
            more = f" {seeds - 1} more seeds were not trained;" if seeds > 1 else ""
            screen.line(
                f"training: interrupted; the best epoch so far is evaluated and kept;{more} nothing is exported"
            )
            screen.line(f"to continue: --mode=finetune --resume --run_dir={job.folder.path}")
        if trained.diverged:
            job.warn(f"warning: {trained.diverged} The best weights from before that are kept")

        def train_again() -> dict[str, Any] | None:
            with watch.stage("seeds"), trained.kept():
                every_draw = Trainer(dataclasses.replace(job, examples=drawn), preset)
                return every_draw.repeat(plan, material, first=logits)

        return job.finish(
            trainer.build_classifier(plan, trained.head),
            logits,
            embedded=material.embedded,
            parity=parity,
            chosen="epochs were chosen on it; ",
            views=trained.views(),
            interrupted=trained.interrupted,
            failed=bool(trained.diverged),
            repeat=train_again if seeds > 1 and not trained.interrupted else None,
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """What of a backbone is trained, and where it is cut.

    Attributes:
        backbone: the whole of it.
        part: what is trained.
        trunk: the frozen part; None if every epoch needs the pixels: they change (--augment=crop), or the stem is
            trained.
        tail: the rest of the backbone.
        pretrained: whether it has learned something that a head can be trained on first.
        crop: whether pixels are cropped and mirrored, anew in each epoch.
        untrained: the tail's weights before any training.
    """

    backbone: keras.Model
    part: TrainablePart
    trunk: keras.Model | None
    tail: keras.Model
    pretrained: bool
    crop: bool
    untrained: list[np.ndarray]

    @classmethod
    def make(cls, backbone: keras.Model, config: Config) -> Plan:
        """Plans the training of a backbone.

        Raises:
            UserError: `--trainable` names no layer of it, or one where it can't be cut.
        """
        pretrained = config.backbone.weights != "none"
        part = choose_trainable(backbone, config.training.trainable, pretrained=pretrained)
        crop = config.training.augment == "crop"
        trunk, tail = (None, backbone) if part.cut is None or crop else cut(backbone, at=part.cut)
        untrained = tail.get_weights() if config.evaluation.seeds > 1 else []
        return cls(backbone, part, trunk, tail, pretrained, crop, untrained)

    @property
    def has_tail(self) -> bool:
        """Whether anything stands between what is stored and the head."""
        return self.trunk is None or bool(self.part.layers)


@dataclasses.dataclass(frozen=True)
class Material:
    """What is trained on.

    Attributes:
        embedded: what the trunk gave: feature maps, vectors, or pixels if there is no trunk.
        vectors: the embeddings of the pretrained backbone, which the head is trained on first.
    """

    embedded: Embedded
    vectors: Embedded


class Trainer:
    """Trains heads and tails of one run, once for each seed."""

    def __init__(self, job: Job, preset: Preset) -> None:
        """Args: job: the run; preset: of the backbone."""
        self._job, self._preset = job, preset

    def embed(self, plan: Plan) -> Material:
        """Sends every image through the trunk, and through the untrained tail if the head is trained first."""
        job, flip = self._job, self._job.config.training.augment == "flip"
        size = int(plan.backbone.input_shape[1])
        embedded = job.embed([plan.trunk] if plan.trunk else [], self._preset, image_size=size, mirrored=flip)[0]
        if not (plan.pretrained and plan.has_tail):
            return Material(embedded, embedded)
        views, show_progress = wanted_views(job.examples, mirrored=flip), job.screen.progress
        return Material(embedded, embed_tail(embedded, plan.tail, wanted=views, show_progress=show_progress))

    def fit(self, plan: Plan, material: Material, task: Task, *, keep_head: bool = True) -> Trained:
        """Trains the head, then the tail if the plan has one.

        Args:
            plan: what is trained; its tail has the weights from before any training.
            material: what is trained on.
            task: what is learned.
            keep_head: whether the run gets a usable classifier as soon as the head is trained.

        Raises:
            UserError: see `fit_stage`.
        """
        head, stage = new_head(task, dim=plan.backbone.output_shape[1]), None
        if plan.pretrained or not plan.has_tail:
            head, stage = fit_head(task, material.vectors)
        diverged = stage.diverged if stage else ""
        if plan.has_tail and not (stage and stage.interrupted):
            is_begun = (task.progress.folder / "checkpoints" / "tail.npz").is_file()
            if stage and keep_head and not is_begun and len(task.examples.positions("val")):
                self._keep_classifier(plan, material, task, head)
            stage = fit_tail(
                task, material.embedded, plan.tail, head, layers=plan.part.layers, crop=plan.crop, after=stage
            )
        diverged = (stage.diverged if stage else "") or diverged
        return Trained(plan, material, head, bool(stage and stage.interrupted), diverged, task.predict_batch)

    def repeat(self, plan: Plan, material: Material, *, first: dict[str, np.ndarray]) -> dict[str, Any] | None:
        """Trains again with other seeds, for the spread; the run's own classifier stays that of the first seed.

        Each training equals that of a run with `--seed` of its own: its draw of `--shots`, its random weights if
        `--weights=none`, its order of batches.

        Args:
            plan: of the first seed.
            material: of the first seed.
            first: split → logits of the first seed.

        Returns:
            See `summarize`; and the `split` and whether the user `interrupted`. None: it was interrupted before another
            seed was trained; empty: no other seed could be trained.
        """
        job, config, split = self._job, self._job.config, evaluated_split(first)
        labels, count = job.examples.labels(split), config.evaluation.seeds
        accuracies = [float((first[split].argmax(1) == labels).mean())]
        interrupted = False
        try:
            for seed in range(config.run.seed + 1, config.run.seed + count):
                keras.utils.set_random_seed(seed)
                if plan.pretrained and plan.has_tail:
                    plan.tail.set_weights(plan.untrained)
                elif not plan.pretrained:
                    plan = Plan.make(load_backbone(config.backbone)[1], config)
                    material = self.embed(plan)
                folder = job.folder.path / "seeds" / str(seed)
                folder.mkdir(parents=True, exist_ok=True)
                task = Task(
                    job.draw(seed), config.training, seed, Progress(folder, _ignore, job.screen.progress, _ignore)
                )
                trained = self._try_to_fit(plan, material, task)
                if trained is None:
                    continue
                if trained.interrupted:
                    raise KeyboardInterrupt
                accuracies.append(float((trained.predict(job.examples, split).argmax(1) == labels).mean()))
                job.screen.progress(f"seed {seed}: {split} accuracy {accuracies[-1]:.3f}")
        except KeyboardInterrupt:
            interrupted = True
            job.screen.line(
                f"seeds: interrupted after {len(accuracies)} of {count}; the run is kept, and goes on to its end"
            )
        if len(accuracies) == 1:
            return None if interrupted else {}
        summary = summarize(accuracies)
        job.screen.line(f"{len(accuracies)} seeds: {split} accuracy {describe_spread(summary)}")
        return {"split": split, "interrupted": interrupted, **summary}

    def _try_to_fit(self, plan: Plan, material: Material, task: Task) -> Trained | None:
        """Trains with a further seed; None if that fails, which costs the run only that seed."""
        try:
            trained = self.fit(plan, material, task, keep_head=False)
            failure = trained.diverged
        except UserError as error:
            failure = str(error)
        if failure:
            self._job.warn(f"warning: seed {task.seed} is left out: {failure}")
        return None if failure else trained

    def build_classifier(self, plan: Plan, head: keras.Model) -> Classifier:
        """The classifier of a backbone and a head."""
        examples = self._job.examples
        return Classifier(
            attach(head, plan.backbone),
            name=f"{examples.source.name}-{self._preset.name}",
            labels=examples.class_names,
            backbone=self._preset.name,
            embedding_layer=plan.backbone.layers[-1].name,
            resize=self._job.config.backbone.resize,
        )

    def _keep_classifier(self, plan: Plan, material: Material, task: Task, head: keras.Model) -> None:
        positions = task.examples.positions("val")
        logits = predict_logits(head, material.vectors.read, positions, batch_size=task.predict_batch)
        self._job.keep_classifier(self.build_classifier(plan, head), logits)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What one training gave.

    Attributes:
        plan: what was trained; its tail has the weights of the best epoch.
        material: what it was trained on.
        head: embeddings `(b, dim)` → logits `(b, classes)`.
        interrupted: whether the user interrupted it.
        diverged: why a stage ended early, if its loss became NaN.
        batch_size: examples at once where nothing is learned.
    """

    plan: Plan
    material: Material
    head: keras.Model
    interrupted: bool
    diverged: str
    batch_size: int

    def predict(self, examples: Examples, split: str) -> np.ndarray:
        """Logits of a split's examples, float32 `(n, classes)`."""
        model = attach(self.head, self.plan.tail) if self.plan.has_tail else self.head
        positions = examples.positions(split)
        return predict_logits(model, self.material.embedded.read, positions, batch_size=self.batch_size)

    def views(self) -> Views:
        """Embeddings for the report."""
        stored = functools.partial(read_embeddings, self.material.vectors)
        is_stored = self.plan.pretrained or not self.plan.has_tail
        return Views(
            self._read_trained, stored if is_stored else self._read_trained, self.plan.backbone.output_shape[1]
        )

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Restores the tail's trained weights on exit."""
        weights = self.plan.tail.get_weights() if self.plan.has_tail else []
        try:
            yield
        finally:
            if weights:
                self.plan.tail.set_weights(weights)

    def _read_trained(self, positions: np.ndarray) -> np.ndarray:
        if self.plan.has_tail:
            read = self.material.embedded.read
            return predict_logits(self.plan.tail, read, positions, batch_size=self.batch_size)
        return read_embeddings(self.material.embedded, positions)


def _check_memory(plan: Plan, config: Config) -> None:
    """Refuses a network that will not fit in memory."""
    check_network(
        plan.backbone,
        batch_size=BATCH_SIZE if plan.trunk else 0,
        exported=config.run.export,
        trained=plan.tail if plan.has_tail else None,
        training_batch=config.training.batch_size,
    )


def _ignore(*shown: Any) -> None:
    """Drops what further seeds show epoch by epoch."""
    del shown


def _introduce(screen: Screen, preset: Preset, part: TrainablePart, config: Config) -> None:
    """What will be trained."""
    trained = "the head alone" if not part.layers else f"the head, then {len(part.layers)} layers of {preset.name}"
    if config.backbone.weights == "none" and part.layers:
        trained = f"head and {len(part.layers)} layers of {preset.name} together, from scratch"
    screen.line(f"training: {trained}; weights: {config.backbone.weights}; {config.training.epochs} epochs")
    if part.cut is None or config.training.augment == "crop":
        why = "--augment=crop" if config.training.augment == "crop" else f"--trainable={config.training.trainable}"
        screen.line(f"the whole network runs each epoch, because of {why}: slower by the frozen part's share")
