"""Load generator for a server, run in its own process; prints its results as one line of JSON.

python -m benchmarks.serving_client REST_OR_GRPC HOST:PORT MODEL FOLDER CLIENTS SECONDS [RATE]

Each of CLIENTS threads sends one request after another for SECONDS seconds. With RATE, that many requests start per
second, whether or not earlier ones have been answered.
"""

from __future__ import annotations

import base64
import http.client
import json
import queue
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path


def main() -> None:
    kind, address, model, folder, clients, seconds = sys.argv[1:7]
    rate = float(sys.argv[7]) if len(sys.argv) > 7 else 0.0
    images = [path.read_bytes() for path in sorted(Path(folder).rglob("*.jpg"))[:64]]
    make = {"rest": make_rest, "raw": make_raw, "grpc": make_grpc}[kind]
    result = run(lambda: make(address, model, images), int(clients), float(seconds), rate, len(images))
    print(json.dumps(result))


def run(make: Callable, clients: int, seconds: float, rate: float, count: int) -> dict:
    times, errors, due = list[float](), list[str](), queue.Queue[float]()
    ready, begin = threading.Barrier(clients + 1), threading.Event()
    start = stop = 0.0

    def work(number: int) -> None:
        ask = make()
        ask(number % count)  # warm-up: opens the connection
        ready.wait()
        begin.wait()
        while True:
            try:
                began = due.get_nowait() if rate else time.perf_counter()
            except queue.Empty:
                return
            if began > stop:
                return
            time.sleep(max(0.0, began - time.perf_counter()))
            try:
                ask(number % count)
                times.append(time.perf_counter() - began)
            except Exception as error:
                errors.append(repr(error)[:200])
            number += clients

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    ready.wait()
    start = time.perf_counter()
    stop = start + seconds
    for number in range(int(rate * seconds)):
        due.put(start + number / rate)
    used = cpu_seconds()
    begin.set()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - start
    ordered = sorted(times)
    return {
        "requests": len(times),
        "errors": errors[:3],
        "per_second": len(times) / took,
        "cpu_seconds_a_request": (cpu_seconds() - used) / max(1, len(times)),
        **{f"p{part}": 1000 * ordered[min(len(ordered) - 1, len(ordered) * part // 100)] for part in (50, 95, 99)},
    }


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def make_rest(address: str, model: str, images: list[bytes]) -> Callable[[int], None]:
    bodies = [json.dumps({"instances": [{"b64": base64.b64encode(one).decode()}]}) for one in images]
    return make_post(address, f"/v1/models/{model}:predict", bodies, "application/json")


def make_raw(address: str, model: str, images: list[bytes]) -> Callable[[int], None]:
    return make_post(address, f"/v1/models/{model}:predict", images, "image/jpeg")


def make_post(address: str, path: str, bodies: list, kind: str) -> Callable[[int], None]:
    connection = http.client.HTTPConnection(address, timeout=120)

    def ask(number: int) -> None:
        connection.request("POST", path, bodies[number], {"Content-Type": kind})
        response = connection.getresponse()
        answer = json.loads(response.read())
        if response.status != 200 or not answer["predictions"][0]["valid"]:
            raise ValueError(f"{response.status} {str(answer)[:100]}")

    return ask


def make_grpc(address: str, model: str, images: list[bytes]) -> Callable[[int], None]:
    import grpc
    from tensorflow.core.framework import tensor_pb2, types_pb2
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    requests = []
    for one in images:
        request = predict_pb2.PredictRequest()
        request.model_spec.name = model
        proto = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[one])
        proto.tensor_shape.dim.add(size=1)
        request.inputs["image_bytes"].CopyFrom(proto)
        requests.append(request)
    stub = prediction_service_pb2_grpc.PredictionServiceStub(grpc.insecure_channel(address))

    def ask(number: int) -> None:
        if not stub.Predict(requests[number], timeout=120).outputs["valid"].bool_val[0]:
            raise ValueError("invalid")

    return ask


if __name__ == "__main__":
    main()
