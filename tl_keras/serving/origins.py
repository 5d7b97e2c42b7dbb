"""Which web pages may talk to the server: none but its own, unless others are allowed."""

from __future__ import annotations

import ipaddress
import json
import urllib.parse
from collections.abc import MutableMapping, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ANY = "*"
_METHODS, _HEADERS = "POST, GET", "Content-Type"  # http_rest_api_util.cc, AddCORSHeaders
_FROM_ELSEWHERE = {"cross-site", "same-site"}  # values of Sec-Fetch-Site, which browsers send and pages can't set
_SAFE = {"GET", "HEAD", "OPTIONS"}  # what a page asks for by them it can't read


class OriginCheck:
    """An ASGI application that answers only those who may ask another one.

    A web page can send requests to a server on the reader's machine: by its address, whose answers the browser keeps
    from the page, or by a name of its own that it lets point there (DNS rebinding), whose answers it would read.
    """

    def __init__(self, app: ASGIApp, *, host: str, allowed: Sequence[str]) -> None:
        """Args: app: what is asked; host: where the server listens; allowed: origins of pages that may ask, or `*`."""
        self._app, self._allowed = app, set(allowed)
        self._names = {host.lower(), *(urllib.parse.urlsplit(origin).hostname for origin in allowed)}
        self._checks_host = is_loopback(host) and ANY not in self._allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        reason = self._find_reason(scope["method"], headers)
        if reason:
            content = json.dumps({"error": reason})
            refusal = Response(content, 403, media_type="application/json", headers={"Connection": "close"})
            await refusal(scope, receive, send)
            return
        granted = self._grant(headers.get("origin", ""))
        if granted and scope["method"] == "OPTIONS":
            await Response(status_code=200, headers=granted)(scope, receive, send)
            return

        async def send_granted(message: Message) -> None:
            if message["type"] == "http.response.start":
                _add(message, granted)
            await send(message)

        await self._app(scope, receive, send_granted if granted else send)

    def _find_reason(self, method: str, headers: Headers) -> str:
        """Why a request is refused; empty where it is not."""
        for host in headers.getlist("host") if self._checks_host else ():
            name = _read_host(host)
            # no page on the internet has a name without a dot, which containers have
            if "." in name and name not in self._names and not is_loopback(name):
                return (
                    f"this server listens on this machine only and does not answer to the Host {host[:100]}. Use "
                    "localhost, or start it with --cors=ORIGIN, or with another --host"
                )
        origin = headers.get("origin", "")
        if method in _SAFE or headers.get("sec-fetch-site", "") not in _FROM_ELSEWHERE or self._grant(origin):
            return ""
        return f"web pages of {origin[:100] or 'another site'} may not ask this server. Start it with --cors=ORIGIN"

    def _grant(self, origin: str) -> dict[str, str]:
        """The headers by which a browser lets a page read the answer; none where it may not."""
        if not origin or not {ANY, origin} & self._allowed:
            return {}
        found = {"Access-Control-Allow-Methods": _METHODS, "Access-Control-Allow-Headers": _HEADERS}
        if ANY in self._allowed:
            return {"Access-Control-Allow-Origin": ANY, **found}
        return {"Access-Control-Allow-Origin": origin, **found, "Vary": "Origin"}


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own, which no other can reach."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_host(header: str) -> str:
    """The name in a Host header, without its port."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].rstrip(".")


def _add(message: MutableMapping[str, Any], headers: dict[str, str]) -> None:
    MutableHeaders(scope=message).update(headers)
