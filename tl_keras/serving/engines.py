"""Engines of a served model: its graph as in TF Serving, or its network in OpenVINO, whichever is faster."""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError

from tl_keras.backbones.engines import freeze_function, has_openvino
from tl_keras.classifier import EXAMPLE_FEATURE, TOP_K, read_decoding
from tl_keras.data.images import open_decoder
from tl_keras.run import Interrupts
from tl_keras.serving.graphs import IMAGE_INPUT, Graph, as_strings, time_run

_PART = 4  # images per batch of one core (benchmarks/extract.py: faster than 32 on five networks)
_TYPES = {"float32": "f32", "bfloat16": "bf16"}
DIFFERENCE_AT_MOST = 1e-3  # largest change of a probability; the export has the same limit
_COMPARED = 8
_TIMED_SECONDS = 0.5  # at least


class OpenVinoGraph:
    """The exported model with its network in OpenVINO; images are decoded with the same ops as in the graph.

    The signature `embeddings` runs in the graph.
    """

    def __init__(self, graph: Graph, path: Path, labels: Sequence[str], *, precision: str) -> None:
        """Converts the network.

        Args:
            graph: the graph of the model.
            path: its version folder.
            labels: class names.
            precision: `float32` or `bfloat16`.

        Raises:
            RuntimeError: OpenVINO can't convert it.
        """
        import openvino

        self.signatures, self._graph = graph.signatures, graph
        self.internal_signatures = graph.internal_signatures
        self._labels = as_strings([label.encode() for label in labels])
        model = tf.saved_model.load(str(path))
        shape = model.signatures["pixels"].structured_input_signature[1]["images"].shape
        self._decode_one = open_decoder(image_size=int(shape[1]), **read_decoding(path))
        self._decoders = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")
        core = openvino.Core()
        with tempfile.TemporaryDirectory() as folder:
            frozen = Path(folder) / "network.pb"
            frozen.write_bytes(_extract_network(model.signatures["pixels"]))
            network = core.read_model(frozen)
        self._compiled = {}
        for size, hint in ((1, "LATENCY"), (_PART, "THROUGHPUT")):
            network.reshape([size, *shape[1:]])
            hints = {"INFERENCE_PRECISION_HINT": _TYPES[precision], "PERFORMANCE_HINT": hint}
            self._compiled[size] = core.compile_model(network, "CPU", hints)
        self._own = threading.local()

    def run(self, name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs a signature: see `Graph.run`."""
        if name == "pixels":
            images = inputs["images"]
            return self._answer(self._run(images), np.isfinite(images).all(axis=(1, 2, 3)))
        if name == "serving_default":
            return self._classify(inputs[IMAGE_INPUT])
        if name == "classify":
            answer = self._classify(as_strings([_read_example(one) for one in inputs["inputs"]]))
            return {"classes": answer["labels"], "scores": answer["scores"]}
        return self._graph.run(name, inputs)

    def close(self) -> None:
        """Releases the memory, including the graph's."""
        self.close_own()
        self._graph.close()

    def close_own(self) -> None:
        """Releases everything except the graph."""
        self._decoders.shutdown(wait=True)
        self._own, self._compiled = threading.local(), {}

    def keeps(self, graph: Graph) -> bool:
        """Whether it uses the graph (for embeddings)."""
        return graph is self._graph

    def _classify(self, image_bytes: np.ndarray) -> dict[str, np.ndarray]:
        # image by image on all cores: starting the pipeline in the graph takes longer than decoding an image
        images = list(self._decoders.map(self._decode, image_bytes))
        valid = np.array([image is not None for image in images], bool)
        probabilities = np.zeros((len(valid), len(self._labels)), np.float32)
        if valid.any():  # padding rows are not decoded
            good = np.stack([image for image in images if image is not None])
            probabilities[valid] = self._run(good.astype(np.float32))
        return self._answer(probabilities, valid)

    def _decode(self, content: bytes) -> np.ndarray | None:
        """Decodes one image, uint8 `(size, size, 3)`; None if it is invalid."""
        if not content:
            return None
        try:
            image: np.ndarray = self._decode_one(content)
            return image
        except tf.errors.OpError:
            return None

    def _run(self, images: np.ndarray) -> np.ndarray:
        """Computes probabilities, float32 `(n, classes)`."""
        size = 1 if len(images) <= _PART else _PART  # each part runs on one core: a few images are faster on all cores
        probabilities = np.zeros((len(images), len(self._labels)), np.float32)
        queue = self._queue(size)

        def keep(request: Any, start: int) -> None:
            kept = probabilities[start : start + size]
            kept[:] = request.get_output_tensor(0).data[: len(kept)]

        queue.set_callback(keep)
        for start in range(0, len(images), size):
            part = images[start : start + size]
            missing = size - len(part)
            full = np.concatenate([part, np.zeros((missing, *part.shape[1:]), part.dtype)]) if missing else part
            queue.start_async({0: full}, start)
        queue.wait_all()
        return probabilities

    def _queue(self, size: int) -> Any:
        """The request queue of the current thread, for parallel parts; it can't be shared between threads."""
        import openvino

        if not hasattr(self._own, "queues"):
            self._own.queues = {}
        if size not in self._own.queues:
            self._own.queues[size] = openvino.AsyncInferQueue(self._compiled[size])
        return self._own.queues[size]

    def _answer(self, probabilities: np.ndarray, valid: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs of `Servable`."""
        probabilities = np.where(valid[:, None], probabilities, np.float32(0))
        class_ids = np.argsort(-probabilities, axis=1, kind="stable")[:, : min(TOP_K, len(self._labels))]
        labels = self._labels[class_ids]
        labels[~valid] = b""
        return {
            "probabilities": probabilities,
            "labels": labels,
            "scores": np.take_along_axis(probabilities, class_ids, 1),
            "class_ids": np.where(valid[:, None], class_ids, -1),
            "valid": valid,
        }


@dataclasses.dataclass(frozen=True)
class ServingEngine:
    """Engine and precision of a model.

    Attributes:
        engine: `tensorflow` or `openvino`; `auto` before it is chosen.
        precision: `float32` or `bfloat16`; `auto` before it is chosen.
    """

    engine: str
    precision: str

    def __str__(self) -> str:
        """The text for the screen."""
        return f"{self.engine} {self.precision}"


def build_serving_engine(
    path: Path, labels: Sequence[str], *, wanted: ServingEngine, samples: Sequence[bytes], show: Callable[[str], None]
) -> tuple[Any, ServingEngine]:
    """Loads a version in the requested engine, or in the fastest one whose predictions agree with the graph.

    Args:
        path: the version folder.
        labels: class names.
        wanted: requested engine and precision.
        samples: images for the comparison and the benchmark.
        show: shows a line.

    Returns:
        The engine that runs the signatures, and its description.

    Raises:
        RuntimeError: the requested engine is not available, or its predictions differ from the graph.
    """
    graph = Graph(path, precision="float32")
    images = as_strings([*(list(samples) * _COMPARED)[: _COMPARED - 1], b"no image"])
    expected = graph.run("serving_default", {IMAGE_INPUT: images})
    clock = functools.partial(time_run, images=images, seconds=_TIMED_SECONDS)
    plain = ServingEngine("tensorflow", "float32")
    found: dict[ServingEngine, tuple[Any, float]] = {plain: (graph, clock(graph))} if plain in _list(wanted) else {}
    reason = ""
    for choice in _list(wanted):
        if choice == plain:
            continue
        tried = None
        try:
            with Interrupts.restored():
                tried = _load(choice, graph, path, labels)
                difference = _check_answers(tried, choice, images, expected)
                found[choice] = tried, clock(tried)
            if choice.precision == "bfloat16":
                show(_describe_rounding(choice, difference, len(images) - 1))
        except Exception as error:  # OpenVINO raises plain RuntimeErrors, TensorFlow its own exceptions
            reason = f"{choice} does not run {path}: {(str(error).strip().splitlines() or ['unknown'])[0][:200]}"
            show(reason)
            if tried is not None:
                tried.close_own()
    if not found:
        graph.close()
        raise RuntimeError(reason)
    best = min(found, key=lambda one: found[one][1])
    chosen = found[best][0]
    for other, _ in found.values():
        if other is not chosen and other is not graph:
            other.close_own()
    if chosen is not graph and not chosen.keeps(graph):
        graph.close()
    return chosen, best


def _describe_rounding(choice: ServingEngine, difference: float, count: int) -> str:
    return (
        f"{choice}: probabilities differ from the exported model's by up to {difference:.4f} on {count} images; "
        "--precision=float32 answers as the model was evaluated"
    )


def _list(wanted: ServingEngine) -> list[ServingEngine]:
    """Lists the engines to try."""
    engines = [wanted.engine]
    if wanted.engine == "auto":
        engines = ["tensorflow", "openvino"] if has_openvino() else ["tensorflow"]
    # bfloat16 changes probabilities by up to 0.1 (MobileNetV2), the export allows 0.001: it must be requested
    precision = "float32" if wanted.precision == "auto" else wanted.precision
    return [ServingEngine(engine, precision) for engine in engines]


def _load(choice: ServingEngine, graph: Graph, path: Path, labels: Sequence[str]) -> Any:
    if choice.engine == "openvino":
        return OpenVinoGraph(graph, path, labels, precision=choice.precision)
    return Graph(path, precision=choice.precision)


def _check_answers(tried: Any, choice: ServingEngine, images: np.ndarray, expected: dict[str, np.ndarray]) -> float:
    """Compares the answers of an engine with those of the exported graph.

    Returns:
        The largest difference of a probability.

    Raises:
        RuntimeError: the answers differ. Probabilities in bfloat16 may differ by any finite amount, because it was
            requested explicitly.
    """
    answers = tried.run("serving_default", {IMAGE_INPUT: images})
    if (answers["valid"] != expected["valid"]).any():
        raise RuntimeError("it does not find the same images invalid as the graph does")
    difference = float(np.abs(answers["probabilities"] - expected["probabilities"]).max())
    if not difference <= (DIFFERENCE_AT_MOST if choice.precision == "float32" else 1.0):  # also rejects NaN
        raise RuntimeError(f"its probabilities differ from the graph's by {difference:.1e}")
    # rounding may swap the two best classes if they are nearly equal
    ordered = np.sort(expected["probabilities"], axis=1)
    is_clear = ordered[:, -1] - ordered[:, -2] > 2 * difference
    if (answers["labels"][is_clear, 0] != expected["labels"][is_clear, 0]).any():
        raise RuntimeError("its labels are not the graph's")
    return difference


def _extract_network(pixels: Any) -> bytes:
    """Extracts the graph from `images` to `probabilities`, as a serialized GraphDef, without labels and top k."""
    frozen = freeze_function(pixels)
    names = sorted(pixels.structured_outputs)
    output = frozen.outputs[names.index("probabilities")].op.name
    graph = tf.compat.v1.graph_util.extract_sub_graph(frozen.graph.as_graph_def(), [output])
    return bytes(graph.SerializeToString())


def _read_example(serialized: bytes) -> bytes:
    """Reads the image in a serialized example; empty, and therefore invalid, if it has none or several."""
    try:
        values = tf.train.Example.FromString(serialized).features.feature[EXAMPLE_FEATURE].bytes_list.value
    except DecodeError:
        return b""
    return values[0] if len(values) == 1 else b""
