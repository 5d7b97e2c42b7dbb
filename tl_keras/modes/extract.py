"""`--mode=extract`: a pretrained backbone read as it is, its embeddings given to scikit-learn; one model of both."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tl_keras.backbones.cut import read_layer
from tl_keras.backbones.embed import Embedded
from tl_keras.backbones.zoo import find_preset
from tl_keras.classifier import Classifier
from tl_keras.config import Config, is_run
from tl_keras.data.examples import Examples, draw_shots
from tl_keras.errors import UserError
from tl_keras.evaluation.intervals import accuracy_interval
from tl_keras.evaluation.tables import format_table, write_examples
from tl_keras.export.embeddings import check_output, write_embeddings
from tl_keras.export.parity import ParityProcess
from tl_keras.folded import size_in_bytes
from tl_keras.modes.steps import Job, load_backbone, load_job
from tl_keras.probes.estimators import PROBES, Fitted, Recipe, check_probe, fit_probe
from tl_keras.probes.fold import fold
from tl_keras.probes.memory import check_memory
from tl_keras.probes.search import Labelled, Search, choose_parameter
from tl_keras.run import Result, Screen, Stopwatch
from tl_keras.training.batches import predict_probabilities
from tl_keras.training.heads import attach

_PREDICT_BATCH = 128


def run(config: Config) -> Result:
    """Fits probes on the embeddings of one layer or several; what is best on val is evaluated and exported.

    Layer, probe and its parameter are chosen on val (or by cross-validation within train and val); test is looked at
    once, by the winner, at the end.
    """
    screen, watch = Screen(), Stopwatch()
    keras.utils.set_random_seed(config.run.seed)
    with watch.stage("backbone"):
        preset, backbone = load_backbone(config.backbone, with_top=_wants_top(config))
        layers = config.probe.feature_layer or (backbone.operations[-1].name,)
        trunks = [read_layer(backbone, layer, pooling=config.probe.pooling) for layer in layers]
    job = load_job(config, preset, screen, watch, unlabelled=config.probe.embeddings_output is not None)
    if job.examples.class_names:
        _check(job, trunks)
        probes = ", ".join(config.probe.probe)
        screen.line(f"probe: {probes} on {', '.join(layers)}; weights: {config.backbone.weights}")
    if config.probe.embeddings_output:
        check_output(config.probe.embeddings_output)

    with watch.stage("trunk"):
        embedded = job.embed(trunks, preset, image_size=int(backbone.input_shape[1]))
    write_examples(job.folder, job.examples)
    if config.probe.embeddings_output:
        with watch.stage("embeddings"):
            written = write_embeddings(config.probe.embeddings_output, job.examples, embedded[0].read)
            screen.line(written)
    if not job.examples.class_names:
        return job.finish_without_labels(embedded[0])
    if config.data.shots and config.probe.repeats > 1:
        drawn_from, job.examples = job.examples, draw_shots(job.examples, shots=config.data.shots, seed=config.run.seed)

    # the process that checks the export loads TensorFlow while the probe is fitted
    with ParityProcess() if config.run.export else contextlib.nullcontext() as parity:
        with watch.stage("probe"):
            candidates = [
                _try(job, trunk, found, probe)
                for trunk, found in zip(trunks, embedded, strict=True)
                for probe in config.probe.probe
            ]
            winner = max(candidates, key=lambda candidate: candidate.accuracy)
            _show(screen, candidates, winner)
            more: dict[str, Any] = {"candidates": [one.as_dict() for one in candidates], "probe": winner.as_dict()}
            fitted = _refit(job, winner) if config.probe.refit == "train+val" else winner.fitted
            head = fold(fitted, num_classes=len(job.examples.class_names))
            if config.probe.repeats > 1:
                more["few_shot"] = _repeat(job, drawn_from, winner, screen)
        with watch.stage("evaluation"):
            probabilities = {"val": winner.val_probabilities}
            if len(job.examples.positions("test")):
                probabilities["test"] = _predict(job.examples, winner.embedded, head, "test")
        screen.line(f"head: {winner.probe}, {size_in_bytes(head) / 1e6:,.1f} MB in the exported model")
        classifier = Classifier(
            attach(head, winner.trunk),
            name=f"{job.examples.source.name}-{preset.name}",
            labels=job.examples.class_names,
            backbone=preset.name,
            embedding_layer=winner.trunk.layers[-1].name,
            resize=config.backbone.resize,
        )
        chosen = "layers and probes" if len(candidates) > 1 else "the probe's parameters"
        return job.finish(classifier, probabilities, embedded=winner.embedded, parity=parity, chosen=chosen, more=more)


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A probe on a layer, fitted on train and scored on val."""

    trunk: keras.Model
    embedded: Embedded
    probe: str
    search: Search | None
    fitted: Fitted
    val_probabilities: np.ndarray
    correct: int
    seconds: float

    @property
    def layer(self) -> str:
        return str(self.trunk.operations[-1].name)

    @property
    def accuracy(self) -> float:
        return self.correct / len(self.val_probabilities)

    def as_dict(self) -> dict[str, Any]:
        """For `metrics.json`."""
        search = self.search
        return {
            "layer": self.layer,
            "probe": self.probe,
            "dim": int(self.trunk.output_shape[1]),
            "parameter": PROBES[self.probe].parameter,
            "value": self.fitted.value,
            "val_accuracy": self.accuracy,
            "val_accuracy_ci95": list(accuracy_interval(self.correct, len(self.val_probabilities))),
            "seconds": round(self.seconds, 3),
            "converged": self.fitted.converged,
            "chosen_by": search.chosen_by if search else "asked for",
            "tried": [[value, score] for value, score in search.scores.items()] if search else [],
        }


def _wants_top(config: Config) -> bool:
    """Whether a layer is read that only the backbone with its top has; a run's backbone is as the run left it."""
    if is_run(config.backbone.weights):
        return False
    top = find_preset(config.backbone.backbone or "").top
    return bool(top) and (not config.probe.feature_layer or bool(set(top) & set(config.probe.feature_layer)))


def _check(job: Job, trunks: Sequence[keras.Model]) -> None:
    """Finds out before anything long is computed what would stop the run after it."""
    config, examples = job.config.probe, job.examples
    if config.refit == "train+val" and not len(examples.positions("test")):
        raise UserError(
            "--refit=train+val leaves nothing to measure the classifier on: there is no test split. Give one, carve it "
            "with --test_fraction, or leave --refit out."
        )
    for probe in config.probe:
        check_probe(probe, examples.labels("train"), value=config.probe_parameter)
        for trunk in trunks:
            check_memory(probe, count=int(np.sum(examples.splits >= 0)), dim=int(trunk.output_shape[1]))


def _recipe(job: Job) -> Recipe:
    probe = job.config.probe
    return Recipe(scale=probe.scale, max_iter=probe.max_iter, seed=job.config.run.seed)


def _read(examples: Examples, embedded: Embedded, *splits: str) -> Labelled:
    positions = np.concatenate([examples.positions(split) for split in splits])
    return embedded.read(positions), examples.source.labels[positions]


def _predict(examples: Examples, embedded: Embedded, head: keras.Model, split: str) -> np.ndarray:
    """By the folded head: what is measured is what is served."""
    return predict_probabilities(head, embedded.read, examples.positions(split), batch_size=_PREDICT_BATCH)


def _try(job: Job, trunk: keras.Model, embedded: Embedded, probe: str) -> _Candidate:
    """Chooses the parameter, fits on train, scores on val."""
    start = time.perf_counter()
    examples = job.examples
    search, fitted = _fit(job, examples, embedded, probe)
    head = fold(fitted, num_classes=len(examples.class_names))
    probabilities = _predict(examples, embedded, head, "val")
    correct = int((probabilities.argmax(1) == examples.labels("val")).sum())
    return _Candidate(
        trunk, embedded, probe, search, fitted, probabilities, correct, seconds=time.perf_counter() - start
    )


def _fit(job: Job, examples: Examples, embedded: Embedded, probe: str) -> tuple[Search | None, Fitted]:
    settings, recipe, screen = job.config.probe, _recipe(job), job.screen
    train, search, value = _read(examples, embedded, "train"), None, settings.probe_parameter
    if value is None:
        val = _read(examples, embedded, "val")
        search = choose_parameter(
            probe, train, val, recipe=recipe, choose_by=settings.choose_by, show_progress=screen.progress
        )
        value = search.value
        if search.value in {min(search.scores), max(search.scores)} and probe != "knn":
            screen.line(f"note: the best {PROBES[probe].parameter} of {probe} is the end of its grid, {value:.3g}")
    fitted = fit_probe(probe, value, *train, recipe)
    _warn_of_convergence(job, fitted, search)
    return search, fitted


def _warn_of_convergence(job: Job, fitted: Fitted, search: Search | None) -> None:
    max_iter = job.config.probe.max_iter
    if not fitted.converged:
        job.screen.line(
            f"warning: {fitted.name} has not converged in --max_iter={max_iter} iterations; give more, a smaller C "
            "(--probe_parameter), or --scale=standard"
        )
    elif search and search.unconverged:
        values = ", ".join(f"{value:.3g}" for value in search.unconverged)
        job.screen.line(f"note: with C {values} {fitted.name} did not converge in {max_iter} iterations")


def _refit(job: Job, winner: _Candidate) -> Fitted:
    """The winner on train and val together; val's figures stay those of the one fitted on train alone."""
    both = _read(job.examples, winner.embedded, "train", "val")
    return fit_probe(winner.probe, winner.fitted.value, *both, _recipe(job))


def _repeat(job: Job, examples: Examples, winner: _Candidate, screen: Screen) -> dict[str, Any]:
    """The winner's layer and probe on other draws of as many examples a class: mean and spread."""
    config, accuracies = job.config, []
    split = "test" if len(examples.positions("test")) else "val"
    for repeat in range(config.probe.repeats):
        drawn = draw_shots(examples, shots=int(config.data.shots or 0), seed=config.run.seed + repeat)
        _, fitted = _fit(job, drawn, winner.embedded, winner.probe)
        head = fold(fitted, num_classes=len(drawn.class_names))
        probabilities = _predict(drawn, winner.embedded, head, split)
        accuracies.append(float((probabilities.argmax(1) == drawn.labels(split)).mean()))
        screen.progress(f"draw {repeat + 1}/{config.probe.repeats}: {split} accuracy {accuracies[-1]:.3f}")
    mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies)
    screen.line(
        f"{config.data.shots} examples a class, {len(accuracies)} draws: {split} accuracy {mean:.3f}, standard "
        f"deviation {spread:.3f}, {min(accuracies):.3f} to {max(accuracies):.3f}"
    )
    return {
        "shots": config.data.shots,
        "split": split,
        "accuracies": accuracies,
        "mean": mean,
        "standard_deviation": spread,
    }


def _show(screen: Screen, candidates: Sequence[_Candidate], winner: _Candidate) -> None:
    """What was tried, in a table where it is more than one."""
    if len(candidates) == 1:
        value = f"{PROBES[winner.probe].parameter}={winner.fitted.value:.3g}"
        how = winner.search.chosen_by if winner.search else "asked for"
        screen.line(f"probe: {value} ({how}), {winner.seconds:.1f} s")
        return
    rows = []
    for one in candidates:
        low, high = accuracy_interval(one.correct, len(one.val_probabilities))
        rows.append((
            one.layer,
            one.probe,
            f"{PROBES[one.probe].parameter}={one.fitted.value:.3g}",
            f"{one.trunk.output_shape[1]:,}",
            f"{one.accuracy:.3f} [{low:.3f}, {high:.3f}]",
            f"{one.seconds:.1f}",
            "best on val" if one is winner else "",
        ))
    for line in format_table(("layer", "probe", "parameter", "dim", "val accuracy", "seconds", ""), rows):
        screen.line(line)
