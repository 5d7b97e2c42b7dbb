"""HTTP with limits: uvicorn with httptools accepts any number of headers, and has no timeout for slow clients."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_HEAD_BYTES = 64 << 10
_HEAD_SECONDS = 30.0
_STALL_SECONDS = 30.0  # maximum time in which a client reads nothing of its answer


class BoundedProtocol(HttpToolsProtocol):
    """Closes connections of clients that send headers too slowly, send too many, or do not read the answer."""

    _head_bytes = 0
    _in_head = True
    _timer: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client has connected; the timeout of its first request starts."""
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has disconnected."""
        self._end_head()
        self._end_stall()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client reads more slowly than the server writes."""
        super().pause_writing()
        self._end_stall()
        self._stalled = self.loop.call_later(_STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        self._end_stall()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Counts the bytes of headers; it parses first, because the data may contain the end of the headers."""
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > _HEAD_BYTES:
                self.transport.close()

    def on_message_begin(self) -> None:
        """The first byte of the next request has arrived."""
        super().on_message_begin()
        self._begin_head()

    def on_headers_complete(self) -> None:
        """The headers are complete."""
        self._end_head()
        super().on_headers_complete()

    def _begin_head(self) -> None:
        self._end_head()
        self._in_head, self._head_bytes = True, 0
        self._timer = self.loop.call_later(_HEAD_SECONDS, self._give_up)

    def _end_head(self) -> None:
        self._in_head = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end_stall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _give_up(self) -> None:
        if self._in_head and not self.transport.is_closing():
            self.transport.close()
