"""What gRPC calls may cost before they are worked on: how many, how large, of how many fields, in what time."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from tl_keras.serving import calls
from tl_keras.serving.errors import RequestError, expired, forget, invalid
from tl_keras.serving.workers import Workers

MOST_RPCS = 4096  # at once, those whose message is still on its way among them: such a one holds next to nothing
_MOST_CALLS = 512  # whose message is there
_MOST_STREAMS = 256
_STREAM_SECONDS = 60.0  # older streams make way where there are too many
_MOST_FIELDS = 1 << 16  # of a message: each becomes an object, an empty string too
_UNCHECKED_BYTES = 1 << 16
_PACKED_BYTES = 16  # of packed integers count as one field: they take up to eight times as much memory
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


class Gate:
    """Registers a service's methods so that messages are read within the limits, and parsed beside the event loop."""

    def __init__(self, limits: calls.Limits, budget: calls.Budget, workers: Workers) -> None:
        """Args: limits: what one call may cost; budget: what all may hold; workers: parse messages."""
        self._limits, self._budget, self._workers = limits, budget, workers
        self._open = 0

    def add(self, server: grpc.aio.Server, service: Any, servicer: Any) -> None:
        """Adds a service.

        Args:
            server: gRPC's.
            service: its descriptor; all methods take one message and give one.
            servicer: has a coroutine `method(request, context)` for each.
        """
        handlers = {}
        for method in service.methods:
            # a stream of one message is the same on the wire, and leaves it to us when and how it is read
            answer = self._make_handler(getattr(servicer, method.name), method.input_type)
            handlers[method.name] = grpc.stream_unary_rpc_method_handler(answer)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))

    def _make_handler(
        self, method: Callable[[Any, Any], Awaitable[Any]], kind: Any
    ) -> Callable[[Any, Any], Awaitable[bytes]]:
        async def work(context: Any) -> bytes:
            content = await self._read(context)
            with self._hold(len(content)):
                request = await self._workers.run(len(content), parse_message, content, kind)
                response = await method(request, context)
                return await self._workers.run(response.ByteSize(), response.SerializeToString)

        async def answer(requests: Any, context: Any) -> bytes:
            del requests
            try:
                return await work(context)
            except RequestError as error:
                forget(error)
                failure = error
            # gRPC keeps what `abort` raises in the context: this frame stays, so no message may be in it
            await context.abort(failure.code, failure.message)
            raise failure

        return answer

    async def _read(self, context: Any) -> bytes:
        """A call's message.

        Raises:
            RequestError: it does not come, or not in time.
        """
        seconds = max(0.0, self._limits.deadline(context.time_remaining()) - time.monotonic())
        try:
            content = await asyncio.wait_for(context.read(), seconds)
        except asyncio.TimeoutError:
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
    """Bounds the calls that stay open, as health's `Watch` does: they would take the places of all others."""

    def __init__(self) -> None:
        """Starts without a stream."""
        self._streams: dict[Any, float] = {}

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Wraps the handler of a call that gives a stream."""
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


def parse_message(content: bytes, kind: Any) -> Any:
    """A message of a type that its descriptor gives.

    Raises:
        RequestError: it is none, or has more fields than any request needs.
    """
    from google.protobuf import message_factory

    if len(content) > _UNCHECKED_BYTES:
        _check_fields(content, kind)
    try:
        return message_factory.GetMessageClass(kind).FromString(content)
    except DecodeError as error:
        raise RequestError(grpc.StatusCode.INTERNAL, f"the message is no {kind.full_name}: {error}") from None


def _check_fields(content: bytes, kind: Any) -> None:
    """Counts a message's fields, those of messages in it included, without parsing it.

    Raises:
        RequestError: there are too many.
    """
    left = _MOST_FIELDS
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
                raise invalid(f"the message has more than {_MOST_FIELDS} fields; send tensors as tensor_content")


def _read_varint(content: bytes, position: int) -> tuple[int, int]:
    """A number and where it ends; what is cut off counts as 0, and the parser will refuse it."""
    value = shift = 0
    while position < len(content) and shift < 70:
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    return 0, max(position, len(content))
