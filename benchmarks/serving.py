"""Throughput, latency and robustness of the local server.

python -m benchmarks.serving --only=throughput,overhead

Parts for `--only`:
    sizes: images per second of the exported graph by batch size and precision.
    throughput: 16 clients, REST and gRPC, ResNet50 and MobileNetV2 (random weights); compared with the limit of the CPU
        cores, and with a FastAPI handler that calls the same SavedModel (pip install fastapi). Then latency at lower
        load.
    overhead: latency for one client, compared with calling the model in the process.
    hostile: 20,000 requests to a classifier trained on hymenoptera; one in twenty is hostile.
    swaps: 50 new versions under load, alternating between two models.
    answers: hymenoptera's test split through both APIs, compared with predictions.csv of the run.
    start: CPU seconds and memory of the server when it is ready and after requests, at its first start with a model and
        at later ones; `--other` is another checkout, in alternation.
"""

from __future__ import annotations

import base64
import csv
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measure import MOBILENET_WEIGHTS, ROOT, parse, run_process, spread, write_results

CLIENTS, SECONDS = 16, 12
NETWORKS = ("ResNet50", "MobileNetV2")
HOSTILE_REQUESTS, SWAPS = 20000, 50
LOADS = (0.25, 0.5, 0.8)


def main() -> None:
    arguments = parse()
    parts = arguments.only.split(",") if arguments.only else list(PARTS)
    results = {name: PARTS[name](arguments) for name in parts}
    earlier = ROOT / "benchmarks" / "results" / "serving.json"
    if "throughput" in results and earlier.exists():  # keeps the networks that were not measured now
        results["throughput"] = json.loads(earlier.read_text())["throughput"] | results["throughput"]
    write_results("serving", results)


def export_random(arguments: Any, name: str, *, prefix: str = "class", image_size: int = 224) -> Path:
    """Exports a model with random weights and ten classes as version 1 in its own folder."""
    folder = arguments.work / "serving" / prefix / name / "1"
    if (folder / "saved_model.pb").exists():
        return folder
    import keras

    from tl_keras.backbones.zoo import build_backbone, find_preset
    from tl_keras.classifier import Classifier
    from tl_keras.export.saved_model import write_version

    keras.utils.set_random_seed(0)
    backbone = build_backbone(find_preset(name), weights="none", image_size=image_size)
    network = keras.Model(backbone.input, keras.layers.Dense(10, name="logits")(backbone.output))
    labels = tuple(f"{prefix} {number}" for number in range(10))
    folder.mkdir(parents=True)
    classifier = Classifier(network, name, labels, name, backbone.layers[-1].name, "crop")
    write_version(classifier, folder, name=name, max_pixels=50_000_000)
    return folder


@contextmanager
def serving(
    export_dir: Path, *flags: str, root: Path = ROOT, **environment: str
) -> Iterator[tuple[str, str, subprocess.Popen, Path]]:
    log = export_dir.parent / "serve.log"
    command = [sys.executable, "-m", "tl_keras.main", "--mode=serve", f"--export_dir={export_dir}", "--port=0"]
    with log.open("w") as file:
        own = {**os.environ, **environment}
        process = subprocess.Popen([*command, "--grpc_port=0", *flags], cwd=root, stdout=file, stderr=file, env=own)
    try:
        while not (found := re.search(r"REST http://(\S+)/v1/models/NAME · gRPC (\S+) ", log.read_text())):
            if process.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.1)
        yield found[1], found[2], process, log
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def load(kind: str, address: str, name: str, folder: Path, clients: int, seconds: float, rate: float = 0) -> dict:
    """Runs the load generator and returns its results, which include its own CPU time."""
    command = ["-m", "benchmarks.serving_client", kind, address, name, str(folder), str(clients), str(seconds)]
    result = json.loads(run_process([*command, *([str(rate)] if rate else [])])[1].splitlines()[-1])
    if result["errors"]:
        raise SystemExit(f"{kind}: {result['errors']}")
    return result


def measure_throughput(arguments: Any) -> dict[str, Any]:
    from benchmarks.extract import write_photographs

    photographs = write_photographs(arguments, 256)
    names = [name for name in NETWORKS if name in arguments.networks.split(",")]
    return {name: measure_network(arguments, name, photographs) for name in names}


def measure_network(arguments: Any, name: str, photographs: Path) -> dict[str, Any]:
    version = export_random(arguments, name)
    decode, runs = measure_decoding(photographs), []
    for _ in range(arguments.runs):
        with serving(version.parent.parent, f"--classifier={version}") as (rest, grpc, _, log):
            engine = re.search(r"serving \S+: (.*), ready", log.read_text())[1]
            trunk = measure_trunk(version, engine)
            run: dict[str, Any] = {"engine": engine, "trunk": trunk, "decoding": decode}
            for kind, address in (("rest", rest), ("grpc", grpc)):
                found = load(kind, address, name, photographs, CLIENTS, SECONDS)
                allowed = 1 / (1 / trunk + 1 / decode + found["cpu_seconds_a_request"] / (os.cpu_count() or 1))
                run[kind] = {**found, "of what the cores allow": found["per_second"] / allowed}
                run[kind]["at"] = {
                    f"{part:.0%}": load(kind, address, name, photographs, 64, 6, part * found["per_second"])
                    for part in LOADS
                }
        run["naive"] = measure_naive(version, name, photographs)
        print(name, json.dumps(run), flush=True)
        runs.append(run)
    return summarise(runs)


def measure_start(arguments: Any) -> dict[str, Any]:
    from benchmarks.extract import write_photographs
    from benchmarks.hostile import read_memory

    content = sorted(write_photographs(arguments, 256).glob("*.jpg"))[0].read_bytes()
    checkouts = {"": ROOT, **({"earlier, ": Path(arguments.other)} if arguments.other else {})}
    results: dict[str, Any] = {}
    for name in [one for one in NETWORKS if one in arguments.networks.split(",")]:
        version, measured = export_random(arguments, name), dict[str, list[dict[str, float]]]()
        for _ in range(arguments.runs):
            for checkout, root in checkouts.items():
                cache = arguments.work / "serving" / "cache"
                shutil.rmtree(cache, ignore_errors=True)
                for start in ("first start", "later start"):
                    own = {"root": root, "XDG_CACHE_HOME": str(cache)}
                    with serving(version.parent.parent, f"--classifier={version}", **own) as (rest, _, process, log):
                        ready = {"CPU s": read_cpu_seconds(process.pid), "MB": read_memory(process.pid, "VmRSS")}
                        for signature in ("serving_default", "embeddings", "serving_default"):
                            for _ in range(4):
                                ask(rest, name, content, signature)
                        ready["MB after requests"] = read_memory(process.pid, "VmRSS")
                        ready["MB at the peak"] = read_memory(process.pid, "VmHWM")
                        print(name, checkout, start, ready, re.search(r"serving (\S+: .*), ready", log.read_text())[1])
                    measured.setdefault(f"{checkout}{start}", []).append(ready)
        results[name] = {
            key: {one: spread([run[one] for run in runs]) for one in runs[0]} for key, runs in measured.items()
        }
    return results


def ask(address: str, name: str, content: bytes, signature: str) -> None:
    body = {"signature_name": signature, "instances": [{"b64": base64.b64encode(content).decode()}]}
    url = f"http://{address}/v1/models/{name}:predict"
    urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode())).read()


def read_cpu_seconds(pid: int) -> float:
    """User and system seconds of a process, with those of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {"engine": runs[-1]["engine"]}
    for key in ("trunk", "decoding", "naive"):
        result[f"{key}, images a second"] = spread([run[key] for run in runs])
    for kind in ("rest", "grpc"):
        result[kind] = {
            "requests a second": spread([run[kind]["per_second"] for run in runs]),
            "client's CPU, ms a request": spread([1000 * run[kind]["cpu_seconds_a_request"] for run in runs]),
            "of what the cores allow": spread([run[kind]["of what the cores allow"] for run in runs]),
            "times the naive server": spread([run[kind]["per_second"] / run["naive"] for run in runs]),
            "ms at part of the load, p50 p95 p99": {
                part: [statistics.median(run[kind]["at"][part][p] for run in runs) for p in ("p50", "p95", "p99")]
                for part in runs[0][kind]["at"]
            },
        }
    return result


def measure_decoding(photographs: Path) -> float:
    """Measures how many photographs per second are decoded and resized on all cores, without a network."""
    import numpy as np

    from tl_keras.data.images import make_images

    contents = [path.read_bytes() for path in sorted(photographs.glob("*.jpg"))]

    def read(positions: Any) -> Iterator[tuple[int, bytes]]:
        return ((int(position), contents[position]) for position in positions)

    positions, speeds = np.tile(np.arange(len(contents)), 8), []  # so long that the start does not count
    for _ in range(4):
        start = time.perf_counter()
        for _ in make_images(read, positions, image_size=224, resize="crop", batch_size=32):
            pass
        speeds.append(len(positions) / (time.perf_counter() - start))
    return statistics.median(speeds[1:])


def measure_trunk(version: Path, engine: str) -> float:
    """Measures images per second of network and head on decoded images, with the engine that the server selected."""
    code = f"""
import json, sys, time
import numpy as np
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tl_keras.serving.graphs import Graph
from tl_keras.serving.openvino_graph import OpenVinoGraph
path, (name, precision) = Path({str(version)!r}), {engine!r}.split()
graph = (OpenVinoGraph if name == "openvino" else Graph)(path, precision=precision)
images = {{"images": np.random.default_rng(0).uniform(0, 255, (32, 224, 224, 3)).astype(np.float32)}}
speeds = []
with ThreadPoolExecutor(2) as pool:
    for _ in range(4):
        start = time.perf_counter()
        list(pool.map(lambda _: graph.run("pixels", images), range(4)))
        speeds.append(128 / (time.perf_counter() - start))
print(max(speeds))
"""
    return float(run_process(["-c", code])[1].splitlines()[-1])


def measure_naive(version: Path, name: str, photographs: Path) -> float:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.naive_server", str(version), str(port)], cwd=ROOT)
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.2)
        load("rest", f"127.0.0.1:{port}", name, photographs, CLIENTS, 5)  # warm-up: traces and plans the graph
        return load("rest", f"127.0.0.1:{port}", name, photographs, CLIENTS, SECONDS)["per_second"]
    finally:
        process.terminate()
        process.wait(30)


def measure_overhead(arguments: Any) -> dict[str, Any]:
    """Compares the median latency of the server with that of the same graph in this process, engine tensorflow."""
    from benchmarks.extract import write_photographs
    from tl_keras.serving.graphs import Graph, as_strings

    photographs, version = write_photographs(arguments, 256), export_random(arguments, "MobileNetV2")
    contents = [path.read_bytes() for path in sorted(photographs.glob("*.jpg"))[:64]]
    flags = (f"--classifier={version}", "--engine=tensorflow", "--precision=float32")
    inside, rest, grpc = list[float](), list[float](), list[float]()
    for _ in range(arguments.runs):
        graph, times = Graph(version, precision="float32"), []
        for number in range(300):
            start = time.perf_counter()
            graph.run("serving_default", {"image_bytes": as_strings([contents[number % 64]])})
            times.append(1000 * (time.perf_counter() - start))
        inside.append(statistics.median(times[50:]))
        with serving(version.parent.parent, *flags) as (rest_address, grpc_address, _, _):
            rest.append(load("rest", rest_address, "MobileNetV2", photographs, 1, 10)["p50"])
            grpc.append(load("grpc", grpc_address, "MobileNetV2", photographs, 1, 10)["p50"])
    return {
        "in the process, ms": spread(inside),
        "REST, ms": spread(rest),
        "gRPC, ms": spread(grpc),
        "REST costs more, ms": statistics.median(rest) - statistics.median(inside),
        "gRPC costs more, ms": statistics.median(grpc) - statistics.median(inside),
    }


def measure_hostile(arguments: Any) -> dict[str, Any]:
    """Mixes valid and hostile requests; returns the answers and the memory of the server."""
    from benchmarks.hostile import run_hostile

    models, result = train(arguments) / "models", {}
    for engine in ("openvino", "tensorflow"):
        # float32 answers are the same in every batch, so that a tolerance of 0.0001 distinguishes photographs
        flags = (f"--engine={engine}", "--precision=float32", "--request_timeout_seconds=20")
        with serving(models, *flags) as (rest, _, process, _):
            name = next(models.iterdir()).name
            result[engine] = run_hostile(rest, name, process.pid, HOSTILE_REQUESTS, arguments.data)
    return result


def measure_swaps(arguments: Any) -> dict[str, Any]:
    """Replaces versions while eight clients send requests; odd and even versions have different labels."""
    versions = [export_random(arguments, "MobileNetV2", prefix=prefix) for prefix in ("even", "odd")]
    root = arguments.work / "serving_swaps"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(versions[1], root / "models" / "m" / "1")
    photograph = next((arguments.data / "hymenoptera").glob("*/*/*.jpg")).read_bytes()
    failed, answers, stop = list[str](), list[tuple[float, float, bool]](), threading.Event()
    alone = list[tuple[float, float, bool]]()  # start and end of the time with only one version, and whether it is odd
    with serving(root / "models", "--engine=tensorflow", "--precision=float32", "--max_batch_size=4") as running:
        address, log = running[0], running[3]

        def ask() -> None:
            while not stop.is_set():
                request = urllib.request.Request(
                    f"http://{address}/v1/models/m:predict", photograph, {"Content-Type": "image/jpeg"}
                )
                start = time.perf_counter()
                try:
                    with urllib.request.urlopen(request, timeout=60) as response:
                        label = json.load(response)["predictions"][0]["labels"][0]
                    answers.append((start, time.perf_counter(), label.startswith("odd")))
                except (urllib.error.URLError, OSError, KeyError) as error:
                    failed.append(repr(error))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        begin = time.perf_counter()
        for number in range(2, SWAPS + 2):
            shutil.copytree(versions[number % 2], root / "models" / "m" / ".unfinished")
            (root / "models" / "m" / ".unfinished").rename(root / "models" / "m" / str(number))
            while f"unloaded m/{number - 1}\n" not in log.read_text():
                time.sleep(0.05)
            since = time.perf_counter()
            shutil.rmtree(root / "models" / "m" / str(number - 1))
            time.sleep(1)
            alone.append((since, time.perf_counter(), number % 2 == 1))
        seconds = time.perf_counter() - begin
        stop.set()
        for thread in threads:
            thread.join()
    checked = [is_odd == odd for start, end, is_odd in answers for since, to, odd in alone if since < start < end < to]
    return {
        "swaps": SWAPS,
        "requests": len(answers) + len(failed),
        "failed": len(failed),
        "asked while one version alone was there": len(checked),
        "of these answered by another": checked.count(False),
        "seconds": round(seconds),
    }


def train(arguments: Any) -> Path:
    """Trains a classifier on hymenoptera once: its run is in `run`, its exported model in `models`."""
    work, data = arguments.work / "serving_answers", arguments.data / "hymenoptera"
    if (work / "run" / "metrics.json").exists():
        return work
    shutil.rmtree(work, ignore_errors=True)
    command = [
        "-m",
        "tl_keras.main",
        "--mode=finetune",
        f"--dataset=folder:{data}",
        "--test_fraction=0.3",
        "--noreport",
    ]
    network = ["--backbone=MobileNetV2", "--backbone_kwargs=alpha=0.35"]
    places = [f"--run_dir={work / 'run'}", f"--export_dir={work / 'models'}", f"--store_dir={work / 'store'}"]
    run_process([*command, *network, f"--weights={arguments.data / MOBILENET_WEIGHTS}", *places])
    return work


def measure_answers(arguments: Any) -> dict[str, Any]:
    """Sends every image of a test split through REST and gRPC, and compares the answers with the run's predictions."""
    import grpc
    import numpy as np
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    work, data = train(arguments), arguments.data / "hymenoptera"
    rows = [row for row in csv.DictReader((work / "run" / "predictions.csv").open()) if row["split"] == "test"]
    expected = np.array([float(row["probability"]) for row in rows])
    name, result = next((work / "models").iterdir()).name, {"images": len(rows)}
    for engine in ("tensorflow", "openvino"):
        with serving(work / "models", f"--engine={engine}", "--precision=float32") as (rest, grpc_address, _, _):
            stub = prediction_service_pb2_grpc.PredictionServiceStub(grpc.insecure_channel(grpc_address))
            answers: dict[str, list] = {"REST": [], "gRPC": []}
            for row in rows:
                content = (data / row["id"]).read_bytes()
                request = urllib.request.Request(
                    f"http://{rest}/v1/models/{name}:predict", content, {"Content-Type": "image/jpeg"}
                )
                prediction = json.load(urllib.request.urlopen(request, timeout=60))["predictions"][0]
                answers["REST"].append((prediction["labels"][0], prediction["scores"][0]))
                message = predict_pb2.PredictRequest()
                message.model_spec.name = name
                message.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto([content]))
                outputs = stub.Predict(message).outputs
                answers["gRPC"].append((outputs["labels"].string_val[0].decode(), outputs["scores"].float_val[0]))
        for api, found in answers.items():
            result[f"{engine}, {api}"] = {
                "labels that agree": float(
                    np.mean([f[0] == row["predicted"] for f, row in zip(found, rows, strict=True)])
                ),
                "largest difference of a probability": float(np.abs([f[1] for f in found] - expected).max()),
            }
    return result


def measure_sizes(arguments: Any) -> dict[str, Any]:
    """Measures images per second of the exported graph by batch size and precision, in the same way as `--deploy`."""
    from tl_keras.export.warmup import BATCH_SIZES, make_photograph
    from tl_keras.serving.measure import measure_speed

    result = {}
    for name in NETWORKS:
        version = export_random(arguments, name)
        runs = [measure_speed(version, [make_photograph()], batch_sizes=BATCH_SIZES) for _ in range(arguments.runs)]
        result[name] = {
            precision: {size: spread([run.images_per_second[precision][size] for run in runs]) for size in BATCH_SIZES}
            for precision in runs[0].images_per_second
        }
        result[name]["bfloat16 pays"] = [run.bfloat16 for run in runs]
        result[name]["sizes"] = [list(run.batch_sizes) for run in runs]
    return result


PARTS = {
    "sizes": measure_sizes,
    "throughput": measure_throughput,
    "overhead": measure_overhead,
    "hostile": measure_hostile,
    "swaps": measure_swaps,
    "answers": measure_answers,
    "start": measure_start,
}

if __name__ == "__main__":
    random.seed(0)
    main()
