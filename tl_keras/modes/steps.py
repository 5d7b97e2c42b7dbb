"""The steps that finetune and extract share: their recipes differ in what is trained, not in what is around it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tl_keras.audit.duplicates import Images
from tl_keras.audit.examine import Audit, describe_data, describe_origin
from tl_keras.audit.files import inspect_file
from tl_keras.audit.findings import FINDINGS_HEADER, Finding
from tl_keras.backbones.embed import Embedded, embed
from tl_keras.backbones.engines import BATCH_SIZE
from tl_keras.backbones.zoo import Preset, build_backbone, find_preset
from tl_keras.classifier import Classifier, load_trained
from tl_keras.config import BackboneConfig, Config, default_store_dir, is_run, parse_kwargs
from tl_keras.data.depth import DepthCheck
from tl_keras.data.examples import Examples, draw_shots, scan, split_source
from tl_keras.data.images import DECODER_VERSION, explain_broken, make_images
from tl_keras.data.sources import load_source
from tl_keras.data.splits import SPLITS, carve, check_classes, evaluated_split
from tl_keras.errors import UserError
from tl_keras.evaluation.calibration import describe_calibration, fit_temperature, is_supported, scale
from tl_keras.evaluation.intervals import with_interval
from tl_keras.evaluation.leaks import TrainedOn, measure_seen
from tl_keras.evaluation.metrics import headline
from tl_keras.evaluation.report.card import Card, load_card
from tl_keras.evaluation.slices import Attributes, read_attributes
from tl_keras.evaluation.tables import describe_device, describe_environment, describe_evaluation, write_evaluation
from tl_keras.export.parity import ParityProcess
from tl_keras.export.saved_model import Exported, describe_request, export_saved_model
from tl_keras.modes.inspection import examine_examples, fits, list_images, measure_leaks
from tl_keras.modes.lineage import find_weights, read_lineage
from tl_keras.modes.reporting import Judged, attempt, report
from tl_keras.run import INTERRUPTED, Result, RunFolder, Screen, Stopwatch, name_run

ReadEmbeddings = Callable[[np.ndarray], np.ndarray]
_PARITY_IMAGES = {"float32": 16, "bfloat16": 100, "float16": 100}  # enough to see one decision in a hundred
PREDICT_BATCH = 128
_KEPT_SAMPLES = 16
_SAMPLE_BYTES = 64 << 20


def load_backbone(config: BackboneConfig, *, with_top: bool = False) -> tuple[Preset, keras.Model]:
    """The backbone with the weights asked for, one flat graph.

    Args:
        config: which, with which weights.
        with_top: see `build_backbone`.

    Raises:
        UserError: no such backbone, or no such weights.
    """
    if not is_run(config.weights):
        preset = find_preset(config.backbone or "")
        size = config.image_size or preset.image_size
        kwargs = parse_kwargs(config.backbone_kwargs)
        backbone = build_backbone(
            preset, weights=config.weights, image_size=size, kwargs=kwargs, with_top=with_top and bool(preset.top)
        )
        return preset, backbone
    earlier = load_trained(config.weights)
    preset = find_preset(config.backbone or earlier.backbone)
    size = config.image_size or earlier.image_size
    if (preset.name, size) != (earlier.backbone, earlier.image_size) or config.backbone_kwargs:
        raise UserError(
            f"--weights={config.weights} is a {earlier.backbone} of {earlier.image_size} pixels; it can't become "
            f"{preset.name} of {size}. Leave out --backbone, --backbone_kwargs and --image_size."
        )
    return preset, earlier.embedder


@dataclasses.dataclass(frozen=True)
class Views:
    """How images look to a network, for the report: positions, int `(m,)` → embeddings, float32 `(m, dim)`.

    Attributes:
        trained: of the backbone as it was trained.
        untrained: of the backbone before that, which has learnt no wrong label, where there was one.
        dim: numbers in an embedding.
    """

    trained: ReadEmbeddings
    untrained: ReadEmbeddings
    dim: int


@dataclasses.dataclass
class Job:
    """One run while it goes on: where it writes, what it reads, how long it took.

    Attributes:
        config: all settings.
        screen: what the user sees.
        watch: seconds by stage.
        folder: the run folder.
        examples: labelled images; those that turn out broken are left out as they are found.
        warnings: lines about the data that were shown.
        oddities: what is odd about how files are stored, where someone wants to know.
        attributes: of the examples, where the user gave some.
        embeddings_only: whether labels are not learnt.
        seen: images that this run or an earlier one of its network is trained on.
        card: what the user says of the classifier.
    """

    config: Config
    screen: Screen
    watch: Stopwatch
    folder: RunFolder
    examples: Examples
    warnings: list[str]
    oddities: list[Finding]
    attributes: Attributes | None = None
    embeddings_only: bool = False
    seen: TrainedOn | None = None
    card: Card = dataclasses.field(default_factory=lambda: Card({}))

    def embed(
        self, trunks: Sequence[keras.Model], preset: Preset, *, image_size: int, mirrored: bool = False
    ) -> list[Embedded]:
        """Sends every image through the trunk, leaves out what can't be decoded, and says so.

        Args:
            trunks: see `embed.embed`.
            preset: of the backbone.
            image_size: side of its images in pixels.
            mirrored: whether training images are wanted mirrored as well.

        Returns:
            The embeddings of each trunk.
        """
        resize, engine = self.config.backbone.resize, self.config.engine
        read = self.examples.source.read
        found = embed(
            trunks,
            wanted=wanted_views(self.examples, mirrored=mirrored),
            digests=self.examples.digests,
            images=functools.partial(
                make_images,
                read,
                image_size=image_size,
                resize=resize,
                batch_size=BATCH_SIZE,
                digests=self.examples.digests,
            ),
            address={
                "backbone": preset.name,
                "image_shape": [image_size, image_size, 3],
                "resize": resize,
                "decoder": DECODER_VERSION,
            },
            engine=engine.engine,
            precision=engine.precision,
            store_dir=engine.store_dir or default_store_dir(),
            show=self.screen.line,
            show_progress=self.screen.progress,
            exact=None if self.embeddings_only else np.flatnonzero(self.examples.splits > 0),
        )
        if found[0].broken:
            reasons = {
                position: explain_broken(content, image_size=image_size, resize=resize) or "changed while it was read"
                for position, content in read(found[0].broken)
            }
            limit = self.config.data.max_broken_fraction
            self.examples = self.examples.without(reasons, max_broken_fraction=limit, report=_reporter(self.folder))
        if self.examples.broken:
            count = len(self.examples.broken)
            self.warn(f"broken: {count} images are left out, listed in {self.folder.path}/broken.csv")
        for warning in [] if self.embeddings_only else _check_classes(self.examples):
            if warning not in self.warnings:
                self.warn(warning)
        return found

    def warn(self, text: str) -> None:
        """Shows a line that whoever reads the report should see as well."""
        self.screen.line(text)
        self.warnings.append(text)

    def draw(self, seed: int) -> Examples:
        """The examples with one draw of `--shots`, if several draws are used; or else all of them."""
        shots = self.config.data.shots
        if shots is None or _count_draws(self.config) == 1:
            return self.examples
        return draw_shots(self.examples, shots=shots, seed=seed)

    def keep_classifier(self, classifier: Classifier, logits: np.ndarray) -> None:
        """Writes a classifier that training still goes on from, so that a killed run leaves one that can be used.

        Args:
            classifier: the network so far.
            logits: of val, `(n, classes)`.
        """
        temperature = self._fit_temperature({"val": logits}) or 1.0
        probabilities = {"val": scale(logits, temperature)}
        samples, expected = _sample(self.examples, probabilities, _KEPT_SAMPLES)
        try:
            classifier.divide_logits(temperature).save(
                self.folder.path / "classifier", samples=samples, expected=expected
            )
        except UserError as error:
            self.screen.line(f"warning: {error} Training continues")

    def _fit_temperature(self, logits: dict[str, np.ndarray]) -> float | None:
        """The temperature; 1 if none is wanted, None if val has too few images to fit one on."""
        if not self.config.evaluation.calibrate or "val" not in logits:
            return 1.0
        labels = self.examples.labels("val")
        temperature = fit_temperature(logits["val"], labels)
        return temperature if is_supported(logits["val"], labels, temperature) else None

    def finish(
        self,
        classifier: Classifier,
        logits: dict[str, np.ndarray],
        *,
        embedded: Embedded,
        parity: ParityProcess | None,
        chosen: str,
        views: Views,
        interrupted: bool = False,
        failed: bool = False,
        more: dict[str, Any] | None = None,
        repeat: Callable[[], dict[str, Any] | None] | None = None,
    ) -> Result:
        """Measures, writes and exports a classifier: the end of both recipes.

        Args:
            classifier: what was trained.
            logits: split → `(n, classes)`, of val and test.
            embedded: what it was trained on.
            parity: the process that compares the exported model, where one is wanted.
            chosen: that something was chosen on val, a clause with its semicolon; empty where nothing was.
            views: embeddings for the report.
            interrupted: whether training was cut short; then nothing is exported.
            failed: whether a stage of training failed, so that less was trained than was asked for.
            more: further entries of `metrics.json`.
            repeat: trains again for the entry `seeds`, once all that was trained before is kept; none: interrupted.
        """
        config, screen, watch, folder = self.config, self.screen, self.watch, self.folder
        precision = embedded.evaluated_precision
        with watch.stage("evaluation"):
            fitted = self._fit_temperature(logits)
            temperature = fitted or 1.0
            if temperature != 1:
                classifier = classifier.divide_logits(temperature)
            probabilities = {split: scale(values, temperature) for split, values in logits.items()}
            evaluation = write_evaluation(
                folder,
                self.examples,
                probabilities,
                target_accuracy=config.evaluation.target_accuracy,
                attributes=self.attributes,
            )
            metrics = evaluation | (more or {})
            leaks, leaked = measure_seen(
                self.seen, self.examples, probabilities, what="this run, or an earlier one of its network,"
            )
            metrics |= {"leaks": leaks} if leaks else {}
            before = {split: scale(values, 1) for split, values in logits.items()}
            metrics["calibration"] = describe_calibration(
                temperature,
                {split: (values, self.examples.labels(split)) for split, values in before.items()},
                supported=fitted is not None,
            )
            samples, expected = _sample(self.examples, probabilities, _PARITY_IMAGES[precision])
            classifier.save(
                folder.path / "classifier", samples=samples[:_KEPT_SAMPLES], expected=expected[:_KEPT_SAMPLES]
            )
        metrics["interrupted"] = interrupted
        metrics["environment"] = describe_environment(
            engine=embedded.choice.engine, precision=embedded.choice.precision
        )
        metrics["environment"]["evaluated_precision"] = precision
        metrics["timing"] = _describe_timing(watch, embedded)
        folder.write_json("metrics.json", metrics)
        for line in describe_evaluation(metrics):
            screen.line(line)
        for line in leaked:
            self.warn(line)

        exported, status = None, INTERRUPTED if interrupted else int(failed)
        if repeat:
            seeds = repeat()
            status = INTERRUPTED if seeds is None or seeds.get("interrupted") else status
            metrics |= {"timing": _describe_timing(watch, embedded)} | ({"seeds": seeds} if seeds else {})
            folder.write_json("metrics.json", metrics)
        if parity and not interrupted:
            screen.line(_last_line(metrics, folder, None, chosen))  # whatever becomes of the export
            try:
                with watch.stage("export"):
                    exported = self._export(classifier, parity, samples, expected, precision)
            except KeyboardInterrupt:
                status = INTERRUPTED
                screen.line(
                    f"export: interrupted; the rest of the run is complete. Export it with --mode=export "
                    f"--classifier={folder.path}"
                )
            else:
                metrics |= {"export": exported.as_dict(), "timing": _describe_timing(watch, embedded)}
                folder.write_json("metrics.json", metrics)
                for line in describe_request(exported.path):
                    screen.line(line)
        is_complete = status != INTERRUPTED
        if config.evaluation.report:
            uncalibrated = before if temperature != 1 else None
            with watch.stage("report"):
                write = functools.partial(self._write_report, classifier, metrics, probabilities, uncalibrated, views)
                report_status = attempt(write, screen.line)
            status, is_complete = report_status or status, is_complete and not report_status
            metrics["timing"] = _describe_timing(watch, embedded)
            folder.write_json("metrics.json", metrics)
        screen.line(_last_line(metrics, folder, exported, chosen))
        return Result(folder.path, exported.path if exported else None, metrics, status, is_complete)

    def _export(
        self,
        classifier: Classifier,
        parity: ParityProcess,
        samples: Sequence[bytes],
        expected: np.ndarray,
        precision: str,
    ) -> Exported:
        run = self.config.run
        return export_saved_model(
            classifier,
            export_dir=run.export_dir,
            name=run.model_name,
            samples=samples,
            expected=expected,
            precision=precision,
            max_pixels=run.max_pixels,
            show=self.screen.line,
            parity=parity,
            run_id=self.folder.run_id,
        )

    def _write_report(
        self,
        classifier: Classifier,
        metrics: dict[str, Any],
        probabilities: dict[str, np.ndarray],
        before: dict[str, np.ndarray] | None,
        views: Views,
    ) -> Path:
        """Looks at the data as an audit does, and writes what it found into `metrics`, `audit.csv` and the report."""
        config, folder, audit, lines = self.config, self.folder, None, list[str]()
        rows, images = list_images(self.examples)
        if fits(len(rows), views.dim):
            audit, lines = self._audit(metrics, rows, images, probabilities, views.untrained)
        else:
            lines.append(f"audit: {len(rows):,} images are too many for the report; --mode=audit looks at them")
            self.screen.line(lines[0])
        judged = Judged(
            name=classifier.name,
            backbone=classifier.backbone,
            examples=self.examples,
            probabilities=probabilities,
            before=before,
            image_size=classifier.image_size,
            resize=classifier.resize,
            trained=classifier,
            read_embeddings=views.trained if audit else None,
        )
        return report(
            folder,
            judged,
            metrics,
            config=config.as_dict(),
            flags=config.as_flags(),
            card=self.card,
            notes=self.warnings,
            audit=audit,
            audit_lines=lines,
        )

    def _audit(
        self,
        metrics: dict[str, Any],
        rows: np.ndarray,
        images: Images,
        probabilities: dict[str, np.ndarray],
        read: ReadEmbeddings,
    ) -> tuple[Audit, list[str]]:
        """Looks at the data, writes `audit.csv`, says what was found; gives it with lines for the report."""
        audit = examine_examples(
            self.examples, self.oddities, read(rows), every=False, show_progress=self.screen.progress
        )
        leaks, lines = measure_leaks(audit, images, probabilities[images.evaluated].argmax(1), "this classifier")
        self.folder.write_csv("audit.csv", FINDINGS_HEADER, [one.as_row() for one in audit.findings])
        metrics["audit"] = {"findings": audit.counts(), "leaks": leaks, "shift": audit.shift}
        found = ", ".join(f"{kind} {count:,}" for kind, count in audit.counts().items())
        self.screen.line(f"audit: {found or 'nothing found'} · {self.folder.path}/audit.csv")
        for line in lines:
            self.warn(f"warning: {line}")
        return audit, [*lines, *describe_data(audit, images)]

    def finish_without_probe(self, embedded: Embedded) -> Result:
        """Ends a run that was to give embeddings alone."""
        choice = embedded.choice
        metrics = {
            "environment": describe_environment(engine=choice.engine, precision=choice.precision),
            "timing": _describe_timing(self.watch, embedded),
        }
        self.folder.write_json("metrics.json", metrics)
        why = "--probe=none" if self.examples.class_names else "no labels, hence no probe"
        self.screen.line(f"{why} · {self.folder.path}")
        return Result(self.folder.path, None, metrics)


def load_job(
    config: Config,
    preset: Preset,
    screen: Screen,
    watch: Stopwatch,
    *,
    image_size: int,
    asked: Config | None = None,
) -> Job:
    """Finds the labelled images, splits them, makes the run folder, and reads every image's bytes once.

    Args:
        config: all settings.
        preset: of the backbone.
        screen: what the user sees.
        watch: seconds by stage.
        image_size: side of the network's input in pixels.
        asked: the settings that are kept in the run folder, if they are not `config`.

    Raises:
        UserError: the data can't be found or used, or the run folder can't be made.
    """
    data, card = config.data, load_card(config.evaluation.card)
    with watch.stage("data"):
        source = load_source(
            data.dataset or "",
            data_dir=data.data_dir,
            classes=data.classes,
            allow_unlabelled=config.probe.embeddings_output is not None or config.mode == "audit",
        )
        embeddings_only = not source.class_names or "none" in config.probe.probe or config.mode == "audit"
        splits, warnings = source.splits, list[str]()
        if embeddings_only and (source.splits == 0).any():
            splits = carve(
                source.ids,
                source.splits,
                val_fraction=data.val_fraction,
                test_fraction=data.test_fraction,
                labels=source.labels if source.class_names else None,
            )
        elif not embeddings_only:
            splits, warnings = split_source(
                source,
                val_fraction=data.val_fraction,
                test_fraction=data.test_fraction,
                shots=data.shots,
                seed=config.run.seed,
                draws=_count_draws(config),
            )
        attributes = read_attributes(config.evaluation.slices, source.ids)
        folder = RunFolder.create(
            config.run.run_dir or name_run(config.mode, source.name, preset.name),
            overwrite=config.run.overwrite,
            config=(asked or config).as_dict(),
            flags=(asked or config).as_flags(),
        )
        oddities = list[Finding]()

        depth, wants_oddities = DepthCheck(), config.mode == "audit" or config.evaluation.report

        def look(example_id: str, content: bytes) -> None:
            depth.look(content)
            if wants_oddities:
                oddities.extend(inspect_file(example_id, content, image_size=image_size))

        examples = scan(
            source,
            splits,
            max_broken_fraction=data.max_broken_fraction,
            show_progress=screen.progress,
            report=_reporter(folder),
            look=look,
        )
    missing = [] if embeddings_only else _check_classes(examples)
    lineage = None if embeddings_only else read_lineage(config.backbone.weights, examples)
    origin = describe_origin(data.dataset or "", find_weights(config.backbone.weights), examples.class_names)
    warnings = list(dict.fromkeys([*source.notes, *warnings, *missing, *([origin] if origin else [])]))
    warnings += [*depth.notes(), *(lineage.notes if lineage else ())]
    counts = ", ".join(f"{split} {len(examples.positions(split)):,}" for split in SPLITS)
    screen.line(f"device: {describe_device()}")
    labels = f"{counts}; {len(examples.class_names):,} classes" if source.class_names else f"{len(source.ids):,} images"
    screen.line(f"data: {source.name}: {labels}")
    for warning in warnings:
        screen.line(warning)
    seen = lineage.seen if lineage else None
    return Job(config, screen, watch, folder, examples, warnings, oddities, attributes, embeddings_only, seen, card)


def wanted_views(examples: Examples, *, mirrored: bool) -> dict[int, np.ndarray]:
    """Which views of which images are needed: all as they are; training images mirrored as well, if asked for.

    Returns:
        Index into `embed.VIEWS` → positions, int64 `(m,)`.
    """
    views = {0: np.flatnonzero(examples.splits >= 0)}
    return views | {1: examples.positions("train")} if mirrored else views


def _count_draws(config: Config) -> int:
    """How many draws of `--shots` a run makes."""
    return max(config.probe.repeats, config.evaluation.seeds)


def _reporter(folder: RunFolder) -> Callable[[list[tuple[str, str]]], None]:
    return functools.partial(folder.write_csv, "broken.csv", ("id", "reason"))


def _check_classes(examples: Examples) -> list[str]:
    return check_classes(examples.source.labels, examples.splits, examples.class_names)


def _sample(examples: Examples, probabilities: dict[str, np.ndarray], count: int) -> tuple[list[bytes], np.ndarray]:
    """Some evaluated images, drawn from the last split, with their probabilities; at most 64 MB of them but for one."""
    split = list(probabilities)[-1]
    total = len(probabilities[split])
    rows = np.random.default_rng(0).permutation(total)[: min(count, total)]
    positions = examples.positions(split)[rows]
    row_of = dict(zip(positions.tolist(), rows.tolist(), strict=True))
    contents, kept, size = [], [], 0
    for position, content in examples.source.read(positions):
        if size and size + len(content) > _SAMPLE_BYTES:
            break
        contents.append(content)
        kept.append(row_of[position])
        size += len(content)
    return contents, probabilities[split][kept]


def _describe_timing(watch: Stopwatch, embedded: Embedded) -> dict[str, Any]:
    rate = round(embedded.computed / embedded.seconds, 1) if embedded.computed else None
    return {
        "seconds": dict(watch.seconds),
        "trunk_images": embedded.computed,
        "trunk_images_per_second": rate,
    }


def _last_line(metrics: dict[str, Any], folder: RunFolder, exported: Exported | None, chosen: str) -> str:
    split = evaluated_split(metrics)
    note = "" if split == "test" else f" ({chosen}there is no test split)"
    leak = (metrics.get("leaks") or {}).get(split, {})
    if "accuracy_without" in leak:
        shown = with_interval(leak["accuracy_without"], leak["accuracy_without_ci95"])
        note += f" ({shown} without {leak['leaked']:,} images that are training images too)"
    parts = [headline(split, metrics[split]) + note, str(folder.path)]
    return " · ".join([*parts, str(exported.path)] if exported else parts)
