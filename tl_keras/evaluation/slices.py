"""The same figures for parts of the examples: by camera, hospital, season, skin tone. That is how bias is seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats

from tl_keras.config import nearest
from tl_keras.data.manifests import Table, read_table
from tl_keras.errors import UserError
from tl_keras.evaluation.metrics import measure
from tl_keras.statistics.intervals import with_interval

SLICES = (
    *("column", "value", "n", "accuracy", "accuracy_low", "accuracy_high", "p_value"),
    *("mean_per_class_accuracy", "macro_precision", "macro_recall", "macro_f1", "nll", "ece"),
)
_NO_ATTRIBUTES = {"id", "path", "label", "split"}  # of a manifest that is given for its further columns
_MISSING = "(none)"
_NAMED_AT_LEAST = 10  # examples: a value with fewer is not called the worst
_AT_MOST = 200  # values of a column: more are no groups


@dataclasses.dataclass(frozen=True)
class Attributes:
    """What a file says about examples beside their labels.

    Attributes:
        columns: name → id → value.
    """

    columns: dict[str, dict[str, str]]

    def values(self, column: str, ids: Sequence[str]) -> list[str]:
        """A column's value for each id; `(none)` where the file does not say."""
        return [self.columns[column].get(one) or _MISSING for one in ids]

    def count_unknown(self, ids: Sequence[str]) -> int:
        """How many of these the file does not name."""
        named = next(iter(self.columns.values()))
        return sum(one not in named for one in ids)


def read_attributes(path: str | None, ids: Sequence[str]) -> Attributes | None:
    """Reads a CSV of attributes: a column `id` or `path`, and any others; it is read as a manifest of images is.

    Args:
        path: the file, if there is one.
        ids: the examples.

    Raises:
        UserError: it can't be read, has no such columns, knows none of the ids, or one twice.
    """
    if path is None:
        return None
    table = read_table(Path(path), asked=f"--slices={path}")
    names = [name for name in table.names if name not in _NO_ATTRIBUTES]
    if not table.names.keys() & {"id", "path"} or not names:
        raise UserError(
            f"--slices={path} has the columns {', '.join(table.names.values()) or '(none)'}. It needs id (or path), "
            "and one more for each attribute: id,camera,season."
        )
    known: dict[str, int] = {}
    for row, one in enumerate(_choose_ids(table, set(ids))):
        if known.setdefault(one, row) != row and one:
            raise UserError(
                f"--slices={path} line {table.rows[row][0]}: {one} stands there twice. Leave one row for each image."
            )
    known.pop("", None)
    if not known.keys() & set(ids):
        example = next(iter(known), "")
        raise UserError(
            f"--slices={path} knows none of the {len(ids):,} examples. Its first id is {example!r}; the data's are "
            f"like {ids[0]!r}. {nearest(example, ids)}Write ids as they stand in splits.csv."
        )
    columns = {table.names[name]: {one: table.cell(row, name) for one, row in known.items()} for name in names}
    for name, values in columns.items():
        count = len({values.get(one, "") for one in ids})
        if count > _AT_MOST:
            raise UserError(
                f"--slices={path}: column {name} has {count:,} values; at most {_AT_MOST} make groups. Leave it out, "
                "or put its values into ranges."
            )
    return Attributes(columns)


def _choose_ids(table: Table, examples: set[str]) -> list[str]:
    """Each row's id by the column that names most of the examples: a column `id` may be a patient's number here."""
    columns: tuple[Literal["id", "path"], ...] = ("id", "path")
    return max(
        (table.ids_of(column) for column in columns if column in table.names), key=lambda ids: len(examples & set(ids))
    )


def measure_slices(
    attributes: Attributes, ids: Sequence[str], probabilities: np.ndarray, labels: np.ndarray
) -> dict[str, Any]:
    """The same figures for each value of each column.

    Args:
        attributes: what is known of the examples.
        ids: of the examples.
        probabilities: float32 `(n, classes)`.
        labels: int `(n,)`.

    Returns:
        `columns`: column → value → what `measure` gives, and `p_value` of the value's accuracy against all others
        (Fisher's exact test, two-sided, times the number of values of all columns: Bonferroni); `worst`: column, value
        and figures of the lowest accuracy among values of ten examples or more, and as many others, or None; `unknown`:
        how many examples the file does not name.
    """
    correct = probabilities.argmax(1) == labels
    columns: dict[str, dict[str, Any]] = {}
    values_of = {name: np.array(attributes.values(name, ids)) for name in attributes.columns}
    tests = sum(len(np.unique(values)) for values in values_of.values())
    for name, values in values_of.items():
        columns[name] = {}
        for value in np.unique(values).tolist():
            own = values == value
            p_value = _compare(own, correct, tests=tests)
            columns[name][value] = measure(probabilities[own], labels[own]) | {"p_value": p_value}
    candidates = [
        {"column": name, "value": value, **found}
        for name, values in columns.items()
        for value, found in values.items()
        if _NAMED_AT_LEAST <= found["n"] <= len(ids) - _NAMED_AT_LEAST
    ]
    worst = min(candidates, key=lambda one: one["accuracy"], default=None)
    return {"columns": columns, "worst": worst, "unknown": attributes.count_unknown(ids)}


def slice_cells(slices: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The rows of `slices.csv`, in the columns of `SLICES`."""
    return [
        (
            *(column, value, found["n"], found["accuracy"], *found["accuracy_ci95"], found["p_value"]),
            found["mean_per_class_accuracy"],
            *(found["macro"][figure] for figure in ("precision", "recall", "f1")),
            *(found["nll"], found["ece"]),
        )
        for column, values in slices["columns"].items()
        for value, found in values.items()
    ]


def describe_worst(slices: dict[str, Any], *, accuracy: float) -> str:
    """A line that names the worst slice."""
    worst, unknown = slices["worst"], slices["unknown"]
    rest = f"; {unknown:,} examples are not in the file" if unknown else ""
    if worst is None:
        return f"slices: no value has {_NAMED_AT_LEAST} examples and others to be compared with{rest}"
    shown = with_interval(worst["accuracy"], worst["accuracy_ci95"])
    told = f"slices: worst is {worst['column']}={worst['value']}: accuracy {shown} n={worst['n']:,}, all {accuracy:.3f}"
    p_value = worst["p_value"]
    verdict = f"p = {p_value:.3g}" if p_value < 0.05 else f"which may be chance, p = {p_value:.2f}"
    return f"{told}; {verdict}{rest}"


def _compare(own: np.ndarray, correct: np.ndarray, *, tests: int) -> float:
    right, count = int(correct[own].sum()), int(own.sum())
    others_right, others = int(correct[~own].sum()), int((~own).sum())
    table = [[right, count - right], [others_right, others - others_right]]
    return min(1.0, float(stats.fisher_exact(table).pvalue) * tests) if others else 1.0
