"""Who may ask: without a server."""

from __future__ import annotations

import asyncio

import pytest

from tl_keras.serving.origins import OriginCheck, is_loopback

PAGE = "https://photos.example"


def ask(host: str = "127.0.0.1", cors: tuple[str, ...] = (), method: str = "GET", **headers: str):
    """Status and headers of the answer."""

    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 299, "headers": [(b"x", b"y")]})
        await send({"type": "http.response.body", "body": b""})

    sent = []

    async def send(message) -> None:
        sent.append(message)

    async def receive() -> dict:
        return {"type": "http.request", "body": b"", "more_body": False}

    raw = [(name.replace("_", "-").lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": "/", "headers": raw, "query_string": b""}
    asyncio.run(OriginCheck(app, host=host, allowed=cors)(scope, receive, send))
    return sent[0]["status"], {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}


@pytest.mark.parametrize(
    ("host", "cors", "name", "status"),
    [
        ("127.0.0.1", (), "evil.example", 403),
        ("localhost", (), "evil.example:80", 403),
        ("::1", (), "evil.example", 403),
        ("127.0.0.1", (), "127.0.0.1.evil.example", 403),
        ("127.0.0.1", (), "localhost.evil.example", 403),
        ("127.0.0.1", (), "8.8.8.8", 403),
        ("127.0.0.1", (PAGE,), "evil.example", 403),
        ("127.0.0.1", (PAGE,), "photos.example", 299),
        ("127.0.0.1", ("*",), "evil.example", 299),
        ("0.0.0.0", (), "evil.example", 299),
        ("127.0.0.1", (), "localhost:8501", 299),
        ("127.0.0.1", (), "localhost.", 299),
        ("127.0.0.1", (), "[::1]:8501", 299),
        ("127.0.0.1", (), "container:8501", 299),
    ],
)
def test_hosts(host, cors, name, status):
    assert ask(host, cors, Host=name)[0] == status


def test_a_request_without_a_host_is_answered():
    assert ask()[0] == 299


def test_cors_is_off():
    for method in ("GET", "POST", "OPTIONS"):
        status, headers = ask(method=method, Origin=PAGE)
        assert (status, headers) == (299, {"x": "y"})


@pytest.mark.parametrize(("cors", "granted"), [(("*",), "*"), ((PAGE, "https://other.example"), PAGE)])
def test_allowed_pages_may_ask(cors, granted):
    for method, expected in (("GET", 299), ("POST", 299), ("OPTIONS", 200)):
        status, headers = ask("127.0.0.1", cors, method, Origin=PAGE, Sec_Fetch_Site="cross-site")
        assert status == expected
        assert headers["access-control-allow-origin"] == granted
        assert headers["access-control-allow-methods"] == "POST, GET"
        assert headers["access-control-allow-headers"] == "Content-Type"
        assert (headers.get("vary") == "Origin") == (granted != "*")
    assert ask("127.0.0.1", cors, "OPTIONS")[0] == 299  # no page asks


def test_other_pages_may_not_post():
    assert ask("0.0.0.0", (PAGE,), "POST", Origin="https://evil.example", Sec_Fetch_Site="cross-site")[0] == 403
    assert ask("0.0.0.0", (), "POST", Origin="null", Sec_Fetch_Site="cross-site")[0] == 403
    assert ask("0.0.0.0", (), "POST", Sec_Fetch_Site="same-origin")[0] == 299
    assert ask("0.0.0.0", (), "GET", Origin="https://evil.example", Sec_Fetch_Site="cross-site")[0] == 299


def test_loopback():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.9.9.9", "::1", "a.localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "example.org", "localhost.example", "")))
