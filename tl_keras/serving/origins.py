"""Decides which web pages may use the server: only its own, unless others are allowed."""

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
_FROM_ELSEWHERE = {"cross-site", "same-site"}  # values of Sec-Fetch-Site, a header that web pages cannot set
_SAFE = {"GET", "HEAD", "OPTIONS"}  # other pages cannot read the answers


class OriginCheck:
    """ASGI middleware that rejects requests of other web pages.

    A web page can send requests to a server on the visitor's own machine. If it uses the address, the browser hides
    the answers from the page. If it points its own domain at the address (DNS rebinding), it could read them.
    """

    def __init__(self, app: ASGIApp, *, host: str, allowed: Sequence[str]) -> None:
        """Args: app: application to protect; host: address of the server; allowed: origins of pages, or `*`."""
        self._app, self._allowed = app, set(allowed)
        self._names = {host.lower(), *(urllib.parse.urlsplit(origin).hostname for origin in allowed)}
        self._checks_host = is_loopback(host) and ANY not in self._allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
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
        """Returns the reason for rejecting a request; empty if it is accepted."""
        for host in headers.getlist("host") if self._checks_host else ():
            name = _read_host(host)
            # names without a dot belong to containers, not to pages on the internet
            if "." in name and name not in self._names and not is_loopback(name):
                return (
                    f"this server is for this machine only and does not answer to the Host {host[:100]}. Use "
                    "localhost, or start the server with --cors=ORIGIN or another --host"
                )
        origin = headers.get("origin", "")
        if method in _SAFE or headers.get("sec-fetch-site", "") not in _FROM_ELSEWHERE or self._grant(origin):
            return ""
        return f"web pages of {origin[:100] or 'another site'} may not use this server. Start it with --cors=ORIGIN"

    def _grant(self, origin: str) -> dict[str, str]:
        """Returns the headers that allow a page to read the answer; empty if it is not allowed."""
        if not origin or not {ANY, origin} & self._allowed:
            return {}
        found = {"Access-Control-Allow-Methods": _METHODS, "Access-Control-Allow-Headers": _HEADERS}
        if ANY in self._allowed:
            return {"Access-Control-Allow-Origin": ANY, **found}
        return {"Access-Control-Allow-Origin": origin, **found, "Vary": "Origin"}


def is_loopback(host: str) -> bool:
    """Whether a name or address is on the loopback interface."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_host(header: str) -> str:
    """Returns the name in a Host header, without the port."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].rstrip(".")


def _add(message: MutableMapping[str, Any], headers: dict[str, str]) -> None:
    MutableHeaders(scope=message).update(headers)
