"""Composes the reports of finetune, extract, evaluate and audit: collects thumbnails, heat maps and neighbors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.neighbors import NearestNeighbors

from tl_keras.audit.examine import Audit
from tl_keras.audit.findings import KINDS
from tl_keras.classifier import Classifier
from tl_keras.data.examples import Examples
from tl_keras.data.images import make_images
from tl_keras.data.splits import SPLITS, evaluated_split
from tl_keras.errors import LostRunError, UserError
from tl_keras.report.card import Card
from tl_keras.report.contents import Near, Shown, ShownFinding, ShownPair
from tl_keras.report.gradcam import choose_map, explain
from tl_keras.report.page import REPORT, AuditShown, Report, write_audit_page, write_report
from tl_keras.report.pictures import describe_heat, encode_thumb, light_up
from tl_keras.report.selection import Selection, choose_shown
from tl_keras.run import INTERRUPTED, Interrupts, RunFolder

_THUMB = 168  # longer side in pixels
_NEAR = 3
_FINDINGS, _FINDINGS_PER_KIND = 18, 4
_AUDIT_FINDINGS, _AUDIT_FINDINGS_PER_KIND = 120, 12  # in the report of the audit mode
_BATCH = 32
_EXPORTED = "There are no heat maps: an exported model has no gradients. Evaluate its run folder instead."
_NO_GRADIENT = (
    "There are no heat maps: the predictions have no gradient with respect to the feature map, as with nearest "
    "neighbors (--probe=knn)."
)
_NO_MAP = "There are no heat maps: this network has no feature map before its embedding."


@dataclasses.dataclass(frozen=True)
class Judged:
    """A classifier and its predictions for labeled images.

    Attributes:
        name: name of the classifier.
        backbone: name of its network.
        examples: the images.
        probabilities: split → float `(n, classes)`.
        image_size: height and width of the network's input, in pixels.
        resize: how images are resized, see `--resize`.
        trained: the classifier with its Keras network; None for an exported model.
        before: the probabilities before calibration; None without calibration.
        read_embeddings: positions, int `(m,)` → float `(m, dim)`; None if training images are not available.
    """

    name: str
    backbone: str
    examples: Examples
    probabilities: Mapping[str, np.ndarray]
    image_size: int
    resize: str
    trained: Classifier | None
    before: Mapping[str, np.ndarray] | None = None
    read_embeddings: Callable[[np.ndarray], np.ndarray] | None = None


def try_report(write: Callable[[], Path], show: Callable[[str], None], warn: Callable[[str], None]) -> int:
    """Writes a report; if that fails, the run is complete without it.

    Returns:
        The exit status: 0, 1 if the report could not be written, 130 if the user interrupted it.
    """
    try:
        with Interrupts.restored():
            show(f"report: {write()}")
    except KeyboardInterrupt:
        warn("report: interrupted; the run is complete without it")
        return INTERRUPTED
    except UserError as error:
        warn(f"warning: the report could not be written: {_in_a_line(error)} The run is complete without it.")
        return 1
    except LostRunError:
        raise
    except Exception as error:  # a bug in the last step must not lose the run
        reason = f"{type(error).__name__}: {_in_a_line(error)}"
        warn(f"warning: the report could not be written: {reason}. The run is complete without it; please report this.")
        return 1
    return 0


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())


def compose_report(
    folder: RunFolder,
    judged: Judged,
    metrics: Mapping[str, Any],
    *,
    config: Mapping[str, Any],
    command: str,
    card: Card,
    notes: Sequence[str] = (),
    audit: Audit | None = None,
    audit_lines: Sequence[str] = (),
) -> Path:
    """Writes `report.html`, `MODEL_CARD.md` and `plots/`.

    Args:
        folder: the run folder, in which the tables are already written.
        judged: the classifier and its predictions.
        metrics: contents of `metrics.json`.
        config: contents of `config.json`.
        command: the command that reproduces the run.
        card: the user's entries of the model card.
        notes: warnings of the run.
        audit: findings of the audit; None without an audit.
        audit_lines: lines of the audit on the screen.

    Returns:
        The path of the report.
    """
    examples, split = judged.examples, evaluated_split(judged.probabilities)
    probabilities, labels = judged.probabilities[split], examples.labels(split)
    positions, chosen = examples.positions(split), choose_shown(probabilities, labels)
    near = _find_near(judged, positions[chosen.rows])
    findings = _choose_findings(audit, at_most=_FINDINGS, per_kind=_FINDINGS_PER_KIND)
    named, shown = _find_named(examples, findings), positions[chosen.rows].tolist()
    others = {position for found in near.values() for position, _ in found} | set(named.values())
    views, thumbs = _read_views(examples, shown, others, image_size=judged.image_size, resize=judged.resize)
    rows = [row for row in chosen.rows if int(positions[row]) in views]
    heats, no_heat = _explain(judged, [views[int(positions[row])] for row in rows], probabilities[rows].argmax(1))
    gallery = _Gallery(
        judged, split, views, thumbs, near, dict(zip(rows, heats, strict=True)) if heats is not None else {}
    )
    pictures = {one: thumbs[position] for one, position in named.items() if position in thumbs}
    write_report(
        folder,
        Report(
            name=judged.name,
            dataset=examples.source.name,
            backbone=judged.backbone,
            config=config,
            command=command,
            metrics=metrics,
            counts={split: len(examples.positions(split)) for split in SPLITS},
            class_names=examples.class_names,
            probabilities=probabilities,
            labels=labels,
            before=judged.before[split] if judged.before else None,
            card=card,
            notes=notes,
            worst=gallery.images(chosen.worst),
            least_sure=gallery.images(chosen.least_sure),
            pairs=gallery.pairs(chosen),
            no_heat=no_heat,
            audit=_show_audit(audit, audit_lines, findings, pictures) if audit else None,
        ),
    )
    return folder.path / REPORT


def compose_audit_report(
    folder: RunFolder,
    examples: Examples,
    audit: Audit,
    *,
    lines: Sequence[str],
    image_size: int,
    resize: str,
    command: str,
    notes: Sequence[str],
    environment: Mapping[str, Any],
) -> Path:
    """Writes `report.html` of the audit mode, and returns its path.

    Args:
        folder: the run folder.
        examples: the images.
        audit: the findings.
        lines: lines of the audit on the screen.
        image_size: height and width of the network's input, in pixels.
        resize: how images are resized, see `--resize`.
        command: the command that reproduces the audit.
        notes: warnings of the audit.
        environment: versions, device, engine.
    """
    findings = _choose_findings(audit, at_most=_AUDIT_FINDINGS, per_kind=_AUDIT_FINDINGS_PER_KIND)
    named = _find_named(examples, findings)
    _, thumbs = _read_views(examples, [], set(named.values()), image_size=image_size, resize=resize)
    pictures = {one: thumbs[position] for one, position in named.items() if position in thumbs}
    counts = {split: len(examples.positions(split)) for split in SPLITS}
    shown = _show_audit(audit, lines, findings, pictures)
    write_audit_page(
        folder,
        shown,
        dataset=examples.source.name,
        counts=counts,
        command=command,
        notes=notes,
        environment=environment,
    )
    return folder.path / REPORT


@dataclasses.dataclass(frozen=True)
class _Gallery:
    """Makes the images of the template from rows of the evaluated split."""

    judged: Judged
    split: str
    views: Mapping[int, np.ndarray]
    thumbs: Mapping[int, str]
    near: Mapping[int, list[tuple[int, float]]]
    heats: Mapping[int, np.ndarray]

    def images(self, rows: Sequence[int]) -> list[Shown]:
        positions = self.judged.examples.positions(self.split)
        return [self._image(row, int(positions[row])) for row in rows if int(positions[row]) in self.views]

    def pairs(self, chosen: Selection) -> list[ShownPair]:
        names = self.judged.examples.class_names
        return [
            ShownPair(names[pair.label], names[pair.predicted], pair.count, self.images(pair.rows))
            for pair in chosen.pairs
        ]

    def _image(self, row: int, position: int) -> Shown:
        source, values = self.judged.examples.source, self.judged.probabilities[self.split][row]
        view, heat, best = self.views[position], self.heats.get(row), int(values.argmax())
        label, names = int(source.labels[position]), self.judged.examples.class_names
        place = describe_heat(heat) if heat is not None else ""
        return Shown(
            id=source.ids[position],
            label=names[label],
            predicted=names[best],
            probability=float(values[best]),
            label_probability=float(values[label]),
            thumb=self.thumbs[position],
            heat=encode_thumb(light_up(view, heat), side=_THUMB) if heat is not None and place else "",
            place=place,
            near=[
                Near(source.ids[other], names[source.labels[other]], self.thumbs[other], similarity)
                for other, similarity in self.near.get(position, [])
                if other in self.thumbs
            ],
        )


def _find_near(judged: Judged, positions: np.ndarray) -> dict[int, list[tuple[int, float]]]:
    """Finds training images with similar embeddings: position → their positions and cosine similarities."""
    train = judged.examples.positions("train")
    if judged.read_embeddings is None or not len(train) or not len(positions):
        return {}
    count = min(_NEAR, len(train))
    search = NearestNeighbors(n_neighbors=count, metric="cosine", algorithm="brute").fit(judged.read_embeddings(train))
    distances, indices = search.kneighbors(judged.read_embeddings(positions))
    return {
        int(position): [(int(train[index]), 1 - float(distance)) for index, distance in zip(*found, strict=True)]
        for position, *found in zip(positions, indices, distances, strict=True)
    }


def _read_views(
    examples: Examples, shown: Sequence[int], others: set[int], *, image_size: int, resize: str
) -> tuple[dict[int, np.ndarray], dict[int, str]]:
    """Reads images as the network sees them.

    Returns:
        Position → image, uint8 `(size, size, 3)`, for `shown`; position → thumbnail for `shown` and `others`.
    """
    views, thumbs = dict[int, np.ndarray](), dict[int, str]()
    stream = make_images(
        examples.source.read,
        np.array(sorted({*shown, *others}), np.int64),
        image_size=image_size,
        resize=resize,
        batch_size=_BATCH,
    )
    large = set(shown)
    for arrived, images in stream:
        for position, image in zip(arrived.tolist(), images, strict=True):
            thumbs[position] = encode_thumb(image, side=_THUMB)
            if position in large:
                views[position] = image
    return views, thumbs


def _explain(judged: Judged, images: Sequence[np.ndarray], classes: np.ndarray) -> tuple[np.ndarray | None, str]:
    """Computes heat maps; None and the reason if there are none."""
    if judged.trained is None:
        return None, _EXPORTED
    at = choose_map(judged.trained.embedder)
    if at is None:
        return None, _NO_MAP
    if not images:
        return None, ""
    heats = explain(judged.trained, at, np.stack(images), classes.tolist())
    return (heats, "") if heats.any() else (None, _NO_GRADIENT)


def _choose_findings(audit: Audit | None, *, at_most: int, per_kind: int) -> list[ShownFinding]:
    """Chooses some findings of each kind, most severe kinds first."""
    shown, counts = list[ShownFinding](), dict.fromkeys(KINDS, 0)
    for one in audit.findings if audit else []:
        counts[one.kind] += 1
        if counts[one.kind] <= per_kind:
            shown.append(ShownFinding(one.id, one.kind, one.severity, one.evidence, "", one.other_id))
    return shown[:at_most]


def _find_named(examples: Examples, findings: Sequence[ShownFinding]) -> dict[str, int]:
    """Finds the positions of the images that findings name: id → position."""
    place = {examples.source.ids[position]: position for position in np.flatnonzero(examples.splits >= 0).tolist()}
    return {one: place[one] for found in findings for one in (found.id, found.other_id) if one in place}


def _show_audit(
    audit: Audit, lines: Sequence[str], findings: Sequence[ShownFinding], thumbs: Mapping[str, str]
) -> AuditShown:
    counts = audit.counts()
    return AuditShown(
        [(kind, meaning, counts[kind]) for kind, meaning in KINDS.items() if kind in counts],
        lines,
        [
            dataclasses.replace(one, thumb=thumbs.get(one.id, ""), other_thumb=thumbs.get(one.other_id, ""))
            for one in findings
        ],
    )
