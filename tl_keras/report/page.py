"""Writes the report and the model card from templates."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from tl_keras.data.splits import evaluated_split
from tl_keras.evaluation.metrics import confuse, describe_spread, measure_classes
from tl_keras.evaluation.tables import describe_evaluation
from tl_keras.report import plots
from tl_keras.report.card import FIELDS, TITLES, Card, format_hub_metadata
from tl_keras.report.contents import (
    FULL_MATRIX,
    Shown,
    ShownFinding,
    ShownPair,
    describe_run,
    make_classes,
    make_matrix,
)
from tl_keras.run import RunFolder, read_csv
from tl_keras.statistics.calibration import reliability
from tl_keras.statistics.coverage import accuracy_by_coverage
from tl_keras.statistics.intervals import with_interval

REPORT, MODEL_CARD = "report.html", "MODEL_CARD.md"
_DRAWN_AT_MOST = 3000  # classes: the memory for ordering them grows quadratically
_NAME_AT_MOST = 20
_SPLITS = {"test": "test", "val": "validation"}


@dataclasses.dataclass(frozen=True)
class AuditShown:
    """The audit in a report: kind, meaning and count of findings; lines; and some findings with thumbnails."""

    counts: Sequence[tuple[str, str, int]]
    lines: Sequence[str]
    findings: Sequence[ShownFinding]


@dataclasses.dataclass(frozen=True)
class Report:
    """The contents of a report.

    Attributes:
        name: name of the classifier.
        dataset: name of the data set.
        backbone: name of the network.
        config: contents of `config.json`.
        command: the command that reproduces the run.
        metrics: contents of `metrics.json`.
        counts: split → number of images.
        class_names: names of the classes.
        probabilities: predictions for the reported split, float `(n, classes)`.
        labels: int `(n,)`.
        before: probabilities before calibration; None without calibration.
        card: the user's entries of the model card.
        notes: warnings of the run.
        worst: confident errors.
        least_sure: least confident predictions.
        pairs: most confused pairs of classes.
        no_heat: reason why there are no heat maps; empty if there are.
        audit: findings of the audit; None without an audit.
    """

    name: str
    dataset: str
    backbone: str
    config: Mapping[str, Any]
    command: str
    metrics: Mapping[str, Any]
    counts: Mapping[str, int]
    class_names: Sequence[str]
    probabilities: np.ndarray
    labels: np.ndarray
    before: np.ndarray | None
    card: Card
    notes: Sequence[str] = ()
    worst: Sequence[Shown] = ()
    least_sure: Sequence[Shown] = ()
    pairs: Sequence[ShownPair] = ()
    no_heat: str = ""
    audit: AuditShown | None = None

    @property
    def split(self) -> str:
        """The reported split."""
        return evaluated_split(self.metrics)


def write_report(folder: RunFolder, report: Report) -> None:
    """Writes `report.html`, `MODEL_CARD.md`, and the plots as SVG files in `plots/`.

    Args:
        folder: the run folder, in which the tables are already written.
        report: the contents.
    """
    split, figures = report.split, report.metrics[report.split]
    predicted, classes = report.probabilities.argmax(1), len(report.class_names)
    matrix, order = None, np.arange(classes)
    if classes <= _DRAWN_AT_MOST:
        matrix = confuse(predicted, report.labels, num_classes=classes)
        order = plots.order_classes(matrix) if classes > FULL_MATRIX else order
    drawn = _draw(folder, report, matrix, order)
    for name, svg in drawn.items():
        folder.write_text(f"plots/{name}.svg", svg)
    values = {
        "report": report,
        "split": split,
        "figures": figures,
        "accuracy": with_interval(figures["accuracy"], figures["accuracy_ci95"]),
        "sentences": describe_run(
            report.config, report.metrics, split=split, counts=report.counts, backbone=report.backbone
        ),
        "plots": {name: Markup(plots.for_page(svg, name)) for name, svg in drawn.items()},
        "matrix": make_matrix(predicted, report.labels, report.class_names, order),
        "classes": make_classes(measure_classes(predicted, report.labels, num_classes=classes), report.class_names),
        "lines": describe_evaluation(report.metrics),
        "seeds": describe_spread(report.metrics["seeds"]) if "seeds" in report.metrics else "",
        "few_shot": describe_spread(report.metrics["few_shot"]) if "few_shot" in report.metrics else "",
        "candidates": _read_table(folder, "candidates.csv"),
        "command": report.command,
        "fence": "`" * (3 + max(map(len, re.findall("`+", report.command)), default=0)),
        "fields": FIELDS,
        "titles": TITLES,
        "has_near": any(one.near for one in [*report.worst, *report.least_sure, *_images(report.pairs)]),
        "metadata": format_hub_metadata(
            report.card,
            name=report.name,
            backbone=report.backbone,
            dataset=report.dataset,
            split=_SPLITS[split],
            figures=figures,
        ),
    }
    _write(folder, REPORT, "report.html.j2", values)
    _write(folder, MODEL_CARD, "card.md.j2", values)


def write_audit_page(
    folder: RunFolder,
    audit: AuditShown,
    *,
    dataset: str,
    counts: Mapping[str, int],
    command: str,
    notes: Sequence[str],
    environment: Mapping[str, Any],
) -> None:
    """Writes `report.html` of the audit mode.

    Args:
        folder: the run folder.
        audit: the findings.
        dataset: name of the data set.
        counts: split → number of images.
        command: the command that reproduces the audit.
        notes: warnings of the audit.
        environment: versions, device, engine.
    """
    values = {
        "audit": audit,
        "total": sum(count for _, _, count in audit.counts),
        "dataset": dataset,
        "counts": counts,
        "command": command,
        "notes": notes,
        "environment": environment,
    }
    _write(folder, REPORT, "audit.html.j2", values)


def _images(pairs: Sequence[ShownPair]) -> list[Shown]:
    return [image for pair in pairs for image in pair.images]


def _write(folder: RunFolder, file: str, template: str, values: Mapping[str, Any]) -> None:
    text = _environment().get_template(template).render(values)
    folder.write_text(file, text.encode("utf-8", "replace").decode())  # file names may contain surrogates


def escape_markdown(text: str) -> str:
    """Escapes text for Markdown: a class may be named `__pos__` or `<img>`."""
    text = re.sub(r"([\\`*\[\]<>|~&]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(text.split()))
    return re.sub(r"^(\d*)([#+.)-])", r"\1\\\2", text)  # a heading or a list


def _as_sentence(note: str) -> str:
    """Turns a line of the screen into a sentence."""
    text = note.removeprefix("warning: ").removeprefix("note: ")
    if "/" in text.partition(" ")[0]:  # a path
        return f"{text.rstrip('.')}."
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _shorten(name: str) -> str:
    """Shortens a name to its beginning and end, so that names with a common prefix remain different."""
    return name if len(name) <= _NAME_AT_MOST else f"{name[: _NAME_AT_MOST // 2 - 1]}…{name[-_NAME_AT_MOST // 2 :]}"


def _draw(folder: RunFolder, report: Report, matrix: np.ndarray | None, order: np.ndarray) -> dict[str, str]:
    """Draws all plots that have data: name → SVG."""
    figures, metrics = dict[str, Figure](), report.metrics
    history = _read_table(folder, "history.csv")
    if history:
        figures |= {f"learning_{name}": plots.draw_history(history, name) for name in ("accuracy", "loss")}
    if matrix is not None:
        names = [_shorten(report.class_names[number]) for number in order] if len(order) <= FULL_MATRIX else []
        figures["confusion"] = plots.draw_confusion(matrix, order, names)
    before = reliability(report.before, report.labels) if report.before is not None else []
    figures["reliability"] = plots.draw_reliability(reliability(report.probabilities, report.labels), before)
    _, coverage, accuracy = accuracy_by_coverage(report.probabilities, report.labels)
    reject = metrics.get("reject", {})
    reached = reject.get(report.split, {}).get("coverage")
    target = report.config["evaluation"]["target_accuracy"]
    figures["coverage"] = plots.draw_coverage(coverage, accuracy, target=target, reached=reached)
    if "robustness" in metrics:
        figures["robustness"] = plots.draw_robustness(metrics["robustness"])
    return {name: plots.as_svg(figure, name) for name, figure in figures.items()}


def _read_table(folder: RunFolder, name: str) -> list[dict[str, str]]:
    """Reads a table of the run folder; empty if it does not exist."""
    return read_csv(folder.path / name) if (folder.path / name).is_file() else []


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tl_keras.report", ""),
        autoescape=lambda name: bool(name) and str(name).endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["markdown"] = escape_markdown
    environment.filters["note"] = _as_sentence
    environment.filters["middle"] = _shorten
    environment.filters["percent"] = lambda value: f"{100 * value:.1f} %"
    environment.filters["figure"] = lambda value: "–" if value is None else f"{value:.3f}"
    return environment
