"""`--mode=extract`: fits a scikit-learn classifier on embeddings of a pretrained backbone; exports both as one."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import keras
import numpy as np

from tl_keras.backbones.capacity import check_network
from tl_keras.backbones.cut import read_layer
from tl_keras.backbones.embed import Embedded
from tl_keras.backbones.engines import BATCH_SIZE
from tl_keras.backbones.zoo import find_preset
from tl_keras.classifier.probe_layers import size_in_bytes
from tl_keras.config import Config, ProbeConfig, is_run
from tl_keras.data.examples import Examples
from tl_keras.data.splits import SPLITS, evaluated_split
from tl_keras.errors import UserError
from tl_keras.evaluation.metrics import describe_spread, summarize
from tl_keras.evaluation.tables import format_table, write_examples
from tl_keras.export.embeddings import check_output, write_embeddings
from tl_keras.export.parity import ParityProcess
from tl_keras.jobs.finish import Views, close, close_without_probe, export, judge
from tl_keras.jobs.result import Result
from tl_keras.jobs.start import Job, Network, load_network, start
from tl_keras.probes.estimators import PROBES, Fitted, Recipe, check_probe, fit_probe
from tl_keras.probes.fold import fold
from tl_keras.probes.memory import check_probe_memory
from tl_keras.probes.search import Labeled, Search, choose_parameter
from tl_keras.run import Screen, count_of, read_json, write_atomically
from tl_keras.statistics.intervals import accuracy_interval, with_interval
from tl_keras.training.batches import predict_logits
from tl_keras.training.heads import attach

_COLUMNS = ("layer", "probe", "dim", "parameter", "value", "val_accuracy", "ci95_low", "ci95_high", "seconds")
_PREDICT_BATCH = 128
_HEADER = ("layer", "probe", "parameter", "dim", "val accuracy", "seconds")


def run(config: Config, screen: Screen | None = None) -> Result:
    """Fits probes on the embeddings of one layer or several; the best on val is evaluated and exported.

    Layer, probe and its parameter are selected on val (or by cross-validation within train and val); test is evaluated
    once, with the winner, at the end.
    """
    if config.probe.embeddings_output:
        check_output(config.probe.embeddings_output)
    network = load_network(config, screen or Screen(), with_top=_wants_top(config))
    trunks = _cut_trunks(network)
    check_network(network.backbone, batch_size=BATCH_SIZE, engine=config.engine.engine)
    job = start(network)
    if not job.embeddings_only:
        _check(config.probe, job.draw(config.run.seed).examples, trunks)
        _introduce(network)
    with job.watch.stage("trunk"):
        embedded = job.embed(trunks)
    first = job.draw(config.run.seed)
    write_examples(first.folder, first.examples)
    if config.probe.embeddings_output:
        with job.watch.stage("embeddings"):
            job.screen.line(write_embeddings(config.probe.embeddings_output, first.examples, embedded[0].read))
    if job.embeddings_only:
        return close_without_probe(first, embedded[0])
    _check_refit(config.probe, first.examples)  # every image of test may be broken

    # the process that checks the export loads TensorFlow while the probe is fitted
    with ParityProcess() if config.run.export else contextlib.nullcontext() as parity:
        with job.watch.stage("probe"):
            candidates, winner = _compare(first, trunks, embedded)
            fitted = _refit_winner(first, winner)
            few_shot = _repeat(job, winner, fitted)
        head = fold(fitted, num_classes=len(job.examples.class_names))
        with job.watch.stage("evaluation"):
            logits = {"val": winner.val_logits}
            if len(job.examples.positions("test")):
                logits["test"] = _predict(job.examples, winner.embedded, head, "test")
        job.screen.line(f"head: {winner.probe}, {size_in_bytes(head) / 1e6:,.1f} MB in the exported model")
        outcome = judge(
            first,
            job.name_classifier(attach(head, winner.trunk), winner.trunk.layers[-1].name),
            logits,
            embedded=winner.embedded,
            selected=_describe_selection(candidates, winner),
            entries={"candidates": [one.as_dict() for one in candidates], "probe": winner.as_dict(), **few_shot},
        )
        outcome = export(first, outcome, parity)
        read, dim = winner.embedded.read_float32, int(winner.trunk.output_shape[1])
        return close(first, outcome, Views(read, read, dim))


def _cut_trunks(network: Network) -> list[keras.Model]:
    """The backbone up to each of the layers that are read.

    Raises:
        UserError: there is no such layer, or a pooling was requested where there is no feature map.
    """
    probe, backbone = network.config.probe, network.backbone
    layers = probe.feature_layer or (backbone.operations[-1].name,)
    trunks = [read_layer(backbone, layer, pooling=probe.pooling) for layer in layers]
    _check_pooling(trunks, layers, probe.pooling)
    return trunks


def _introduce(network: Network) -> None:
    """Shows what will be fitted."""
    probe = network.config.probe
    layers = ", ".join(probe.feature_layer or (network.backbone.operations[-1].name,))
    weights = network.config.backbone.weights
    network.screen.line(f"probe: {', '.join(probe.probe)} on {layers}; weights: {weights}")


def _refit_winner(job: Job, winner: _Candidate) -> Fitted:
    """The probe that is evaluated and exported: the winner, or the winner fitted on train and val together."""
    if job.config.probe.refit != "train+val":
        return cast(Fitted, winner.fitted)
    fitted = _refit(job, winner, winner.value)
    _warn_of_convergence(job, fitted, None)
    return fitted


def _describe_selection(candidates: Sequence[_Candidate], winner: _Candidate) -> str:
    """What was selected on val, a clause with its semicolon; may be empty."""
    if len(candidates) > 1:
        return "layers and probes were selected on it; "
    if not winner.search:
        return ""
    how = "by cross-validation with it" if "cross" in winner.search.chosen_by else "on it"
    return f"the probe's parameters were selected {how}; "


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A probe on a layer, fitted on train and scored on val; `fitted` is kept only for the best."""

    trunk: keras.Model
    embedded: Embedded
    probe: str
    search: Search | None
    value: float
    converged: bool
    fitted: Any
    val_logits: np.ndarray
    correct: int
    seconds: float

    @property
    def layer(self) -> str:
        return str(self.trunk.operations[-1].name)

    @property
    def accuracy(self) -> float:
        return self.correct / len(self.val_logits)

    @property
    def interval(self) -> tuple[float, float]:
        return accuracy_interval(self.correct, len(self.val_logits))

    def as_dict(self) -> dict[str, Any]:
        """The entry of `metrics.json`."""
        return {
            "layer": self.layer,
            "probe": self.probe,
            "dim": int(self.trunk.output_shape[1]),
            "parameter": PROBES[self.probe].parameter,
            "value": self.value,
            "val_accuracy": self.accuracy,
            "val_accuracy_ci95": list(self.interval),
            "seconds": round(self.seconds, 3),
            "converged": self.converged,
            "chosen_by": self.search.chosen_by if self.search else "asked for",
            "tried": [[value, score] for value, score in self.search.scores.items()] if self.search else [],
        }

    def as_cells(self) -> tuple[Any, ...]:
        """The row of `candidates.csv`."""
        row = self.as_dict()
        return tuple(row[name] for name in _COLUMNS[:6]) + (*self.interval, row["seconds"])

    def as_row(self) -> tuple[str, ...]:
        """The row on the screen."""
        return (
            self.layer,
            self.probe,
            f"{PROBES[self.probe].parameter}={self.value:.3g}",
            f"{self.trunk.output_shape[1]:,}",
            with_interval(self.accuracy, self.interval),
            f"{self.seconds:.1f}",
        )


def _compare(
    job: Job, trunks: Sequence[keras.Model], embedded: Sequence[Embedded]
) -> tuple[list[_Candidate], _Candidate]:
    """Fits every probe on every layer, shows and writes each result, and selects the best on val."""
    config, candidates, winner = job.config.probe, list[_Candidate](), None
    several = len(trunks) * len(config.probe) > 1
    for trunk, found in zip(trunks, embedded, strict=True):
        train, val = (_read(job.examples, found, split) for split in ("train", "val"))
        for probe in config.probe:
            candidate = _try(job, trunk, found, probe, train=train, val=val)
            is_best = winner is None or candidate.accuracy > winner.accuracy
            winner = candidate if winner is None or is_best else winner
            candidates.append(dataclasses.replace(candidate, fitted=None))
            if several:
                job.folder.write_csv("candidates.csv", _COLUMNS, [one.as_cells() for one in candidates])
                job.screen.line(f"{candidate.layer}, {probe}: val accuracy {candidate.as_row()[4]}")
    if winner is None:
        raise ValueError("no probe was tried")
    if several:
        best = [one.layer == winner.layer and one.probe == winner.probe for one in candidates]
        rows = [
            (*one.as_row(), "best on val" if is_best else "") for one, is_best in zip(candidates, best, strict=True)
        ]
        for line in format_table((*_HEADER, ""), rows):
            job.screen.line(line)
    else:
        how = winner.search.chosen_by if winner.search else "asked for"
        job.screen.line(f"probe: {winner.as_row()[2]} ({how}), {winner.seconds:.1f} s")
    return candidates, winner


def _check_pooling(trunks: Sequence[keras.Model], layers: Sequence[str], pooling: str) -> None:
    """Checks that there is a feature map to pool, if a pooling is given.

    Raises:
        UserError: the layers have no feature map.
    """
    if pooling != "avg" and all(trunk.operations[-1].name in layers for trunk in trunks):
        raise UserError(
            f"--pooling={pooling} needs a feature map, but the output of {', '.join(layers)} is a vector. Give a layer "
            "with a feature map as --feature_layer, or leave --pooling out."
        )


def _wants_top(config: Config) -> bool:
    """Whether a layer of the backbone's top is read; the backbone of an earlier run has no top."""
    if is_run(config.backbone.weights):
        return False
    top = find_preset(config.backbone.backbone or "").top
    return bool(top) and (not config.probe.feature_layer or bool(set(top) & set(config.probe.feature_layer)))


def _check(config: ProbeConfig, examples: Examples, trunks: Sequence[keras.Model]) -> None:
    """Checks the probes before the embeddings are computed."""
    _check_refit(config, examples)
    count = len(examples.positions("train")) + len(examples.positions("val"))
    for probe in config.probe:
        check_probe(probe, examples.labels("train"), value=config.probe_parameter)
        for trunk in trunks:
            check_probe_memory(probe, count=count, dim=int(trunk.output_shape[1]))


def _check_refit(config: ProbeConfig, examples: Examples) -> None:
    if config.refit == "train+val" and not len(examples.positions("test")):
        raise UserError(
            "--refit=train+val leaves no images for evaluation, because there is no test split. Add a test split, "
            "create one with --test_fraction, or leave --refit out."
        )


def _recipe(job: Job) -> Recipe:
    probe = job.config.probe
    return Recipe(scale=probe.scale, max_iter=probe.max_iter, seed=job.config.run.seed)


def _read(examples: Examples, embedded: Embedded, *splits: str) -> Labeled:
    positions = np.concatenate([examples.positions(split) for split in splits])
    return embedded.read(positions), examples.source.labels[positions]


def _predict(examples: Examples, embedded: Embedded, head: keras.Model, split: str) -> np.ndarray:
    """Predicts with the folded head, so that the metrics hold for the served model."""
    return predict_logits(head, embedded.read, examples.positions(split), batch_size=_PREDICT_BATCH)


def _try(job: Job, trunk: keras.Model, embedded: Embedded, probe: str, *, train: Labeled, val: Labeled) -> _Candidate:
    """Selects the parameter, fits on train, and scores on val."""
    start = time.perf_counter()
    search, fitted = _fit(job, probe, train, val)
    _warn_of_convergence(job, fitted, search)
    head = fold(fitted, num_classes=len(job.examples.class_names))
    logits = _predict(job.examples, embedded, head, "val")
    correct = int((logits.argmax(1) == val[1]).sum())
    seconds = time.perf_counter() - start
    return _Candidate(trunk, embedded, probe, search, fitted.value, fitted.converged, fitted, logits, correct, seconds)


def _fit(job: Job, probe: str, train: Labeled, val: Labeled) -> tuple[Search | None, Fitted]:
    settings, recipe, search, value = job.config.probe, _recipe(job), None, job.config.probe.probe_parameter
    if value is None:
        search = _search_once(
            job.folder.path / "checkpoints" / "search.json",
            (probe, recipe, settings.choose_by, *train, *val),
            lambda: choose_parameter(
                probe, train, val, recipe=recipe, choose_by=settings.choose_by, show_progress=job.screen.progress
            ),
        )
        value = search.value
    return search, fit_probe(probe, value, *train, recipe)


def _search_once(path: Path, inputs: tuple[Any, ...], choose: Callable[[], Search]) -> Search:
    """Searches, or reads the result of an interrupted process with the same inputs."""
    digest = hashlib.sha256()
    for value in inputs:
        digest.update(np.ascontiguousarray(value).tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    key = digest.hexdigest()
    known = read_json(path) if path.is_file() else {}
    if key in known:
        found = known[key]
        return Search(**{**found, "scores": {value: score for value, score in found["scores"]}})
    search = choose()
    known[key] = {**dataclasses.asdict(search), "scores": list(search.scores.items())}
    write_atomically(path, json.dumps(known).encode())
    return search


def _warn_of_convergence(job: Job, fitted: Fitted, search: Search | None) -> None:
    config, name = job.config.probe, fitted.name
    if not fitted.converged:
        scale = ", or --scale=standard" if config.scale == "none" else ""
        job.warn(
            f"warning: {name} did not converge in --max_iter={config.max_iter} iterations; give more iterations, a "
            f"smaller C (--probe_parameter){scale}"
        )
    elif search and search.unconverged:
        values = ", ".join(f"{value:.3g}" for value in search.unconverged)
        job.warn(f"note: with C {values} {name} did not converge in {config.max_iter} iterations")
    if search and name != "knn" and search.value in {min(search.scores), max(search.scores)}:
        job.warn(f"note: the best {PROBES[name].parameter} of {name} is at the end of its grid, {search.value:.3g}")


def _refit(job: Job, winner: _Candidate, value: float) -> Fitted:
    """Fits the winner on train and val together; the metrics on val remain those of the fit on train."""
    both = _read(job.examples, winner.embedded, "train", "val")
    return fit_probe(winner.probe, value, *both, _recipe(job))


def _repeat(job: Job, winner: _Candidate, first: Fitted) -> dict[str, Any]:
    """Fits the winner on other random draws of `--shots` (--repeats), for mean and standard deviation.

    Returns:
        The entry `few_shot` of `metrics.json`; empty without repeats.
    """
    config, accuracies = job.config, list[float]()
    if config.probe.repeats == 1:
        return {}
    split = evaluated_split(name for name in SPLITS if len(job.examples.positions(name)))
    val = _read(job.examples, winner.embedded, "val")
    for repeat in range(config.probe.repeats):
        drawn, fitted = job.draw(config.run.seed + repeat), first
        if repeat:
            _, fitted = _fit(job, winner.probe, _read(drawn.examples, winner.embedded, "train"), val)
            fitted = _refit(drawn, winner, fitted.value) if config.probe.refit == "train+val" else fitted
        head = fold(fitted, num_classes=len(job.examples.class_names))
        logits = _predict(drawn.examples, winner.embedded, head, split)
        accuracies.append(float((logits.argmax(1) == drawn.examples.labels(split)).mean()))
        job.screen.progress(f"draw {repeat + 1}/{config.probe.repeats}: {split} accuracy {accuracies[-1]:.3f}")
    summary, shots = summarize(accuracies), config.data.shots
    draws = f"{count_of(int(shots or 0), 'image')} per class, {count_of(len(accuracies), 'draw')}"
    job.screen.line(f"{draws}: {split} accuracy {describe_spread(summary)}")
    return {"few_shot": {"shots": shots, "split": split, **summary}}
