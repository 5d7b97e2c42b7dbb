"""Slices: metrics for groups of examples, by camera, hospital, season or skin tone, which reveal bias."""

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
    "column",
    "value",
    "n",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "p_value",
    "mean_per_class_accuracy",
    "macro_precision",
    "macro_recall",
    "macro_f1",
    "nll",
    "ece",
)
_NO_ATTRIBUTES = {"id", "path", "label", "split"}  # columns of a manifest that are not attributes
_MISSING = "(none)"
_NAMED_AT_LEAST = 10  # values with fewer examples are not reported as the worst
_AT_MOST = 200  # values per column


@dataclasses.dataclass(frozen=True)
class Attributes:
    """Attributes of examples from a file.

    Attributes:
        columns: name → id → value.
    """

    columns: dict[str, dict[str, str]]

    def values(self, column: str, ids: Sequence[str]) -> list[str]:
        """The value of a column for each id; `(none)` if it is missing."""
        return [self.columns[column].get(one) or _MISSING for one in ids]

    def count_unknown(self, ids: Sequence[str]) -> int:
        """The number of ids that the file does not contain."""
        named = next(iter(self.columns.values()))
        return sum(one not in named for one in ids)


def read_attributes(path: str | None, ids: Sequence[str]) -> Attributes | None:
    """Reads a CSV file of attributes: a column `id` or `path`, and one column per attribute.

    Args:
        path: the file; None if no slices are wanted.
        ids: ids of the examples.

    Raises:
        UserError: the file can't be read, a column is missing, no id matches, or an id is listed twice.
    """
    if path is None:
        return None
    table = read_table(Path(path), asked=f"--slices={path}")
    names = [name for name in table.names if name not in _NO_ATTRIBUTES]
    if not table.names.keys() & {"id", "path"} or not names:
        found_columns = ", ".join(table.names.values()) or "(none)"
        raise UserError(
            f"--slices={path} has the columns {found_columns}. It needs id (or path), and one column per attribute: "
            "id,camera,season."
        )
    known: dict[str, int] = {}
    for row, one in enumerate(_choose_ids(table, set(ids))):
        if known.setdefault(one, row) != row and one:
            raise UserError(
                f"--slices={path} line {table.rows[row][0]}: {one} is listed twice. Keep one row per image."
            )
    known.pop("", None)
    if not known.keys() & set(ids):
        example = next(iter(known), "")
        raise UserError(
            f"--slices={path} contains none of the {len(ids):,} examples. Its first id is {example!r}; ids of the "
            f"data look like {ids[0]!r}. {nearest(example, ids)}Use the ids of splits.csv."
        )
    columns = {table.names[name]: {one: table.cell(row, name) for one, row in known.items()} for name in names}
    for name, values in columns.items():
        count = len({values.get(one, "") for one in ids})
        if count > _AT_MOST:
            raise UserError(
                f"--slices={path}: column {name} has {count:,} values; at most {_AT_MOST} are allowed. Leave it out, "
                "or group its values into ranges."
            )
    return Attributes(columns)


def _choose_ids(table: Table, examples: set[str]) -> list[str]:
    """Reads ids from the column that matches most examples: a column `id` may contain patient numbers."""
    columns: tuple[Literal["id", "path"], ...] = ("id", "path")
    return max(
        (table.ids_of(column) for column in columns if column in table.names), key=lambda ids: len(examples & set(ids))
    )


def measure_slices(
    attributes: Attributes, ids: Sequence[str], probabilities: np.ndarray, labels: np.ndarray
) -> dict[str, Any]:
    """Computes the metrics for each value of each column.

    Args:
        attributes: attributes of the examples.
        ids: ids of the examples.
        probabilities: float32 `(n, classes)`.
        labels: int `(n,)`.

    Returns:
        `columns`: column → value → result of `measure`, with the `p_value` of its accuracy against that of all other
        examples (Fisher's exact test, two-sided, Bonferroni correction for the values of all columns). `worst`: column,
        value and metrics of the value with the lowest accuracy, among values with at least ten examples and ten others;
        None without such values. `unknown`: number of examples that the file does not contain.
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
    """Makes the rows of `slices.csv`, with the columns of `SLICES`."""
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
    """Describes the slice with the lowest accuracy in one line."""
    worst, unknown = slices["worst"], slices["unknown"]
    rest = f"; {unknown:,} examples are not in the file" if unknown else ""
    if worst is None:
        return f"slices: no value has {_NAMED_AT_LEAST} examples and {_NAMED_AT_LEAST} others to compare with{rest}"
    shown = with_interval(worst["accuracy"], worst["accuracy_ci95"])
    value, p_value = f"{worst['column']}={worst['value']}", worst["p_value"]
    verdict = f"p = {p_value:.3g}" if p_value < 0.05 else f"not significant, p = {p_value:.2f}"
    return f"slices: lowest accuracy for {value}: {shown} n={worst['n']:,}, overall {accuracy:.3f}; {verdict}{rest}"


def _compare(own: np.ndarray, correct: np.ndarray, *, tests: int) -> float:
    right, count = int(correct[own].sum()), int(own.sum())
    others_right, others = int(correct[~own].sum()), int((~own).sum())
    table = [[right, count - right], [others_right, others - others_right]]
    return min(1.0, float(stats.fisher_exact(table).pvalue) * tests) if others else 1.0
