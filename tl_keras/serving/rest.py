"""TF Serving's REST API (tensorflow_serving/g3doc/api_rest.md), and what people want besides: raw images and a page."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import importlib.resources
import json
import re
import time
import urllib.parse
import zlib
from collections.abc import Callable, Coroutine
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
from tl_keras.serving.graphs import DEFAULT_SIGNATURE, IMAGE_INPUT, as_strings, find_signature
from tl_keras.serving.json_tensors import (
    format_classes,
    format_predictions,
    parse_examples,
    parse_json,
    parse_predict,
)
from tl_keras.serving.metrics import CONTENT_TYPE, PATH, Metrics
from tl_keras.serving.models import Models, Version

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
_TOO_LARGE, _GONE = 413, 499
_LARGE_BYTES = 1 << 20  # of a body: JSON of that size takes milliseconds
_ZLIB_GZIP = 31  # wbits: with gzip's header


def build_app(models: Models, metrics: Metrics, limits: calls.Limits, budget: calls.Budget) -> Starlette:
    """The ASGI application.

    Args:
        models: what is served.
        metrics: counts requests.
        limits: what one request may cost.
        budget: what all may hold.
    """
    api = _Api(models, metrics, limits, budget)
    return Starlette(
        routes=[
            Route("/", _show_page, methods=["GET"]),
            Route("/healthz", api.tell_health, methods=["GET"]),
            Route("/models", api.list_models, methods=["GET"]),
            Route(PATH, api.show_metrics, methods=["GET"]),
            Route("/{path:path}", api.answer, methods=_METHODS),
        ]
    )


@dataclasses.dataclass(frozen=True)
class _Call:
    """A request whose body is there."""

    served: calls.Served
    request: Request
    body: bytes
    limits: calls.Limits
    deadline: float

    async def work(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs what takes long for a large body in a thread: the event loop has others to serve."""
        if len(self.body) < _LARGE_BYTES:
            return function(*arguments)
        return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


class _Held:
    """What one request holds of the budget."""

    def __init__(self, budget: calls.Budget) -> None:
        self._budget, self._size = budget, 0

    def take(self, size: int) -> None:
        """Takes more."""
        self._budget.take(size)
        self._size += size

    def give_back(self) -> None:
        """Gives all of it back."""
        self._budget.give_back(self._size)
        self._size = 0


class _TooLargeError(Exception):
    """A body above the limit."""


class _Api:
    """TF Serving's addresses."""

    def __init__(self, models: Models, metrics: Metrics, limits: calls.Limits, budget: calls.Budget) -> None:
        self._models, self._metrics, self._limits, self._budget = models, metrics, limits, budget

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
        except RecursionError:
            return _fail(400, "JSON Parse error: nested too deeply")
        except Exception as error:  # a fault of ours is no reason to answer in another format
            return _fail(500, f"internal error: {type(error).__name__}: {error}")
        return _fail(400, f"Malformed request: {request.method} {path}")

    async def tell_health(self, _: Request) -> Response:
        """Whether every model has a version that answers."""
        missing = [name for name in self._models.names if not self._models.is_available(name)]
        return Response(f"no version of {', '.join(missing)}\n" if missing else "ok\n", 503 if missing else 200)

    async def list_models(self, request: Request) -> Response:
        """What the page shows: TF Serving has no such list."""
        del request
        found = []
        for name in self._models.names:
            versions, labels = list[Version](), list[str]()
            with contextlib.suppress(RequestError):
                versions = self._models.find_all(name)
                with self._models.use(name) as (_, served):
                    labels = list(served.labels)
            states = [{"version": one.number, "state": one.state, "error": one.error} for one in versions]
            found.append({"name": name, "labels": labels, "versions": states})
        return _json({"models": found, "limits": {"request_bytes": self._limits.request_bytes}})

    async def show_metrics(self, _: Request) -> Response:
        """Prometheus's text format."""
        return Response(self._metrics.page(), media_type=CONTENT_TYPE)

    async def _post(self, request: Request, model: str, version: str, label: str, verb: str) -> Response:
        start, name, code = time.perf_counter(), _decode(model), grpc.StatusCode.INTERNAL.name
        deadline, held = self._limits.deadline(), _Held(self._budget)
        try:
            body = await _read_body(request, self._limits, held)
            with self._models.use(name, number=_number(version), label=_decode(label)) as (_, served):
                call = _Call(served, request, body, self._limits, deadline)
                answer = await _answer_unless_gone(request, _VERBS[verb.lower()](call))
            code = "OK"
            return Response(answer, media_type="application/json", headers=_CORS)
        except _TooLargeError as error:
            code = grpc.StatusCode.RESOURCE_EXHAUSTED.name
            return _fail(_TOO_LARGE, str(error))
        except ClientDisconnect:
            code = grpc.StatusCode.CANCELLED.name
            return Response(status_code=_GONE)
        except RequestError as error:
            code = error.code.name
            raise
        finally:
            held.give_back()
            api = verb.capitalize()
            self._metrics.count(name, api=api, entrypoint="REST", status=code, seconds=time.perf_counter() - start)

    def _get(self, model: str | None, version: str, label: str, metadata: str) -> Response:
        if not model:
            raise invalid("Missing model name in request.")
        name, number, label = _decode(model), _number(version), _decode(label)
        if not metadata:
            status = calls.describe_status(self._models, name, number=number, label=label)
            return _json(_as_dict(status, preserving_proto_field_name=False))
        with self._models.use(name, number=number, label=label) as (version_found, served):
            response = calls.describe_metadata(version_found, served)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata[calls.METADATA_FIELD].Unpack(signatures)
        return _json({
            "model_spec": _as_dict(response.model_spec),
            "metadata": {calls.METADATA_FIELD: _as_dict(signatures)},
        })


async def _predict(call: _Call) -> bytes:
    if call.request.headers.get("content-type", "").lower().startswith("image/"):
        name, inputs, by_row = DEFAULT_SIGNATURE, {IMAGE_INPUT: as_strings([call.body])}, True
    else:
        document = await call.work(parse_json, call.body)
        name = document.get("signature_name", "")
        signature = find_signature(call.served.graph, name)[1]
        inputs, by_row = await call.work(parse_predict, document, signature)
    outputs = await calls.predict(call.served, name, inputs, limits=call.limits, deadline=call.deadline)
    return bytes(await call.work(functools.partial(format_predictions, outputs, by_row=by_row)))


async def _classify(call: _Call) -> bytes:
    document = await call.work(parse_json, call.body)
    examples, context = await call.work(parse_examples, document)
    call.limits.check_rows(len(examples))
    call.limits.check_bytes(len(context) * len(examples))
    merged = [example + context for example in examples]
    name = document.get("signature_name", "")
    return format_classes(*await calls.classify(call.served, name, merged, limits=call.limits, deadline=call.deadline))


async def _regress(call: _Call) -> bytes:
    document = await call.work(parse_json, call.body)
    await call.work(parse_examples, document)
    await calls.regress(call.served, document.get("signature_name", ""))
    return b""


_VERBS: dict[str, Callable[[_Call], Coroutine[Any, Any, bytes]]] = {
    "predict": _predict,
    "classify": _classify,
    "regress": _regress,
}


async def _answer_unless_gone(request: Request, work: Coroutine[Any, Any, bytes]) -> bytes:
    """The answer, unless the client hangs up first: then nothing more is done for it.

    Raises:
        ClientDisconnect: it did.
    """
    answering, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_wait_until_gone(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientDisconnect
        return answering.result()
    finally:
        answering.cancel()
        leaving.cancel()


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read_body(request: Request, limits: calls.Limits, held: _Held) -> bytes:
    """The body, if it is not too large and comes in time; one that was sent by gzip as it was before.

    Raises:
        _TooLargeError: it is.
        RequestError: it does not.
    """
    declared = request.headers.get("content-length", "")
    message = f"the request's body is larger than this server takes ({limits.request_bytes} bytes)"
    if declared.isdecimal() and (
        len(declared) > len(str(limits.request_bytes)) or int(declared) > limits.request_bytes
    ):
        raise _TooLargeError(message)

    async def read() -> bytes:
        chunks, size = list[bytes](), 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limits.request_bytes:
                raise _TooLargeError(message)
            held.take(len(chunk))
            chunks.append(chunk)
        return b"".join(chunks)

    try:
        body = await asyncio.wait_for(read(), limits.seconds)
    except asyncio.TimeoutError as error:
        raise RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, "the request's body did not come in time") from error
    if request.headers.get("content-encoding", "").lower() != "gzip":
        return body
    inflate = zlib.decompressobj(_ZLIB_GZIP)
    try:
        inflated = inflate.decompress(body, limits.request_bytes)
    except zlib.error as error:
        raise invalid(f"Failed to uncompress the gzipped body: {error}") from error
    if inflate.unconsumed_tail:
        raise _TooLargeError(message)
    held.take(len(inflated))
    return inflated


async def _show_page(_: Request) -> Response:
    page = importlib.resources.files("tl_keras.serving").joinpath("page.html").read_bytes()
    return Response(page, media_type="text/html", headers={"Content-Security-Policy": _PAGE_POLICY})


def _decode(part: str | None) -> str:
    return urllib.parse.unquote(part or "")


def _number(version: str | None) -> int | None:
    if not version:
        return None
    if len(version) > len(str(_LARGEST_VERSION)) or int(version) > _LARGEST_VERSION:
        raise invalid(f"Failed to convert version: {version[:40]} to numeric.")
    return int(version)


def _as_dict(message: Any, *, preserving_proto_field_name: bool = True) -> dict[str, Any]:
    fields: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=preserving_proto_field_name, always_print_fields_with_no_presence=True
    )
    return fields


def _json(value: Any) -> Response:
    return Response(json.dumps(value, indent=1, ensure_ascii=False), media_type="application/json", headers=_CORS)


def _fail(status: int, message: str) -> Response:
    """An error in TF Serving's format; who sends a body that is not read is hung up on."""
    headers = _CORS | ({"Connection": "close"} if status in {_TOO_LARGE, 404} else {})
    return Response(json.dumps({"error": message}), status, media_type="application/json", headers=headers)
