"""The end of a job in four steps: judge, repeat (`jobs.training`), export, close."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tl_keras.audit.duplicates import Images
from tl_keras.audit.examine import Audit, describe_data
from tl_keras.audit.findings import FINDINGS_HEADER
from tl_keras.backbones.embed import Embedded, ReadEmbeddings
from tl_keras.classifier import Classifier, write_classifier
from tl_keras.data.examples import Examples
from tl_keras.data.splits import evaluated_split
from tl_keras.errors import UserError
from tl_keras.evaluation.leaks import measure_seen
from tl_keras.evaluation.metrics import headline
from tl_keras.evaluation.tables import describe_environment, describe_evaluation, write_evaluation
from tl_keras.export.parity import ParityProcess
from tl_keras.export.saved_model import Exported, describe_request, export_saved_model
from tl_keras.jobs.inspection import examine_job, fits_in_report, list_audited_images, measure_leaks
from tl_keras.jobs.result import Result
from tl_keras.jobs.start import Job
from tl_keras.report.compose import Judged, compose_report, try_report
from tl_keras.run import INTERRUPTED, Interrupts, check_owner
from tl_keras.statistics.calibration import calibrated_softmax, describe_calibration, fit_temperature, is_supported
from tl_keras.statistics.intervals import with_interval

_PARITY_IMAGES = {"float32": 16, "bfloat16": 100, "float16": 100}  # enough to see one decision in a hundred
_KEPT_SAMPLES = 16
_SAMPLE_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Views:
    """How a network sees images, for the report: positions, int `(m,)` → embeddings, float32 `(m, dim)`.

    Attributes:
        trained: embeddings of the backbone as it was trained.
        pretrained: embeddings of the backbone before that, which has learned no wrong label, if there was one.
        dim: size of an embedding.
    """

    trained: ReadEmbeddings
    pretrained: ReadEmbeddings
    dim: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a job has produced so far; `record` writes it.

    Attributes:
        classifier: the trained classifier, calibrated.
        embedded: the embeddings it was trained on.
        probabilities: split → float32 `(n, classes)`.
        uncalibrated: the same before calibration; None if there was none.
        samples: encoded images that the exported model is compared on.
        expected: their probabilities, float32 `(m, classes)`.
        selected: what was selected on val, a clause with its semicolon; may be empty.
        status: exit status so far.
        entries: entries of `metrics.json`.
        exported: the exported model.
    """

    classifier: Classifier
    embedded: Embedded
    probabilities: Mapping[str, np.ndarray]
    uncalibrated: Mapping[str, np.ndarray] | None
    samples: Sequence[bytes]
    expected: np.ndarray
    selected: str
    status: int
    entries: dict[str, Any]
    exported: Exported | None = None


def record(job: Job, outcome: Outcome, entries: Mapping[str, Any], **changes: Any) -> Outcome:
    """Adds entries to `metrics.json`, and brings its timing up to date.

    Args:
        job: the run.
        outcome: what it has produced so far.
        entries: new entries.
        **changes: other fields of the outcome that change.

    Returns:
        The outcome with these entries.
    """
    timing = _describe_timing(job, outcome.embedded)
    outcome = dataclasses.replace(outcome, entries={**outcome.entries, **entries, "timing": timing}, **changes)
    job.folder.write_json("metrics.json", outcome.entries)
    return outcome


def judge(
    job: Job,
    classifier: Classifier,
    logits: Mapping[str, np.ndarray],
    *,
    embedded: Embedded,
    selected: str,
    interrupted: bool = False,
    failed: bool = False,
    entries: Mapping[str, Any] | None = None,
) -> Outcome:
    """Calibrates a classifier on val, measures it, and writes the tables and the classifier.

    Args:
        job: the run.
        classifier: what was trained.
        logits: split → `(n, classes)`, of val and test.
        embedded: the embeddings it was trained on.
        selected: what was selected on val, a clause with its semicolon; may be empty.
        interrupted: whether the user interrupted the training.
        failed: whether a stage of training failed, so that less was trained than requested.
        entries: further entries of `metrics.json`.
    """
    config, examples, folder = job.config, job.examples, job.folder
    precision = embedded.evaluated_precision
    with job.watch.stage("evaluation"):
        fitted = _fit_temperature(job, logits)
        temperature = fitted or 1.0
        calibrated = classifier.divide_logits(temperature) if temperature != 1 else classifier
        probabilities = {split: calibrated_softmax(values, temperature) for split, values in logits.items()}
        uncalibrated = {split: calibrated_softmax(values, 1) for split, values in logits.items()}
        metrics: dict[str, Any] = write_evaluation(
            folder,
            examples,
            probabilities,
            target_accuracy=config.evaluation.target_accuracy,
            attributes=job.attributes,
        )
        leaks, leak_warnings = measure_seen(
            job.seen, examples, probabilities, what="this run, or an earlier one of its network,"
        )
        calibration = describe_calibration(
            temperature,
            {split: (values, examples.labels(split)) for split, values in uncalibrated.items()},
            supported=fitted is not None,
        )
        samples, expected = _sample(examples, probabilities, _PARITY_IMAGES[precision])
        write_classifier(
            calibrated,
            folder.path / "classifier",
            samples=samples[:_KEPT_SAMPLES],
            expected=expected[:_KEPT_SAMPLES],
        )
    environment = describe_environment(engine=embedded.choice.engine, precision=embedded.choice.precision)
    environment["evaluated_precision"] = precision
    metrics |= {**(entries or {}), **({"leaks": leaks} if leaks else {}), "calibration": calibration}
    metrics |= {"interrupted": interrupted, "environment": environment}
    status = INTERRUPTED if interrupted else int(failed)
    before = uncalibrated if temperature != 1 else None
    outcome = Outcome(calibrated, embedded, probabilities, before, samples, expected, selected, status, {})
    outcome = record(job, outcome, metrics)
    for line in describe_evaluation(outcome.entries):
        job.screen.line(line)
    for line in leak_warnings:
        job.warn(line)
    return outcome


def keep_classifier(job: Job, network: keras.Model, embedding_layer: str, logits: np.ndarray) -> None:
    """Writes the classifier so far, so that a run that is killed later leaves one that can be used.

    Args:
        job: the run.
        network: images → logits `(b, classes)`.
        embedding_layer: the last layer of its backbone.
        logits: of val, `(n, classes)`.
    """
    temperature = _fit_temperature(job, {"val": logits}) or 1.0
    samples, expected = _sample(job.examples, {"val": calibrated_softmax(logits, temperature)}, _KEPT_SAMPLES)
    classifier = job.name_classifier(network, embedding_layer).divide_logits(temperature)
    try:
        write_classifier(classifier, job.folder.path / "classifier", samples=samples, expected=expected)
    except UserError as error:
        job.screen.line(f"warning: {error} Training continues")


def export(job: Job, outcome: Outcome, parity: ParityProcess | None) -> Outcome:
    """Exports the classifier, unless the run was interrupted or no export is wanted.

    Args:
        job: the run.
        outcome: what it has produced so far.
        parity: the process that compares the exported model with the classifier; None: no export is wanted.
    """
    if parity is None or outcome.entries["interrupted"]:
        return outcome
    job.screen.line(_last_line(job, outcome))  # before the export, which may fail
    run = job.config.run
    check_owner(job.folder.path)
    try:
        with job.watch.stage("export"), Interrupts.restored():
            exported = export_saved_model(
                outcome.classifier,
                export_dir=run.export_dir,
                name=run.model_name,
                samples=outcome.samples,
                expected=outcome.expected,
                precision=outcome.embedded.evaluated_precision,
                max_pixels=run.max_pixels,
                show=job.screen.line,
                parity=parity,
                run_id=job.folder.run_id,
            )
    except KeyboardInterrupt:
        job.screen.warning(
            "export: interrupted; the rest of the run is complete. Export it with --mode=export "
            f"--classifier={job.folder.path}"
        )
        return dataclasses.replace(outcome, status=INTERRUPTED)
    for line in describe_request(exported.path):
        job.screen.line(line)
    return record(job, outcome, {"export": exported.as_dict()}, exported=exported)


def close(job: Job, outcome: Outcome, views: Views) -> Result:
    """Writes the report, and shows the last line.

    Args:
        job: the run.
        outcome: what it has produced.
        views: embeddings for the report.
    """
    is_complete, status = outcome.status != INTERRUPTED, outcome.status
    if job.config.evaluation.report:
        with job.watch.stage("report"):
            audit = _AuditForReport(job)
            write = functools.partial(_write_report, job, outcome, views, audit)
            report_status = try_report(write, job.screen.line, job.screen.warning)
        is_complete = is_complete and not report_status
        outcome = record(job, outcome, audit.entries, status=report_status or status)
    job.screen.result(_last_line(job, outcome))
    exported = outcome.exported.path if outcome.exported else None
    return Result(job.folder.path, exported, outcome.entries, outcome.status, is_complete)


def close_without_probe(job: Job, embedded: Embedded) -> Result:
    """Ends a run that only computes embeddings."""
    environment = describe_environment(engine=embedded.choice.engine, precision=embedded.choice.precision)
    metrics = {"environment": environment, "timing": _describe_timing(job, embedded)}
    job.folder.write_json("metrics.json", metrics)
    why = "--probe=none" if job.examples.class_names else "the images have no labels: no probe is trained"
    job.screen.result(f"{why} · {job.folder.path}")
    return Result(job.folder.path, None, metrics)


class _AuditForReport:
    """What an audit of the run's images finds, for the report.

    Attributes:
        entries: for `metrics.json`.
        lines: for the report.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.entries: dict[str, Any] = {}
        self.lines: list[str] = []

    def examine(self, probabilities: Mapping[str, np.ndarray], views: Views) -> Audit | None:
        """Audits the images, unless they are too many for a report; writes `audit.csv`."""
        rows, images = list_audited_images(self._job.examples)
        if not fits_in_report(len(rows), views.dim):
            self.lines = [f"audit: {len(rows):,} images are too many for the report; use --mode=audit"]
            self._job.screen.line(self.lines[0])
            return None
        job = self._job
        audit = examine_job(job, views.pretrained(rows), all_pixels=False)
        leaks, leak_lines = measure_leaks(audit, images, _predicted(probabilities, images), "this classifier")
        job.folder.write_csv("audit.csv", FINDINGS_HEADER, [one.as_row() for one in audit.findings])
        self.entries = {"audit": {"findings": audit.counts(), "leaks": leaks, "shift": audit.shift}}
        found = ", ".join(f"{kind} {count:,}" for kind, count in audit.counts().items())
        job.screen.line(f"audit: {found or 'no findings'} · {job.folder.path}/audit.csv")
        for line in leak_lines:
            job.warn(f"warning: {line}")
        self.lines = [*leak_lines, *describe_data(audit, images)]
        return audit


def _write_report(job: Job, outcome: Outcome, views: Views, auditor: _AuditForReport) -> Path:
    """Audits the images, and writes the report."""
    config, classifier = job.config, outcome.classifier
    audit = auditor.examine(outcome.probabilities, views)
    judged = Judged(
        name=classifier.name,
        backbone=classifier.backbone,
        examples=job.examples,
        probabilities=outcome.probabilities,
        before=outcome.uncalibrated,
        image_size=classifier.image_size,
        resize=classifier.resize,
        trained=classifier,
        read_embeddings=views.trained if audit else None,
    )
    return compose_report(
        job.folder,
        judged,
        {**outcome.entries, **auditor.entries},
        config=config.as_dict(),
        command=config.as_command(),
        card=job.card,
        notes=job.warnings,
        audit=audit,
        audit_lines=auditor.lines,
    )


def _predicted(probabilities: Mapping[str, np.ndarray], images: Images) -> np.ndarray:
    return np.asarray(probabilities[images.evaluated].argmax(1))


def _fit_temperature(job: Job, logits: Mapping[str, np.ndarray]) -> float | None:
    """The temperature; 1 if none is wanted, None if val has too few images to fit one."""
    if not job.config.evaluation.calibrate or "val" not in logits:
        return 1.0
    labels = job.examples.labels("val")
    temperature = fit_temperature(logits["val"], labels)
    return temperature if is_supported(logits["val"], labels, temperature) else None


def _sample(examples: Examples, probabilities: Mapping[str, np.ndarray], count: int) -> tuple[list[bytes], np.ndarray]:
    """Some evaluated images, drawn from the last split, at most 64 MB together; and their probabilities."""
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


def _describe_timing(job: Job, embedded: Embedded) -> dict[str, Any]:
    rate = round(embedded.computed / embedded.seconds, 1) if embedded.computed else None
    return {
        "seconds": dict(job.watch.seconds),
        "trunk_images": embedded.computed,
        "trunk_images_per_second": rate,
    }


def _last_line(job: Job, outcome: Outcome) -> str:
    metrics, split = outcome.entries, evaluated_split(outcome.entries)
    note = "" if split == "test" else f" ({outcome.selected}there is no test split)"
    leak = (metrics.get("leaks") or {}).get(split, {})
    if "accuracy_without" in leak:
        shown = with_interval(leak["accuracy_without"], leak["accuracy_without_ci95"])
        note += f" ({shown} without {leak['leaked']:,} images that are training images too)"
    parts = [headline(split, metrics[split]) + note, str(job.folder.path)]
    return " · ".join([*parts, str(outcome.exported.path)] if outcome.exported else parts)
