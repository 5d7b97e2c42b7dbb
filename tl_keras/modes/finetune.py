"""`--mode=finetune`: a pretrained backbone with a new head, evaluated and exported."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from tl_keras.backbones.cut import TrainablePart, choose_trainable, cut
from tl_keras.backbones.embed import embed_tail
from tl_keras.backbones.zoo import Preset
from tl_keras.classifier import Classifier
from tl_keras.config import Config
from tl_keras.data.splits import SPLITS, evaluated_split
from tl_keras.evaluation.metrics import describe_spread, summarize
from tl_keras.evaluation.tables import write_examples
from tl_keras.export.parity import ParityProcess
from tl_keras.modes.inspection import read_embeddings
from tl_keras.modes.steps import PREDICT_BATCH, Job, Views, load_backbone, load_job, wanted_views
from tl_keras.run import History, Result, Screen, Stopwatch
from tl_keras.training.batches import predict_logits
from tl_keras.training.callbacks import HISTORY_HEADER
from tl_keras.training.fit import Progress, Stage
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
        pretrained = config.backbone.weights != "none"
        part = choose_trainable(backbone, config.training.trainable, pretrained=pretrained)
    job = load_job(config, preset, screen, watch, image_size=int(backbone.input_shape[1]))
    _introduce(screen, preset, part, config)

    # pixels that change each epoch, or a stem that is trained, leave no trunk: the store then keeps decoded images
    crop = config.training.augment == "crop"
    whole = part.cut is None or crop
    trunk, tail = (None, backbone) if whole else cut(backbone, at=str(part.cut))
    with watch.stage("trunk"):
        flip, size = config.training.augment == "flip", int(backbone.input_shape[1])
        embedded = job.embed([trunk] if trunk else [], preset, image_size=size, mirrored=flip)[0]
    examples = job.examples
    write_examples(job.folder, examples)  # a run that is killed has said what was used for what

    # the process that checks the export loads TensorFlow while the head is trained
    with ParityProcess() if config.run.export else contextlib.nullcontext() as parity:
        with watch.stage("training"):
            history = History(job.folder, HISTORY_HEADER)
            progress = Progress(job.folder.path, screen.line, screen.progress, history.keep)
            has_tail, vectors = whole or bool(part.layers), embedded
            if pretrained and has_tail:
                views, show_progress = wanted_views(examples, mirrored=flip), screen.progress
                vectors = embed_tail(embedded, tail, wanted=views, show_progress=show_progress)

            def fit(task: Task) -> tuple[keras.Model, Stage | None]:
                head, stage = new_head(task, dim=backbone.output_shape[1]), None
                if pretrained or not has_tail:
                    head, stage = fit_head(task, vectors)
                if has_tail and not (stage and stage.interrupted):
                    stage = fit_tail(task, embedded, tail, head, layers=part.layers, crop=crop, after=stage)
                return head, stage

            def predict(head: keras.Model, split: str) -> np.ndarray:
                trained = attach(head, tail) if has_tail else head
                return predict_logits(trained, embedded.read, examples.positions(split), batch_size=PREDICT_BATCH)

            untrained = tail.get_weights() if has_tail and config.evaluation.seeds > 1 else []
            head, stage = fit(Task(examples, config.training, config.run.seed, progress))
        with watch.stage("evaluation"):
            logits = {split: predict(head, split) for split in SPLITS[1:] if len(examples.positions(split))}
        classifier = Classifier(
            attach(head, backbone),
            name=f"{examples.source.name}-{preset.name}",
            labels=examples.class_names,
            backbone=preset.name,
            embedding_layer=backbone.layers[-1].name,
            resize=config.backbone.resize,
        )
        interrupted = bool(stage and stage.interrupted)
        seeds = config.evaluation.seeds
        if interrupted:
            more = f" {seeds - 1} more seeds were not trained;" if seeds > 1 else ""
            screen.line(
                f"training: interrupted; the best epoch so far is evaluated and kept;{more} nothing is exported"
            )

        def train_again() -> dict[str, Any] | None:
            with watch.stage("seeds"), _kept(tail, untrained) as forget:
                return _repeat(job, fit, predict, forget, first=logits)

        def read_trained(positions: np.ndarray) -> np.ndarray:
            if has_tail:
                return predict_logits(tail, embedded.read, positions, batch_size=PREDICT_BATCH)
            return read_embeddings(embedded, positions)

        stored = functools.partial(read_embeddings, vectors)
        unspoilt = stored if pretrained or not has_tail else read_trained

        return job.finish(
            classifier,
            logits,
            embedded=embedded,
            parity=parity,
            chosen="epochs were chosen on it; ",
            views=Views(read_trained, unspoilt, backbone.output_shape[1]),
            interrupted=interrupted,
            repeat=train_again if seeds > 1 and not interrupted else None,
        )


@contextlib.contextmanager
def _kept(tail: keras.Model, untrained: list[np.ndarray]) -> Iterator[Callable[[], None]]:
    """Gives what brings a tail back to its start; in the end the tail is what it was in the beginning of the block."""
    trained = tail.get_weights() if untrained else []
    try:
        yield lambda: tail.set_weights(untrained) if untrained else None
    finally:
        if untrained:
            tail.set_weights(trained)


def _repeat(
    job: Job,
    fit: Callable[[Task], tuple[keras.Model, Stage | None]],
    predict: Callable[[keras.Model, str], np.ndarray],
    forget: Callable[[], None],
    *,
    first: dict[str, np.ndarray],
) -> dict[str, Any] | None:
    """Trains again with other seeds, for the spread alone; the run's own classifier stays that of the first seed.

    Returns:
        What `summarize` says, with the `split` and whether the user `interrupted`; None: no other seed was trained.
    """
    split = evaluated_split(first)
    labels, count = job.examples.labels(split), job.config.evaluation.seeds
    accuracies = [float((first[split].argmax(1) == labels).mean())]
    interrupted = False
    try:
        for number in range(1, count):
            seed = job.config.run.seed + number
            keras.utils.set_random_seed(seed)
            forget()
            folder = job.folder.path / "seeds" / str(seed)
            folder.mkdir(parents=True, exist_ok=True)
            progress = Progress(folder, _ignore, job.screen.progress, _ignore)
            head, stage = fit(Task(job.examples, job.config.training, seed, progress))
            if stage and stage.interrupted:
                raise KeyboardInterrupt
            accuracies.append(float((predict(head, split).argmax(1) == labels).mean()))
            job.screen.progress(f"seed {seed}: {split} accuracy {accuracies[-1]:.3f}")
    except KeyboardInterrupt:
        interrupted = True
        job.screen.line(
            f"seeds: interrupted after {len(accuracies)} of {count}; the run is kept, and goes on to its end"
        )
    if len(accuracies) == 1:
        return None
    summary = summarize(accuracies)
    job.screen.line(f"{len(accuracies)} seeds: {split} accuracy {describe_spread(summary)}")
    return {"split": split, "interrupted": interrupted, **summary}


def _ignore(shown: Any) -> None:
    """What further seeds have to say epoch by epoch."""
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
