"""Steps of a training job: plan, memory check, embeddings, and repetition with other random seeds."""

from __future__ import annotations

from typing import Any

import keras

from tl_keras.backbones.capacity import check_network
from tl_keras.backbones.embed import embed_tail
from tl_keras.backbones.engines import BATCH_SIZE
from tl_keras.config import Config
from tl_keras.data.examples import Examples
from tl_keras.data.splits import SPLITS, evaluated_split
from tl_keras.errors import UserError
from tl_keras.evaluation.metrics import describe_spread, summarize
from tl_keras.jobs.finish import Outcome, record
from tl_keras.jobs.start import Job, load_backbone, wanted_views
from tl_keras.run import INTERRUPTED, Interrupts
from tl_keras.training.fit import Progress
from tl_keras.training.plan import Plan, plan_training
from tl_keras.training.stages import Task
from tl_keras.training.trainer import Material, Trained, Trainer


def make_plan(backbone: keras.Model, config: Config) -> Plan:
    """Plans the training that the settings ask for; see `plan_training`."""
    return plan_training(
        backbone,
        config.training,
        pretrained=config.backbone.weights != "none",
        repeated=config.evaluation.seeds > 1,
    )


def check_training_memory(plan: Plan, config: Config) -> None:
    """Checks that the training fits in the free memory.

    Raises:
        UserError: it does not fit.
    """
    check_network(
        plan.backbone,
        batch_size=BATCH_SIZE if plan.trunk else 0,
        engine=config.engine.engine,
        trained=plan.tail if plan.has_tail else None,
        training_batch=config.training.batch_size,
    )


def embed_plan(job: Job, plan: Plan) -> Material:
    """Computes the embeddings that a plan is trained on: outputs of its trunk, and of the pretrained backbone."""
    mirrored = job.config.training.augment == "flip"
    embedded = job.embed([plan.trunk] if plan.trunk else [], mirrored=mirrored)[0]
    if not (plan.pretrained and plan.has_tail):
        return Material(embedded, embedded)
    views = wanted_views(job.examples, mirrored=mirrored)
    return Material(embedded, embed_tail(embedded, plan.tail, wanted=views, show_progress=job.screen.progress))


def repeat(job: Job, outcome: Outcome, first: Trained) -> Outcome:
    """Trains again with other seeds (--seeds), for mean and standard deviation; the classifier stays the first one.

    Each training equals that of a run with `--seed` of its own: its draw of `--shots`, its random weights if
    `--weights=none`, its order of batches.

    Args:
        job: the run, with all its examples.
        outcome: what the first seed has produced.
        first: the network of the first seed.
    """
    count = job.config.evaluation.seeds
    if count == 1 or first.interrupted:
        return outcome
    with job.watch.stage("seeds"), first.restored():
        repetition = _Repetition(job, first.plan, first.material, outcome)
        repetition.run()
    return record(job, outcome, repetition.entries, status=repetition.status)


class _Repetition:
    """Trainings with further seeds.

    Attributes:
        entries: for `metrics.json`.
        status: the exit status.
    """

    def __init__(self, job: Job, plan: Plan, material: Material, outcome: Outcome) -> None:
        self._job, self._plan, self._material = job, plan, material
        self._split = evaluated_split(outcome.probabilities)
        self._accuracies = [self._measure(outcome.probabilities[self._split].argmax(1))]
        self.entries: dict[str, Any] = {}
        self.status = outcome.status

    def run(self) -> None:
        """Trains with each seed; an interruption keeps what is complete."""
        job, config = self._job, self._job.config
        count, interrupted = config.evaluation.seeds, False
        try:
            for seed in range(config.run.seed + 1, config.run.seed + count):
                with Interrupts.restored():
                    self._train(seed)
        except KeyboardInterrupt:
            interrupted, self.status = True, INTERRUPTED
            job.screen.warning(
                f"seeds: interrupted after {len(self._accuracies)} of {count}; the run is kept and will be completed"
            )
        if len(self._accuracies) > 1:
            summary = summarize(self._accuracies)
            job.screen.line(f"{len(self._accuracies)} seeds: {self._split} accuracy {describe_spread(summary)}")
            self.entries = {"seeds": {"split": self._split, "interrupted": interrupted, **summary}}

    def _train(self, seed: int) -> None:
        self._reset(seed)
        job = self._job
        folder = job.folder.path / "seeds" / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        progress = Progress(folder, _ignore, job.screen.progress, _ignore)
        task = Task(job.draw(seed).examples, job.config.training, seed, progress)
        try:
            trained = Trainer(self._plan, self._material).fit(task)
            failure = trained.diverged
        except UserError as error:
            failure = str(error)
        if failure:
            job.warn(f"warning: seed {seed} is left out: {failure}")
            return
        if trained.interrupted:
            raise KeyboardInterrupt
        accuracy = self._measure(trained.predict(job.examples, self._split).argmax(1))
        self._accuracies.append(accuracy)
        job.screen.progress(f"seed {seed}: {self._split} accuracy {accuracy:.3f}")

    def _reset(self, seed: int) -> None:
        """Gives the network the weights that a run with this seed begins with."""
        keras.utils.set_random_seed(seed)
        if self._plan.pretrained:
            self._plan.reset()
        else:
            self._plan = make_plan(load_backbone(self._job.config.backbone)[1], self._job.config)
            self._material = embed_plan(self._job, self._plan)

    def _measure(self, predicted: Any) -> float:
        return float((predicted == self._job.examples.labels(self._split)).mean())


def list_evaluated(examples: Examples) -> list[str]:
    """The splits that are evaluated: those of val and test that have images."""
    return [split for split in SPLITS[1:] if len(examples.positions(split))]


def _ignore(*shown: Any) -> None:
    """Drops what further seeds show epoch by epoch."""
    del shown
