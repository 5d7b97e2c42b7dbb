"""`--mode=finetune`: a pretrained backbone with a new head; optionally, layers of the backbone are trained too."""

from __future__ import annotations

import contextlib
import functools

import keras
import numpy as np

from tl_keras.config import Config
from tl_keras.evaluation.tables import write_examples
from tl_keras.export.parity import ParityProcess
from tl_keras.jobs.finish import Views, close, export, judge, keep_classifier
from tl_keras.jobs.result import Result
from tl_keras.jobs.start import Job, Network, load_network, start
from tl_keras.jobs.training import check_training_memory, embed_plan, list_evaluated, make_plan, repeat
from tl_keras.run import History, Screen, count_of
from tl_keras.training.callbacks import HISTORY_HEADER
from tl_keras.training.fit import Progress
from tl_keras.training.heads import attach
from tl_keras.training.plan import Plan
from tl_keras.training.stages import Task
from tl_keras.training.trainer import Trained, Trainer


def run(config: Config, screen: Screen | None = None) -> Result:
    """Trains a head, and the requested layers of the backbone, on labeled images; evaluates and exports the classifier.

    Epochs are selected on val; test is evaluated once, at the end.
    """
    network = load_network(config, screen or Screen())
    plan = make_plan(network.backbone, config)
    check_training_memory(plan, config)
    job = start(network)
    _introduce(network, plan)
    with job.watch.stage("trunk"):
        material = embed_plan(job, plan)
    first = job.draw(config.run.seed)
    write_examples(first.folder, first.examples)  # a run that is killed has its splits on disk

    # the process that checks the export loads TensorFlow while the head is trained
    with ParityProcess() if config.run.export else contextlib.nullcontext() as parity:
        with job.watch.stage("training"):
            trained = Trainer(plan, material).fit(_make_task(first), keep_head=functools.partial(_keep, first, plan))
        with job.watch.stage("evaluation"):
            logits = {split: trained.predict(job.examples, split) for split in list_evaluated(job.examples)}
        _describe_end(job, trained)
        outcome = judge(
            first,
            job.name_classifier(trained.build_network(), plan.backbone.layers[-1].name),
            logits,
            embedded=material.trunk,
            selected="epochs were selected on it; ",
            interrupted=trained.interrupted,
            failed=bool(trained.diverged),
        )
        outcome = repeat(job, outcome, trained)
        outcome = export(first, outcome, parity)
        return close(first, outcome, Views(trained.read_embeddings, trained.read_pretrained, plan.dim))


def _make_task(job: Job) -> Task:
    """The task of the run's own seed, whose epochs are shown and written to `history.csv`."""
    history = History(job.folder, HISTORY_HEADER)
    progress = Progress(job.folder.path, job.screen.line, job.screen.progress, history.keep)
    return Task(job.examples, job.config.training, job.config.run.seed, progress)


def _keep(job: Job, plan: Plan, head: keras.Model, logits: np.ndarray) -> None:
    """Writes the classifier as it is before the tail is trained."""
    keep_classifier(job, attach(head, plan.backbone), plan.backbone.layers[-1].name, logits)


def _introduce(network: Network, plan: Plan) -> None:
    """Shows what will be trained."""
    config, name, layers = network.config, network.preset.name, len(plan.part.layers)
    trained = f"the head, then {count_of(layers, 'layer')} with weights of {name}" if layers else "the head only"
    if layers and not plan.pretrained:
        trained = f"the head and {count_of(layers, 'layer')} with weights of {name}, from scratch"
    weights, epochs = config.backbone.weights, config.training.epochs
    network.screen.line(f"training: {trained}; weights: {weights}; {count_of(epochs, 'epoch')}")
    if plan.trunk is None:
        flag = "--augment=crop" if plan.crop else f"--trainable={config.training.trainable}"
        network.screen.line(f"{flag} bypasses the embedding cache: every epoch runs the full network")


def _describe_end(job: Job, trained: Trained) -> None:
    """Shows that the training ended early, if it did."""
    config = job.config
    if trained.interrupted:
        skipped = f" {config.evaluation.seeds - 1} more seeds were not trained;" if config.evaluation.seeds > 1 else ""
        job.screen.warning(
            f"training: interrupted; the best epoch so far will be evaluated and saved;{skipped} nothing is exported"
        )
        job.screen.warning(f"to continue: tl_keras finetune --resume --run_dir={job.folder.path}")
    if trained.diverged:
        job.warn(f"warning: {trained.diverged} The best weights before that are kept")
