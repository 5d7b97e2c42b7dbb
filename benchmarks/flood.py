"""Memory and health check latency under ten thousand hostile requests from 32 clients, including large messages.

python -m benchmarks.flood [--data=DATA] [--work=WORK] [--only=openvino]
"""

from __future__ import annotations

import collections
import http.client
import json
import multiprocessing
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.hostile import JSON, ask_good, is_same, make_hostile, read_memory
from benchmarks.measure import parse, write_results

REQUESTS, CLIENTS, CHANNELS = 10_000, 32, 8
LARGE_SHARE, GRPC_SHARE, GOOD_SHARE = 0.03, 0.3, 0.02
LARGE_BYTES = 60_000_000
SETTLE_SECONDS = 5.0
LEFT_OUT = {"bombs, sixteen", "hangs up", "hangs up in the middle"}  # no answer to check, or seconds of decoding


def main() -> None:
    from benchmarks.serving import serving, train

    arguments = parse()
    engines = arguments.only.split(",") if arguments.only else ["openvino", "tensorflow"]
    models, results = train(arguments) / "models", {}
    for engine in engines:
        with serving(models, f"--engine={engine}") as (rest, grpc_address, process, log):
            name = next(models.iterdir()).name
            results[engine] = flood(rest, grpc_address, name, process.pid, arguments.data)
            results[engine]["lines in the log"] = len(log.read_text().splitlines())
    write_results("flood", results)
    print(json.dumps(results, indent=1))


def flood(rest: str, grpc_address: str, model: str, pid: int, data: Path) -> dict[str, Any]:
    """Sends the requests while separate processes check the health of the server."""
    photographs = [path.read_bytes() for path in sorted((data / "hymenoptera").glob("*/*/*.jpg"))[:16]]
    expected = [ask_good(rest, model, one)[1] for one in photographs]
    small = {key: kind for key, kind in make_hostile(model, photographs[0]).items() if key not in LEFT_OUT}
    kinds = [small, make_large(model), *make_calls(grpc_address, model, photographs[0])]
    before, stop = read_memory(pid, "VmRSS"), multiprocessing.Event()
    probing = [multiprocessing.Pipe(duplex=False) for _ in range(2)]
    probes = [
        multiprocessing.Process(target=probe, args=(target, stop, pipe[1]))
        for target, pipe in zip((rest, f"grpc:{grpc_address}"), probing, strict=True)
    ]
    for process in probes:
        process.start()
    sender = Sender(rest, model, photographs, expected, kinds)
    start = time.perf_counter()
    threads = [threading.Thread(target=sender.work, args=(seed,)) for seed in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    stop.set()
    health = dict(zip(("/healthz", "gRPC health"), (pipe[0].recv() for pipe in probing), strict=True))
    for process in probes:
        process.join()
    time.sleep(SETTLE_SECONDS)
    return {
        "hostile requests": REQUESTS,
        "clients": CLIENTS,
        "seconds": round(seconds),
        "answered wrongly": len(sender.wrong),
        "first of them": sender.wrong[:5],
        "answers": dict(sorted(sender.answers.items())),
        "health": health,
        "memory before, MB": before,
        "at its peak, MB": read_memory(pid, "VmHWM"),
        "at the end, MB": read_memory(pid, "VmRSS"),
    }


class Sender:
    """Sends random requests from 32 clients; answers to valid requests are compared with those before the flood."""

    def __init__(self, rest: str, model: str, photographs: list[bytes], expected: list[Any], kinds: list[dict]) -> None:
        self.rest, self.model, self.photographs, self.expected = rest, model, photographs, expected
        self.small, self.large, self.calls, self.large_calls = kinds
        self.left, self.lock = iter(range(REQUESTS)), threading.Lock()
        self.wrong, self.answers = list[str](), collections.Counter[str]()

    def work(self, seed: int) -> None:
        chance = random.Random(seed)
        while True:
            with self.lock:
                if next(self.left, None) is None:
                    return
            if chance.random() < GOOD_SHARE:
                self.send_good(chance.randrange(len(self.photographs)))
            is_call, is_large = chance.random() < GRPC_SHARE, chance.random() < LARGE_SHARE
            kinds = (
                (self.large_calls if is_large else self.calls) if is_call else self.large if is_large else self.small
            )
            self.send(kinds, chance.choice(list(kinds)))

    def send(self, kinds: dict[str, tuple[tuple, Callable]], name: str) -> None:
        codes, send = kinds[name]
        try:
            code = send(self.rest)
        except (ConnectionError, http.client.HTTPException):
            code = "hung up"
        except (OSError, ValueError) as error:
            code = repr(error)
        # 429: the server has reached its memory limit for requests
        self.note(f"{name}: {code}", code in codes or code == 429)

    def send_good(self, number: int) -> None:
        try:
            status, answer = ask_good(self.rest, self.model, self.photographs[number])
        except (OSError, http.client.HTTPException) as error:
            status, answer = repr(error), None
        is_right = status == 429 or (status == 200 and is_same(answer, self.expected[number]))
        self.note(f"good: {status}", is_right)

    def note(self, answer: str, right: bool) -> None:
        with self.lock:
            self.answers[answer] += 1
            if not right:
                self.wrong.append(answer)


def make_large(model: str) -> dict[str, tuple[tuple, Any]]:
    """Maps names to the correct codes (under load also 429 and 504) and a function that posts 60 MB of JSON."""
    predict, classify, regress = (f"/v1/models/{model}:{verb}" for verb in ("predict", "classify", "regress"))

    def post(where: str, head: bytes, unit: bytes, tail: bytes, *codes: int) -> tuple[tuple, Any]:
        body = head + unit * ((LARGE_BYTES - len(head) - len(tail)) // len(unit)) + tail

        def send(address: str) -> int:
            connection = http.client.HTTPConnection(address, timeout=120)
            connection.request("POST", where, body, JSON)
            response = connection.getresponse()
            response.read()
            connection.close()
            return response.status

        return (*(codes or (400,)), 429, 504), send

    rows, pixels = b'{"instances":[', b'{"signature_name":"pixels","instances":['
    return {
        "large, objects": post(predict, rows, b"{},", b"{}]}"),
        "large, numbers": post(predict, rows, b"1,", b"1]}"),
        "large, floats as pixels": post(predict, pixels, b"1.5,", b"1]}"),
        "large, one row of pixels": post(predict, pixels + b"[", b"0,", b"1]]}"),
        "large, strings": post(predict, rows, b'"",', b'""]}'),
        "large, lists": post(predict, b'{"inputs":{"image_bytes":[', b"[],", b"[]]}}"),
        "large, columns": post(predict, b'{"signature_name":"pixels","inputs":[', b"[1,2],", b"[1]]}"),
        "large, members": post(predict, b"{", b'"key":1,', b'"x":1}'),
        "large, members of a row": post(predict, rows + b"{", b'"key":1,', b'"x":1}]}'),
        "large, unused": post(predict, b'{"instances":["x"],"y":[', b"{},", b"{}]}"),
        "large, nested": post(predict, rows, b"[", b"1"),
        "large, base64": post(predict, rows + b'{"b64":"', b"A", b'"}]}', 200, 400),
        "large, examples": post(classify, b'{"signature_name":"classify","examples":[', b"{},", b"{}]}"),
        "large, features": post(classify, b'{"examples":[{"a":[', b"1,", b"1]}]}"),
        "large, context": post(regress, b'{"context":{"a":[', b"1.5,", b'1]},"examples":[{}]}'),
    }


def make_calls(
    address: str, model: str, good: bytes
) -> tuple[dict[str, tuple[tuple, Any]], dict[str, tuple[tuple, Any]]]:
    """Maps names of small and of large hostile gRPC calls to the correct codes and a function that sends the call."""
    import grpc
    import numpy as np
    import tensorflow as tf
    from grpc_health.v1 import health_pb2
    from tensorflow_serving.apis import classification_pb2, predict_pb2

    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    channels = [grpc.insecure_channel(address, options) for _ in range(CHANNELS)]
    service, turn = "/tensorflow.serving.PredictionService/", iter(range(1 << 62))

    def call(method: str, content: bytes, *codes: str, seconds: float = 60) -> tuple[tuple, Any]:
        def send(_: str) -> str:
            channel = channels[next(turn) % CHANNELS]
            try:
                channel.unary_unary(service + method)(content, timeout=seconds)
            except grpc.RpcError as error:
                return str(error.code().name)
            return "OK"

        return (*codes, "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"), send

    def predict(array: Any, signature: str = "", name: str = model, key: str = "image_bytes") -> bytes:
        request = predict_pb2.PredictRequest()
        request.model_spec.name, request.model_spec.signature_name = name, signature
        request.inputs[key].CopyFrom(tf.make_tensor_proto(array))
        return request.SerializeToString()

    def fill(unit: bytes, size: int) -> bytes:
        """Builds a request whose tensor consists of repeated fields."""
        tensor = b"\x08\x07" + unit * (size // len(unit))
        entry = b"\x0a\x0bimage_bytes\x12" + as_varint(len(tensor)) + tensor
        head = predict_pb2.PredictRequest()
        head.model_spec.name = model
        return head.SerializeToString() + b"\x12" + as_varint(len(entry)) + entry

    def claim() -> bytes:
        request = predict_pb2.PredictRequest()
        request.model_spec.name, request.model_spec.signature_name = model, "pixels"
        proto = request.inputs["images"]
        proto.dtype = 1
        for size in (64, 100000, 100000, 3):
            proto.tensor_shape.dim.add(size=size)
        proto.float_val.append(1.0)
        return request.SerializeToString()

    def watch(_: str) -> str:
        channel = channels[next(turn) % CHANNELS]
        stream = channel.unary_stream("/grpc.health.v1.Health/Watch")(
            health_pb2.HealthCheckRequest().SerializeToString(), timeout=5
        )
        try:
            next(stream)
        except grpc.RpcError as error:
            return str(error.code().name)
        stream.cancel()
        return "OK"

    examples = classification_pb2.ClassificationRequest()
    examples.model_spec.name, examples.model_spec.signature_name = model, "classify"
    examples.input.example_list.examples.extend([tf.train.Example()] * 5000)
    small = {
        "gRPC, broken": call("Predict", predict([good[: len(good) // 2]]), "OK"),
        "gRPC, no message": call("Predict", b"\xff" * 1000, "INTERNAL"),
        "gRPC, unknown model": call("Predict", predict([good], name="nobody"), "NOT_FOUND"),
        "gRPC, unknown signature": call("Predict", predict([good], "x"), "FAILED_PRECONDITION"),
        "gRPC, wrong type": call("Predict", predict([1.0]), "INVALID_ARGUMENT"),
        "gRPC, wrong shape": call("Predict", predict(np.zeros((1, 2)), "pixels", key="images"), "INVALID_ARGUMENT"),
        "gRPC, too many images": call("Predict", predict([b""] * 5000), "INVALID_ARGUMENT"),
        "gRPC, too many examples": call("Classify", examples.SerializeToString(), "INVALID_ARGUMENT"),
        "gRPC, a terabyte claimed": call("Predict", claim(), "INVALID_ARGUMENT"),
        "gRPC, in a hurry": call("Predict", predict([good] * 8), "OK", seconds=0.005),
        "gRPC, a stream": (("OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"), watch),
    }
    floats = np.zeros((LARGE_BYTES // 4,), np.float32)
    large = {
        "gRPC, empty strings": call("Predict", fill(b"\x42\0", LARGE_BYTES), "INVALID_ARGUMENT"),
        "gRPC, single floats": call("Predict", fill(b"\x2d\0\0\0\0", LARGE_BYTES), "INVALID_ARGUMENT"),
        "gRPC, numbers": call("Predict", predict(floats, "pixels", key="images"), "INVALID_ARGUMENT"),
        "gRPC, above the limit": call("Predict", bytes(70_000_000)),
    }
    return small, large


def as_varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def probe(target: str, stop: Any, results: Any) -> None:
    """Checks the health of the server twenty times per second; sends the latency and the number of failures."""
    times, failed = list[float](), 0
    ask = make_grpc_probe(target[5:]) if target.startswith("grpc:") else make_probe(target)
    while not stop.is_set():
        start = time.perf_counter()
        try:
            failed += not ask()
        except Exception:  # any exception counts as a failed check
            failed += 1
        times.append(time.perf_counter() - start)
        time.sleep(0.05)
    times.sort()
    results.send({
        "asked": len(times),
        "failed": failed,
        "median, ms": round(1000 * times[len(times) // 2], 1),
        "p99, ms": round(1000 * times[int(len(times) * 0.99)]),
        "slowest, ms": round(1000 * times[-1]),
    })


def make_probe(address: str) -> Callable[[], bool]:
    def ask() -> bool:
        connection = http.client.HTTPConnection(address, timeout=60)
        connection.request("GET", "/healthz")
        status = connection.getresponse().status
        connection.close()
        return status == 200

    return ask


def make_grpc_probe(address: str) -> Callable[[], bool]:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    stub = health_pb2_grpc.HealthStub(grpc.insecure_channel(address))
    return lambda: stub.Check(health_pb2.HealthCheckRequest(), timeout=60).status == 1


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
