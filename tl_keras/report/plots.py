"""Plots of the report, drawn with Matplotlib as SVG, for the page and for files."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

# placeholders for the page's colors, which differ between light and dark; the SVG files use them as they are
_INK, _MUTED, _FIRST, _SECOND = "#23272f", "#6b7280", "#2563eb", "#c2410c"
_VARIABLES = {_INK: "var(--ink)", _MUTED: "var(--muted)", _FIRST: "var(--first)", _SECOND: "var(--second)"}
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "legend.frameon": False,
}
_styled = mpl.rc_context(_STYLE)
_SIZE = (5.6, 3.4)
_LINES = ("-", "--", ":", "-.")
_MARKERS = "os^vDPX*"
# contrast of at least 3:1 to both backgrounds of the page (WCAG 2.1, section 1.4.11)
_TONES = ("#3b82f6", "#d9480f", "#2b8a3e", "#a346c4", "#0c8599", "#d6336c", "#7a828a", "#a07600")
_LARGEST_PICTURE = 600  # maximum height and width of the picture of a confusion matrix, in pixels


@_styled
def draw_history(rows: Sequence[Mapping[str, str]], name: str) -> Figure:
    """Draws a learning curve of train and val.

    Args:
        rows: rows of `history.csv`.
        name: `accuracy` or `loss`.
    """
    figure, place = _make()
    epochs = np.arange(1, len(rows) + 1)
    marker = "o" if len(rows) < 3 else None
    for column, color, line, label in ((name, _FIRST, "-", "train"), (f"val_{name}", _SECOND, "--", "val")):
        values = [float(row[column]) for row in rows]
        place.plot(epochs, values, color=color, linestyle=line, label=label, marker=marker)
    place.set(xlabel="epoch", ylabel=name)
    place.xaxis.get_major_locator().set_params(integer=True)
    place.legend()
    stages = [row["stage"] for row in rows]
    for number in range(1, len(stages)):
        if stages[number] != stages[number - 1]:
            place.axvline(number + 0.5, color=_MUTED, linewidth=0.8, linestyle=":")
    return figure


@_styled
def draw_reliability(rows: Sequence[Mapping[str, float]], before: Sequence[Mapping[str, float]] = ()) -> Figure:
    """Draws accuracy against confidence, with intervals, and below it the number of images in each bin.

    Args:
        rows: result of `reliability`.
        before: the same before calibration; empty without calibration.
    """
    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    curve, counts = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    curve.plot((0, 1), (0, 1), color=_MUTED, linestyle="--", linewidth=1, label="perfectly calibrated")
    confidence, accuracy = (np.array([row[name] for row in rows]) for name in ("confidence", "accuracy"))
    low, high = (np.array([row[name] for row in rows]) for name in ("accuracy_low", "accuracy_high"))
    spans = np.clip([accuracy - low, high - accuracy], 0, None)
    curve.errorbar(
        confidence, accuracy, spans, color=_FIRST, marker="o", capsize=3, label="this classifier, 95 % interval"
    )
    if before:
        earlier = [[row[name] for row in before] for name in ("confidence", "accuracy")]
        curve.plot(*earlier, color=_SECOND, linestyle=":", marker="x", label="before calibration")
    curve.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    counts.bar([(row["low"] + row["high"]) / 2 for row in rows], [row["n"] for row in rows], 0.055, color=_FIRST)
    counts.set(xlabel="confidence (probability of the predicted class)", ylabel="images")
    figure.legend(loc="outside upper left", fontsize=9)
    return figure


@_styled
def draw_coverage(coverage: np.ndarray, accuracy: np.ndarray, *, target: float, reached: float | None) -> Figure:
    """Draws the accuracy of the most confident predictions against coverage.

    Args:
        coverage: 0 to 1, increasing, float `(k,)`.
        accuracy: 0 to 1, float `(k,)`.
        target: the target accuracy.
        reached: coverage at the threshold selected on val; None without a threshold.
    """
    figure, place = _make()
    place.plot(100 * coverage, accuracy, color=_FIRST, marker="o" if len(coverage) < 3 else None)
    place.axhline(target, color=_MUTED, linestyle="--", linewidth=1, label=f"target accuracy {target:g}")
    if reached is not None:
        place.axvline(100 * reached, color=_SECOND, linestyle=":", label="threshold selected on val")
    place.set(xlabel="coverage, %", ylabel="accuracy", xlim=(0, 100))
    figure.legend(loc="outside upper left", fontsize=9)
    return figure


@_styled
def draw_robustness(robustness: Mapping[str, Any]) -> Figure:
    """Draws accuracy by corruption and strength, and the accuracy without corruptions.

    Args:
        robustness: result of `measure_corruptions`.
    """
    figure, place = _make((5.6, 4.2))
    names = list(robustness["corruptions"])
    for number, name in enumerate(names):
        values = [one["accuracy"] for one in robustness["corruptions"][name]]
        look = {"color": _TONES[number % len(_TONES)], "marker": _MARKERS[number % len(_MARKERS)]}
        place.plot(range(1, len(values) + 1), values, **look, linestyle=_LINES[number % 4], label=name)
    place.axhline(robustness["clean"]["accuracy"], color=_INK, linewidth=1, label="clean")
    place.set(xlabel="strength", ylabel="accuracy", ylim=(0, 1.02))
    place.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside right upper", fontsize=9)
    return figure


@_styled
def draw_confusion(matrix: np.ndarray, order: np.ndarray, names: Sequence[str] = ()) -> Figure:
    """Draws a confusion matrix as a picture.

    Args:
        matrix: int `(classes, classes)`, rows are labels.
        order: order of the classes, see `order_classes`.
        names: class names in this order; empty if there are too many to be readable.
    """
    shares = (matrix[order][:, order] / np.maximum(matrix.sum(1, keepdims=True)[order], 1)).astype(np.float32)
    side = max(len(matrix) // _LARGEST_PICTURE + (len(matrix) % _LARGEST_PICTURE > 0), 1)
    if side > 1:  # a pixel shows the largest of its cells
        filled = np.pad(shares, (0, -len(shares) % side))
        blocks = len(filled) // side
        shares = filled.reshape(blocks, side, blocks, side).max((1, 3))
    figure, place = _make((5.6, 4.8))
    place.spines[["top", "right"]].set_visible(True)
    extent = (0.5, len(matrix) + 0.5, len(matrix) + 0.5, 0.5)
    shown = place.imshow(shares, cmap="magma_r", vmin=0, vmax=1, interpolation="nearest", extent=extent)
    places = range(1, len(names) + 1)
    place.set(xlabel="predicted", ylabel="label", xticks=places, yticks=places)
    place.set_xticklabels(names, rotation=90, fontsize=7)
    place.set_yticklabels(names, fontsize=7)
    for text in (*place.get_xticklabels(), *place.get_yticklabels()):
        text.set_parse_math(False)  # a class may be named US$_$EU
    figure.colorbar(shown, ax=place, label="share of the label's images")
    return figure


def order_classes(matrix: np.ndarray) -> np.ndarray:
    """Orders classes so that those that are confused with each other are adjacent, int64 `(classes,)`.

    Args:
        matrix: int `(classes, classes)`, rows are labels.
    """
    if len(matrix) < 3:
        return np.arange(len(matrix))
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    likeness = np.clip((shares + shares.T) / 2, 0, 1)
    distances = 1 - likeness
    np.fill_diagonal(distances, 0)
    return np.asarray(leaves_list(linkage(squareform(distances, checks=False), "average")))


def as_svg(figure: Figure, name: str) -> str:
    """Renders a plot as SVG; equal plots give equal bytes."""
    content = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # text is drawn with the viewer's font, not with Matplotlib's
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return content.getvalue()


def for_page(svg: str, name: str) -> str:
    """Prepares an SVG for the page: colors of the page, unique ids, hidden from screen readers.

    The page describes each plot in words.

    Args:
        svg: result of `as_svg`.
        name: name of the plot, unique in the page.
    """
    body = svg[svg.index("<svg") :].replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    for reference in ('id="', 'href="#', "url(#"):  # Matplotlib uses the same ids in every plot
        body = body.replace(reference, f"{reference}{name}-")
    for color, variable in _VARIABLES.items():
        body = body.replace(color, variable)
    return body


def _make(size: tuple[float, float] = _SIZE) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()
