"""Bodies of REST requests: within the limits, in time, unpacked."""

from __future__ import annotations

import asyncio
import time
import zlib

import grpc
from starlette.requests import Request

from tl_keras.serving import calls
from tl_keras.serving.errors import RequestError, expired, invalid
from tl_keras.serving.workers import Workers

_ZLIB_GZIP = 31  # wbits: with gzip's header
_PART = 1 << 16  # bytes that are unpacked before the limits are looked at
_MOST_MEMBERS = 1024  # of a gzip file


class TooLargeError(Exception):
    """A body above the limit."""


class Held:
    """What one request holds of the budget."""

    def __init__(self, budget: calls.Budget) -> None:
        """Args: budget: what all may hold."""
        self._budget, self._size = budget, 0

    def take(self, size: int) -> None:
        """Takes more.

        Raises:
            RequestError: so much is not left.
        """
        self._budget.take(size, held=self._size)
        self._size += size

    def give_back(self) -> None:
        """Gives all of it back."""
        self._budget.give_back(self._size)
        self._size = 0


async def read_body(request: Request, limits: calls.Limits, held: Held, workers: Workers, deadline: float) -> bytes:
    """The body, if it is not too large and comes in time; one that was sent by gzip as it was before.

    Raises:
        TooLargeError: it is.
        RequestError: it does not, or is no gzip although it says so.
    """
    message = f"the request's body is larger than this server takes ({limits.request_bytes} bytes)"
    declared = request.headers.get("content-length", "")
    is_number = declared.isascii() and declared.isdecimal()
    if is_number and (len(declared) > len(str(limits.request_bytes)) or int(declared) > limits.request_bytes):
        raise TooLargeError(message)
    try:
        body = await asyncio.wait_for(_collect(request, limits, held, message), limits.seconds)
    except asyncio.TimeoutError:
        raise RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, "the request's body did not come in time") from None
    if "gzip" not in request.headers.get("content-encoding", "").lower():  # x-gzip too, as in TF Serving
        return body
    # a small body may stand for a large one
    unpacked = await workers.run(
        max(len(body), _PART), unpack, body, most=limits.request_bytes, message=message, deadline=deadline
    )
    held.take(len(unpacked))
    return unpacked


async def _collect(request: Request, limits: calls.Limits, held: Held, message: str) -> bytes:
    chunks, size = list[bytes](), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limits.request_bytes:
            raise TooLargeError(message)
        held.take(len(chunk))
        chunks.append(chunk)
    return b"".join(chunks)


def unpack(body: bytes, *, most: int, message: str, deadline: float) -> bytes:
    """What a gzip file holds, which may have several members (RFC 1952, section 2.2).

    Args:
        body: the file.
        most: how many bytes it may stand for.
        message: what is said of more.
        deadline: by `time.monotonic`.

    Raises:
        TooLargeError: it stands for more.
        RequestError: it is no gzip, is cut off, fails its check sum, or the deadline passed.
    """
    found, size, members, position = list[bytes](), 0, 1, 0
    inflate = zlib.decompressobj(_ZLIB_GZIP)
    waiting = b""
    while waiting or position < len(body):
        if time.monotonic() > deadline:
            raise expired("the body was unpacked")
        if not waiting:
            waiting, position = body[position : position + _PART], position + _PART
        if inflate.eof:
            waiting = waiting.lstrip(b"\0")  # padding
            if not waiting:
                continue
            members, inflate = members + 1, zlib.decompressobj(_ZLIB_GZIP)
            if members > _MOST_MEMBERS:
                raise invalid(f"Failed to uncompress the gzipped body: more than {_MOST_MEMBERS} members")
        try:
            part = inflate.decompress(waiting, _PART)
        except zlib.error as error:
            raise invalid(f"Failed to uncompress the gzipped body: {error}") from None
        waiting = inflate.unused_data if inflate.eof else inflate.unconsumed_tail
        size += len(part)
        if size > most:
            raise TooLargeError(message)
        found.append(part)
    if not inflate.eof:
        raise invalid("Failed to uncompress the gzipped body: it is cut off")
    return b"".join(found)
