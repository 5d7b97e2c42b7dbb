"""Exports `saved_models/NAME/VERSION/` atomically, after a comparison with the evaluated classifier."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tl_keras.classifier import Classifier, Servable, read_run_id, write_decoding
from tl_keras.classifier.probe_layers import has_votes
from tl_keras.data.images import explain_broken
from tl_keras.errors import UserError
from tl_keras.export.parity import Agreement, ParityProcess
from tl_keras.export.warmup import write_warmup
from tl_keras.run import count_of, disk_errors, sync_tree

AGREE_AT_LEAST = 0.99
_DIFFERENCE_AT_MOST = {"float32": 1e-3, "TensorFloat-32": 2e-2, "bfloat16": 0.5, "float16": 0.5}
_TRIES = 1000
_UNFINISHED = ".unfinished-"
_LARGEST_VERSION = 2**63 - 1  # TF Serving reads an int64, and ignores folders with other names


@dataclasses.dataclass(frozen=True)
class Exported:
    """An exported model: its path, and its agreement with the evaluated classifier."""

    path: Path
    agreement: Agreement

    def as_dict(self) -> dict[str, Any]:
        """The entry of `metrics.json`."""
        return {"path": str(self.path), **dataclasses.asdict(self.agreement)}


def name_model(name: str) -> str:
    """Makes a name for URLs of TF Serving: other characters are replaced by `_`."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".")


def describe_request(path: Path) -> list[str]:
    """Describes how to serve the model locally, and a request with `curl`."""
    body = """'{"instances": [{"b64": "'$(base64 -w0 photo.jpg)'"}]}'"""
    return [
        f"try it: tl_keras serve --classifier={path}",
        f"then send a request: echo {body} | curl -d @- http://localhost:8501/v1/models/{path.parent.name}:predict",
    ]


def export_saved_model(
    classifier: Classifier,
    *,
    export_dir: str,
    name: str | None,
    samples: Sequence[bytes],
    expected: np.ndarray,
    precision: str,
    max_pixels: int,
    show: Callable[[str], None],
    parity: ParityProcess | None = None,
    run_id: str = "",
) -> Exported:
    """Exports the next free version, and checks it before it gets its final name.

    Args:
        classifier: the evaluated classifier.
        export_dir: folder of all models.
        name: name of the model; None for that of the classifier.
        samples: m encoded images, m at least 1.
        expected: their evaluated probabilities, float32 `(m, classes)`.
        precision: precision of the trunk, which determines the allowed difference.
        max_pixels: pixel limit; the model rejects larger images.
        show: shows a line.
        parity: the process that compares, if it was started already.
        run_id: id of the run; if the run was killed after it exported a version, that version is used.

    Returns:
        The version folder, and the agreement.

    Raises:
        UserError: the folder can't be written, or the predictions of the exported model differ.
    """
    small = _find_small(classifier, samples, max_pixels, show)
    samples, expected = [samples[number] for number in small], expected[small]
    own = contextlib.nullcontext(parity) if parity else ParityProcess()
    with own as parity, disk_errors(f"the model folder {export_dir}"):
        parent = Path(export_dir) / (name or name_model(classifier.name))
        parent.mkdir(parents=True, exist_ok=True)
        known = _find_version(parent, run_id)
        if known:
            agreement = parity.compare(known, samples, expected)
            with contextlib.suppress(UserError):  # the data has changed since: a new version is exported below
                check_agreement(agreement, precision, has_votes=has_votes(classifier.network))
                return Exported(known, agreement)
        for leftover in parent.glob(f"{_UNFINISHED}{run_id}-*") if run_id else ():  # from a killed process
            shutil.rmtree(leftover, ignore_errors=True)
        # TF Serving ignores names that are not numbers
        unfinished = Path(tempfile.mkdtemp(prefix=f"{_UNFINISHED}{run_id}-", dir=parent))
        try:
            write_version(classifier, unfinished, name=parent.name, max_pixels=max_pixels, run_id=run_id)
            with contextlib.nullcontext(parity) if not known else ParityProcess() as fresh:
                agreement = fresh.compare(unfinished, samples, expected)
            checked, largest = count_of(agreement.count, "image"), agreement.largest_difference
            show(
                f"export: exported model checked on {checked} in a new process: decisions agree in "
                f"{agreement.decisions:.3f}, largest difference of a probability {largest:.1e}"
            )
            check_agreement(agreement, precision, has_votes=has_votes(classifier.network))
            unfinished.chmod(0o755)
            sync_tree(unfinished)
            _warn_of_other_labels(parent, classifier.labels, show)
            return Exported(_take_version(unfinished, parent), agreement)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _find_small(
    classifier: Classifier, samples: Sequence[bytes], max_pixels: int, show: Callable[[str], None]
) -> list[int]:
    """Finds the samples that the model accepts.

    Raises:
        UserError: it accepts none.
    """
    # the decoder that the model is traced with, so that it is traced once
    decoding: dict[str, Any] = {
        "image_size": classifier.image_size,
        "resize": classifier.resize,
        "max_pixels": max_pixels,
    }
    small = [number for number, sample in enumerate(samples) if not explain_broken(sample, **decoding)]
    if samples and not small:
        raise UserError(
            f"the evaluated images have more than --max_pixels={max_pixels} pixels, so the exported model would reject "
            "them. Nothing was exported. Give a larger --max_pixels."
        )
    if len(small) < len(samples):
        show(
            f"warning: {len(samples) - len(small)} of {len(samples)} evaluated images have more than "
            f"--max_pixels={max_pixels} pixels; the exported model rejects such images"
        )
    return small


def check_agreement(agreement: Agreement, precision: str, *, has_votes: bool = False) -> None:
    """Checks that the predictions of the exported model agree with the evaluated classifier.

    Args:
        agreement: the agreement of both.
        precision: precision of the trunk.
        has_votes: whether its probabilities are votes, which change in steps; then only decisions are compared.

    Raises:
        UserError: they differ by more than the precision explains.
    """
    if not agreement.batch_difference <= _DIFFERENCE_AT_MOST["float32"]:  # also rejects NaN
        raise UserError(
            f"the predictions of the exported model depend on the batch size (by {agreement.batch_difference:.1e}). "
            "Nothing was exported; please report this with the run folder."
        )
    advice = "Run again with --precision=float32" if precision != "float32" else "Please report this"
    if precision == "float32" and tf.config.list_physical_devices("GPU"):
        precision = "TensorFloat-32"
    flips = round((1 - agreement.decisions) * agreement.count)
    too_many = flips > max(
        1, (1 - AGREE_AT_LEAST) * agreement.count
    )  # a single flip among few images is not significant
    allowed = 1.0 if has_votes else _DIFFERENCE_AT_MOST[precision]
    if not agreement.largest_difference <= allowed or too_many:
        raise UserError(
            f"the exported model differs from the evaluated classifier: decisions agree in {agreement.decisions:.3f} "
            f"(required: {AGREE_AT_LEAST}), largest difference {agreement.largest_difference:.1e} (allowed in "
            f"{precision}: {allowed:.0e}). Nothing was exported. {advice}; the run folder is kept."
        )


def _find_version(parent: Path, run_id: str) -> Path | None:
    """Finds the version that a run exported earlier."""
    versions = [path for path in parent.iterdir() if path.name.isdecimal()] if run_id else []
    return next((path for path in versions if read_run_id(path) == run_id), None)


def write_version(classifier: Classifier, folder: Path, *, name: str, max_pixels: int, run_id: str = "") -> None:
    """Writes the model, its labels, and its warm-up requests.

    Args:
        classifier: the trained classifier.
        folder: the version folder, which exists.
        name: name of the model.
        max_pixels: pixel limit; the model rejects larger images.
        run_id: id of the run that exports it, if any.

    Raises:
        OSError: the disk is full, or the folder can't be written.
    """
    servable = Servable(classifier, max_pixels=max_pixels)
    # A served model computes no gradients, and TensorFlow 2.21 fails to trace the custom gradient of `silu`.
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    # traced here: in `save`, TensorFlow would trace the decoder again, which it has traced before
    signatures = {name: function.get_concrete_function() for name, function in servable.endpoints.items()}
    try:
        tf.saved_model.save(servable.module, str(folder), signatures=signatures, options=options)
    except tf.errors.OpError as error:
        raise OSError(None, error.message) from error
    assets = folder / "assets"
    assets.mkdir(exist_ok=True)
    (assets / "labels.txt").write_text("".join(f"{label}\n" for label in classifier.labels), encoding="utf-8")
    write_decoding(folder, classifier, max_pixels=max_pixels, run_id=run_id)
    write_warmup(folder, name, image_size=classifier.image_size)


def _warn_of_other_labels(parent: Path, labels: Sequence[str], show: Callable[[str], None]) -> None:
    """Warns if the previous version has other labels: it may belong to another data set with the same name."""
    before = parent / str(_last_version(parent)) / "assets" / "labels.txt"
    if os.path.isfile(before) and before.read_text(encoding="utf-8") != "".join(f"{label}\n" for label in labels):
        show(
            f"warning: version {before.parent.parent.name} of {parent.name} has other labels, and TF Serving serves "
            "the newest version; if they are different models, give another --model_name"
        )


def _last_version(parent: Path) -> int:
    """The highest version number in the folder of a model; 0 if there is none."""
    names = [path.name for path in parent.iterdir()]
    numbers = [int(name) for name in names if name.isascii() and name.isdecimal()]
    return max((number for number in numbers if number < _LARGEST_VERSION), default=0)


def _take_version(unfinished: Path, parent: Path) -> Path:
    """Renames the folder to the next free number, even if other exports run at the same time."""
    first = _last_version(parent) + 1
    for number in range(first, first + _TRIES):
        try:
            os.rename(unfinished, parent / str(number))
            return parent / str(number)
        except OSError:
            if not (parent / str(number)).exists():
                raise
    raise UserError(f"{parent} has no free version number after {first}. Delete old versions.")
