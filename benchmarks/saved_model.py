"""Memory and speed of an exported model: python -m benchmarks.saved_model [--other=CHECKOUT]

Exports ResNet50 and MobileNetV2 (random weights), and runs the models in TensorFlow's C++ loader, like TensorFlow
Serving, and in a TensorFlow 1 session. `--other` is the folder of another checkout of this repository: both are
measured in alternation.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import ROOT, parse, spread, write_results

NETWORKS = ("ResNet50", "MobileNetV2")
SIGNATURES = ("serving_default", "embeddings", "classify")
SIZE, BATCH, REPEATS = 224, 8, 10


def main() -> None:
    if len(sys.argv) > 2 and sys.argv[1] in PARTS:
        print(json.dumps(PARTS[sys.argv[1]](*sys.argv[2:])))
        return
    arguments = parse()
    checkouts = {"this": ROOT, **({"other": Path(arguments.other).resolve()} if arguments.other else {})}
    results: dict[str, Any] = {}
    for network in NETWORKS:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
        for number in range(arguments.runs):
            for name, checkout in checkouts.items():
                folder = arguments.work / f"saved_model-{network}-{name}-{number}-{os.getpid()}"
                folder.mkdir()
                one = {}
                for part in PARTS:
                    one |= run_part(checkout, part, str(folder), *([network] if part == "export" else []))
                found[name].append(one)
                print(network, name, one, flush=True)
        results[network] = {
            name: {key: spread([one[key] for one in runs]) for key in runs[0]} for name, runs in found.items()
        }
    write_results("saved_model", results)


def run_part(checkout: Path, *arguments: str) -> dict[str, float]:
    """Runs one part in a new process with the package of a checkout."""
    environment = {**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{ROOT}", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-P", __file__, *arguments]  # -P: tl_keras is the checkout's
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if result.returncode:
        raise SystemExit(result.stdout[-2000:] + result.stderr[-2000:])
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def export(folder: str, network: str) -> dict[str, float]:
    """Exports a classifier of the network with random weights."""
    import keras

    from tl_keras.backbones.zoo import BACKBONES, build_backbone
    from tl_keras.classifier import Classifier
    from tl_keras.export.saved_model import write_version
    from tl_keras.training.heads import attach, build_head

    keras.utils.set_random_seed(0)
    backbone = build_backbone(BACKBONES[network], weights="none", image_size=SIZE)
    head = build_head(backbone.output_shape[1], 5, dropout=0, standardize=None)
    classifier = Classifier(attach(head, backbone), "toy", tuple("abcde"), network, backbone.layers[-1].name, "crop")
    start, version = time.process_time(), Path(folder) / "1"
    version.mkdir()
    write_version(classifier, version, name="toy", max_pixels=50_000_000)
    seconds = time.process_time() - start
    write_inputs(Path(folder))
    return {
        "export, CPU s": seconds,
        "export, peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "model, MB": sum(path.stat().st_size for path in version.rglob("*") if path.is_file()) / 1e6,
    }


def run_in_loader(folder: str) -> dict[str, float]:
    """Loads the model in TensorFlow's C++ loader and runs the signatures that take bytes."""
    from tl_keras.export.cpp_loader import CppModel, find_libraries, load_library

    class Model(CppModel):  # type: ignore[misc]
        """A model whose other signatures can be run too."""

        def select(self, feed: str, fetches: dict[str, str]) -> None:
            self._feed, self._fetches = self._find(feed), {key: self._find(one) for key, one in fetches.items()}

    images, examples = read_inputs(folder, "jpg"), read_inputs(folder, "example")
    signatures = json.loads((Path(folder) / "signatures.json").read_text())
    library = load_library(find_libraries())
    feed, fetches = signatures["serving_default"]
    base, start = resident_mb(), time.process_time()
    model = Model(library, f"{folder}/1", feed=feed, fetches=fetches)
    found = {"C++: loaded, CPU s": time.process_time() - start, "C++: loaded, MB": resident_mb() - base}
    for name in SIGNATURES:
        model.select(*signatures[name])
        values = examples if name == "classify" else images
        start = time.process_time()
        model.run(values[:1])
        found[f"C++: {name}, first answer, CPU s"] = time.process_time() - start
        model.run(values[:4])
        found[f"C++: {name}, MB"] = resident_mb() - base
    model.select(*signatures["serving_default"])
    for size in (1, BATCH):
        found[f"C++: CPU ms an image, batch {size}"] = cpu_ms(lambda size=size: model.run(images[:size])) / size
    return found


def run_in_session(folder: str) -> dict[str, float]:
    """Loads the model in a TensorFlow 1 session and runs all four signatures."""
    from tl_keras.serving.graphs import Graph, as_strings

    images, examples = read_inputs(folder, "jpg"), read_inputs(folder, "example")
    base, start = resident_mb(), time.process_time()
    graph = Graph(Path(folder) / "1", precision="float32")
    found = {"session: loaded, CPU s": time.process_time() - start, "session: loaded, MB": resident_mb() - base}
    pixels = np.random.default_rng(0).uniform(0, 255, (4, SIZE, SIZE, 3)).astype(np.float32)
    for name, key, values in (
        ("serving_default", "image_bytes", as_strings(images)),
        ("pixels", "images", pixels),
        ("embeddings", "image_bytes", as_strings(images)),
        ("classify", "inputs", as_strings(examples)),
    ):
        graph.run(name, {key: values[:1]})
        graph.run(name, {key: values[:4]})
        found[f"session: {name}, MB"] = resident_mb() - base
    return found


def write_inputs(folder: Path) -> None:
    """Writes eight JPEGs of 500 × 375 pixels, as they are and as serialized examples, and the names of all tensors.

    The process with the C++ loader can't write them: it can't import TensorFlow's Python package.
    """
    import tensorflow as tf
    from PIL import Image
    from tensorflow.core.protobuf import saved_model_pb2

    random = np.random.default_rng(0)
    for number in range(BATCH):
        path = folder / f"{number}.jpg"
        Image.fromarray(random.integers(0, 255, (40, 50, 3), np.uint8)).resize((500, 375)).save(path)
        example = tf.train.Example()
        example.features.feature["image_bytes"].bytes_list.value.append(path.read_bytes())
        (folder / f"{number}.example").write_bytes(example.SerializeToString())
    model = saved_model_pb2.SavedModel.FromString((folder / "1" / "saved_model.pb").read_bytes())
    signatures = {
        name: (
            next(iter(signature.inputs.values())).name,
            {key: tensor.name for key, tensor in signature.outputs.items() if tensor.dtype == tf.float32},
        )
        for name, signature in model.meta_graphs[0].signature_def.items()
        if signature.inputs
    }
    (folder / "signatures.json").write_text(json.dumps(signatures))


def read_inputs(folder: str, suffix: str) -> list[bytes]:
    return [(Path(folder) / f"{number}.{suffix}").read_bytes() for number in range(BATCH)]


def resident_mb() -> float:
    """Memory of this process after unused memory was returned to the system, in MB."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def cpu_ms(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times)


PARTS = {"export": export, "loader": run_in_loader, "session": run_in_session}

if __name__ == "__main__":
    main()
