"""The audit of a job's images: for the mode `audit`, and for the reports of `finetune` and `extract`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tl_keras.audit.duplicates import Images
from tl_keras.audit.examine import Audit, examine
from tl_keras.audit.findings import Finding
from tl_keras.data.examples import Examples
from tl_keras.data.splits import SPLITS
from tl_keras.evaluation.leaks import compare_without
from tl_keras.jobs.start import Job

_IMAGES_AT_MOST, _NUMBERS_AT_MOST = 100_000, 400_000_000  # one minute of search; 1.6 GB, up to three copies


def list_audited_images(examples: Examples) -> tuple[np.ndarray, Images]:
    """Lists the images in use: their positions, int64 `(n,)`, and ids, labels and splits in the same order."""
    rows = np.flatnonzero(examples.splits >= 0)
    ids = [examples.source.ids[row] for row in rows.tolist()]
    splits = [SPLITS[split] for split in examples.splits[rows].tolist()]
    return rows, Images(ids, examples.source.labels[rows], examples.class_names, splits)


def fits_in_report(count: int, dim: int) -> bool:
    """Whether `count` embeddings of size `dim` are few enough for an audit in a report."""
    return count <= _IMAGES_AT_MOST and count * dim <= _NUMBERS_AT_MOST


def examine_job(job: Job, embeddings: np.ndarray, *, all_pixels: bool) -> Audit:
    """Audits the images of a job.

    Args:
        job: the job.
        embeddings: see `examine_examples`.
        all_pixels: see `examine`.
    """
    return examine_examples(
        job.examples,
        job.oddities,
        embeddings,
        all_pixels=all_pixels,
        store_dir=job.store_dir,
        show_progress=job.screen.progress,
    )


def examine_examples(
    examples: Examples,
    oddities: Sequence[Finding],
    embeddings: np.ndarray,
    *,
    all_pixels: bool,
    store_dir: str | None = None,
    show_progress: Callable[[str], None],
) -> Audit:
    """Audits the images of a run.

    Args:
        examples: the images.
        oddities: findings about their files.
        embeddings: embeddings of the images in use, in the order of the source, float `(n, dim)`.
        all_pixels: see `examine`.
        store_dir: see `examine`.
        show_progress: called with the progress as text.
    """
    rows, images = list_audited_images(examples)
    broken = [
        Finding(examples.source.ids[row], "unreadable", "high", reason) for row, reason in examples.broken.items()
    ]
    numbers = {int(row): number for number, row in enumerate(rows)}
    in_use = set(images.ids)

    def read(wanted: np.ndarray) -> Iterator[tuple[int, bytes]]:
        for done, (row, content) in enumerate(examples.source.read(rows[wanted]), start=1):
            yield numbers[row], content
            show_progress(f"searching for duplicates {done:,}/{len(wanted):,}")

    return examine(
        images,
        digests=[examples.digests[row].tobytes() for row in rows],
        embeddings=embeddings,
        read=read,
        all_pixels=all_pixels,
        store_dir=store_dir,
        known=[*broken, *(one for one in oddities if one.id in in_use)],
    )


def measure_leaks(audit: Audit, images: Images, predicted: np.ndarray, judge: str) -> tuple[dict[str, Any], list[str]]:
    """Measures the effect of images that are in two splits on accuracy.

    Args:
        audit: result of the audit.
        images: the audited images.
        predicted: predicted classes of the evaluated split, int `(m,)`, in its order.
        judge: the name of the classifier, for people.

    Returns:
        An entry of `metrics.json`, empty without leaks, and lines for the screen.
    """
    evaluated = np.array(images.splits) == images.evaluated
    copied = audit.copied[evaluated]
    leaked = copied.any(1)
    if not leaked.any() or len(predicted) != len(leaked):
        return {}, []
    labels = images.labels[evaluated]
    result, accuracies = compare_without(leaked, predicted == labels)
    line = f"leak: {int(leaked.sum()):,} of {len(leaked):,} {images.evaluated} images are also in another split; "
    rows = np.flatnonzero(evaluated)
    ids = {split: [images.ids[row] for row in rows[own].tolist()] for split, own in zip(SPLITS, copied.T, strict=True)}
    result = {"split": images.evaluated, "judge": judge, **result, "copies_in": ids}
    return result, [f"{line}{images.evaluated} accuracy of {judge}: {accuracies}"]
