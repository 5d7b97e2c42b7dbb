"""The REST API of TF Serving (https://www.tensorflow.org/tfx/serving/api_rest), plus raw images and a web page."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.resources
import json
import re
import time
import urllib.parse
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import grpc
from google.protobuf import json_format
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from tensorflow_serving.apis import get_model_metadata_pb2

from tl_keras.serving import calls
from tl_keras.serving.bodies import Held, TooLargeError, read_body
from tl_keras.serving.errors import RequestError, clear_tracebacks, expired, hide_folders, invalid
from tl_keras.serving.graphs import DEFAULT_SIGNATURE, IMAGE_INPUT, as_strings, find_signature
from tl_keras.serving.json_answers import format_classes, format_predictions
from tl_keras.serving.json_examples import parse_examples
from tl_keras.serving.json_tensors import Document, parse_json, parse_predict
from tl_keras.serving.metrics import CONTENT_TYPE, PATH, Metrics
from tl_keras.serving.models import Models, Version
from tl_keras.serving.origins import OriginCheck
from tl_keras.serving.workers import Workers

# as TF Serving matches them, in http_rest_api_util.cc
_PREDICTION = re.compile(
    r"/v1/models/([^/:]+)(?:(?:/versions/(\d+))|(?:/labels/([^/:]+)))?:(classify|regress|predict)", re.IGNORECASE
)
_STATUS = re.compile(
    r"/v1/models(?:/([^/:]+))?(?:(?:/versions/(\d+))|(?:/labels/([^/:]+)))?(?:/(metadata))?", re.IGNORECASE
)
_LARGEST_VERSION = 2**63 - 1
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src blob: data:; connect-src 'self'"
)
_TOO_LARGE, _GONE = 413, 499
_GRACE_SECONDS = 0.5  # after the deadline, so that the step in progress can report it first
_WRITTEN_BYTES = 16  # approximate size of one value in an answer


def build_app(
    models: Models,
    metrics: Metrics,
    limits: calls.Limits,
    budget: calls.Budget,
    *,
    workers: Workers,
    host: str,
    cors: Sequence[str] = (),
) -> OriginCheck:
    """The ASGI application.

    Args:
        models: served models.
        metrics: counts requests.
        limits: limits of a request.
        budget: memory budget of all requests.
        workers: threads that parse requests and format answers.
        host: address that the server listens on.
        cors: origins of other web pages that may use the server.
    """
    api = _Api(models, metrics, limits, budget, workers)
    app = Starlette(
        routes=[
            Route("/", _show_page, methods=["GET"]),
            Route("/healthz", api.tell_health, methods=["GET"]),
            Route("/livez", api.tell_life, methods=["GET"]),
            Route("/models", api.list_models, methods=["GET"]),
            Route(PATH, api.show_metrics, methods=["GET"]),
        ]
    )
    app.router.default = api.answer_any  # a route pattern would not match line breaks
    return OriginCheck(app, host=host, allowed=cors)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A request with its complete body."""

    served: calls.Served
    request: Request
    body: bytes
    limits: calls.Limits
    deadline: float
    workers: Workers

    async def read(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Runs a function on the body, beside the event loop if the body is large."""
        return await self.workers.run(len(self.body), function, *arguments, **named)

    async def read_document(self) -> Document:
        """Reads the JSON object in the body.

        Raises:
            RequestError: the body is not a JSON object.
        """
        try:
            document: Document = await self.read(parse_json, self.body)
        except RequestError as error:
            if "multipart/" not in self.request.headers.get("content-type", "").lower():
                raise
            raise invalid(
                "JSON Parse error: the body is a multipart form. Send the image itself as the body with Content-Type: "
                'image/jpeg (curl --data-binary @photo.jpg), or JSON: {"instances": [{"b64": "..."}]}'
            ) from error
        return document


class _Api:
    """Handles the URLs of TF Serving."""

    def __init__(
        self, models: Models, metrics: Metrics, limits: calls.Limits, budget: calls.Budget, workers: Workers
    ) -> None:
        self._models, self._metrics, self._limits, self._budget = models, metrics, limits, budget
        self._workers = workers

    async def answer_any(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles all other URLs."""
        if scope["type"] == "http":
            response = await self.answer(Request(scope, receive, send))
            await response(scope, receive, send)

    async def answer(self, request: Request) -> Response:
        """Handles any URL under /v1/."""
        path = request.scope.get("raw_path", request.url.path.encode()).decode("latin-1")
        if not path.lower().startswith("/v1/"):
            return _fail(404, f"nothing is here: {path}. The API is under /v1/models/NAME, a page for people under /")
        try:
            if request.method == "POST" and (match := _PREDICTION.fullmatch(path)):
                return await self._post(request, *match.groups())
            if request.method == "GET" and (match := _STATUS.fullmatch(path)):
                return self._get(*match.groups())
        except RequestError as error:
            clear_tracebacks(error)
            return _fail(error.http_status, error.message)
        except Exception as error:  # a bug must not change the format of the answer
            clear_tracebacks(error)
            return _fail(500, f"internal error: {type(error).__name__}: {hide_folders(str(error))}")
        return _fail(400, f"Malformed request: {request.method} {path}")

    async def tell_health(self, _: Request) -> Response:
        """Readiness: whether every model has a loaded version."""
        reason = self._models.find_missing()
        return Response(f"{reason or 'ok'}\n", 503 if reason else 200)

    async def tell_life(self, _: Request) -> Response:
        """Liveness: the process answers, even if no model is loaded."""
        return Response("ok\n")

    async def list_models(self, request: Request) -> Response:
        """Lists the models for the page; TF Serving has no such list."""
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
        """Returns the metrics in the text format of Prometheus."""
        return Response(self._metrics.page(), media_type=CONTENT_TYPE)

    async def _post(self, request: Request, model: str, version: str, label: str, verb: str) -> Response:
        start, name, code = time.perf_counter(), _decode(model), grpc.StatusCode.INTERNAL.name
        deadline, held = self._limits.deadline(), Held(self._budget)
        try:
            body = await read_body(request, self._limits, held, self._workers, deadline)
            with self._models.use(name, number=_number(version), label=_decode(label)) as (_, served):
                call = _Call(served, request, body, self._limits, deadline, self._workers)
                answer = await _answer_unless_gone(request, _VERBS[verb.lower()](call), deadline)
            code = "OK"
            return Response(answer, media_type="application/json")
        except TooLargeError as error:
            clear_tracebacks(error)
            code = grpc.StatusCode.RESOURCE_EXHAUSTED.name
            return _fail(_TOO_LARGE, str(error))
        except ClientDisconnect as error:
            clear_tracebacks(error)
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
        document = await call.read_document()
        name = document.signature_name
        signature = find_signature(call.served.graph, name)[1]
        inputs, by_row = await call.read(
            parse_predict, document, signature, most_rows=call.limits.images, deadline=call.deadline
        )
    outputs = await calls.predict(call.served, name, inputs, limits=call.limits, deadline=call.deadline)
    size = max(len(call.body), _WRITTEN_BYTES * sum(array.size for array in outputs.values()))
    return await call.workers.run(size, format_predictions, outputs, by_row=by_row, deadline=call.deadline)


async def _classify(call: _Call) -> bytes:
    document = await call.read_document()
    examples, context = await call.read(parse_examples, document, most_rows=call.limits.images, deadline=call.deadline)
    call.limits.check_bytes(len(context) * len(examples))
    name = document.signature_name
    merged = calls.merge(context, examples)
    return format_classes(*await calls.classify(call.served, name, merged, limits=call.limits, deadline=call.deadline))


async def _regress(call: _Call) -> bytes:
    document = await call.read_document()
    await call.read(parse_examples, document, most_rows=call.limits.images, deadline=call.deadline)
    await calls.regress(call.served, document.signature_name)
    return b""


_VERBS: dict[str, Callable[[_Call], Coroutine[Any, Any, bytes]]] = {
    "predict": _predict,
    "classify": _classify,
    "regress": _regress,
}


async def _answer_unless_gone(request: Request, work: Coroutine[Any, Any, bytes], deadline: float) -> bytes:
    """Waits for the answer; stops the work if the client disconnects or the deadline passes.

    Raises:
        ClientDisconnect: the client disconnected.
        RequestError: the deadline passed, or the request cannot be answered.
    """
    answering, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_wait_until_gone(request))
    done = set[Any]()
    try:
        seconds = max(0.0, deadline - time.monotonic()) + _GRACE_SECONDS
        done, _ = await asyncio.wait({answering, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise expired("the request was answered")
        if not answering.done():
            raise ClientDisconnect
        return answering.result()
    finally:
        answering.cancel()
        leaving.cancel()
        # breaks the reference cycle of task, error, traceback and frame, which would keep the body in memory
        del answering, leaving, done


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


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
    return Response(json.dumps(value, indent=1, ensure_ascii=False), media_type="application/json")


def _fail(status: int, message: str) -> Response:
    """Makes an error in the format of TF Serving; closes the connection if the body was not read."""
    headers = {"Connection": "close"} if status == _TOO_LARGE else {}
    return Response(json.dumps({"error": message}), status, media_type="application/json", headers=headers)
