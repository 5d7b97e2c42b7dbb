"""`--mode=evaluate`: measures a trained classifier on labeled images."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tl_keras.audit.examine import describe_origin
from tl_keras.classifier import LoadedClassifier, load
from tl_keras.config import Config, nearest
from tl_keras.data.corruptions import STRENGTHS
from tl_keras.data.examples import Examples, scan
from tl_keras.data.images import make_images
from tl_keras.data.sources import Source, load_source
from tl_keras.data.splits import SPLITS, UNUSED, carve, evaluated_split
from tl_keras.errors import UserError
from tl_keras.evaluation.leaks import TrainedOn, measure_seen, read_earlier_images, read_trained_on
from tl_keras.evaluation.metrics import headline
from tl_keras.evaluation.robustness import measure_corruptions, robustness_rows
from tl_keras.evaluation.slices import Attributes, read_attributes
from tl_keras.evaluation.tables import (
    describe_device,
    describe_environment,
    describe_evaluation,
    format_table,
    write_evaluation,
)
from tl_keras.jobs.comparison import compare_runs
from tl_keras.jobs.lineage import find_weights, load_run_config, trace_weights
from tl_keras.jobs.result import Result
from tl_keras.jobs.start import create_folder
from tl_keras.report.card import Card, load_card
from tl_keras.report.compose import Judged, compose_report, try_report
from tl_keras.run import INTERRUPTED, Interrupts, RunFolder, Screen, Stopwatch, count_of, name_run, read_json
from tl_keras.statistics.coverage import measure_threshold
from tl_keras.statistics.intervals import with_interval

_CORRUPTED_BATCH = 32
_NAMED = 10  # classes in an error


def run(config: Config, screen: Screen | None = None) -> Result:
    """Measures a classifier on the val and test of its own data, or on all labeled images of another source."""
    screen = screen or Screen()
    if config.evaluation.compare:
        return compare_runs(config, screen)
    task = _start(config, screen)
    with task.watch.stage("prediction"):
        probabilities, broken = _predict(task.classifier, task.examples, screen)
    with task.watch.stage("evaluation"):
        probabilities = task.remove_broken(probabilities, broken)
        metrics, status = _measure(task, probabilities)
    task.folder.write_json("metrics.json", metrics)
    for line in [*task.warnings, *describe_evaluation(metrics)]:
        screen.line(line)
    if config.evaluation.report:
        with task.watch.stage("report"):
            status = _try_report(task, probabilities, metrics) or status
        metrics["timing"]["seconds"] = dict(task.watch.seconds)
        task.folder.write_json("metrics.json", metrics)
    split = evaluated_split(metrics)
    own = split == "val" and config.data.dataset is None
    note = " (its run made selections on it; there is no test split)" if own else ""
    screen.result(f"{headline(split, metrics[split])}{note} · {task.folder.path}")
    return Result(run_dir=task.folder.path, metrics=metrics, exit_status=status, is_complete=not status)


@dataclasses.dataclass
class _Task:
    """One evaluation.

    Attributes:
        config: all settings.
        screen: what the user sees.
        path: the run folder or the exported version folder.
        classifier: the classifier in it.
        folder: the folder of the evaluation.
        examples: labeled images; those that can't be decoded are removed when they are found.
        attributes: attributes of the examples (--slices).
        card: the user's entries for the model card.
        trained_on: images that the classifier was trained on, if that is known.
        notes: remarks on the data, already shown.
        warnings: warnings about the metrics, shown beside them.
    """

    config: Config
    screen: Screen
    path: Path
    classifier: LoadedClassifier
    folder: RunFolder
    examples: Examples
    attributes: Attributes | None
    card: Card
    trained_on: TrainedOn | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    @property
    def watch(self) -> Stopwatch:
        """Seconds by stage."""
        return self.screen.watch

    def remove_broken(self, probabilities: dict[str, np.ndarray], broken: dict[int, str]) -> dict[str, np.ndarray]:
        """Removes images that could not be decoded, and splits that have no others.

        Args:
            probabilities: split → float32 `(n, classes)`.
            broken: position → reason.

        Returns:
            The probabilities of the others.
        """
        if broken:
            kept = {split: ~np.isin(self.examples.positions(split), list(broken)) for split in probabilities}
            probabilities = {split: values[kept[split]] for split, values in probabilities.items()}
            limit = self.config.data.max_broken_fraction
            self.examples = self.examples.without(broken, max_broken_fraction=limit, report=self.folder.write_broken)
        _tell_broken(self.examples, self.folder, self.screen)
        return {split: values for split, values in probabilities.items() if len(values)}


def _start(config: Config, screen: Screen) -> _Task:
    """Loads the classifier and its data, and creates the folder of the evaluation."""
    path, card, watch = Path(str(config.read.classifier)), load_card(config.evaluation.card), screen.watch
    with watch.stage("classifier"):
        classifier = load(str(path))
    with watch.stage("data"):
        source, splits = _load_data(config, path)
        source = _renumber(source, classifier.labels)
        attributes = read_attributes(config.evaluation.slices, source.ids)
        run_dir = config.run.run_dir or name_run("evaluate", source.name, path.resolve().name)
        folder = create_folder(run_dir, config, screen)
        examples = scan(
            source,
            splits,
            max_broken_fraction=config.data.max_broken_fraction,
            show_progress=screen.progress,
            report=folder.write_broken,
        )
    task = _Task(config, screen, path, classifier, folder, examples, attributes, card)
    counts = ", ".join(f"{split} {len(examples.positions(split)):,}" for split in SPLITS[1:])
    screen.line(f"device: {describe_device()}, engine: tensorflow")
    screen.line(f"data: {source.name}: {counts}; {len(classifier.labels):,} classes")
    task.trained_on, unknown = _read_trained_on(path)
    task.notes = [*_list_origin(config, path, source.class_names), *unknown]
    for note in task.notes:
        screen.line(note)
    return task


def _measure(task: _Task, probabilities: dict[str, np.ndarray]) -> tuple[dict[str, Any], int]:
    """Makes the content of `metrics.json`, and the exit status: 1 if the corruptions could not be measured."""
    config, examples, status = task.config.evaluation, task.examples, 0
    metrics: dict[str, Any] = write_evaluation(
        task.folder, examples, probabilities, target_accuracy=config.target_accuracy, attributes=task.attributes
    )
    metrics |= _reject_as_run(metrics, task.path, examples, probabilities)
    metrics["leaks"], task.warnings = measure_seen(
        task.trained_on,
        examples,
        probabilities,
        selection_matters=SPLITS[1:] if task.config.data.dataset else ("test",),
    )
    if config.corruptions:
        split = evaluated_split(probabilities)
        more, status = _try_corruptions(task.classifier, examples, split, config.corruption_images, task.screen)
        metrics |= more
    metrics["environment"] = describe_environment(engine="tensorflow", precision="float32")
    count = sum(map(len, probabilities.values()))
    metrics["timing"] = {
        "seconds": dict(task.watch.seconds),
        "trunk_images": count,
        "trunk_images_per_second": round(count / task.watch.seconds["prediction"], 1),
    }
    return metrics, status


def _try_report(task: _Task, probabilities: dict[str, np.ndarray], metrics: dict[str, Any]) -> int:
    write = functools.partial(_write_report, task, probabilities, metrics)
    return try_report(write, task.screen.line, task.screen.warning)


def _write_report(task: _Task, probabilities: dict[str, np.ndarray], metrics: dict[str, Any]) -> Path:
    return compose_report(
        task.folder,
        _judge(task.classifier, task.path, task.examples, probabilities),
        metrics,
        config=task.config.as_dict(),
        command=task.config.as_command(),
        card=task.card,
        notes=[*task.notes, *task.warnings],
    )


def _tell_broken(examples: Examples, folder: RunFolder, screen: Screen) -> None:
    """Shows how many images are left out.

    Raises:
        UserError: no image is left.
    """
    if not (examples.splits >= 0).any():
        raise UserError(
            f"none of the {len(examples.broken)} images can be used; {folder.path}/broken.csv has the reasons. Repair "
            "them, or give other images."
        )
    if examples.broken:
        screen.warning(folder.describe_broken(len(examples.broken)))


def _judge(
    classifier: LoadedClassifier, path: Path, examples: Examples, probabilities: dict[str, np.ndarray]
) -> Judged:
    """Collects the classifier and its predictions for the report; an exported model is named after its folder."""
    trained = classifier.trained
    return Judged(
        name=trained.name if trained else "-".join(path.resolve().parts[-2:]),
        backbone=trained.backbone if trained else "",
        examples=examples,
        probabilities=probabilities,
        image_size=classifier.decoding["image_size"],
        resize=classifier.decoding["resize"],
        trained=trained,
    )


def _try_corruptions(
    classifier: LoadedClassifier, examples: Examples, split: str, count: int, screen: Screen
) -> tuple[dict[str, Any], int]:
    """Makes the entry `robustness` of `metrics.json`, empty if it fails or is interrupted; and the exit status."""
    try:
        with Interrupts.restored():
            return {"robustness": _corrupt(classifier, examples, split, count, screen)}, 0
    except KeyboardInterrupt:
        screen.warning("corruptions: interrupted; the evaluation is complete without them")
        return {}, INTERRUPTED
    except UserError as error:
        screen.line(f"warning: {error} The evaluation is complete without them.")
        return {}, 1


def _corrupt(
    classifier: LoadedClassifier, examples: Examples, split: str, count: int, screen: Screen
) -> dict[str, Any]:
    """Measures accuracy on corrupted images, drawn at random from a split."""
    positions = np.sort(np.random.default_rng(0).permutation(examples.positions(split))[:count])
    size, resize = classifier.decoding["image_size"], classifier.decoding["resize"]
    read = examples.source.read
    batches = list(make_images(read, positions, image_size=size, resize=resize, batch_size=_CORRUPTED_BATCH))
    if not batches:
        raise UserError("--corruptions: none of the images can be read any more. Check the files.")
    order, images = (np.concatenate(part) for part in zip(*batches, strict=True))
    found = measure_corruptions(
        images, examples.source.labels[order], classifier.predict_pixels, show_progress=screen.progress
    )
    clean, strengths = found["clean"], [str(number) for number in range(1, STRENGTHS + 1)]
    shown = with_interval(clean["accuracy"], clean["accuracy_ci95"])
    screen.line(f"corruptions: {len(order):,} {split} images, clean {shown}; accuracy by strength:")
    for line in format_table(("corruption", *strengths), robustness_rows(found)):
        screen.line(line)
    return {"split": split, **found}


def _load_data(config: Config, path: Path) -> tuple[Source, np.ndarray]:
    """Loads the classifier's own data with its splits, or another source: its val and test, or all images as test."""
    if config.data.dataset is None:
        own = _own_config(path)
        data = dataclasses.replace(own.data, data_dir=config.data.data_dir or own.data.data_dir)
        source = load_source(str(data.dataset), data_dir=data.data_dir, classes=config.data.classes or data.classes)
        splits = carve(
            source.ids,
            source.splits,
            val_fraction=data.val_fraction,
            test_fraction=data.test_fraction,
            labels=source.labels,
        )
    else:
        source = load_source(config.data.dataset, data_dir=config.data.data_dir, classes=config.data.classes)
        splits = source.splits.copy()
        if not (splits >= 1).any():
            splits[splits == 0] = SPLITS.index("test")
    splits[splits == 0] = UNUSED
    if not (splits >= 0).any():
        raise UserError(f"{source.name} has neither a val nor a test split to evaluate. Give another --dataset.")
    return source, splits


def _own_config(path: Path) -> Config:
    if not (path / "config.json").is_file():
        raise UserError(f"--dataset is missing, and {path} does not record its training data. Give --dataset.")
    return load_run_config(path)


def _renumber(source: Source, labels: tuple[str, ...]) -> Source:
    """Converts the labels of a source to the class numbers of the classifier.

    Raises:
        UserError: the classifier does not have one of the labels.
    """
    unknown = [name for name in source.class_names if name not in labels]
    if unknown:
        more = f" (and {count_of(len(unknown) - 1, 'more label')})" if len(unknown) > 1 else ""
        known = ", ".join(labels[:_NAMED]) + (", …" if len(labels) > _NAMED else "")
        raise UserError(
            f"the data has the label {unknown[0]!r}{more}, which is not a class of the classifier. "
            f"{nearest(unknown[0], labels)}The classes are: {known}. Rename it, or leave it out with --classes."
        )
    numbers = np.array([labels.index(name) for name in source.class_names], np.int32)
    return dataclasses.replace(source, labels=numbers[source.labels], class_names=labels)


def _list_origin(config: Config, path: Path, names: Sequence[str]) -> list[str]:
    """Makes a warning if the network was pretrained on the evaluated images."""
    if not (path / "config.json").is_file():  # an exported model does not record its initial weights
        text = describe_origin(config.data.dataset or "", "imagenet", names)
        return [text.replace("warning:", "warning: if its network had ImageNet weights:")] if text else []
    text = describe_origin(config.data.dataset or _own_config(path).data.dataset or "", find_weights(str(path)), names)
    return [text] if text else []


def _reject_as_run(
    metrics: dict[str, Any], path: Path, examples: Examples, probabilities: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Measures the confidence threshold of the classifier's run, if there is no val split to select one."""
    file = path / "metrics.json"
    chosen = (read_json(file).get("reject") or {}) if file.is_file() and "reject" not in metrics else {}
    if chosen.get("threshold") is None:
        return {}
    kept = ("target_accuracy", "threshold", "threshold_confidence")  # thresholds of version 0.1 have no guarantee
    reject = {name: chosen[name] for name in kept if name in chosen} | {"run": str(path)}
    for split, values in probabilities.items():
        reject[split] = measure_threshold(values, examples.labels(split), chosen["threshold"])
    return {"reject": reject}


def _read_trained_on(path: Path) -> tuple[TrainedOn | None, list[str]]:
    """Reads the images that a classifier and its network were trained on, and makes notes of what is unknown."""
    if not (path / "config.json").is_file():
        return None, [
            "note: an exported model does not record its training images; evaluate its run folder to check for them"
        ]
    config = load_run_config(path)
    try:
        earlier = read_earlier_images(path) or trace_weights(config.backbone.weights).read_images()
        found = read_trained_on(path, set(config.probe.refit.split("+")), earlier.runs)
    except UserError as error:
        return None, [f"note: {error}"]
    unknown = list(earlier.unknown)
    if earlier.initial not in {"imagenet", "none"} and os.path.exists(earlier.initial):
        unknown.append(f"the network started with {earlier.initial}, whose training images are unknown")
    return found, [f"note: {sentence}" for sentence in unknown]


def _predict(
    classifier: LoadedClassifier, examples: Examples, screen: Screen
) -> tuple[dict[str, np.ndarray], dict[int, str]]:
    """Predicts every example: split → probabilities, and the reasons why images could not be decoded."""
    probabilities, broken = {}, {}
    for split in SPLITS[1:]:
        positions = examples.positions(split)
        order: list[int] = []

        def contents(positions: np.ndarray = positions, order: list[int] = order) -> Iterator[bytes]:
            for position, content in examples.source.read(positions):
                order.append(position)
                yield content

        rows: dict[int, np.ndarray] = {}
        for batch in classifier.predict_batches(contents()) if len(positions) else ():
            for prediction in batch:
                position = order[len(rows)]
                rows[position] = prediction["probabilities"]
                if prediction["error"]:
                    broken[position] = prediction["error"]
            screen.progress(f"evaluating {split} {len(rows):,}/{len(positions):,}")
        if len(positions):
            probabilities[split] = np.stack([rows[int(position)] for position in positions])
    return probabilities, broken
