"""Clients that take their time."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest
import uvicorn

from tl_keras.serving import protocol

LARGE = 50_000_000


async def answer_largely(scope, receive, send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % LARGE)]})
    await send({"type": "http.response.body", "body": bytes(LARGE)})


async def ask(read) -> int:
    """What `read` gives, in a thread, of a connection that has asked."""
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(answer_largely, http=protocol.BoundedProtocol, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        return await asyncio.get_running_loop().run_in_executor(None, read, listening.getsockname())
    finally:
        server.should_exit = True
        await serving


def read_after(seconds: float):
    def read(address) -> int:
        with socket.create_connection(address, timeout=20) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            time.sleep(seconds)
            found = 0
            while found < LARGE and (part := client.recv(1 << 20)):
                found += len(part)
            return found

    return read


def test_who_does_not_read_the_answer_is_hung_up_on(monkeypatch):
    monkeypatch.setattr(protocol, "_STALL_SECONDS", 0.3)
    try:
        found = asyncio.run(ask(read_after(1.5)))
    except ConnectionResetError:
        found = 0
    assert found < LARGE


@pytest.mark.parametrize("seconds", [0, 0.3])
def test_who_reads_late_gets_all_of_it(seconds, monkeypatch):
    monkeypatch.setattr(protocol, "_STALL_SECONDS", 5.0)
    assert asyncio.run(ask(read_after(seconds))) >= LARGE
