"""The REST API against TF Serving's own contract: api_rest.md, json_tensor.cc, http_rest_api_handler.cc."""

from __future__ import annotations

import csv
import gzip
import http.client
import json
import socket
import time
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.serving.conftest import Server, as_b64

OUTPUTS = {"probabilities", "labels", "scores", "class_ids", "valid"}


def test_row_format_takes_plain_values_and_named_ones(server, model, photographs):
    plain = server.ask(f"/v1/models/{model}:predict", {"instances": [as_b64(one) for one in photographs]})
    named = server.ask(
        f"/v1/models/{model}:predict", {"instances": [{"image_bytes": as_b64(one)} for one in photographs]}
    )
    assert plain[0] == 200
    assert plain == named
    rows = plain[1]["predictions"]
    assert len(rows) == len(photographs)
    assert all(set(row) == OUTPUTS for row in rows)
    assert [row["labels"][0] for row in rows] == ["blue"] * 3 + ["green"] * 3 + ["red"] * 3
    assert all(row["class_ids"][0] == ["blue", "green", "red"].index(row["labels"][0]) for row in rows)
    assert all(abs(sum(row["probabilities"]) - 1) < 1e-5 and row["valid"] is True for row in rows)


def test_column_format_gives_columns(server, model, photographs):
    status, answer = server.ask(f"/v1/models/{model}:predict", {"inputs": {"image_bytes": [as_b64(photographs[0])]}})
    assert status == 200
    assert set(answer["outputs"]) == OUTPUTS
    assert np.shape(answer["outputs"]["probabilities"]) == (1, 3)
    assert server.ask(f"/v1/models/{model}:predict", {"inputs": [as_b64(photographs[0])]}) == (200, answer)


def test_one_output_comes_bare(server, model, photographs):
    request = {"signature_name": "embeddings", "instances": [as_b64(photographs[0])] * 2}
    status, answer = server.ask(f"/v1/models/{model}:predict", request)
    assert status == 200
    assert len(answer["predictions"]) == 2
    assert isinstance(answer["predictions"][0][0], float)
    columns = server.ask(
        f"/v1/models/{model}:predict", {"signature_name": "embeddings", "inputs": request["instances"]}
    )
    assert columns == (200, {"outputs": answer["predictions"]})


def test_pixels_that_are_not_finite_are_invalid(server, model):
    pixels = np.full((4, 16, 16, 3), 200.0)
    pixels[1, 3, 4, 0], pixels[2, 0, 0, 0] = np.nan, -np.inf
    body = json.dumps({"signature_name": "pixels", "instances": pixels.tolist()}).encode()
    assert b"NaN" in body
    for sent in (body, body.replace(b"-Infinity", b"-1.7976931348623157e308"), body.replace(b"-Infinity", b"-Inf")):
        status, answer = server.ask(f"/v1/models/{model}:predict", sent)
        assert status == 200
        rows = answer["predictions"]
        assert [row["valid"] for row in rows] == [True, False, False, True]
        assert [round(sum(row["probabilities"]), 4) for row in rows] == [1, 0, 0, 1]
        assert rows[1]["labels"] == [""] * 3
    whole = {"signature_name": "pixels", "instances": [[[[16777216, 200, 1435774380]] * 16] * 16]}
    assert server.ask(f"/v1/models/{model}:predict", whole)[0] == 200


def test_an_image_may_be_the_body(server, model, photographs):
    headers = {"Content-Type": "image/jpeg"}
    status, answer = server.ask(f"/v1/models/{model}:predict", photographs[0], headers=headers)
    in_json = server.ask(f"/v1/models/{model}:predict", {"instances": [as_b64(photographs[0])]})
    assert (status, answer) == in_json
    assert answer["predictions"][0]["labels"][0] == "blue"


def test_a_broken_image_is_invalid_and_leaves_its_neighbours_alone(server, model, photographs):
    contents = [photographs[0], b"", b"no image", photographs[0][:300], photographs[5]]
    status, answer = server.ask(f"/v1/models/{model}:predict", {"instances": [as_b64(one) for one in contents]})
    rows = answer["predictions"]
    assert status == 200
    assert [row["valid"] for row in rows] == [True, False, False, False, True]
    assert rows[1] == {
        "valid": False,
        "probabilities": [0.0] * 3,
        "scores": [0.0] * 3,
        "labels": [""] * 3,
        "class_ids": [-1] * 3,
    }
    assert (rows[0]["labels"][0], rows[4]["labels"][0]) == ("blue", "green")


def test_answers_are_those_of_predictions_csv(server, model, trained, colour_folder):
    rows = [row for row in csv.DictReader((trained[0] / "predictions.csv").open()) if row["split"] == "test"]
    contents = [(colour_folder / row["id"]).read_bytes() for row in rows]
    _, answer = server.ask(f"/v1/models/{model}:predict", {"instances": [as_b64(one) for one in contents]})
    assert [row["labels"][0] for row in answer["predictions"]] == [row["predicted"] for row in rows]
    scores = [row["scores"][0] for row in answer["predictions"]]
    np.testing.assert_allclose(scores, [float(row["probability"]) for row in rows], atol=1e-4)


def test_classify(server, model, photographs):
    examples = [{"image_bytes": as_b64(one)} for one in photographs[::3]]
    status, answer = server.ask(
        f"/v1/models/{model}:classify", {"signature_name": "classify", "examples": [*examples, {}]}
    )
    assert status == 200
    assert [row[0][0] for row in answer["results"]] == ["blue", "green", "red", ""]
    assert all(len(row) == 3 and isinstance(row[0][1], float) for row in answer["results"])
    shared = {"signature_name": "classify", "context": examples[0], "examples": [{}, {}]}
    _, answer = server.ask(f"/v1/models/{model}:classify", shared)
    assert [row[0][0] for row in answer["results"]] == ["blue", "blue"]
    shared["examples"] = [examples[1], {}]  # both have the feature: the example's counts
    _, answer = server.ask(f"/v1/models/{model}:classify", shared)
    assert [row[0][0] for row in answer["results"]] == ["green", "blue"]


def test_status_and_metadata(server, model):
    status, answer = server.ask(f"/v1/models/{model}")
    state = {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    assert (status, answer) == (200, {"model_version_status": [state]})
    assert server.ask(f"/v1/models/{model}/versions/1") == (200, answer)
    status, answer = server.ask(f"/v1/models/{model}/metadata")
    assert status == 200
    assert answer["model_spec"]["name"] == model
    assert answer["model_spec"]["version"] == "1"
    signatures = answer["metadata"]["signature_def"]["signature_def"]
    assert set(signatures) == {"serving_default", "pixels", "embeddings", "classify", "__saved_model_init_op"}
    image_bytes = signatures["serving_default"]["inputs"]["image_bytes"]
    assert image_bytes["dtype"] == "DT_STRING"
    assert image_bytes["tensor_shape"]["dim"] == [{"size": "-1", "name": ""}]


def test_paths_ignore_case_and_versions_may_be_named(server, model, photographs):
    request = {"instances": [as_b64(photographs[0])]}
    expected = server.ask(f"/v1/models/{model}:predict", request)
    assert expected[0] == 200
    assert server.ask(f"/V1/MODELS/{model}/Versions/1:PREDICT", request) == expected
    assert server.ask(f"/v1/models/{urllib.parse.quote(model, safe='')}:predict", request) == expected


PREDICT, CLASSIFY, REGRESS = (f"/v1/models/MODEL:{verb}" for verb in ("predict", "classify", "regress"))
ERRORS = {
    "unknown model": (
        "/v1/models/nobody:predict",
        {"instances": ["x"]},
        404,
        "Servable not found for request: Latest(nobody)",
    ),
    "unknown version": (
        "/v1/models/MODEL/versions/7:predict",
        {"instances": ["x"]},
        404,
        "Servable not found for request: Specific(MODEL, 7)",
    ),
    "unknown label": (
        "/v1/models/MODEL/labels/x:predict",
        {"instances": ["x"]},
        400,
        "Unrecognized servable version label: x",
    ),
    "unknown status": ("/v1/models/nobody", None, 404, "Could not find any versions of model nobody"),
    "unknown version's status": ("/v1/models/MODEL/versions/7", None, 404, "Could not find version 7 of model MODEL"),
    "no model's name": ("/v1/models", None, 400, "Missing model name in request."),
    "unknown verb": ("/v1/models/MODEL:explain", {}, 400, "Malformed request: POST /v1/models/MODEL:explain"),
    "verb by GET": (PREDICT, None, 400, "Malformed request: GET /v1/models/MODEL:predict"),
    "other path": ("/v1/nothing", {}, 400, "Malformed request: POST /v1/nothing"),
    "outside the API": ("/v2/models", {}, 404, "nothing is here"),
    "empty body": (PREDICT, b"", 400, "JSON Parse error: The document is empty"),
    "no JSON": (PREDICT, b"{'instances'", 400, "JSON Parse error: "),
    "an image without its type": (
        *(PREDICT, b"\xff\xd8\xff\xe0 a JPEG", 400),
        "JSON Parse error: the body is not JSON but an image: send it with Content-Type: image/jpeg, or as",
    ),
    "no text": (PREDICT, b"\x80 no text", 400, "JSON Parse error: it is no text in UTF-8"),
    "nested without end": (PREDICT, b"[" * 200000, 400, "JSON Parse error: "),
    "no object": (PREDICT, [1], 400, "JSON Value: [1] Is not object"),
    "neither key": (PREDICT, {}, 400, "Missing 'inputs' or 'instances' key"),
    "both keys": (PREDICT, {"inputs": [], "instances": []}, 400, "expecting only one of 'inputs' or 'instances'"),
    "no instances": (PREDICT, {"instances": []}, 400, "No values in 'instances' array"),
    "instances no list": (PREDICT, {"instances": "x"}, 400, "Expecting 'instances' to be an list/array"),
    "signature no string": (
        PREDICT,
        {"signature_name": 5, "instances": ["x"]},
        400,
        "'signature_name' key must be a string value.",
    ),
    "unknown signature": (
        PREDICT,
        {"signature_name": "x", "instances": ["x"]},
        400,
        'Serving signature name: "x" not found in signature def',
    ),
    "wrong key": (PREDICT, {"instances": [{"image": "x"}]}, 400, "keys must be equal to: image_bytes"),
    "missing input": (
        PREDICT,
        {"inputs": {"image": ["x"]}},
        400,
        "Missing named input: image_bytes in 'inputs' object.",
    ),
    "bad base64": (PREDICT, {"instances": [{"b64": "-_-_"}]}, 400, "Unable to base64 decode"),
    "a number for bytes": (
        PREDICT,
        {"instances": [5]},
        400,
        "JSON Value: 5 Type: Number is not of expected type: string",
    ),
    "a list for bytes": (PREDICT, {"instances": [["x"]]}, 400, "input image_bytes has shape [1, 1]"),
    "ragged": (
        PREDICT,
        {"signature_name": "pixels", "instances": [[1], [1, 2]]},
        400,
        "Encountered list at unexpected size: 2 at level: 1 expected size: 1",
    ),
    "wrong shape": (
        PREDICT,
        {"signature_name": "pixels", "instances": [[[[1.0]]]]},
        400,
        "input images has shape [1, 1, 1, 1]",
    ),
    "text for a number": (
        PREDICT,
        {"signature_name": "pixels", "instances": [[[["x"]]]]},
        400,
        "is not of expected type: float32",
    ),
    "too many images": (PREDICT, {"instances": ["x"] * 65}, 400, "at most 64"),
    "unknown signature of classify": (
        CLASSIFY,
        {"signature_name": "x", "examples": [{}]},
        400,
        "No signature was found with the name: x",
    ),
    "unknown signature of regress": (
        REGRESS,
        {"signature_name": "x", "examples": [{}]},
        400,
        "No signature was found with the name: x",
    ),
    "an unknown input": (PREDICT, {"instances": [{"x": "y"}]}, 400, "does not have named input: x"),
    "large lists": (PREDICT, b'{"instances": [' + b"{}," * 900_000 + b"{}]}", 400, "holds more than"),
    "large lists of pixels": (
        PREDICT,
        b'{"signature_name": "pixels", "instances": [' + b"1," * 1_400_000 + b"1]}",
        400,
        "at most 64",
    ),
    "many examples": (CLASSIFY, {"examples": [{}] * 65}, 400, "at most 64"),
    "large lists of examples": (CLASSIFY, b'{"examples": [' + b"{}," * 900_000 + b"{}]}", 400, "holds more than"),
    "a large context": (REGRESS, b'{"context": {"a": [' + b"1," * 900_000 + b"1]}}", 400, "holds more than"),
    "classify by default": (
        CLASSIFY,
        {"examples": [{"image_bytes": "x"}]},
        400,
        "Expected one or two output Tensors, found 5",
    ),
    "classify pixels": (
        CLASSIFY,
        {"signature_name": "embeddings", "examples": [{}]},
        400,
        "No classification inputs found in SignatureDef",
    ),
    "no examples": (CLASSIFY, {"signature_name": "classify"}, 400, "key 'examples' is expected and was not found"),
    "empty examples": (CLASSIFY, {"examples": []}, 400, "'examples' value is an empty array"),
    "example no object": (CLASSIFY, {"examples": [5]}, 400, "Example must be JSON object"),
    "nested deeply": (PREDICT, b'{"instances": [' + b"[" * 70 + b'"x"' + b"]" * 70 + b"]}", 400, "unexpected level"),
    "no character": (PREDICT, b'{"signature_name": "\\ud800", "instances": ["x"]}', 400, "not found in signature def"),
    "a version of many digits": (
        f"/v1/models/MODEL/versions/{'9' * 5000}:predict",
        {},
        400,
        "Failed to convert version",
    ),
    "a truth value among numbers": (
        PREDICT,
        {"signature_name": "pixels", "instances": [[[[1, True, 1]]]]},
        400,
        "is not of expected type: float32",
    ),
    "a context that is too large so often": (
        CLASSIFY,
        {"signature_name": "classify", "context": {"image_bytes": "x" * 100_000}, "examples": [{}] * 60},
        400,
        "larger than a request may be",
    ),
    "no gzip": (PREDICT, b"gzip", 400, "JSON Parse error"),
    "regress": (REGRESS, {"examples": [{"image_bytes": "x"}]}, 400, "Expected one output Tensor."),
    "regress by name": (
        REGRESS,
        {"signature_name": "embeddings", "examples": [{}]},
        400,
        "No regression inputs found in SignatureDef",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_tf_servings(case, server, model):
    path, body, expected, words = ERRORS[case]
    status, answer = server.ask(path.replace("MODEL", model), body)
    assert status == expected
    assert list(answer) == ["error"]
    assert words.replace("MODEL", model) in answer["error"]


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server, model):
    host, _, port = server.rest.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST /v1/models/{model}:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n"
        connection.sendall(head.encode() + b"x" * 1000)
        answer = b"".join(iter(lambda: connection.recv(4096), b"")).decode()  # head and body may come apart
    assert answer.startswith("HTTP/1.1 413")
    assert "larger than this server takes (3000000 bytes)" in answer


def test_a_chunked_body_is_bounded_too(server, model):
    host, _, port = server.rest.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST /v1/models/{model}:predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        answer = b""
        try:
            for _ in range(64):
                connection.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        except OSError:
            pass  # it has hung up
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 413")


def test_a_body_may_be_sent_by_gzip(server, model, photographs):
    body = json.dumps({"instances": [as_b64(photographs[0])]}).encode()
    headers = {"Content-Encoding": "gzip"}
    packed = server.ask(f"/v1/models/{model}:predict", gzip.compress(body), headers=headers)
    assert packed == server.ask(f"/v1/models/{model}:predict", body)
    assert packed[0] == 200
    status, answer = server.ask(f"/v1/models/{model}:predict", body, headers=headers)
    assert (status, "Failed to uncompress" in answer["error"]) == (400, True)
    for encoding in ("x-gzip", "GZIP"):
        headers["Content-Encoding"] = encoding
        assert server.ask(f"/v1/models/{model}:predict", gzip.compress(body), headers=headers) == packed
    several = gzip.compress(body[:20]) + gzip.compress(b"") + gzip.compress(body[20:]) + bytes(8)
    assert server.ask(f"/v1/models/{model}:predict", several, headers=headers) == packed
    whole = gzip.compress(body)
    for broken in (whole[:-8], whole[:-1], whole[:-8] + bytes(8), whole + b"rest", whole + whole[:10]):
        status, answer = server.ask(f"/v1/models/{model}:predict", broken, headers=headers)
        assert (status, "Failed to uncompress" in answer["error"]) == (400, True)
    bomb = gzip.compress(bytes(100_000_000))
    assert server.ask(f"/v1/models/{model}:predict", bomb, headers=headers)[0] == 413


def test_a_client_that_hangs_up_leaves_nothing_behind(server, model, photographs):
    host, _, port = server.rest.removeprefix("http://").partition(":")
    head = f"POST /v1/models/{model}:predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
    for content in (photographs[0], photographs[0][:100]):
        for _ in range(20):
            with socket.create_connection((host, int(port)), timeout=30) as connection:
                connection.sendall(head.encode() + f"Content-Length: {len(photographs[0])}\r\n\r\n".encode() + content)
    assert server.ask(f"/v1/models/{model}:predict", {"instances": [as_b64(photographs[0])]})[0] == 200
    nothing, deadline = f':tl_keras:serving:queued_rows{{model_name="{model}"}} 0.0', time.monotonic() + 20
    while nothing not in (text := server.ask("/monitoring/prometheus/metrics")[1]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert nothing in text


def test_headers_are_bounded(server):
    host, _, port = server.rest.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        headers = b"".join(f"x-{number}: {'y' * 10000}\r\n".encode() for number in range(1000))
        with pytest.raises(ConnectionError):  # it hangs up
            connection.sendall(headers)
    assert server.ask("/healthz")[0] == 200


def test_names_that_clients_invent_are_counted_as_one(server):
    for number in range(3):
        assert server.ask(f"/v1/models/invented-{number}:predict", {"instances": ["x"]})[0] == 404
    text = server.ask("/monitoring/prometheus/metrics")[1]
    assert "invented" not in text
    assert ':tensorflow:serving:request_count{model_name="unknown",status="NOT_FOUND"}' in text


def test_other_pages_may_read_nothing_unless_they_are_allowed(server, model):
    """CORS is off, as in TF Serving."""
    path = f"/v1/models/{model}"
    for origin in ("https://evil.example", "null", server.rest):
        request = urllib.request.Request(server.rest + path, headers={"Origin": origin})
        with urllib.request.urlopen(request) as response:
            assert not [name for name in response.headers if name.lower().startswith("access-control")]
    for method in ("OPTIONS", "HEAD", "PUT"):
        status, answer = server.ask(f"{path}:predict", method=method)
        assert status == 400
        assert method == "HEAD" or answer["error"] == f"Malformed request: {method} {path}:predict"
    assert server.ask(f"{path}:predict", method="OPTIONS", headers={"Origin": "https://evil.example"})[0] == 400


@pytest.mark.parametrize("path", ["/", "/models", "/healthz", "/v1/models/MODEL", "/v1/models/MODEL:predict"])
def test_a_name_that_points_at_this_machine_is_not_answered(path, server, model):
    """DNS rebinding: a page lets its own name point at 127.0.0.1, and is of the same origin then."""
    body = b"{}" if "predict" in path else None
    status, answer = server.ask(path.replace("MODEL", model), body, headers={"Host": "evil.example:8501"})
    assert (status, list(answer)) == (403, ["error"])
    assert "does not answer to the Host evil.example:8501" in answer["error"]
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:80", "127.1.2.3", "[::1]:8501", "app.localhost", "container"):
        assert server.ask(f"/v1/models/{model}", headers={"Host": host})[0] == 200


def test_pages_of_other_sites_may_not_post(server, model, photographs):
    path, body = f"/v1/models/{model}:predict", {"instances": [as_b64(photographs[0])]}
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
        headers = {"Sec-Fetch-Site": site, "Origin": "https://evil.example", "Content-Type": "text/plain"}
        assert server.ask(path, body, headers=headers)[0] == status


def test_a_missing_address_keeps_the_connection(server):
    connection = http.client.HTTPConnection(server.rest.removeprefix("http://"), timeout=30)
    for path, status in (("/nothing", 404), ("/v1/models/nobody", 404), ("/v1/models/a%0ab:x", 400), ("/a%0a", 404)):
        connection.request("GET", path)
        response = connection.getresponse()
        answer = json.loads(response.read())
        assert (response.status, list(answer)) == (status, ["error"])
        assert response.headers.get("Connection", "keep-alive") == "keep-alive"
    connection.close()


def test_a_form_is_named(server, model):
    form = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n\xff\xd8\xff\r\n--x--'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    status, answer = server.ask(f"/v1/models/{model}:predict", form, headers=headers)
    assert status == 400
    assert "the body is a multipart form. Send the image itself" in answer["error"]


def test_no_request_stays_in_memory(server, model):
    """Else each of them leaves 24 times its size, for ever."""
    body = b'{"instances": [' + b"{}," * 60_000 + b"{}]}"  # few enough values to be parsed as a whole

    def ask(times: int) -> int:
        for _ in range(times):
            assert server.ask(f"/v1/models/{model}:predict", body)[0] == 400
        lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) // 1024

    before = ask(5)
    assert ask(40) < before + 80


def test_health_and_metrics(server, model, photographs):
    assert server.ask("/healthz") == (200, "ok\n")
    assert server.ask("/livez") == (200, "ok\n")
    server.ask(f"/v1/models/{model}:predict", {"instances": [as_b64(photographs[0])]})
    server.ask(f"/v1/models/{model}:predict", {})
    status, text = server.ask("/monitoring/prometheus/metrics")
    assert status == 200
    lines = text.splitlines()
    counts = [line for line in lines if line.startswith(":tensorflow:serving:request_count{") and model in line]
    assert any('status="OK"' in line for line in counts)
    assert any('status="INVALID_ARGUMENT"' in line for line in counts)
    latency = [line for line in lines if line.startswith(":tensorflow:serving:request_latency_bucket{")]
    assert any('le="+Inf"' in line and 'entrypoint="REST"' in line and 'API="Predict"' in line for line in latency)


def test_the_page_and_the_list_of_models(server, model):
    status, page = server.ask("/")
    assert status == 200
    assert page.startswith("<!doctype html>")
    _, answer = server.ask("/models")
    assert answer["models"] == [
        {
            "name": model,
            "labels": ["blue", "green", "red"],
            "versions": [{"version": 1, "state": "AVAILABLE", "error": ""}],
        }
    ]


def test_warm_up_requests_are_answered(trained, model, server):
    """Each of the exported file's own requests, sent as a client would."""
    import grpc
    from tensorflow_serving.apis import prediction_service_pb2_grpc

    from tl_keras.export.warmup import BATCH_SIZES, read_warmup

    requests = read_warmup(trained[1])
    assert 0 < len(requests) <= 1000
    seen = set()
    with grpc.insecure_channel(server.grpc) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        for log in requests:
            if log.WhichOneof("log_type") == "classify_log":
                answer = stub.Classify(log.classify_log.request, timeout=30)
                rows, name = len(answer.result.classifications), "classify"
                assert all(one.classes[0].label for one in answer.result.classifications)
            else:
                request = log.predict_log.request
                answer = stub.Predict(request, timeout=30)
                name = request.model_spec.signature_name
                rows = len(tf.make_ndarray(next(iter(answer.outputs.values()))))
            assert answer.model_spec.name == model
            seen.add((name, rows))
    assert seen == {
        (name, size) for name in ("serving_default", "pixels", "embeddings", "classify") for size in BATCH_SIZES
    }


def test_the_server_that_a_reader_of_the_readme_starts(server: Server, trained: tuple[Path, Path]):
    """What it prints: the model, where it listens, a line to try."""
    text = server.log.read_text()
    assert f"serving {trained[1].parent.name}/1: tensorflow float32, ready in" in text
    assert f"try it: curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' {server.rest}/v1/models/" in text
