"""Converts single JSON values, and shows them in error messages."""

from __future__ import annotations

import binascii
import json
import math
from typing import Any

import tensorflow as tf

from tl_keras.serving.errors import invalid
from tl_keras.serving.json_text import TOO_BIG, Constant, Text

SHOWN = 200  # maximum number of characters of a value in an error message
_PART = 1 << 20  # number of base64 characters that are decoded at once
_TYPES = {dict: "Object", list: "Array", str: "String", type(None): "Null"}
_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_SPACE = b" \t\n\v\f\r"


def is_base64(value: Any) -> bool:
    """Whether a JSON value represents bytes: `{"b64": "…"}`."""
    return isinstance(value, dict) and len(value) == 1 and isinstance(value.get("b64"), str)


def as_leaf(value: Any, dtype: tf.DType) -> Any:
    """Converts one value of a tensor.

    Raises:
        RequestError: the value has another type, or is out of range.
    """
    if dtype == tf.string and isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError as error:
            raise invalid("JSON Parse error: The surrogate pair in string is invalid.") from error
    if dtype == tf.string and isinstance(value, dict):
        return _decode_base64(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {tf.string: False, tf.bool: isinstance(value, bool)}.get(
        dtype, is_number and (dtype.is_floating or isinstance(value, int))
    )
    message = f"JSON Value: {show_value(value)} Type: {name_type(value)} is not of expected type: {dtype.name}"
    if not fits:
        raise invalid(message)
    if dtype.is_integer and not dtype.min <= value <= dtype.max:
        raise invalid(f"{message}, to which it can't be converted without loss of precision.")
    return value if not dtype.is_floating else _as_float(value)


def _as_float(value: float) -> float:
    try:
        number = float(value)
    except OverflowError as error:
        raise invalid(f"JSON Parse error: {TOO_BIG}") from error
    if math.isinf(number) and not isinstance(value, Constant):
        raise invalid(f"JSON Parse error: {TOO_BIG}")
    return number


def name_type(value: Any) -> str:
    """Returns TF Serving's name for the type of a JSON value."""
    if isinstance(value, bool):
        return str(value)
    return _TYPES.get(type(value), "Number")


def _decode_base64(value: dict[str, Any]) -> bytes:
    """Decodes `{"b64": "…"}` as Abseil does: white space is skipped, and padding is optional.

    Raises:
        RequestError: the value is another object, or not standard base64.
    """
    if not is_base64(value):
        raise invalid(f"JSON Value: {show_value(value)} not formatted correctly for base64 data")
    failure = invalid("Unable to base64 decode")
    try:
        text = value["b64"].encode("ascii")
    except UnicodeEncodeError:
        raise failure from None
    if len(text) != len(stripped := text.translate(None, _SPACE)):
        text = stripped
    digits = text.rstrip(b"=.")  # Abseil accepts dots as padding, too
    missing = -len(digits) % 4
    if missing == 3 or len(text) - len(digits) not in {0, missing} or digits.translate(None, _ALPHABET):
        raise failure
    digits += b"=" * missing
    try:
        return b"".join(binascii.a2b_base64(digits[at : at + _PART]) for at in range(0, len(digits), _PART))
    except (binascii.Error, ValueError):
        raise failure from None


def show_value(value: Any) -> str:
    """Formats a value for an error message. Large values are truncated first."""
    text = json.dumps(_cut(value))
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _cut(value: Any, level: int = 3) -> Any:
    if isinstance(value, Text):
        return "..."
    if isinstance(value, str):
        return value[:SHOWN]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**SHOWN:
        return "..."
    if isinstance(value, list):
        return [_cut(item, level - 1) for item in value[:4]] if level else ["..."]
    if isinstance(value, dict):
        return {key[:SHOWN]: _cut(item, level - 1) for key, item in list(value.items())[:4]} if level else {}
    return value
