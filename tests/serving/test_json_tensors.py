"""JSON ↔ tensors, without a server."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import meta_graph_pb2

from tl_keras.serving.errors import RequestError
from tl_keras.serving.graphs import as_strings
from tl_keras.serving.json_tensors import format_classes, format_predictions, parse_json, parse_predict


def make_signature(**inputs: tf.DType) -> meta_graph_pb2.SignatureDef:
    signature = meta_graph_pb2.SignatureDef()
    for name, dtype in inputs.items():
        signature.inputs[name].dtype = dtype.as_datatype_enum
    return signature


def parse(document: str, **inputs: tf.DType) -> dict[str, np.ndarray]:
    return parse_predict(parse_json(document.encode()), make_signature(**inputs))[0]


def test_numbers_keep_their_type_and_value():
    arrays = parse('{"inputs": {"a": [1, 2.5, NaN, -Infinity], "b": [[1], [-2]], "c": [true]}}',
                   a=tf.float32, b=tf.int64, c=tf.bool)  # fmt: skip
    np.testing.assert_array_equal(arrays["a"], np.array([1, 2.5, np.nan, -np.inf], np.float32))
    assert arrays["a"].dtype == np.float32
    assert (arrays["b"].tolist(), arrays["b"].dtype) == ([[1], [-2]], np.int64)
    assert (arrays["c"].tolist(), arrays["c"].dtype) == ([True], np.bool_)


@pytest.mark.parametrize(
    ("text", "dtype", "words"),
    [
        ("[16777216]", tf.float32, "Cannot convert JSON value: 16777216 to float32 without loss of precision."),
        ("[1e39]", tf.float32, "without loss of precision"),
        ("[1.5]", tf.int32, "JSON Value: 1.5 Type: Number is not of expected type: int32"),
        ("[3000000000]", tf.int32, "without loss of precision"),
        ("[true]", tf.float32, "is not of expected type: float32"),
        ("[1]", tf.bool, "is not of expected type: bool"),
        ("[null]", tf.string, "JSON Value: null Type: Null is not of expected type: string"),
        ('[{"b64": 5}]', tf.string, "not formatted correctly for base64 data"),
        ('[{"b64": "eA==", "x": 1}]', tf.string, "not formatted correctly for base64 data"),
        ("[[1], 2]", tf.float32, "found at incorrect level: 2 in the JSON DOM. Expected at level: 2"),
        ("[1, [2]]", tf.float32, "Encountered list at unexpected level: 1 expected < 1"),
    ],
)
def test_values_that_do_not_fit(text, dtype, words):
    with pytest.raises(RequestError) as caught:
        parse(f'{{"inputs": {{"a": {text}, "b": []}}}}', a=dtype, b=tf.float32)
    assert words in caught.value.message


def test_strings_and_base64():
    arrays = parse('{"inputs": ["é", {"b64": "AAEC/w=="}, {"b64": "AAEC/w"}, {"b64": ""}, "a\\u0000"]}', a=tf.string)
    assert arrays["a"].tolist() == ["é".encode(), b"\0\1\2\xff", b"\0\1\2\xff", b"", b"a\0"]


def test_rows_of_several_inputs():
    arrays = parse('{"instances": [{"a": [1, 2], "b": "x"}, {"a": [3, 4], "b": "y"}]}', a=tf.int32, b=tf.string)
    assert arrays["a"].tolist() == [[1, 2], [3, 4]]
    assert arrays["b"].tolist() == [b"x", b"y"]
    with pytest.raises(RequestError, match="instances is a plain list"):
        parse('{"instances": [1]}', a=tf.int32, b=tf.string)
    with pytest.raises(RequestError, match="Expecting object but got list at item 1"):
        parse('{"instances": [{"a": 1, "b": "x"}, 5]}', a=tf.int32, b=tf.string)
    with pytest.raises(RequestError, match="Expecting value/list but got object at item 1"):
        parse('{"instances": [1, {"a": 5}]}', a=tf.int32)


def test_decimals_are_short_and_exact():
    values = np.array([0.1, 1 / 3, 1, 1e-20, 3e38, np.nan, np.inf, -np.inf, 123456.789], np.float32)
    text = format_predictions({"x": values}, by_row=True).decode()
    assert text == ('{"predictions": [0.1, 0.333333343, 1.0, 1e-20, 3e+38, NaN, Infinity, -Infinity, 123456.789]}')
    np.testing.assert_array_equal(np.array(json.loads(text)["predictions"], np.float32), values)


def test_names_that_end_in_bytes_come_as_base64():
    outputs = {"raw_bytes": as_strings([b"\0\xff"]), "text": as_strings(["é".encode()])}
    rows = json.loads(format_predictions(outputs, by_row=True))
    assert rows == {"predictions": [{"raw_bytes": {"b64": "AP8="}, "text": "é"}]}
    columns = json.loads(format_predictions(outputs, by_row=False))
    assert columns == {"outputs": {"raw_bytes": [{"b64": "AP8="}], "text": ["é"]}}


def test_row_format_needs_rows():
    with pytest.raises(RequestError, match="has no shape information"):
        format_predictions({"a": np.float32(1), "b": np.zeros(2)}, by_row=True)
    with pytest.raises(RequestError, match="inconsistent batch sizes"):
        format_predictions({"a": np.zeros(1), "b": np.zeros(2)}, by_row=True)


def test_classes():
    text = format_classes(as_strings([b"a", b"b"]).reshape(1, 2), np.array([[0.75, 0.25]], np.float32))
    assert json.loads(text) == {"results": [[["a", 0.75], ["b", 0.25]]]}
