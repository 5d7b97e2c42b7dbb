"""Formats tensors as JSON, as TF Serving does (tensorflow_serving/util/json_tensor.cc)."""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tl_keras.serving.errors import expired, invalid

_PART = 1 << 14  # number of values that are formatted between checks of the deadline


def format_predictions(outputs: Mapping[str, np.ndarray], *, by_row: bool, deadline: float = math.inf) -> bytes:
    """Formats the answer to a predict request: `predictions` with one entry per row, or `outputs` with one per output.

    Args:
        outputs: name → array.
        by_row: whether the request is in row format.
        deadline: latest time, in seconds of `time.monotonic`.

    Raises:
        RequestError: in row format, the outputs have no rows or different numbers of rows; or the deadline passed.
    """
    arrays = dict(sorted(outputs.items()))
    if not by_row:
        if len(arrays) == 1:
            return b'{"outputs": ' + b"".join(_write(*next(iter(arrays.items())), deadline)) + b"}"
        columns = (_dump(name) + b": " + b"".join(_write(name, array, deadline)) for name, array in arrays.items())
        return b'{"outputs": {' + b", ".join(columns) + b"}}"
    sizes = set()
    for name, array in arrays.items():
        if not array.ndim:
            raise invalid(f"Tensor name: {name} has no shape information ")
        sizes.add(len(array))
    if len(sizes) > 1:
        raise invalid(f"outputs have inconsistent batch sizes: {sorted(sizes)}")
    rows = []
    for number in range(sizes.pop() if sizes else 0):
        row = {name: array[number : number + 1].reshape(array.shape[1:]) for name, array in arrays.items()}
        values = {name: b"".join(_write(name, array, deadline)) for name, array in row.items()}
        members = (_dump(name) + b": " + value for name, value in values.items())
        rows.append(next(iter(values.values())) if len(values) == 1 else b"{" + b", ".join(members) + b"}")
    return b'{"predictions": [' + b", ".join(rows) + b"]}"


def format_classes(classes: np.ndarray, scores: np.ndarray) -> bytes:
    """Formats the answer to a classify request: [label, score] pairs for each example.

    Args:
        classes: bytes `(n, k)`.
        scores: float32 `(n, k)`.
    """
    labels, numbers = _as_list("classes", classes), _as_list("scores", scores)
    pairs = [[list(pair) for pair in zip(*row, strict=True)] for row in zip(labels, numbers, strict=True)]
    return _dump({"results": pairs})


def _write(name: str, array: np.ndarray, deadline: float) -> Iterator[bytes]:
    """Formats one output. A large one is formatted in parts, because each value is an object meanwhile.

    Raises:
        RequestError: the deadline passed.
    """
    if time.monotonic() > deadline:
        raise expired("the answer was written")
    if array.size <= _PART or not array.ndim:
        yield _dump(_as_list(name, array))
        return
    if array.ndim == 1:
        parts = (_dump(_as_list(name, array[at : at + _PART]))[1:-1] for at in range(0, len(array), _PART))
    else:
        parts = (b"".join(_write(name, row, deadline)) for row in array)
    yield b"[" + b", ".join(parts) + b"]"


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _as_list(name: str, array: np.ndarray) -> Any:
    """Converts an array to nested lists: shortest decimals, strings or base64."""
    if array.dtype == object:
        as_bytes = name.endswith("_bytes")
        return _map(array.tolist(), lambda text: {"b64": base64.b64encode(text).decode()} if as_bytes else _text(text))
    if array.dtype in {np.dtype(np.float32), np.dtype(np.float16)}:
        return _map(array.tolist(), _shortest)
    return array.tolist()


def _map(value: Any, convert: Any) -> Any:
    return [_map(item, convert) for item in value] if isinstance(value, list) else convert(value)


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _shortest(value: float) -> float:
    """Rounds to six digits if they identify the float32, otherwise to nine (WriteDecimal in json_tensor.cc)."""
    short = float(f"{value:.6g}")
    return short if np.float32(short) == np.float32(value) else float(f"{value:.9g}")
