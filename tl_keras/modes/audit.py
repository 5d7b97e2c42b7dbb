"""`--mode=audit`: finds duplicates, data leakage, label errors and outliers before training."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tl_keras.audit.duplicates import Images
from tl_keras.audit.examine import Audit, describe_data, predict_surrogate
from tl_keras.audit.findings import FINDINGS_HEADER, Finding, count
from tl_keras.backbones.capacity import check_network
from tl_keras.backbones.embed import Embedded
from tl_keras.backbones.engines import BATCH_SIZE
from tl_keras.classifier import load_trained
from tl_keras.config import Config
from tl_keras.data.manifests import has_control
from tl_keras.data.splits import SPLITS
from tl_keras.errors import UserError
from tl_keras.evaluation.leaks import read_digests
from tl_keras.evaluation.tables import describe_environment, write_examples
from tl_keras.jobs.inspection import examine_job, list_audited_images, measure_leaks
from tl_keras.jobs.lineage import load_run_config
from tl_keras.jobs.result import Result
from tl_keras.jobs.start import Job, load_network, start
from tl_keras.report.compose import compose_audit_report, try_report
from tl_keras.run import UNFINISHED, Screen, check_writable, count_of, csv_bytes, read_csv, write_atomically

_ESTIMATED = {"label", "outlier"}  # kinds that are estimates of a model, not properties of the file
_MANY = 300_000  # images; fewer take minutes
_NEIGHBOR_SECONDS = 42  # for 100,000 embeddings (benchmarks/results/audit.json); grows quadratically
_UNTRAINED = (
    "warning: --weights=none: an untrained network finds few modified copies, and label errors and outliers only by "
    "chance. Leave the flag out, or give a weights file"
)
_SURROGATE = "a logistic regression on these embeddings"


def run(config: Config, screen: Screen | None = None) -> Result:
    """Audits files, duplicates, data leakage, labels, outliers and class balance.

    The user's files are not changed. Findings are written to `audit.csv`; with --write_clean_csv the images without
    findings are written to a manifest. With --classifier the data of that run is audited, with its network and its
    predictions.
    """
    screen = screen or Screen()
    watch = screen.watch
    asked, config = config, _follow_classifier(config, screen)
    job, embedded = _embed_images(config, asked, screen)
    rows, images = list_audited_images(job.examples)
    if not len(rows):
        raise UserError(f"none of the images can be read; {job.folder.path}/broken.csv has the reasons. Repair them.")
    _estimate_time(screen, len(rows), int(job.network.backbone.output_shape[-1]))
    with watch.stage("audit"):
        audit = examine_job(job, embedded.read_float32(rows), all_pixels=True)
        digests = [job.examples.digests[row].tobytes() for row in rows]
        predicted, judge = _predict(asked, audit, images, digests)
        leaks, leak_lines = measure_leaks(audit, images, predicted, judge)
    job.folder.write_csv("audit.csv", FINDINGS_HEADER, [one.as_row() for one in audit.findings])
    lines = [*leak_lines, *describe_data(audit, images)]
    for line in [*count(audit.findings), *lines]:
        screen.line(line)
    if config.audit.write_clean_csv:
        for line in _write_clean(config, job, rows, audit.findings):
            screen.line(line)
    write_examples(job.folder, job.examples)
    environment = describe_environment(engine=embedded.choice.engine, precision=embedded.choice.precision)
    with watch.stage("report"):
        write = functools.partial(
            compose_audit_report,
            job.folder,
            job.examples,
            audit,
            lines=lines,
            image_size=job.network.image_size,
            resize=config.backbone.resize,
            command=asked.as_command(),
            notes=job.warnings,
            environment=environment,
        )
        status = try_report(write, screen.line, screen.warning)
    metrics = {
        "n": len(rows),
        "findings": audit.counts(),
        "leaks": leaks,
        "shift": audit.shift,
        "classes": _count_classes(job),
        "environment": environment,
        "timing": {"seconds": dict(watch.seconds)},
    }
    job.folder.write_json("metrics.json", metrics)
    found = f"{count_of(len(audit.findings), 'finding')} on {count_of(len(rows), 'image')}"
    screen.result(f"{found} · {job.folder.path}/audit.csv")
    return Result(job.folder.path, None, metrics, status, is_complete=not status)


def _embed_images(config: Config, asked: Config, screen: Screen) -> tuple[Job, Embedded]:
    """Starts the job, and computes the embeddings of its images.

    Args:
        config: the settings, with those of the classifier.
        asked: the settings as they were given.
        screen: what the user sees.
    """
    if config.audit.write_clean_csv:
        _check_clean_path(config)
    if config.backbone.weights == "none" and not asked.read.classifier:
        screen.line(_UNTRAINED)
    network = load_network(config, screen)
    check_network(network.backbone, batch_size=BATCH_SIZE, engine=config.engine.engine)
    job = start(network, asked=asked)
    _check_clean(config, job)
    with screen.watch.stage("trunk"):
        return job, job.embed([network.backbone])[0]


def _estimate_time(screen: Screen, count: int, dim: int) -> None:
    """Shows an estimate of the time for nearest neighbors, if it is hours."""
    if count > _MANY:
        hours, gigabytes = _NEIGHBOR_SECONDS * (count / 1e5) ** 2 / 3600, 4e-9 * count * dim
        screen.line(
            f"note: finding the nearest neighbors of {count:,} images takes about {hours:.1f} hours on two cores, and "
            f"{gigabytes:.0f} GB of memory"
        )


def _follow_classifier(config: Config, screen: Screen) -> Config:
    """With --classifier, takes the network of its run, and its data unless --dataset is given."""
    path = config.read.classifier
    if not path:
        return config
    if not (Path(path) / "config.json").is_file():
        raise UserError(
            f"--classifier={path} is not a run folder and does not record its data. Give a run folder: runs/NAME."
        )
    trained, own = load_trained(path), load_run_config(path)
    if own.mode == "finetune" and own.training.trainable != "head":
        screen.line(
            "note: this network was trained on these labels, so it may miss label errors and exaggerate the shift "
            "between train and test"
        )
    data = config.data
    if data.dataset is None:
        data = dataclasses.replace(
            own.data,
            data_dir=data.data_dir or own.data.data_dir,
            classes=data.classes or own.data.classes,
            shots=None,
            max_broken_fraction=data.max_broken_fraction,
        )
    backbone = dataclasses.replace(config.backbone, weights=path, resize=trained.resize)
    read = dataclasses.replace(config.read, classifier=None)
    return dataclasses.replace(config, data=data, backbone=backbone, read=read)


def _check_clean_path(config: Config) -> None:
    """Checks that the manifest does not replace a file of the user.

    Raises:
        UserError: it would, or it can't be written.
    """
    path = Path(str(config.audit.write_clean_csv))
    if path.is_dir():
        raise UserError(f"--write_clean_csv={path} is a folder. Give the name of a file in it.")
    own = os.path.realpath(path) == os.path.realpath((config.data.dataset or "").partition(":")[2])
    is_resumed = (Path(config.run.run_dir or "") / UNFINISHED).is_file()  # the run may have written it before
    if path.exists() and (own or not (config.run.overwrite or is_resumed)):
        state = (
            "is the audited file. Give another name." if own else "already exists. Give another name, or --overwrite."
        )
        raise UserError(f"--write_clean_csv={path} {state}")
    check_writable(path.absolute().parent, str(path))


def _check_clean(config: Config, job: Job) -> None:
    """Checks that the data has files that a manifest can list, and that the manifest does not replace one of them.

    Raises:
        UserError: the data has no files, or the manifest would replace one.
    """
    if not config.audit.write_clean_csv:
        return
    path, source = Path(config.audit.write_clean_csv), job.examples.source
    if not source.paths:
        raise UserError(
            f"--write_clean_csv lists image files, but {source.name} has none. Leave it out, or use --dataset=folder: "
            "or csv:."
        )
    if os.path.realpath(path) in {os.path.realpath(one) for one in source.paths}:
        raise UserError(f"--write_clean_csv={path} is one of the audited images. Give another name.")


def _count_classes(job: Job) -> dict[str, dict[str, int]]:
    """Counts images: class → split → number of images."""
    examples = job.examples
    counts = {split: np.bincount(examples.labels(split), minlength=len(examples.class_names)) for split in SPLITS}
    return {
        name: {split: int(counts[split][number]) for split in SPLITS}
        for number, name in enumerate(examples.class_names)
    }


def _predict(config: Config, audit: Audit, images: Images, digests: Sequence[bytes]) -> tuple[np.ndarray, str]:
    """Predicts the evaluated split, and names the predictor: the run, if it predicted these images, or a surrogate."""
    run_dir, numbers = config.read.classifier, {name: number for number, name in enumerate(images.names)}
    if run_dir and (Path(run_dir) / "predictions.csv").is_file():
        predicted = _recall(Path(run_dir), images, digests)
        if all(one in numbers for one in predicted):
            return np.array([numbers[one] for one in predicted if one], np.int64), run_dir
    return predict_surrogate(audit.points, images), _SURROGATE


def _recall(run_dir: Path, images: Images, digests: Sequence[bytes]) -> list[str | None]:
    """Reads a run's predictions for the images of the evaluated split; None for images that it did not predict."""
    try:
        content = {name: digest for name, _, digest in read_digests(run_dir)}
    except UserError:
        content = {}
    known = {
        (row["id"], content.get(row["id"])): row["predicted"]
        for row in read_csv(run_dir / "predictions.csv")
        if row["split"] == images.evaluated
    }
    rows = zip(images.ids, digests, images.splits, strict=True)
    return [known.get((name, digest)) for name, digest, split in rows if split == images.evaluated]


def _write_clean(config: Config, job: Job, rows: np.ndarray, findings: Sequence[Finding]) -> list[str]:
    """Writes the manifest; ids are kept, so that runs on both data sets can be compared."""
    source, examples = job.examples.source, job.examples
    left_out = {one.id for one in findings if one.kind in config.audit.clean}
    lines, unwritable = [], 0
    for row in rows.tolist():
        label = [source.class_names[source.labels[row]]] if source.class_names else []
        line = (str(Path(source.paths[row]).absolute()), *label, SPLITS[examples.splits[row]], source.ids[row])
        if source.ids[row] in left_out:
            continue
        if not any(has_control(cell) or cell != cell.strip() for cell in line):
            lines.append(line)
        else:
            unwritable += 1
    path = Path(str(config.audit.write_clean_csv))
    header = ("path", "label", "split", "id") if source.class_names else ("path", "split", "id")
    write_atomically(path, csv_bytes(header, lines))
    texts = [f"clean: {len(lines):,} of {len(rows):,} images, without {', '.join(config.audit.clean)} · {path}"]
    estimated = sorted(_ESTIMATED & set(config.audit.clean))
    gone = {one.id for one in findings if one.kind in estimated}
    evaluated = sum(source.ids[row] in gone and SPLITS[examples.splits[row]] != "train" for row in rows.tolist())
    if evaluated:
        texts.append(
            f"warning: {evaluated:,} val and test images are left out because of estimates of a model "
            f"({', '.join(estimated)}): metrics on the others are too good. Look at these images first"
        )
    if unwritable:
        texts.append(
            f"clean: {unwritable:,} files are left out, because a CSV file can't hold their names: rename them"
        )
    return texts
