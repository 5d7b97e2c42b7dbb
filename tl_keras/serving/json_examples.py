"""Converts the examples of classify and regress requests from JSON to `tf.train.Example`."""

from __future__ import annotations

import math
import time
from typing import Any

import tensorflow as tf

from tl_keras.serving.errors import expired, invalid
from tl_keras.serving.json_tensors import Document
from tl_keras.serving.json_text import MOST_VALUES, VALUES_PER_IMAGE
from tl_keras.serving.json_values import as_leaf, is_base64, name_type

_MOST_VALUES = 4096  # limit for one example; an image needs one value
_LARGEST_SIGNED, _LARGEST = 2**63 - 1, 2**64 - 1
_KINDS = {"bytes_list": "bytes", "float_list": "float", "int64_list": "int64"}


def parse_examples(
    document: Document, *, most_rows: int = 1 << 20, deadline: float = math.inf
) -> tuple[list[bytes], bytes]:
    """Reads the examples of a classify or regress request.

    Args:
        document: the request.
        most_rows: maximum number of examples.
        deadline: latest time, in seconds of `time.monotonic`.

    Returns:
        n serialized `tf.train.Example`s, and the serialized context that they share.

    Raises:
        RequestError: there are no examples or too many, a feature has an unsupported type, or the deadline passed.
    """
    most, context = max(MOST_VALUES, VALUES_PER_IMAGE * most_rows), b""
    if "context" in document.members:
        context = _make_example(document.members["context"].load(most=most, last_wins=True)).SerializeToString()
    if "examples" not in document.members:
        raise invalid(
            f"JSON Value: {document.show()} When method is classify, key 'examples' is expected and was not found"
        )
    values = document.members["examples"].load(most=most, last_wins=True)
    if not isinstance(values, list):
        raise invalid(f"JSON Value: {document.show()} Expecting 'examples' value to be an list/array")
    if not values:
        raise invalid(f"JSON Value: {document.show()} 'examples' value is an empty array")
    if len(values) > most_rows:
        raise invalid(f"the request holds {len(values)} examples; this server takes at most {most_rows} in one")
    found = []
    for value in values:
        if time.monotonic() > deadline:
            raise expired("the request's JSON was read")
        found.append(_make_example(value).SerializeToString())
    return found, context


def _make_example(value: Any) -> tf.train.Example:
    if not isinstance(value, dict):
        raise invalid(f"Example must be JSON object but got JSON {name_type(value)}")
    if sum(len(content) if isinstance(content, list) else 1 for content in value.values()) > _MOST_VALUES:
        raise invalid(f"an example holds more than {_MOST_VALUES} values")
    example = tf.train.Example()
    for name, content in value.items():
        feature = example.features.feature[_encode(name)]
        for item in content if isinstance(content, list) else [content]:
            _add_to_feature(name, feature, item)
    return example


def _encode(name: str) -> str:
    """Raises: RequestError: the name of the feature is not valid Unicode."""
    return str(as_leaf(name, tf.string).decode())


def _add_to_feature(name: str, feature: tf.train.Feature, value: Any) -> None:
    if isinstance(value, str) or is_base64(value):
        kind, item = "bytes_list", as_leaf(value, tf.string)
    elif isinstance(value, int) and _LARGEST_SIGNED < value <= _LARGEST:
        raise invalid(f"Feature: {name} has uint64 element. Only int64_t is supported.")
    elif isinstance(value, float) or (isinstance(value, int) and abs(value) > _LARGEST_SIGNED + (value < 0)):
        kind, item = "float_list", as_leaf(value, tf.float32)
    elif isinstance(value, int):
        kind, item = "int64_list", int(value)
    else:
        raise invalid(f"Feature: {name} has element with unexpected JSON type: {name_type(value)}")
    if (found := feature.WhichOneof("kind")) not in {None, kind}:
        raise invalid(f"Unexpected element type in feature: {name} expecting type: {_KINDS[found]}")
    getattr(feature, kind).value.append(item)
