"""Answers and memory of a server under valid and hostile requests; run by `benchmarks.serving --only=hostile`.

python -m benchmarks.hostile HOST:PORT MODEL PID COUNT DATA
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import http.client
import io
import json
import random
import socket
import struct
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

CLIENTS, HOSTILE_SHARE = 16, 0.05
SLOW_SECONDS, LARGE_BYTES = 2.0, 100_000_000
SAME = 1e-4  # tolerance for probabilities
JSON = {"Content-Type": "application/json"}


@dataclasses.dataclass
class Load:
    """The requests to send, and the answers received."""

    address: str
    model: str
    photographs: list[bytes]
    expected: list[Any]
    hostile: dict[str, tuple[tuple, Any]]
    left: Any
    wrong: list[str] = dataclasses.field(default_factory=list)
    answers: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    lock: Any = dataclasses.field(default_factory=threading.Lock)

    def work(self, seed: int) -> None:
        """Sends requests until the requested number is reached."""
        chance = random.Random(seed)
        while True:
            with self.lock:
                if next(self.left, None) is None:
                    return
            if chance.random() < HOSTILE_SHARE:
                self.send_hostile(chance.choice(list(self.hostile)))
            else:
                self.send_good(chance.randrange(len(self.photographs)))

    def send_hostile(self, name: str) -> None:
        codes, send = self.hostile[name]
        try:
            code = send(self.address)
        except (ConnectionError, http.client.HTTPException):
            code = "hung up"
        except (OSError, ValueError) as error:
            code = repr(error)
        self.note(f"{name}: {code}", code in codes)

    def send_good(self, number: int) -> None:
        try:
            status, answer = ask_good(self.address, self.model, self.photographs[number])
        except (OSError, http.client.HTTPException) as error:
            status, answer = repr(error), None
        self.note(f"good: {status}", status == 200 and is_same(answer, self.expected[number]))

    def note(self, answer: str, right: bool) -> None:
        with self.lock:
            self.answers[answer] += 1
            if not right:
                self.wrong.append(answer)


def run_hostile(address: str, model: str, pid: int, count: int, data: Path) -> dict[str, Any]:
    """Sends `count` requests from 16 clients; each answer to a valid image is compared with its first answer."""
    photographs = [path.read_bytes() for path in sorted((data / "hymenoptera").glob("*/*/*.jpg"))[:64]]
    expected = [ask_good(address, model, one)[1] for one in photographs]
    load = Load(address, model, photographs, expected, make_hostile(model, photographs[0]), iter(range(count)))
    pairs = [is_same(a, b) for number, a in enumerate(expected) for b in expected[:number]]
    before = read_memory(pid, "VmRSS")
    start = time.perf_counter()
    threads = [threading.Thread(target=load.work, args=(seed,)) for seed in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "requests": count,
        "seconds": round(time.perf_counter() - start),
        "answered wrongly": len(load.wrong),
        "first of them": load.wrong[:5],
        "answers": dict(sorted(load.answers.items())),
        "pairs of photographs whose answers can be told apart": round(1 - sum(pairs) / len(pairs), 3),
        "memory before, MB": before,
        "at its peak, MB": read_memory(pid, "VmHWM"),
        "at the end, MB": read_memory(pid, "VmRSS"),
    }


def ask_good(address: str, model: str, image: bytes) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(address, timeout=120)
    body = json.dumps({"instances": [{"b64": base64.b64encode(image).decode()}]})
    connection.request("POST", f"/v1/models/{model}:predict", body, JSON)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer["predictions"][0]["probabilities"] if response.status == 200 else answer


def is_same(answer: Any, expected: Any) -> bool:
    """Whether two answers agree, apart from the rounding differences between batch sizes."""
    return answer is not None and all(abs(a - b) < SAME for a, b in zip(answer, expected, strict=True))


def read_memory(pid: int, kind: str) -> int:
    """Reads the resident memory of a process in MB: current (`VmRSS`) or peak (`VmHWM`)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1]) // 1024


def make_hostile(model: str, good: bytes) -> dict[str, tuple[tuple, Any]]:
    """Maps names of hostile requests to the correct answers and a function from server address to answer."""
    predict, path = f"/v1/models/{model}:predict", f"/v1/models/{model}"
    image = {"Content-Type": "image/jpeg"}

    def post(body: bytes, where: str = predict, headers: dict[str, str] = JSON) -> Any:
        def send(address: str) -> int | str:
            connection = http.client.HTTPConnection(address, timeout=120)
            connection.request("POST", where, body, headers)
            response = connection.getresponse()
            answer = json.loads(response.read())
            connection.close()
            if response.status == 200:
                return "invalid" if not answer["predictions"][0]["valid"] else "valid"
            return response.status if "error" in answer else f"{response.status} without a reason"

        return send

    def as_json(value: Any, where: str = predict) -> Any:
        return post(json.dumps(value).encode(), where)

    def b64(content: bytes) -> dict[str, str]:
        return {"b64": base64.b64encode(content).decode()}

    return {
        "truncated": (("invalid",), post(good[: len(good) // 2], headers=image)),
        "wrong type": (("invalid",), post(b"%PDF-1.7 no image at all" * 100, headers=image)),
        "zero bytes": (("invalid",), post(b"", headers=image)),
        "bomb, PNG": (("invalid",), post(make_png_bomb(), headers=image)),
        "bomb, GIF": (("invalid",), post(make_bomb("GIF"), headers=image)),
        "bomb, JPEG": (("invalid",), post(make_bomb("JPEG"), headers=image)),
        "bombs, sixteen": (("invalid",), as_json({"instances": [b64(make_png_bomb())] * 16})),
        "100 MB": ((413, "hung up"), send_large(predict)),
        "bad JSON": ((400,), post(b'{"instances": [')),
        "deep JSON": ((400,), post(b"[" * 100000)),
        "bad base64": ((400,), as_json({"instances": [{"b64": "!!!!"}]})),
        "unknown model": ((404,), as_json({"instances": [b64(good)]}, "/v1/models/nobody:predict")),
        "unknown version": ((404,), as_json({"instances": [b64(good)]}, f"{path}/versions/99:predict")),
        "unknown signature": ((400,), as_json({"signature_name": "x", "instances": [b64(good)]})),
        "wrong shape": ((400,), as_json({"signature_name": "pixels", "instances": [[[[1.0, 2.0]]]]})),
        "too many images": ((400,), as_json({"instances": ["x"] * 10000})),
        "malformed": ((400,), post(b"{}", "/v1/models/a/b/c:predict")),
        "slow": (("valid",), send_slowly(predict, good)),
        "hangs up": (("hung up",), hang_up(predict, good)),
        "hangs up in the middle": (("hung up",), hang_up(predict, good[: len(good) // 2], len(good))),
    }


def send_large(path: str) -> Any:
    def send(address: str) -> int | str:
        with connect(address) as connection:
            connection.sendall(make_head(path, address, LARGE_BYTES))
            for _ in range(LARGE_BYTES // 1_000_000):
                connection.sendall(bytes(1_000_000))
            return read_status(connection)

    return send


def send_slowly(path: str, content: bytes) -> Any:
    def send(address: str) -> int | str:
        with connect(address) as connection:
            connection.sendall(make_head(path, address, len(content)))
            parts = [
                content[start : start + len(content) // 8 + 1]
                for start in range(0, len(content), len(content) // 8 + 1)
            ]
            for part in parts:
                time.sleep(SLOW_SECONDS / len(parts))
                connection.sendall(part)
            response = http.client.HTTPResponse(connection, method="POST")
            response.begin()
            answer = json.loads(response.read())
            return "valid" if response.status == 200 and answer["predictions"][0]["valid"] else response.status

    return send


def hang_up(path: str, content: bytes, declared: int = 0) -> Any:
    def send(address: str) -> str:
        with connect(address) as connection:
            connection.sendall(make_head(path, address, declared or len(content)) + content)
        return "hung up"

    return send


def connect(address: str) -> socket.socket:
    host, _, port = address.partition(":")
    return socket.create_connection((host, int(port)), timeout=120)


def make_head(path: str, address: str, length: int) -> bytes:
    lines = (f"POST {path} HTTP/1.1", f"Host: {address}", f"Content-Length: {length}", "Content-Type: image/jpeg")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def read_status(connection: socket.socket) -> int:
    return int(connection.recv(65536).split(b" ", 2)[1])


def make_png_bomb(side: int = 20000) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(bytes((1 + side // 8) * side), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def make_bomb(kind: str, side: int = 16000) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, kind)
    return file.getvalue()


if __name__ == "__main__":
    answer = run_hostile(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
    print(json.dumps(answer, indent=1))
