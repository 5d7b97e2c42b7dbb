"""Reads and decompresses the bodies of REST requests within the limits."""

from __future__ import annotations

import asyncio
import time
import zlib

import grpc
from starlette.requests import Request

from tl_keras.serving import calls
from tl_keras.serving.errors import RequestError, expired, invalid
from tl_keras.serving.workers import LARGE_BYTES, Workers

_ZLIB_GZIP = 31  # wbits: with gzip's header
_PART = 1 << 16  # number of bytes that are decompressed between checks of the limits
_MOST_MEMBERS = 1024  # limit for one gzip file


class TooLargeError(Exception):
    """The body is larger than the limit."""


class Held:
    """The share of the budget that one request holds."""

    def __init__(self, budget: calls.Budget) -> None:
        """Args: budget: shared by all requests."""
        self._budget, self._size = budget, 0

    def take(self, size: int) -> None:
        """Takes more bytes.

        Raises:
            RequestError: not enough is left.
        """
        self._budget.take(size, held=self._size)
        self._size += size

    def give_back(self) -> None:
        """Returns everything to the budget."""
        self._budget.give_back(self._size)
        self._size = 0


async def read_body(request: Request, limits: calls.Limits, held: Held, workers: Workers, deadline: float) -> bytes:
    """Reads a body, and decompresses it if it is sent with gzip.

    Raises:
        TooLargeError: the body is larger than the limit.
        RequestError: the body does not arrive in time, or is not valid gzip.
    """
    message = f"the request's body is larger than this server takes ({limits.request_bytes} bytes)"
    declared = request.headers.get("content-length", "")
    is_number = declared.isascii() and declared.isdecimal()
    if is_number and (len(declared) > len(str(limits.request_bytes)) or int(declared) > limits.request_bytes):
        raise TooLargeError(message)
    try:
        chunks = await asyncio.wait_for(_collect(request, limits, held, message), limits.seconds)
    except TimeoutError:
        raise RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, "the request's body did not come in time") from None
    size = sum(map(len, chunks))
    # copying a large body takes a tenth of a second, but no lock; the threads for small requests are free sooner
    body = await workers.run(min(size, LARGE_BYTES - 1), b"".join, chunks)
    del chunks
    if "gzip" not in request.headers.get("content-encoding", "").lower():  # x-gzip too, as in TF Serving
        return body
    # a small body may expand to a large one
    unpacked = await workers.run(
        max(len(body), _PART), unpack, body, most=limits.request_bytes, message=message, deadline=deadline
    )
    held.take(len(unpacked))
    return unpacked


async def _collect(request: Request, limits: calls.Limits, held: Held, message: str) -> list[bytes]:
    chunks, size = list[bytes](), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limits.request_bytes:
            raise TooLargeError(message)
        held.take(len(chunk))
        chunks.append(chunk)
    return chunks


def unpack(body: bytes, *, most: int, message: str, deadline: float) -> bytes:
    """Decompresses a gzip file, which may have several members (RFC 1952, section 2.2).

    Args:
        body: the file.
        most: maximum size of the content, in bytes.
        message: error message for larger content.
        deadline: latest time, in seconds of `time.monotonic`.

    Raises:
        TooLargeError: the content is larger.
        RequestError: the file is not gzip, is truncated, has a wrong checksum, or the deadline passed.
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
        raise invalid("Failed to uncompress the gzipped body: the file is truncated")
    return b"".join(found)
