"""A server of its own process, as a user starts it, and clients of the standard library and the official protos."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Process

_ADDRESSES = re.compile(r"REST (http://\S+)/v1/models/NAME · gRPC (\S+) ")


@dataclasses.dataclass
class Server:
    """A server that runs."""

    process: Process
    rest: str
    grpc: str
    log: Path

    def ask(
        self, path: str, body: Any = None, *, method: str | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """HTTP status and JSON (or text) of an answer."""
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.rest + path, content, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                status, text = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        with contextlib.suppress(ValueError):
            return status, json.loads(text)
        return status, text.decode()

    def wait_for(self, words: str, seconds: float = 60) -> None:
        """Waits until its log says so."""
        deadline = time.monotonic() + seconds
        while words not in self.log.read_text():
            assert time.monotonic() < deadline, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)


@contextlib.contextmanager
def start_server(folder: Path, *flags: str) -> Iterator[Server]:
    log = folder / "serve.log"
    folder.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    process = Process("--mode=serve", "--port=0", "--grpc_port=0", *flags, output=log)
    server = Server(process, "", "", log)
    try:
        server.wait_for(" · page ", 120)
        server.rest, server.grpc = _ADDRESSES.search(log.read_text()).groups()
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


@pytest.fixture(scope="session")
def server(trained: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves the small model on three colours, its graph as TF Serving runs it."""
    models = trained[1].parent.parent
    flags = (f"--export_dir={models}", "--engine=tensorflow", "--precision=float32", "--max_request_images=64")
    with start_server(tmp_path_factory.mktemp("server"), *flags, "--max_request_bytes=3000000") as running:
        yield running


@pytest.fixture(scope="session")
def model(trained: tuple[Path, Path]) -> str:
    return trained[1].parent.name


@pytest.fixture(scope="session")
def photographs(colour_folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(colour_folder.glob("*/00[0-2].jpg"))]


def as_b64(content: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(content).decode()}
