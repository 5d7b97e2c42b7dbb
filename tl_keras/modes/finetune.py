"""`--mode=finetune`: a pretrained backbone with a new head, evaluated and exported."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import keras
import numpy as np

from tl_keras.backbones.cut import TrainablePart, choose_trainable, cut
from tl_keras.backbones.embed import BATCH_SIZE, Embedded, embed, embed_tail
from tl_keras.backbones.zoo import Preset, build_backbone, find_preset
from tl_keras.classifier import Classifier, load_trained
from tl_keras.config import BackboneConfig, Config, default_store_dir, is_run, parse_kwargs
from tl_keras.data.examples import Examples, scan, split_source
from tl_keras.data.images import DECODER_VERSION, explain_broken, make_images
from tl_keras.data.sources import Source, load_source
from tl_keras.data.splits import SPLITS, check_classes
from tl_keras.errors import UserError
from tl_keras.evaluation.metrics import headline
from tl_keras.evaluation.tables import describe_device, describe_environment, write_evaluation, write_examples
from tl_keras.export.parity import ParityProcess
from tl_keras.export.saved_model import Exported, describe_request, export_saved_model, name_model
from tl_keras.run import INTERRUPTED, History, Result, RunFolder, Screen, Stopwatch, name_run
from tl_keras.training.batches import predict_probabilities
from tl_keras.training.callbacks import HISTORY_HEADER
from tl_keras.training.fit import Progress
from tl_keras.training.heads import attach
from tl_keras.training.stages import Task, fit_head, fit_tail, new_head

_PREDICT_BATCH = 128
_PARITY_IMAGES = {"float32": 16, "bfloat16": 100, "float16": 100}  # enough to see one decision in a hundred
_KEPT_SAMPLES = 16
_SAMPLE_BYTES = 64 << 20


def run(config: Config) -> Result:
    """Trains a head, and what of the backbone is asked for, on labelled images; evaluates and exports it.

    Epochs are chosen on val; test is looked at once, at the end.
    """
    screen, watch = Screen(), Stopwatch()
    keras.utils.set_random_seed(config.run.seed)
    with watch.stage("backbone"):
        preset, backbone = _load_backbone(config.backbone)
        pretrained = config.backbone.weights != "none"
        part = choose_trainable(backbone, config.training.trainable, pretrained=pretrained)
    with watch.stage("data"):
        source = load_source(config.data.dataset or "", data_dir=config.data.data_dir, classes=config.data.classes)
        splits, warnings = _split(source, config)
        folder = RunFolder.create(
            config.run.run_dir or name_run("finetune", source.name, preset.name),
            overwrite=config.run.overwrite,
            config=config.as_dict(),
            flags=config.as_flags(),
        )
        report = functools.partial(folder.write_csv, "broken.csv", ("id", "reason"))
        limit = config.data.max_broken_fraction
        examples = scan(source, splits, max_broken_fraction=limit, show_progress=screen.progress, report=report)
    warnings = list(dict.fromkeys([*source.notes, *warnings, *_check_classes(examples)]))
    _introduce(screen, examples, preset, part, config, warnings)

    # pixels that change each epoch, or a stem that is trained, leave no trunk: the store then keeps decoded images
    whole = part.cut is None or config.training.augment == "crop"
    trunk, tail = (None, backbone) if whole else cut(backbone, at=str(part.cut))
    with watch.stage("trunk"):
        embedded = _embed(examples, trunk, preset, backbone, config, screen)
        examples = _leave_out(examples, embedded, backbone, config, report)
    _show_broken(screen, examples, folder, warnings)
    write_examples(folder, examples)  # a run that is killed has said what was used for what

    # the process that checks the export loads TensorFlow while the head is trained
    with ParityProcess() if config.run.export else contextlib.nullcontext() as parity:
        with watch.stage("training"):
            history = History(folder, HISTORY_HEADER)
            progress = Progress(folder.path, screen.line, screen.progress, history.keep)
            task = Task(examples, config.training, config.run.seed, progress)
            has_tail = whole or bool(part.layers)
            head, stage = new_head(task, dim=backbone.output_shape[1]), None
            if pretrained or not has_tail:
                wanted, show_progress = _wanted(examples, config), screen.progress
                vectors = (
                    embed_tail(embedded, tail, wanted=wanted, show_progress=show_progress) if has_tail else embedded
                )
                head, stage = fit_head(task, vectors)
            if has_tail and not (stage and stage.interrupted):
                crop = config.training.augment == "crop"
                stage = fit_tail(task, embedded, tail, head, layers=part.layers, crop=crop, after=stage)
            interrupted = bool(stage and stage.interrupted)

        with watch.stage("evaluation"):
            trained = attach(head, tail) if has_tail else head
            probabilities = {
                split: predict_probabilities(
                    trained, embedded.read, examples.positions(split), batch_size=_PREDICT_BATCH
                )
                for split in SPLITS[1:]
                if len(examples.positions(split))
            }
            metrics = write_evaluation(folder, examples, probabilities)
            classifier = Classifier(
                attach(head, backbone),
                name=f"{source.name}-{preset.name}",
                labels=source.class_names,
                backbone=preset.name,
                embedding_layer=backbone.layers[-1].name,
                resize=config.backbone.resize,
            )
            precision = embedded.precision.name
            samples, expected = _sample(examples, probabilities, _PARITY_IMAGES[precision])
            classifier.save(
                folder.path / "classifier", samples=samples[:_KEPT_SAMPLES], expected=expected[:_KEPT_SAMPLES]
            )
        metrics["interrupted"] = interrupted
        metrics["environment"] = describe_environment(engine="tensorflow", precision=precision)
        metrics["timing"] = _describe_timing(watch, embedded)
        folder.write_json("metrics.json", metrics)

        exported = None
        if config.run.export and not interrupted:
            screen.line(_last_line(metrics, folder, None))  # whatever becomes of the export
            with watch.stage("export"):
                exported = export_saved_model(
                    classifier,
                    export_dir=config.run.export_dir,
                    name=config.run.model_name or name_model(classifier.name),
                    samples=samples,
                    expected=expected,
                    precision=precision,
                    show=screen.line,
                    parity=parity,
                )
            metrics |= {"export": exported.as_dict(), "timing": _describe_timing(watch, embedded)}
            folder.write_json("metrics.json", metrics)
            screen.line(f"try it: {describe_request(exported.path)}")
    screen.line(_last_line(metrics, folder, exported))
    status = INTERRUPTED if interrupted else 0
    return Result(folder.path, exported.path if exported else None, metrics, status)


def _split(source: Source, config: Config) -> tuple[np.ndarray, list[str]]:
    data = config.data
    return split_source(
        source,
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        shots=data.shots,
        seed=config.run.seed,
    )


def _load_backbone(config: BackboneConfig) -> tuple[Preset, keras.Model]:
    """The backbone with the weights asked for, one flat graph."""
    if not is_run(config.weights):
        preset = find_preset(config.backbone or "")
        size = config.image_size or preset.image_size
        kwargs = parse_kwargs(config.backbone_kwargs)
        return preset, build_backbone(preset, weights=config.weights, image_size=size, kwargs=kwargs)
    earlier = load_trained(config.weights)
    preset = find_preset(config.backbone or earlier.backbone)
    size = config.image_size or earlier.image_size
    if (preset.name, size) != (earlier.backbone, earlier.image_size) or config.backbone_kwargs:
        raise UserError(
            f"--weights={config.weights} is a {earlier.backbone} of {earlier.image_size} pixels; it can't become "
            f"{preset.name} of {size}. Leave out --backbone, --backbone_kwargs and --image_size."
        )
    return preset, earlier.embedder


def _introduce(
    screen: Screen,
    examples: Examples,
    preset: Preset,
    part: TrainablePart,
    config: Config,
    warnings: list[str],
) -> None:
    """The first lines: device, data, and what will be computed."""
    counts = ", ".join(f"{split} {len(examples.positions(split)):,}" for split in SPLITS)
    screen.line(f"device: {describe_device()}, engine: tensorflow")
    screen.line(f"data: {examples.source.name}: {counts}; {len(examples.class_names):,} classes")
    for warning in warnings:
        screen.line(warning)
    trained = "the head alone" if not part.layers else f"the head, then {len(part.layers)} layers of {preset.name}"
    if config.backbone.weights == "none" and part.layers:
        trained = f"head and {len(part.layers)} layers of {preset.name} together, from scratch"
    screen.line(f"training: {trained}; weights: {config.backbone.weights}; {config.training.epochs} epochs")
    if part.cut is None or config.training.augment == "crop":
        why = "--augment=crop" if config.training.augment == "crop" else f"--trainable={config.training.trainable}"
        screen.line(f"the whole network runs each epoch, because of {why}: slower by the frozen part's share")


def _wanted(examples: Examples, config: Config) -> dict[int, np.ndarray]:
    """Which views of which images are needed: all as they are; training images mirrored as well, if asked for."""
    wanted = {0: np.flatnonzero(examples.splits >= 0)}
    if config.training.augment == "flip":
        wanted[1] = examples.positions("train")
    return wanted


def _embed(
    examples: Examples,
    trunk: keras.Model | None,
    preset: Preset,
    backbone: keras.Model,
    config: Config,
    screen: Screen,
) -> Embedded:
    size, resize = int(backbone.input_shape[1]), config.backbone.resize
    address = {
        "backbone": preset.name,
        "image_shape": [size, size, 3],
        "resize": resize,
        "decoder": DECODER_VERSION,
    }
    images = functools.partial(make_images, examples.source.read, image_size=size, resize=resize, batch_size=BATCH_SIZE)
    return embed(
        trunk,
        wanted=_wanted(examples, config),
        digests=examples.digests,
        images=images,
        address=address,
        precision=config.engine.precision,
        store_dir=config.engine.store_dir or default_store_dir(),
        show=screen.line,
        show_progress=screen.progress,
    )


def _leave_out(examples: Examples, embedded: Embedded, backbone: keras.Model, config: Config, report: Any) -> Examples:
    """The examples without those that could not be decoded."""
    if not embedded.broken:
        return examples
    explain = functools.partial(explain_broken, image_size=int(backbone.input_shape[1]), resize=config.backbone.resize)
    reasons = {
        position: explain(content) or "changed while it was read"
        for position, content in examples.source.read(embedded.broken)
    }
    return examples.without(reasons, max_broken_fraction=config.data.max_broken_fraction, report=report)


def _show_broken(screen: Screen, examples: Examples, folder: RunFolder, warnings: list[str]) -> None:
    """How many images are left out, and what classes miss without them that they did not miss before."""
    if examples.broken:
        screen.line(f"broken: {len(examples.broken)} images are left out, listed in {folder.path}/broken.csv")
    for warning in _check_classes(examples):
        if warning not in warnings:
            screen.line(warning)


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


def _last_line(metrics: dict[str, Any], folder: RunFolder, exported: Exported | None) -> str:
    split = "test" if "test" in metrics else "val"
    note = "" if split == "test" else " (epochs were chosen on it; there is no test split)"
    parts = [headline(split, metrics[split]) + note, str(folder.path)]
    return " · ".join([*parts, str(exported.path)] if exported else parts)
