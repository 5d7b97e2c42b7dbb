"""Writes `saved_models/NAME/VERSION/`, whole or not at all."""

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
from tl_keras.run import disk_errors, sync_tree

AGREE_AT_LEAST = 0.99
_DIFFERENCE_AT_MOST = {"float32": 1e-3, "TensorFloat-32": 2e-2, "bfloat16": 0.5, "float16": 0.5}
_TRIES = 1000
_UNFINISHED = ".unfinished-"
_LARGEST_VERSION = 2**63 - 1  # TF Serving reads an int64, and ignores folders with other names


@dataclasses.dataclass(frozen=True)
class Exported:
    """Where the model is, and how well it agrees with the classifier that was evaluated."""

    path: Path
    agreement: Agreement

    def as_dict(self) -> dict[str, Any]:
        """For `metrics.json`."""
        return {"path": str(self.path), **dataclasses.asdict(self.agreement)}


def name_model(name: str) -> str:
    """The name under which TF Serving can be asked for a model: what an address can't hold becomes `_`."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".")


def describe_request(path: Path) -> list[str]:
    """How to serve this model here, and a `curl` line that asks whoever serves it about one photograph."""
    body = """'{"instances": [{"b64": "'$(base64 -w0 photo.jpg)'"}]}'"""
    return [
        f"try it: tl_keras serve --classifier={path}",
        f"and ask it: echo {body} | curl -d @- http://localhost:8501/v1/models/{path.parent.name}:predict",
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
    """Writes the next free version and checks what was written before it gets its name.

    Args:
        classifier: what was evaluated.
        export_dir: the folder of all models.
        name: the model's name; None: the classifier's own.
        samples: m encoded images, m at least 1.
        expected: their probabilities as evaluated, float32 `(m, classes)`.
        precision: of the trunk that gave them; what it may explain of a difference.
        max_pixels: larger images are invalid to the model.
        show: shows a line.
        parity: the process that compares, where it was started before.
        run_id: of the run whose export this is; the version that it wrote before it was killed is taken, if there is
            one.

    Returns:
        The version folder, and the agreement.

    Raises:
        UserError: the folder can't be written, or what was written answers otherwise than what was evaluated.
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
            with contextlib.suppress(UserError):  # the data changed since: a version of its own is exported below
                check_agreement(agreement, precision, has_votes=has_votes(classifier.network))
                return Exported(known, agreement)
        for leftover in parent.glob(f"{_UNFINISHED}{run_id}-*") if run_id else ():  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        # a name that is no number: TF Serving ignores it
        unfinished = Path(tempfile.mkdtemp(prefix=f"{_UNFINISHED}{run_id}-", dir=parent))
        try:
            write_version(classifier, unfinished, name=parent.name, max_pixels=max_pixels, run_id=run_id)
            with contextlib.nullcontext(parity) if not known else ParityProcess() as fresh:
                agreement = fresh.compare(unfinished, samples, expected)
            show(
                f"export: exported model checked on {agreement.count} images in a new process: decisions agree in "
                f"{agreement.decisions:.3f}, largest difference of a probability {agreement.largest_difference:.1e}"
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
    """Which of the samples the model will take.

    Raises:
        UserError: none of them.
    """
    decoding: dict[str, Any] = {
        "image_size": classifier.image_size,
        "resize": classifier.resize,
        "max_pixels": max_pixels,
    }
    small = [number for number, sample in enumerate(samples) if not explain_broken(sample, **decoding)]
    if samples and not small:
        raise UserError(
            f"the images that were evaluated have more than --max_pixels={max_pixels} pixels, which the exported model "
            "would refuse. Nothing was exported. Give a larger --max_pixels."
        )
    if len(small) < len(samples):
        show(
            f"warning: {len(samples) - len(small)} of {len(samples)} images that were evaluated have more than "
            f"--max_pixels={max_pixels} pixels; the exported model finds such images invalid"
        )
    return small


def check_agreement(agreement: Agreement, precision: str, *, has_votes: bool = False) -> None:
    """Refuses a model that answers otherwise than the classifier that was evaluated.

    Args:
        agreement: how well it agrees.
        precision: of the trunk.
        has_votes: whether its probabilities jump where a vote changes; then the decisions alone are judged.

    Raises:
        UserError: by more than the precision explains.
    """
    if not agreement.batch_difference <= _DIFFERENCE_AT_MOST["float32"]:  # NaN is refused too
        raise UserError(
            f"the exported model answers otherwise in another batch size (by {agreement.batch_difference:.1e}). "
            "Nothing was exported; please report this with the run folder."
        )
    advice = "Run again with --precision=float32" if precision != "float32" else "Please report this"
    if precision == "float32" and tf.config.list_physical_devices("GPU"):
        precision = "TensorFloat-32"
    flips = round((1 - agreement.decisions) * agreement.count)
    too_many = flips > max(1, (1 - AGREE_AT_LEAST) * agreement.count)  # of few images one may flip: it tells nothing
    allowed = 1.0 if has_votes else _DIFFERENCE_AT_MOST[precision]
    if not agreement.largest_difference <= allowed or too_many:
        raise UserError(
            f"the exported model is not what was evaluated: decisions agree in {agreement.decisions:.3f} (needed: "
            f"{AGREE_AT_LEAST}), largest difference {agreement.largest_difference:.1e} (allowed in {precision}: "
            f"{allowed:.0e}). Nothing was exported. {advice}; the run folder is kept."
        )


def _find_version(parent: Path, run_id: str) -> Path | None:
    """The version that a run exported before."""
    versions = [path for path in parent.iterdir() if path.name.isdecimal()] if run_id else []
    return next((path for path in versions if read_run_id(path) == run_id), None)


def write_version(classifier: Classifier, folder: Path, *, name: str, max_pixels: int, run_id: str = "") -> None:
    """Writes the model, its labels, and the requests that warm it up.

    Args:
        classifier: what was trained.
        folder: the version folder; it exists.
        name: the model's.
        max_pixels: larger images are invalid to it.
        run_id: of the run that exports it, if it is one.

    Raises:
        OSError: the disk is full, or the folder can't be written.
        UserError: the network is too large for one graph.
    """
    servable = Servable(classifier, max_pixels=max_pixels)
    # A served model computes no gradients, and TensorFlow 2.21 fails to trace the custom gradient of a frozen `silu`.
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    try:
        tf.saved_model.save(servable, str(folder), signatures=servable.endpoints, options=options)
    except tf.errors.OpError as error:
        raise OSError(None, error.message) from error
    assets = folder / "assets"
    assets.mkdir(exist_ok=True)
    (assets / "labels.txt").write_text("".join(f"{label}\n" for label in classifier.labels), encoding="utf-8")
    write_decoding(folder, classifier, max_pixels=max_pixels, run_id=run_id)
    write_warmup(folder, name, image_size=classifier.image_size)


def _warn_of_other_labels(parent: Path, labels: Sequence[str], show: Callable[[str], None]) -> None:
    """Says so where the version before has other labels: it may be another data set's of the same name."""
    before = parent / str(_last_version(parent)) / "assets" / "labels.txt"
    if os.path.isfile(before) and before.read_text(encoding="utf-8") != "".join(f"{label}\n" for label in labels):
        show(
            f"warning: version {before.parent.parent.name} of {parent.name} has other labels, and TF Serving takes the "
            "newest version; give --model_name where the two are not one model"
        )


def _last_version(parent: Path) -> int:
    """The highest version number in a model's folder, 0 where there is none."""
    names = [path.name for path in parent.iterdir()]
    numbers = [int(name) for name in names if name.isascii() and name.isdecimal()]
    return max((number for number in numbers if number < _LARGEST_VERSION), default=0)


def _take_version(unfinished: Path, parent: Path) -> Path:
    """Renames the folder to the next free number; another export may take one at the same moment."""
    first = _last_version(parent) + 1
    for number in range(first, first + _TRIES):
        try:
            os.rename(unfinished, parent / str(number))
            return parent / str(number)
        except OSError:
            if not (parent / str(number)).exists():
                raise
    raise UserError(f"{parent} has no free version number after {first}. Clear old versions.")
