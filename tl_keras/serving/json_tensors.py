"""JSON ↔ tensors, as TF Serving's REST API reads and writes them (tensorflow_serving/util/json_tensor.cc)."""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tl_keras.data.formats import explain_unreadable, name_format
from tl_keras.serving.errors import invalid
from tl_keras.serving.graphs import as_strings

_SHOWN = 200  # characters of a value in an error message
_DEEPEST = 8  # lists in lists: no signature has more, and NumPy takes 64
_KINDS = {dict: "Object", str: "String", bool: "Boolean", type(None): "Null"}
_LARGEST_EXACT = {tf.float32: 2**24 - 1, tf.float64: 2**53 - 1}


def parse_json(body: bytes) -> dict[str, Any]:
    """A request's JSON object; NaN and Infinity are numbers.

    Raises:
        RequestError: it is no JSON, or no object.
    """
    if not body:
        raise invalid("JSON Parse error: The document is empty")
    try:
        document = json.loads(body)
    except RecursionError as error:
        raise invalid("JSON Parse error: nested too deeply") from error
    except ValueError as error:
        if not explain_unreadable(body):
            raise invalid(
                "JSON Parse error: the body is no JSON but an image: send it with Content-Type: "
                f'image/{name_format(body)}, or as {{"instances": [{{"b64": "..."}}]}}'
            ) from error
        reason = "it is no text in UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise invalid(f"JSON Parse error: {reason}") from error
    if not isinstance(document, dict):
        raise invalid(f"JSON Value: {_show(document)} Is not object")
    if not isinstance(document.get("signature_name", ""), str):
        raise invalid(
            f"JSON Value: {_show(document)} not formatted correctly. 'signature_name' key must be a string value."
        )
    return document


def parse_predict(document: Mapping[str, Any], signature: Any) -> tuple[dict[str, np.ndarray], bool]:
    """The inputs of a predict request.

    Args:
        document: the request.
        signature: the `SignatureDef` that it names.

    Returns:
        Input's name → array `(n, ...)`, and whether it came in row format (`instances`).

    Raises:
        RequestError: neither or both of `instances` and `inputs`, or values that the signature does not take.
    """
    infos = {name: signature.inputs[name] for name in signature.inputs}
    has_rows, has_columns = "instances" in document, "inputs" in document
    if has_rows and has_columns:
        raise invalid(
            f"JSON Value: {_show(document)} Not formatted correctly expecting only one of 'inputs' or 'instances' keys "
            "to exist "
        )
    if has_rows:
        rows = document["instances"]
        if not isinstance(rows, list):
            raise invalid(f"JSON Value: {_show(document)} Excepting 'instances' to be an list/array")
        if not rows:
            raise invalid(f"JSON Value: {_show(document)} No values in 'instances' array")
        return _parse_rows(rows, infos), True
    if has_columns:
        return _parse_columns(document["inputs"], infos), False
    raise invalid("Missing 'inputs' or 'instances' key")


def parse_examples(document: Mapping[str, Any]) -> tuple[list[bytes], bytes]:
    """The examples of a classify or regress request.

    Returns:
        n serialized `tf.train.Example`s, and the context that they all have, serialized: behind an example it is merged
        into it.

    Raises:
        RequestError: there are none, or a feature is of no kind that an example holds.
    """
    context = _make_example(document.get("context", {})).SerializeToString()
    if "examples" not in document:
        raise invalid(
            f"JSON Value: {_show(document)} When method is classify, key 'examples' is expected and was not found"
        )
    values = document["examples"]
    if not isinstance(values, list):
        raise invalid(f"JSON Value: {_show(document)} Expecting 'examples' value to be an list/array")
    if not values:
        raise invalid(f"JSON Value: {_show(document)} 'examples' value is an empty array")
    return [_make_example(value).SerializeToString() for value in values], context


def format_predictions(outputs: Mapping[str, np.ndarray], *, by_row: bool) -> bytes:
    """A predict request's answer: `predictions`, a value or an object a row, or `outputs`, a list an output.

    Raises:
        RequestError: in row format, outputs that have no rows, or not equally many.
    """
    lists = {name: _as_list(name, array) for name, array in sorted(outputs.items())}
    if not by_row:
        return _dump({"outputs": next(iter(lists.values())) if len(lists) == 1 else lists})
    sizes = set()
    for name, array in outputs.items():
        if not array.ndim:
            raise invalid(f"Tensor name: {name} has no shape information ")
        sizes.add(len(array))
    if len(sizes) > 1:
        raise invalid(f"outputs have inconsistent batch sizes: {sorted(sizes)}")
    if len(lists) == 1:
        return _dump({"predictions": next(iter(lists.values()))})
    return _dump({"predictions": [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]})


def format_classes(classes: np.ndarray, scores: np.ndarray) -> bytes:
    """A classify request's answer: for each example its [label, score] pairs.

    Args:
        classes: bytes `(n, k)`.
        scores: float32 `(n, k)`.
    """
    labels, numbers = _as_list("classes", classes), _as_list("scores", scores)
    pairs = [[list(pair) for pair in zip(*row, strict=True)] for row in zip(labels, numbers, strict=True)]
    return _dump({"results": pairs})


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _parse_rows(rows: list[Any], infos: Mapping[str, Any]) -> dict[str, np.ndarray]:
    are_objects = _is_object(rows[0])
    if not are_objects and len(infos) > 1:
        raise invalid(
            "instances is a plain list, but expecting list of objects as multiple input tensors required as per "
            "tensorinfo_map"
        )
    if not are_objects:
        for number, row in enumerate(rows):
            if _is_object(row):
                raise invalid(f"Expecting value/list but got object at item {number} of input list")
        name = next(iter(infos))
        return {name: _as_array(rows, infos[name], f" of '{name}'")}
    for number, row in enumerate(rows):
        if not _is_object(row):
            raise invalid(f"Expecting object but got list at item {number} of input list")
        if set(row) != set(infos):
            raise invalid(
                f"Failed to process element: {number} of 'instances' list. JSON object: {_show(row)} keys must be "
                f"equal to: {','.join(sorted(infos))}"
            )
    return {name: _as_array([row[name] for row in rows], info, f" of '{name}'") for name, info in infos.items()}


def _parse_columns(value: Any, infos: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if not _is_object(value):
        if len(infos) > 1:
            raise invalid(
                "inputs is a plain value/list, but expecting an object as multiple input tensors required as per "
                "tensorinfo_map"
            )
        name = next(iter(infos))
        return {name: _as_array(value, infos[name], "")}
    for name in infos:
        if name not in value:
            raise invalid(f"Missing named input: {name} in 'inputs' object.")
    return {name: _as_array(value[name], info, "") for name, info in infos.items()}


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and not _is_base64(value)


def _is_base64(value: Any) -> bool:
    return isinstance(value, dict) and len(value) == 1 and isinstance(value.get("b64"), str)


def _as_array(value: Any, info: Any, where: str) -> np.ndarray:
    """A dense tensor of nested lists: the first element of each level says how long the level is."""
    dtype = tf.as_dtype(info.dtype)
    shape: list[int] = []
    level = value
    while isinstance(level, list):
        shape.append(len(level))
        level = level[0] if level else None
        if len(shape) > _DEEPEST:
            raise invalid(f"Encountered list at unexpected level: {len(shape)} expected < {_DEEPEST}{where}")
    if dtype.is_floating and shape and not _has_bool(value) and (fast := _as_numbers(value, shape, dtype)) is not None:
        return fast
    leaves: list[Any] = []
    _collect(value, shape, 0, dtype, leaves, where)
    if dtype == tf.string:
        return as_strings(leaves).reshape(shape)
    return np.array(leaves, dtype.as_numpy_dtype).reshape(shape)


def _as_numbers(value: Any, shape: list[int], dtype: tf.DType) -> np.ndarray | None:
    """Thousands of pixels at once; None where something is odd and wants a message of its own."""
    try:
        array = np.array(value)
    except ValueError:
        return None
    is_plain = array.dtype.kind in "if" and list(array.shape) == shape
    if not is_plain or (array.dtype.kind == "i" and array.size and np.abs(array).max() > _LARGEST_EXACT[dtype]):
        return None
    with np.errstate(over="ignore"):  # looked at in the next line
        converted = array.astype(dtype.as_numpy_dtype)
    return None if np.any(np.isinf(converted) != np.isinf(array)) else converted


def _has_bool(value: Any) -> bool:
    """Whether a truth value hides among numbers: NumPy would make a number of it."""
    return any(map(_has_bool, value)) if isinstance(value, list) else isinstance(value, bool)


def _collect(value: Any, shape: Sequence[int], level: int, dtype: tf.DType, leaves: list[Any], where: str) -> None:
    """Adds a nested list's leaves in order."""
    if not isinstance(value, list):
        if level != len(shape):
            raise invalid(
                f"JSON Value: {_show(value)} found at incorrect level: {level + 1} in the JSON DOM. Expected at level: "
                f"{len(shape)}{where}"
            )
        leaves.append(_as_leaf(value, dtype))
        return
    if level >= len(shape):
        raise invalid(f"Encountered list at unexpected level: {level} expected < {len(shape)}{where}")
    if len(value) != shape[level]:
        raise invalid(
            f"Encountered list at unexpected size: {len(value)} at level: {level} expected size: {shape[level]}{where}"
        )
    for item in value:
        _collect(item, shape, level + 1, dtype, leaves, where)


def _as_leaf(value: Any, dtype: tf.DType) -> Any:
    """One value of a tensor.

    Raises:
        RequestError: it is of another type, or does not fit.
    """
    if dtype == tf.string and isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if dtype == tf.string and isinstance(value, dict):
        return _decode_base64(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {tf.string: False, tf.bool: isinstance(value, bool)}.get(
        dtype, is_number and (dtype.is_floating or isinstance(value, int))
    )
    if not fits:
        kind = _KINDS.get(type(value), "Number")
        raise invalid(f"JSON Value: {_show(value)} Type: {kind} is not of expected type: {dtype.name}")
    if dtype != tf.bool:
        _check_exact(value, dtype)
    return value


def _check_exact(value: float, dtype: tf.DType) -> None:
    """Raises: RequestError: the type can't hold the number."""
    largest = _LARGEST_EXACT.get(dtype) if isinstance(value, int) else float(dtype.max)
    fits = abs(value) <= largest if largest is not None else dtype.min <= value <= dtype.max
    if not fits and math.isfinite(value):
        raise invalid(f"Cannot convert JSON value: {_show(value)} to {dtype.name} without loss of precision.")


def _decode_base64(value: dict[str, Any]) -> bytes:
    if not _is_base64(value):
        raise invalid(f"JSON Value: {_show(value)} not formatted correctly for base64 data")
    text = value["b64"]
    try:
        # as in Abseil, padding may be missing; not urlsafe
        return base64.b64decode(text if len(text) % 4 == 0 else text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid("Unable to base64 decode") from error


def _make_example(value: Any) -> tf.train.Example:
    if not isinstance(value, dict):
        raise invalid(f"Example must be JSON object but got JSON {_show(value)}")
    example = tf.train.Example()
    for name, content in value.items():
        feature = example.features.feature[name]
        for item in content if isinstance(content, list) else [content]:
            _add_to_feature(name, feature, item)
    return example


def _add_to_feature(name: str, feature: tf.train.Feature, value: Any) -> None:
    if isinstance(value, str) or _is_base64(value):
        kind, item = "bytes_list", _as_leaf(value, tf.string)
    elif isinstance(value, float):
        kind, item = "float_list", _as_leaf(value, tf.float32)
    elif isinstance(value, int):
        kind, item = "int64_list", _as_leaf(int(value), tf.int64)
    else:
        raise invalid(f"Feature: {name} has element with unexpected JSON type: {type(value).__name__}")
    if feature.WhichOneof("kind") not in {None, kind}:
        raise invalid(f"Unexpected element type in feature: {name} expecting type: {feature.WhichOneof('kind')}")
    getattr(feature, kind).value.append(item)


def _as_list(name: str, array: np.ndarray) -> Any:
    """Nested lists as JSON holds them: shortest decimals, strings or base64."""
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
    """A float32's decimals: six digits where they give it back, else nine (WriteDecimal in json_tensor.cc)."""
    short = float(f"{value:.6g}")
    return short if np.float32(short) == np.float32(value) else float(f"{value:.9g}")


def _show(value: Any) -> str:
    """A value for an error message; what is large is cut before it is written, not after."""
    text = json.dumps(_cut(value))
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _cut(value: Any, level: int = 3) -> Any:
    if isinstance(value, str):
        return value[:_SHOWN]
    if isinstance(value, list):
        return [_cut(item, level - 1) for item in value[:4]] if level else ["..."]
    if isinstance(value, dict):
        return {key[:_SHOWN]: _cut(item, level - 1) for key, item in list(value.items())[:4]} if level else {}
    return value
