"""Converts JSON requests to tensors, as TF Serving does (tensorflow_serving/util/json_tensor.cc)."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tl_keras.data.formats import explain_unreadable, name_format
from tl_keras.serving.errors import RequestError, expired, invalid
from tl_keras.serving.graphs import as_strings
from tl_keras.serving.json_answers import format_classes, format_predictions
from tl_keras.serving.json_text import MOST_VALUES, TOO_BIG, VALUES_PER_IMAGE, Text, fail
from tl_keras.serving.json_values import SHOWN, as_leaf, is_base64, show_value

__all__ = ["Document", "format_classes", "format_predictions", "parse_json", "parse_predict"]
_DEEPEST = 8  # maximum nesting of lists; no signature has more dimensions
_MOST_ROWS = 1 << 20
_READ_LATER = ("signature_name", "instances", "inputs", "context", "examples")


class Document:
    """A request's JSON object. Its members are parsed on demand.

    Attributes:
        members: name → value.
        signature_name: name of the requested signature; empty for the default.
    """

    def __init__(self, text: Text) -> None:
        """Splits the object into members, and checks the syntax of unknown ones.

        Raises:
            RequestError: the text is not JSON, or not an object.
        """
        self.text = text
        if text.first != b"{":
            text.check()
            raise invalid(f"JSON Value: {self.show()} Is not object")
        self.members = text.members(is_document=True)
        for name, value in self.members.items():
            if name not in _READ_LATER:
                value.check()
        self.signature_name = self._read_signature_name()

    def show(self) -> str:
        """Returns the beginning of the text, for error messages."""
        shown = self.text.body[self.text.start : self.text.start + SHOWN].decode("utf-8", "replace")
        return f"{shown}..." if len(self.text.body) - self.text.start > SHOWN else shown

    def _read_signature_name(self) -> str:
        if "signature_name" not in self.members:
            return ""
        value = self.members["signature_name"]
        if value.first != b'"':
            value.check()
            raise invalid(
                f"JSON Value: {self.show()} not formatted correctly. 'signature_name' key must be a string value."
            )
        return str(value.load())


def parse_json(body: bytes) -> Document:
    """Reads a request's JSON object. NaN and Infinity are numbers, and text after the object is ignored.

    Raises:
        RequestError: the body is not JSON, or not an object.
    """
    text = Text(body, 3 if body.startswith(b"\xef\xbb\xbf") else 0, len(body))
    if not text.first:
        raise invalid("JSON Parse error: The document is empty")
    try:
        return Document(text)
    except RequestError as error:
        if text.first not in b"{[" and not explain_unreadable(body):
            raise invalid(
                "JSON Parse error: the body is not JSON but an image: send it with Content-Type: "
                f'image/{name_format(body)}, or as {{"instances": [{{"b64": "..."}}]}}'
            ) from error
        if text.first not in b"{[":
            _check_text(body)
        raise


def parse_predict(
    document: Document, signature: Any, *, most_rows: int = _MOST_ROWS, deadline: float = math.inf
) -> tuple[dict[str, np.ndarray], bool]:
    """Reads the inputs of a predict request.

    Args:
        document: the request.
        signature: `SignatureDef` of the requested signature.
        most_rows: maximum number of rows.
        deadline: latest time, in seconds of `time.monotonic`.

    Returns:
        Name of the input → array `(n, ...)`, and whether the request is in row format (`instances`).

    Raises:
        RequestError: neither or both of `instances` and `inputs`, values that the signature does not take, or the
            deadline passed.
    """
    infos = {name: signature.inputs[name] for name in signature.inputs}
    reader = _Reader(infos, most_rows, deadline)
    has_rows, has_columns = "instances" in document.members, "inputs" in document.members
    if has_rows and has_columns:
        raise invalid(
            f"JSON Value: {document.show()} Not formatted correctly expecting only one of 'inputs' or 'instances' keys "
            "to exist "
        )
    if has_rows:
        rows = document.members["instances"]
        if rows.first != b"[":
            rows.check()
            raise invalid(f"JSON Value: {document.show()} Expecting 'instances' to be an list/array")
        found = reader.read_rows(rows)
        if found is None:
            raise invalid(f"JSON Value: {document.show()} No values in 'instances' array")
        return found, True
    if has_columns:
        return reader.read_columns(document.members["inputs"]), False
    raise invalid("Missing 'inputs' or 'instances' key")


class _Reader:
    """Reads the tensors of one request."""

    def __init__(self, infos: Mapping[str, Any], most_rows: int, deadline: float) -> None:
        self._infos, self._most_rows, self._deadline = infos, most_rows, deadline
        self._most_values = max(MOST_VALUES, VALUES_PER_IMAGE * most_rows)
        self._has_numbers = any(tf.as_dtype(info.dtype) != tf.string for info in infos.values())

    def read_rows(self, text: Text) -> dict[str, np.ndarray] | None:
        """Reads inputs in row format; None if there are no rows."""
        rows: list[Any] = text.items(self._most_rows, self._too_many) if self._is_cut(text) else self._load(text)
        if not rows:
            return None
        if len(rows) > self._most_rows:
            raise self._too_many(len(rows))
        tensors: dict[str, list[np.ndarray]] = {name: [] for name in self._infos}
        are_objects = False
        for number, row in enumerate(rows):
            self.check_time()
            row = self._open(row)
            if not number:
                are_objects = _is_object(row)
                self._check_is_named(are_objects, "instances is a plain list, but expecting list of objects")
            if are_objects and not _is_object(row):
                raise invalid(f"Expecting object but got list at item {number} of input list")
            if _is_object(row) and not are_objects:
                raise invalid(f"Expecting value/list but got object at item {number} of input list")
            for name, value in self._name_row(row, number, are_objects).items():
                tensors[name].append(self._read_value(name, value, number, tensors[name]))
        return {name: _stack(found, tf.as_dtype(self._infos[name].dtype)) for name, found in tensors.items()}

    def read_columns(self, text: Text) -> dict[str, np.ndarray]:
        """Reads inputs in column format."""
        value = self._open(text)
        if not _is_object(value):
            self._check_is_named(False, "inputs is a plain value/list, but expecting an object")
            name = next(iter(self._infos))
            return {name: self._as_array(value, name, is_row=False)}
        for name in self._infos:
            if name not in value:
                raise invalid(f"Missing named input: {name} in 'inputs' object.")
        for name, other in value.items():
            if name not in self._infos and isinstance(other, Text):
                other.check()
        return {name: self._as_array(self._open(value[name]), name, is_row=False) for name in self._infos}

    def check_time(self) -> None:
        """Raises: RequestError: the deadline passed."""
        if time.monotonic() > self._deadline:
            raise expired("the request's JSON was read")

    def _is_cut(self, text: Text) -> bool:
        """Whether a list is read in parts. Lists of strings are not: they are long but have few values."""
        return self._has_numbers and not text.is_small and text.first == b"["

    def _open(self, value: Any) -> Any:
        """Parses a value; a large one is only split."""
        if not isinstance(value, Text) or self._is_cut(value):
            return value
        if self._has_numbers and not value.is_small and value.first == b"{":
            return value.members()
        return self._load(value)

    def _load(self, text: Text) -> Any:
        return text.load(most=self._most_values)

    def _check_is_named(self, is_object: bool, message: str) -> None:
        if not is_object and len(self._infos) > 1:
            raise invalid(f"{message} as multiple input tensors required as per tensorinfo_map")

    def _name_row(self, row: Any, number: int, is_object: bool) -> Mapping[str, Any]:
        if not is_object:
            return {next(iter(self._infos)): row}
        if set(row) == set(self._infos):
            return {name: row[name] for name in self._infos}
        keys = ",".join(sorted(self._infos))
        unknown = sorted(set(row) - set(self._infos))
        if unknown:
            raise invalid(
                f"Failed to process element: {number} key: {unknown[0][:SHOWN]} of 'instances' list. Error: JSON "
                f"object: does not have named input: {unknown[0][:SHOWN]}; keys must be equal to: {keys}"
            )
        raise invalid(
            f"Failed to process element: {number} of 'instances' list. JSON object: {show_value(row)} keys must be "
            f"equal to: {keys}"
        )

    def _read_value(self, name: str, value: Any, number: int, earlier: Sequence[np.ndarray]) -> np.ndarray:
        """Reads one row of an input, and checks that it has the shape of the first row."""
        try:
            array = self._as_array(self._open(value), name, is_row=True)
        except RequestError as error:
            named = f" of '{name}'" if len(self._infos) > 1 else ""
            message = f"Failed to process element: {number} of 'instances' list. Error: {error.message}{named}"
            raise RequestError(error.code, message) from error
        if not earlier or array.shape == earlier[0].shape:
            return array
        first = earlier[0]
        failed = f"Failed to process element: {number} of 'instances' list. Error: "
        if array.size != first.size:
            failed += f"Expecting tensor size: {first.size} but got: {array.size}"
        else:
            failed += f"Expecting shape {_show_shape(first.shape)} but got: {_show_shape(array.shape)}"
        if array.ndim != first.ndim:
            raise invalid(f"{failed}. JSON Value: {name} found at incorrect level: {array.ndim + 1}")
        level = next(at for at in range(array.ndim) if array.shape[at] != first.shape[at])
        raise invalid(
            f"{failed}. Encountered list at unexpected size: {array.shape[level]} at level: {level + 1} expected size: "
            f"{first.shape[level]}"
        )

    def _as_array(self, value: Any, name: str, *, is_row: bool) -> np.ndarray:
        info = self._infos[name]
        dtype = tf.as_dtype(info.dtype)
        if not isinstance(value, Text):
            return _as_array(value, dtype)
        sizes = [dim.size for dim in info.tensor_shape.dim]
        return self._read_large(value, dtype, sizes[1:] if is_row else sizes)

    def _read_large(self, text: Text, dtype: tf.DType, sizes: Sequence[int], level: int = 0) -> np.ndarray:
        """Reads a tensor whose text is larger than a slice, converting each part before parsing the next.

        Args:
            text: the value.
            dtype: of the tensor.
            sizes: dimensions in the signature; -1 or missing if unknown.
            level: nesting level of the value.
        """
        if text.first != b"[" or text.is_small:
            return _as_array(text.load(), dtype)
        if not level and not text.is_at_most(_DEEPEST):
            raise invalid(f"Encountered list at unexpected level: {_DEEPEST} expected < {_DEEPEST}")
        parts, length = list[np.ndarray](), 0
        for group in text.groups():
            self.check_time()
            part = self._read_group(group, dtype, sizes, level)
            if parts and part.shape[1:] != parts[0].shape[1:]:
                raise _differ(part.shape[1:], parts[0].shape[1:])
            parts.append(part)
            length += len(part)
            if sizes and 0 <= sizes[0] < length:
                raise invalid(
                    f"Encountered list at unexpected size: {length} or more at level: {level} expected size: {sizes[0]}"
                )
            if sizes and sizes[0] < 0 and length > self._most_rows:
                raise self._too_many(length)
        return np.concatenate(parts)

    def _read_group(self, group: Text, dtype: tf.DType, sizes: Sequence[int], level: int) -> np.ndarray:
        if not group.is_small:
            return self._read_large(group, dtype, sizes[1:], level + 1)[np.newaxis]
        text = b"[" + group.body[group.start : group.end] + b"]"
        values = Text(text, 0, len(text)).load()
        if not values:
            raise fail("Invalid value.", group.start)
        return _as_array(values, dtype)

    def _too_many(self, rows: int) -> RequestError:
        return invalid(f"the request holds {rows} images or more; this server takes at most {self._most_rows} in one")


def _check_text(body: bytes) -> None:
    """Raises: RequestError: the body is not text."""
    try:
        body[: 1 << 20].decode("utf-8")
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            raise invalid("JSON Parse error: it is no text in UTF-8") from error


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and not is_base64(value)


def _stack(rows: list[np.ndarray], dtype: tf.DType) -> np.ndarray:
    """Stacks rows. NumPy would change the type of strings."""
    stacked = np.empty((len(rows), *rows[0].shape), object if dtype == tf.string else dtype.as_numpy_dtype)
    for number, row in enumerate(rows):
        stacked[number] = row[()] if not row.ndim else row
    return stacked


def _as_array(value: Any, dtype: tf.DType) -> np.ndarray:
    """Converts nested lists to a dense tensor. The first element of each level determines the size of the level."""
    shape: list[int] = []
    level = value
    while isinstance(level, list):
        shape.append(len(level))
        level = level[0] if level else None
        if len(shape) > _DEEPEST:
            raise invalid(f"Encountered list at unexpected level: {len(shape)} expected < {_DEEPEST}")
    if dtype.is_floating and shape and (fast := _as_numbers(value, shape, dtype)) is not None:
        return fast
    leaves: list[Any] = []
    _collect(value, shape, 0, dtype, leaves)
    if dtype == tf.string:
        return as_strings(leaves).reshape(shape)
    with np.errstate(over="ignore"):
        return np.array(leaves, dtype.as_numpy_dtype).reshape(shape)


def _as_numbers(value: list[Any], shape: Sequence[int], dtype: tf.DType) -> np.ndarray | None:
    """Converts nested lists of numbers quickly; None if anything needs a specific error message."""
    flat = value
    for size in shape[1:]:
        if set(map(type, flat)) != {list} or set(map(len, flat)) != {size}:
            return None
        flat = list(itertools.chain.from_iterable(flat))
    if not set(map(type, flat)) <= {int, float}:  # excludes booleans
        return None
    try:
        with np.errstate(over="ignore"):  # numbers too large for float32 become infinite, as in TF Serving
            array = np.array(flat, np.float64)
            if np.isinf(array).any():
                raise invalid(f"JSON Parse error: {TOO_BIG}")
            return array.astype(dtype.as_numpy_dtype).reshape(shape)
    except OverflowError:
        return None


def _collect(value: Any, shape: Sequence[int], level: int, dtype: tf.DType, leaves: list[Any]) -> None:
    """Appends the leaves of nested lists in order."""
    if not isinstance(value, list):
        if level != len(shape):
            raise invalid(
                f"JSON Value: {show_value(value)} found at incorrect level: {level + 1} in the JSON DOM. Expected at "
                f"level: {len(shape)}"
            )
        leaves.append(as_leaf(value, dtype))
        return
    if level >= len(shape):
        raise invalid(f"Encountered list at unexpected level: {level} expected < {len(shape)}")
    if len(value) != shape[level]:
        raise invalid(
            f"Encountered list at unexpected size: {len(value)} at level: {level} expected size: {shape[level]}"
        )
    for item in value:
        _collect(item, shape, level + 1, dtype, leaves)


def _differ(shape: Sequence[int], expected: Sequence[int]) -> RequestError:
    """Creates the error for items of different shapes in one list."""
    if len(shape) != len(expected):
        return invalid(f"Encountered list at unexpected level: {len(shape)} expected < {len(expected) + 1}")
    level = next(at for at in range(len(shape)) if shape[at] != expected[at])
    return invalid(
        f"Encountered list at unexpected size: {shape[level]} at level: {level + 1} expected size: {expected[level]}"
    )


def _show_shape(shape: Sequence[int]) -> str:
    return f"[{','.join(map(str, shape))}]"
