"""How modes look at their data: `audit` before anything is trained, `finetune` and `extract` for the report."""

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

_IMAGES_AT_MOST, _NUMBERS_AT_MOST = 100_000, 400_000_000  # a minute for neighbours; 1.6 GB, held up to three times


def list_images(examples: Examples) -> tuple[np.ndarray, Images]:
    """Positions of the images in use, int64 `(n,)`, and what is known of them, in the same order."""
    rows = np.flatnonzero(examples.splits >= 0)
    ids = [examples.source.ids[row] for row in rows.tolist()]
    splits = [SPLITS[split] for split in examples.splits[rows].tolist()]
    return rows, Images(ids, examples.source.labels[rows], examples.class_names, splits)


def fits_in_report(count: int, dim: int) -> bool:
    """Whether so many embeddings of `dim` numbers can be looked at beside a run."""
    return count <= _IMAGES_AT_MOST and count * dim <= _NUMBERS_AT_MOST


def examine_examples(
    examples: Examples,
    oddities: Sequence[Finding],
    embeddings: np.ndarray,
    *,
    all_pixels: bool,
    show_progress: Callable[[str], None],
) -> Audit:
    """The audit of a run's images.

    Args:
        examples: those images.
        oddities: what is odd about their files.
        embeddings: of those in use, in the source's order, float `(n, dim)`.
        all_pixels: see `examine`.
        show_progress: shows how far it is.
    """
    rows, images = list_images(examples)
    broken = [
        Finding(examples.source.ids[row], "unreadable", "high", reason) for row, reason in examples.broken.items()
    ]
    numbers = {int(row): number for number, row in enumerate(rows)}
    in_use = set(images.ids)

    def read(wanted: np.ndarray) -> Iterator[tuple[int, bytes]]:
        for done, (row, content) in enumerate(examples.source.read(rows[wanted]), start=1):
            yield numbers[row], content
            show_progress(f"looking for copies {done:,}/{len(wanted):,}")

    return examine(
        images,
        digests=[examples.digests[row].tobytes() for row in rows],
        embeddings=embeddings,
        read=read,
        all_pixels=all_pixels,
        known=[*broken, *(one for one in oddities if one.id in in_use)],
    )


def measure_leaks(audit: Audit, images: Images, predicted: np.ndarray, judge: str) -> tuple[dict[str, Any], list[str]]:
    """What images that are in two splits do to the accuracy.

    Args:
        audit: what was found.
        images: what it was found in.
        predicted: labels of the evaluated split, int `(m,)`, in its order.
        judge: whose predictions they are, for people.

    Returns:
        For `metrics.json`, empty where there is nothing to say, and lines for the screen.
    """
    evaluated = np.array(images.splits) == images.evaluated
    copied = audit.copied[evaluated]
    leaked = copied.any(1)
    if not leaked.any() or len(predicted) != len(leaked):
        return {}, []
    labels = images.labels[evaluated]
    result, accuracies = compare_without(leaked, predicted == labels)
    line = f"leak: {int(leaked.sum()):,} of {len(leaked):,} {images.evaluated} images are in another split too; "
    rows = np.flatnonzero(evaluated)
    ids = {split: [images.ids[row] for row in rows[own].tolist()] for split, own in zip(SPLITS, copied.T, strict=True)}
    result = {"split": images.evaluated, "judge": judge, **result, "copies_in": ids}
    return result, [f"{line}{images.evaluated} accuracy by {judge}: {accuracies}"]
