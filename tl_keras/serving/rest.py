"""TF Serving's REST API (tensorflow_serving/g3doc/api_rest.md), and what people want besides: raw images and a page."""

from __future__ import annotations

import asyncio
import importlib.resources
import json
import re
import time
import urllib.parse
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf import json_format
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from tensorflow_serving.apis import get_model_metadata_pb2

from tl_keras.serving import calls
from tl_keras.serving.errors import RequestError, invalid
from tl_keras.serving.graphs import DEFAULT_SIGNATURE, as_strings, find_signature
from tl_keras.serving.json_tensors import (
    format_classes,
    format_predictions,
    parse_examples,
    parse_json,
    parse_predict,
)
from tl_keras.serving.metrics import CONTENT_TYPE, PATH, Metrics
from tl_keras.serving.models import AVAILABLE, Models

# as TF Serving matches them, in http_rest_api_util.cc
_PREDICTION = re.compile(
    r"/v1/models/([^/:]+)(?:(?:/versions/(\d+))|(?:/labels/([^/:]+)))?:(classify|regress|predict)", re.IGNORECASE
)
_STATUS = re.compile(
    r"/v1/models(?:/([^/:]+))?(?:(?:/versions/(\d+))|(?:/labels/([^/:]+)))?(?:/(metadata))?", re.IGNORECASE
)
_LARGEST_VERSION = 2**63 - 1
_CORS = {  # http_rest_api_util.cc, AddCORSHeaders
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "POST, GET",
    "Access-Control-Allow-Headers": "Content-Type",
}
_METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"]
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src blob: data:; connect-src 'self'"
)
_TOO_LARGE = 413


def build_app(models: Models, metrics: Metrics, limits: calls.Limits) -> Starlette:
    """The ASGI application.

    Args:
        models: what is served.
        metrics: counts requests.
        limits: what one request may cost.
    """
    api = _Api(models, metrics, limits)
    return Starlette(
        routes=[
            Route("/", _show_page, methods=["GET"]),
            Route("/healthz", api.tell_health, methods=["GET"]),
            Route("/models", api.list_models, methods=["GET"]),
            Route(PATH, api.show_metrics, methods=["GET"]),
            Route("/{path:path}", api.answer, methods=_METHODS),
        ]
    )


class _TooLargeError(Exception):
    """A body above the limit."""


class _Api:
    """TF Serving's addresses."""

    def __init__(self, models: Models, metrics: Metrics, limits: calls.Limits) -> None:
        self._models, self._metrics, self._limits = models, metrics, limits

    async def answer(self, request: Request) -> Response:
        """Any address under /v1/."""
        path = request.scope.get("raw_path", request.url.path.encode()).decode("latin-1")
        if not path.lower().startswith("/v1/"):
            return _fail(404, f"nothing is here: {path}. The API is under /v1/models/NAME, a page for people under /")
        if request.method == "OPTIONS":
            return Response(status_code=200, headers=_CORS)
        try:
            if request.method == "POST" and (match := _PREDICTION.fullmatch(path)):
                return await self._post(request, *match.groups())
            if request.method in {"GET", "HEAD"} and (match := _STATUS.fullmatch(path)):
                return self._get(*match.groups())
        except RequestError as error:
            return _fail(error.http_status, error.message)
        return _fail(400, f"Malformed request: {request.method} {path}")

    async def tell_health(self, _: Request) -> Response:
        """Whether every model has a version that answers."""
        missing = [name for name in self._models.names if not self._is_available(name)]
        return Response(f"no version of {', '.join(missing)}\n" if missing else "ok\n", 503 if missing else 200)

    async def list_models(self, _: Request) -> Response:
        """What the page shows: TF Serving has no such list."""
        found = []
        for name in self._models.names:
            versions = self._models.find_all(name) if self._has_versions(name) else []
            serving = next((one for one in versions if one.state == AVAILABLE), None)
            labels = list(serving.served.labels) if serving and serving.served else []
            states = [{"version": one.number, "state": one.state, "error": one.error} for one in versions]
            found.append({"name": name, "labels": labels, "versions": states})
        return _json({"models": found, "limits": {"request_bytes": self._limits.request_bytes}})

    async def show_metrics(self, _: Request) -> Response:
        """Prometheus's text format."""
        return Response(self._metrics.page(), media_type=CONTENT_TYPE)

    async def _post(self, request: Request, model: str, version: str, label: str, verb: str) -> Response:
        start, name, code = time.perf_counter(), _decode(model), "OK"
        try:
            try:
                body = await _read_body(request, self._limits)
            except _TooLargeError as error:
                code = grpc.StatusCode.RESOURCE_EXHAUSTED.name
                return _fail(_TOO_LARGE, str(error))
            found = self._models.find(name, number=_number(version), label=_decode(label))
            with found.in_use() as served:
                answer = await _VERBS[verb.lower()](served, request, body, self._limits)
            return Response(answer, media_type="application/json", headers=_CORS)
        except ClientDisconnect:
            code = grpc.StatusCode.CANCELLED.name
            return Response(status_code=499)
        except RequestError as error:
            code = error.code.name
            raise
        finally:
            api = verb.capitalize()
            self._metrics.count(name, api=api, entrypoint="REST", status=code, seconds=time.perf_counter() - start)

    def _get(self, model: str | None, version: str, label: str, metadata: str) -> Response:
        if not model:
            raise invalid("Missing model name in request.")
        name, number, label = _decode(model), _number(version), _decode(label)
        if not metadata:
            status = calls.describe_status(self._models, name, number=number, label=label)
            return _json(_as_dict(status, preserving_proto_field_name=False))
        found = self._models.find(name, number=number, label=label)
        with found.in_use() as served:
            response = calls.describe_metadata(found, served)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata[calls.METADATA_FIELD].Unpack(signatures)
        return _json({
            "model_spec": _as_dict(response.model_spec),
            "metadata": {calls.METADATA_FIELD: _as_dict(signatures)},
        })

    def _has_versions(self, name: str) -> bool:
        try:
            return bool(self._models.find_all(name))
        except RequestError:
            return False

    def _is_available(self, name: str) -> bool:
        try:
            return bool(self._models.find(name))
        except RequestError:
            return False


async def _predict(served: calls.Served, request: Request, body: bytes, limits: calls.Limits) -> bytes:
    deadline = limits.deadline()
    if request.headers.get("content-type", "").lower().startswith("image/"):
        inputs = {"image_bytes": as_strings([body])}
        outputs = await calls.predict(served, DEFAULT_SIGNATURE, inputs, limits=limits, deadline=deadline)
        return format_predictions(outputs, by_row=True)
    document = parse_json(body)
    name = document.get("signature_name", "")
    inputs, by_row = parse_predict(document, find_signature(served.graph, name)[1])
    outputs = await calls.predict(served, name, inputs, limits=limits, deadline=deadline)
    return format_predictions(outputs, by_row=by_row)


async def _classify(served: calls.Served, request: Request, body: bytes, limits: calls.Limits) -> bytes:
    del request
    document = parse_json(body)
    examples = [example.SerializeToString() for example in parse_examples(document)]
    name = document.get("signature_name", "")
    found = await calls.classify(served, name, examples, limits=limits, deadline=limits.deadline())
    return format_classes(*found)


async def _regress(served: calls.Served, request: Request, body: bytes, limits: calls.Limits) -> bytes:
    del request, limits
    document = parse_json(body)
    parse_examples(document)
    await calls.regress(served, document.get("signature_name", ""))
    return b""


_VERBS: dict[str, Callable[[calls.Served, Request, bytes, calls.Limits], Awaitable[bytes]]] = {
    "predict": _predict,
    "classify": _classify,
    "regress": _regress,
}


async def _read_body(request: Request, limits: calls.Limits) -> bytes:
    """The body, if it is not too large and comes in time.

    Raises:
        _TooLargeError: it is.
        RequestError: it does not.
    """
    declared = request.headers.get("content-length", "")
    message = f"the request's body is larger than this server takes ({limits.request_bytes} bytes)"
    if declared.isdecimal() and int(declared) > limits.request_bytes:
        raise _TooLargeError(message)

    async def read() -> bytes:
        chunks, size = list[bytes](), 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limits.request_bytes:
                raise _TooLargeError(message)
            chunks.append(chunk)
        return b"".join(chunks)

    try:
        return await asyncio.wait_for(read(), limits.seconds)
    except asyncio.TimeoutError as error:
        raise RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, "the request's body did not come in time") from error


async def _show_page(_: Request) -> Response:
    page = importlib.resources.files("tl_keras.serving").joinpath("page.html").read_bytes()
    return Response(page, media_type="text/html", headers={"Content-Security-Policy": _PAGE_POLICY})


def _decode(part: str | None) -> str:
    return urllib.parse.unquote(part or "")


def _number(version: str | None) -> int | None:
    if not version:
        return None
    if int(version) > _LARGEST_VERSION:
        raise invalid(f"Failed to convert version: {version} to numeric.")
    return int(version)


def _as_dict(message: Any, *, preserving_proto_field_name: bool = True) -> dict[str, Any]:
    fields: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=preserving_proto_field_name, always_print_fields_with_no_presence=True
    )
    return fields


def _json(value: Any) -> Response:
    return Response(json.dumps(value, indent=1, ensure_ascii=False), media_type="application/json", headers=_CORS)


def _fail(status: int, message: str) -> Response:
    body = json.dumps({"error": message}, ensure_ascii=False)
    return Response(body, status, media_type="application/json", headers=_CORS)
