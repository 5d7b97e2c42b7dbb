"""Limits for gRPC calls: number, message size, number of fields, and time to arrive."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.message import DecodeError

from tl_keras.serving import calls
from tl_keras.serving.errors import RequestError, clear_tracebacks, expired, hide_folders, invalid
from tl_keras.serving.workers import Workers

MOST_RPCS = 4096  # open calls, including those whose message has not arrived and that need almost no memory
_MOST_CALLS = 512  # calls whose message has arrived
_MOST_STREAMS = 256
_STREAM_SECONDS = 60.0  # older streams are closed if there are too many
_MOST_FIELDS, _FIELDS_PER_IMAGE = 1 << 16, 16  # limit for one message; even an empty string needs memory
_UNCHECKED_BYTES = 1 << 16
_PACKED_BYTES = 16  # this many bytes of packed integers count as one field: they expand up to eight times
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


class Gate:
    """Registers services so that messages are read within the limits and parsed beside the event loop."""

    def __init__(self, limits: calls.Limits, budget: calls.Budget, workers: Workers) -> None:
        """Args: limits: for one call; budget: shared by all calls; workers: parse messages."""
        self._limits, self._budget, self._workers = limits, budget, workers
        self._open = 0

    def add(self, server: grpc.aio.Server, service: Any, servicer: Any) -> None:
        """Adds a service.

        Args:
            server: the gRPC server.
            service: descriptor of the service, whose methods are all unary.
            servicer: has a coroutine `method(request, context)` for each method.
        """
        handlers = {}
        for method in service.methods:
            # a stream of one message looks the same on the wire, and lets us control how the message is read
            answer = self._make_handler(getattr(servicer, method.name), method.input_type)
            handlers[method.name] = grpc.stream_unary_rpc_method_handler(answer)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))

    def _make_handler(
        self, method: Callable[[Any, Any], Awaitable[Any]], kind: Any
    ) -> Callable[[Any, Any], Awaitable[bytes]]:
        most = max(_MOST_FIELDS, _FIELDS_PER_IMAGE * self._limits.images)

        async def work(context: Any) -> bytes:
            content = await self._read(context)
            with self._hold(len(content)):
                request = await self._workers.run(len(content), parse_message, content, kind, most=most)
                response = await method(request, context)
                return await self._workers.run(response.ByteSize(), response.SerializeToString)

        async def answer(requests: Any, context: Any) -> bytes:
            del requests
            try:
                return await work(context)
            except RequestError as error:
                clear_tracebacks(error)
                failure = error
            except Exception as error:
                clear_tracebacks(error)
                message = f"internal error: {type(error).__name__}: {hide_folders(str(error))}"
                failure = RequestError(grpc.StatusCode.INTERNAL, message)
            # gRPC stores the exception of `abort` in the context, with this frame: it must not hold the message
            await context.abort(failure.code, failure.message)
            raise failure

        return answer

    async def _read(self, context: Any) -> bytes:
        """Reads the message of a call.

        Raises:
            RequestError: the message does not arrive in time.
        """
        seconds = max(0.0, self._limits.deadline(context.time_remaining()) - time.monotonic())
        try:
            content = await asyncio.wait_for(context.read(), seconds)
        except TimeoutError:
            raise expired("the request's message had come") from None
        if not isinstance(content, bytes):
            raise invalid("the call has no message")
        return content

    @contextlib.contextmanager
    def _hold(self, size: int) -> Any:
        if self._open >= _MOST_CALLS:
            raise RequestError(grpc.StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!")
        self._budget.take(size)
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            self._budget.give_back(size)


class StreamLimit(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Limits calls that stay open, such as `Watch` of the health service, so that they cannot block other calls."""

    def __init__(self) -> None:
        """Creates the limit, without open streams."""
        self._streams: dict[Any, float] = {}

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Wraps handlers that return a stream."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler.response_streaming:
            return handler
        method = handler.unary_stream or handler.stream_stream

        async def write(request: Any, context: Any) -> None:
            with await self._enter(context):
                await method(request, context)

        async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
            with await self._enter(context):
                async for answer in method(request, context):
                    yield answer

        make = grpc.unary_stream_rpc_method_handler if handler.unary_stream else grpc.stream_stream_rpc_method_handler
        limited = write if inspect.iscoroutinefunction(method) else generate
        return make(limited, handler.request_deserializer, handler.response_serializer)

    async def _enter(self, context: Any) -> contextlib.AbstractContextManager[None]:
        if len(self._streams) >= _MOST_STREAMS:
            oldest = min(self._streams, key=lambda task: self._streams[task])
            if self._streams[oldest] > time.monotonic() - _STREAM_SECONDS:
                message = f"{_MOST_STREAMS} streams are open, which is as many as this server takes; try later"
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
            self._streams.pop(oldest)
            oldest.cancel()
        return self._note()

    @contextlib.contextmanager
    def _note(self) -> Any:
        task = asyncio.current_task()
        self._streams[task] = time.monotonic()
        try:
            yield
        finally:
            self._streams.pop(task, None)


def parse_message(content: bytes, kind: Any, *, most: int = _MOST_FIELDS) -> Any:
    """Parses a message.

    Args:
        content: the serialized message.
        kind: descriptor of its type.
        most: maximum number of fields.

    Raises:
        RequestError: the message is invalid, or has too many fields.
    """
    if len(content) > _UNCHECKED_BYTES:
        _check_fields(content, kind, most)
    try:
        return message_factory.GetMessageClass(kind).FromString(content)
    except DecodeError as error:
        raise RequestError(grpc.StatusCode.INTERNAL, f"the message is no {kind.full_name}: {error}") from None


def _check_fields(content: bytes, kind: Any, most: int) -> None:
    """Counts the fields of a message and of nested messages without parsing it.

    Raises:
        RequestError: there are too many fields.
    """
    left = most
    waiting: list[tuple[int, int, Any]] = [(0, len(content), kind)]
    while waiting:
        position, end, kind = waiting.pop()
        while position < end:
            tag, position = _read_varint(content, position)
            wire, field, cost = tag & 7, kind.fields_by_number.get(tag >> 3), 1
            if wire == _BYTES:
                length, position = _read_varint(content, position)
                if field is not None and field.message_type is not None:
                    waiting.append((position, min(position + length, end), field.message_type))
                elif field is not None and field.cpp_type in {field.CPPTYPE_INT32, field.CPPTYPE_INT64}:
                    cost += length // _PACKED_BYTES
                position += length
            elif wire == _VARINT:
                _, position = _read_varint(content, position)
            else:
                position += {_FIXED64: 8, _FIXED32: 4}.get(wire, 0)
            left -= cost
            if left < 0:
                raise invalid(f"the message has more than {most} fields; send tensors as tensor_content")


def _read_varint(content: bytes, position: int) -> tuple[int, int]:
    """Reads a number and its end. A truncated number counts as 0; the parser will reject it."""
    value = shift = 0
    while position < len(content) and shift < 70:
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    return 0, max(position, len(content))
