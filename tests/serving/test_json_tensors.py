"""JSON ↔ tensors, without a server."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import tracemalloc

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import meta_graph_pb2

from tl_keras.serving.errors import RequestError
from tl_keras.serving.graphs import as_strings
from tl_keras.serving.json_examples import parse_examples
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
        ("[1.5]", tf.int32, "JSON Value: 1.5 Type: Number is not of expected type: int32"),
        ("[3000000000]", tf.int32, "without loss of precision"),
        ("[true]", tf.float32, "Type: True is not of expected type: float32"),
        ("[1e400]", tf.float32, "Number too big to be stored in double."),
        (f"[{'9' * 400}]", tf.float32, "Number too big to be stored in double."),
        (f"[{'9' * 5000}]", tf.float32, "Number too big to be stored in double."),
        ("[1,,2]", tf.float32, "JSON Parse error: Invalid value."),
        ('["\\ud800"]', tf.string, "The surrogate pair in string is invalid."),
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


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16777216", 16777216.0),
        ("1435774380", 1435774380.0),
        ("-16777217", -16777216.0),
        ("1.7976931348623157e308", np.inf),
        ("-1e39", -np.inf),
        ("1" * 30, float("1" * 30)),
        ("Inf", np.inf),
        ("-Inf", -np.inf),
        ("-Infinity", -np.inf),
    ],
)
def test_floats_are_rounded_as_tf_serving_rounds_them(text, value):
    arrays = parse(f'{{"inputs": {{"a": [{text}, 1], "b": ["Inf"]}}}}', a=tf.float32, b=tf.string)
    assert arrays["a"].tolist() == [np.float32(value), 1]
    assert arrays["b"].tolist() == [b"Inf"]


@pytest.mark.parametrize(
    "text", ["aGVs\\nbG8=", "aGVsbG8=\\n", " aGVs\\t bG8 = ", "aGVsbG8", "aGVsbG8.", "aGVs\\r\\nbG8"]
)
def test_white_space_in_base64_is_skipped(text):
    assert parse(f'{{"inputs": [{{"b64": "{text}"}}]}}', a=tf.string)["a"].tolist() == [b"hello"]


@pytest.mark.parametrize("text", ["aGVsbG8==", "eA=", "e", "-_-_", "aGVs=bG8", "aGVs\u00e9"])
def test_what_is_no_base64_is_refused(text):
    with pytest.raises(RequestError, match="Unable to base64 decode"):
        parse(f'{{"inputs": [{{"b64": "{text}"}}]}}', a=tf.string)


def test_of_two_equal_keys_the_first_counts_and_what_follows_the_object_does_not():
    twice = '{"inputs": {"a": [1], "a": [2]}, "inputs": {"a": [3]}, "x": 1, "x": 2} behind it'
    assert parse(twice, a=tf.int32)["a"].tolist() == [1]
    with pytest.raises(RequestError, match="JSON Parse error"):
        parse('{"inputs": [1], "inputs": [}', a=tf.int32)


@pytest.mark.parametrize("depth", [2000, 500_000])
def test_what_nobody_needs_may_be_nested_deeply(depth):
    nested = "[" * depth + "]" * depth
    assert parse(f'{{"unused": {nested}, "inputs": [1]}}', a=tf.int32)["a"].tolist() == [1]
    with pytest.raises(RequestError, match="key must be a string value"):
        parse(f'{{"signature_name": {nested}}}', a=tf.int32)
    with pytest.raises(RequestError, match="JSON Parse error: Invalid value"):
        parse('{"signature_name": ' + "[" * depth, a=tf.int32)
    depth = 2000
    for broken in ("[" * depth + "}" * depth, "[" * depth + "1 2" + "]" * depth, '{"a":' * depth + "1" + "]" * depth):
        with pytest.raises(RequestError, match="JSON Parse error"):
            parse(f'{{"unused": {broken}, "inputs": [1]}}', a=tf.int32)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[1, 2], [3, 4], [5, 6, 7]]", "Expecting tensor size: 2 but got: 3"),
        ("[[1, 2], [3, 4], [[5, 6]]]", "Expecting shape [2] but got: [1,2]"),
        ("[1, [1]]", "Expecting shape [] but got: [1]"),
        ('[{"b": 1}]', "does not have named input: b"),
        ("[{}]", "keys must be equal to: a"),
    ],
)
def test_rows_that_differ(text, words):
    with pytest.raises(RequestError) as caught:
        parse(f'{{"instances": {text}}}', a=tf.int32)
    assert words in caught.value.message
    assert "Failed to process element: " in caught.value.message or "item" in caught.value.message


def test_large_tensors_are_read_in_slices(monkeypatch):
    """As small ones are, whatever the slice's size, in rows and columns, and refused alike."""
    values = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 2)).tolist()
    texts = {
        "rows": json.dumps({"instances": values}),
        "named rows": json.dumps({"instances": [{"a": row} for row in values]}, indent=1),
        "columns": json.dumps({"inputs": values}, indent=1),
        "named columns": json.dumps({"inputs": {"a": values, "x": '[{\\"]'}}),
    }
    for size in (3, 10, 64, 200, 1 << 18):
        monkeypatch.setattr("tl_keras.serving.json_text.SLICE_BYTES", size)
        for text in texts.values():
            np.testing.assert_array_equal(parse(text, a=tf.float32)["a"], values)
            for old, new in (("[", "[[1], "), ("]]]", "]]"), (", ", ",, "), ("1", "true"), ("1", '"1"'), ("]]", "}]")):
                if old in text:
                    with pytest.raises(RequestError):
                        parse(text.replace(old, new, 9), a=tf.float32)


FILLED = 4 << 20
LARGE = {
    "objects": (b'{"instances": [', b"{},", b"{}]}"),
    "numbers": (b'{"instances": [', b"1,", b"1]}"),
    "floats": (b'{"instances": [', b"1.5,", b"1]}"),
    "strings": (b'{"instances": [', b'"",', b'""]}'),
    "lists": (b'{"instances": [', b"[],", b"[]]}"),
    "a long row": (b'{"instances": [[', b"1,", b"1]]}"),
    "a row of objects": (b'{"instances": [[', b"{},", b"1]]}"),
    "columns": (b'{"inputs": [', b"0,", b"1]}"),
    "named columns": (b'{"inputs": {"a": [', b"{},", b"1]}}"),
    "unused": (b'{"inputs": [], "x": [', b"{},", b"1]}"),
    "members": (b"{", b'"a":1,', b'"b":1}'),
    "members of a row": (b'{"instances": [{', b'"a":1,', b'"b":1}]}'),
    "nested": (b'{"instances": ', b"[", b"1"),
}


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("dtype", [tf.string, tf.float32])
def test_large_documents_are_refused_before_they_are_objects(kind, dtype):
    head, unit, tail = LARGE[kind]
    body = head + unit * (FILLED // len(unit)) + tail
    signature = make_signature(a=dtype)
    for size in (-1, 8, 8, 3):
        signature.inputs["a"].tensor_shape.dim.add(size=size)
    tracemalloc.start()
    try:
        with pytest.raises(RequestError) as caught:
            parse_predict(parse_json(body), signature, most_rows=64)
        assert caught.value.http_status == 400
        assert tracemalloc.get_traced_memory()[1] < 4 * FILLED  # 24 times as much as objects
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["objects", "a long row", "unused", "nested"])
def test_others_go_on_while_a_large_document_is_read(kind):
    """Python's parser holds the interpreter's lock: the server stood still for seconds."""
    head, unit, tail = LARGE[kind]
    body = head + unit * (4 * FILLED // len(unit)) + tail
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0.001)

    ticking = threading.Thread(target=tick)
    ticking.start()
    before = ticks[0]
    try:
        with contextlib.suppress(RequestError):
            parse_predict(parse_json(body), make_signature(a=tf.float32), most_rows=64)
        assert ticks[0] - before >= 10
    finally:
        stop.set()
        ticking.join()


def test_large_pixels_take_the_memory_of_their_numbers():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 96, 96, 3))
    body = json.dumps({"instances": pixels.tolist()}).encode()
    tracemalloc.start()
    try:
        found = parse_predict(parse_json(body), make_signature(a=tf.float32), most_rows=64)[0]["a"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(found, pixels)
    assert peak < 3 * found.nbytes + (16 << 20)


def test_reading_and_writing_have_a_deadline():
    late = time.monotonic() - 1
    body = json.dumps({"instances": [[0.0] * 40] * 40}).encode()
    with pytest.raises(RequestError) as caught:
        parse_predict(parse_json(body), make_signature(a=tf.float32), deadline=late)
    assert caught.value.http_status == 504
    with pytest.raises(RequestError) as caught:
        parse_examples(parse_json(b'{"examples": [{}]}'), deadline=late)
    assert caught.value.http_status == 504
    with pytest.raises(RequestError) as caught:
        format_predictions({"a": np.zeros((4, 4), np.float32)}, by_row=True, deadline=late)
    assert caught.value.http_status == 504


def test_large_answers_are_written_in_parts(monkeypatch):
    arrays = {
        "a": np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32),
        "b_bytes": as_strings([b"x"] * 3),
    }
    whole = [format_predictions(arrays, by_row=by_row) for by_row in (True, False)]
    monkeypatch.setattr("tl_keras.serving.json_answers._PART", 4)
    assert [format_predictions(arrays, by_row=by_row) for by_row in (True, False)] == whole
    assert json.loads(whole[1])["outputs"]["b_bytes"] == [{"b64": "eA=="}] * 3


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("null", "unexpected JSON type: Null"),
        ("[[1]]", "unexpected JSON type: Array"),
        ('{"a": 1}', "unexpected JSON type: Object"),
        ("18446744073709551615", "Only int64_t is supported"),
        ('["a", 1]', "Unexpected element type in feature: f expecting type: bytes"),
        ("[1, 1.5]", "expecting type: int64"),
        ('[{"b64": "?"}]', "Unable to base64 decode"),
        (json.dumps([1] * 5000), "an example holds more than"),
    ],
)
def test_features_that_do_not_fit(value, words):
    with pytest.raises(RequestError, match=words):
        parse_examples(parse_json(f'{{"examples": [{{"f": {value}}}]}}'.encode()))


def test_features_have_the_types_that_tf_serving_gives_them():
    text = '{"context": {"c": 1}, "examples": [{"i": [true, 2], "f": [1.5, Inf], "big": 99999999999999999999, "i": 7}]}'
    (example,), context = parse_examples(parse_json(text.encode()))
    features = tf.train.Example.FromString(example).features.feature
    assert list(features["i"].int64_list.value) == [7]
    assert list(features["f"].float_list.value) == [1.5, np.inf]
    assert list(features["big"].float_list.value) == [np.float32(1e20)]
    assert tf.train.Example.FromString(context).features.feature["c"].int64_list.value == [1]


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
