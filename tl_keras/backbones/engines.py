"""Engines: runtimes of a frozen trunk, and the choice of the fastest one that does not cost accuracy."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.metadata
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import (  # documented, but without a public name (TF 2.21)
    convert_variables_to_constants_v2,
)

from tl_keras.backbones.openvino_requests import Requests, pad
from tl_keras.errors import UserError
from tl_keras.run import write_atomically

BATCH_SIZE = 32  # of the trunk, independent of the batch size of training
FASTER_AT_LEAST = 1.3  # benchmarks/trunk.py, precision: a smaller speedup is not worth the loss of accuracy
COSINE_AT_LEAST = 0.995  # at 0.990 (MobileNetV2) a probe lost 1 to 2 points when served in float32
# A shorter computation is not worth a benchmark. TensorFlow takes ten seconds to build and optimize its graph.
_WORTH_SECONDS = {"bfloat16": 5.0, "tensorflow": 60.0}
OPENVINO_BATCH = 4  # two in parallel; faster than 32 on five networks (benchmarks/extract.py, bare OpenVINO)
OPENVINO_TYPES = {"float32": "f32", "bfloat16": "bf16"}
_GREW = 10  # factor of the number of images beyond which the benchmark is repeated
_TIMED_RUNS = 2
_LARGEST_GRAPH_BYTES = 2_100_000_000  # protobuf's limit is 2**31 bytes; the graph itself takes a few MB
_SLOW_SECONDS = 1.0  # longer batches are timed once, because noise matters less
_OPENVINO_SAMPLE = 8  # images of the benchmark of OpenVINO: two batches of four


@dataclasses.dataclass(frozen=True)
class EngineChoice:
    """Engine and precision of the trunk.

    Attributes:
        engine: `tensorflow` or `openvino`.
        precision: `float32`, `bfloat16` or `float16`.
        reason: reason of the choice, shown to the user.
    """

    engine: str
    precision: str
    reason: str

    def address(self) -> dict[str, str]:
        """The part that determines an embedding: engine, its version, precision."""
        own = openvino_version() if self.engine == "openvino" else tf.__version__
        return {"engine": f"{self.engine} {own}, keras {keras.__version__}", "precision": self.precision}


class TensorFlowEngine:
    """Runs a trunk as a graph frozen to constants, with static batches.

    It has its own session, because graph rewriters that lower the precision apply to a whole session; other graphs of
    the process are not affected.
    """

    def __init__(self, trunk: keras.Model, *, batch_size: int, precision: str, dtype: Any = np.uint8) -> None:
        """Freezes the trunk.

        Args:
            trunk: images `(batch, h, w, 3)`, float32, 0 to 255 → embeddings, one output or several.
            batch_size: size of every batch.
            precision: `float32`, `bfloat16` (on the CPU, with oneDNN) or `float16` (GPU).
            dtype: dtype of the input: uint8 for images, float32 for feature maps.
        """
        self.batch_size, self.precision = batch_size, precision
        frozen = freeze(trunk, batch_size=batch_size, dtype=dtype)
        self._graph = tf.Graph()
        with self._graph.as_default():
            tf.graph_util.import_graph_def(frozen.graph.as_graph_def(), name="")
        self._session = tf.compat.v1.Session(graph=self._graph, config=session_config(precision))
        self._feed, self._fetch = frozen.inputs[0].name, [output.name for output in frozen.outputs]

    def at(self, precision: str) -> TensorFlowEngine:
        """Returns an engine of the same frozen graph at another precision, because freezing takes seconds."""
        engine = copy.copy(self)
        engine.precision = precision
        engine._session = tf.compat.v1.Session(graph=self._graph, config=session_config(precision))
        return engine

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        """Embeds up to `batch_size` images; smaller batches are padded internally.

        Args:
            images: uint8 `(b, h, w, 3)`.

        Returns:
            For each output float32 `(b, ...)`.
        """
        outputs = self._session.run(self._fetch, {self._feed: pad(images, self.batch_size)})
        return [embeddings[: len(images)] for embeddings in outputs]


class OpenVinoEngine:
    """Runs a trunk in OpenVINO on the CPU, with small static batches in parallel."""

    def __init__(self, trunk: keras.Model, *, batch_size: int, precision: str) -> None:
        """Converts and compiles the trunk.

        Args:
            trunk: images `(batch, h, w, 3)`, float32, 0 to 255 → embeddings, one output or several.
            batch_size: maximum batch size.
            precision: `float32` or `bfloat16`.

        Raises:
            UserError: OpenVINO can't convert the network.
        """
        self.batch_size, self.precision = batch_size, precision
        self._part = min(OPENVINO_BATCH, batch_size)
        self._shapes = [tuple(shape[1:]) for shape in _as_list(trunk.output_shape)]
        self._name = trunk.name
        with tempfile.TemporaryDirectory() as folder, _openvino_errors(trunk.name):
            import openvino

            path = Path(folder) / "trunk.pb"
            frozen = freeze(trunk, batch_size=self._part, dtype=np.uint8)
            path.write_bytes(frozen.graph.as_graph_def().SerializeToString())
            self._model = openvino.Core().read_model(path)
            self._model.reshape([self._part, *trunk.input_shape[1:]])
            self._order = _match_outputs(self._model, frozen)
            self._compile(precision)

    def at(self, precision: str) -> OpenVinoEngine:
        """Returns an engine of the same converted trunk at another precision."""
        engine = copy.copy(self)
        engine.precision = precision
        with _openvino_errors(self._name):
            engine._compile(precision)
        return engine

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        """Embeds images; see `TensorFlowEngine.run`."""
        outputs = [np.empty((len(images), *shape), np.float32) for shape in self._shapes]
        with _openvino_errors(self._name):
            self._requests.run(images, size=self._part, outputs=outputs, places=self._order)
        return outputs

    def _compile(self, precision: str) -> None:
        import openvino

        hints = {"INFERENCE_PRECISION_HINT": OPENVINO_TYPES[precision], "PERFORMANCE_HINT": "THROUGHPUT"}
        self._requests = Requests(openvino.Core().compile_model(self._model, "CPU", hints))


class PixelEngine:
    """Stores decoded pixels as embeddings if the whole network is trained, so that images are decoded once."""

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        """Returns the images, uint8 `(b, h, w, 3)`, unchanged."""
        return [images]


Engine = TensorFlowEngine | OpenVinoEngine | PixelEngine


def build_engine(choice: EngineChoice, trunk: keras.Model | None, *, batch_size: int) -> Engine:
    """Builds the chosen engine; without a trunk a `PixelEngine`.

    Raises:
        UserError: OpenVINO can't convert the network.
    """
    if trunk is None:
        return PixelEngine()
    build = OpenVinoEngine if choice.engine == "openvino" else TensorFlowEngine
    return build(trunk, batch_size=batch_size, precision=choice.precision)


def choose_engine(
    engine: str,
    precision: str,
    trunk: keras.Model,
    read_sample: Callable[[], np.ndarray | None],
    *,
    count: int,
    notes: Sequence[Path],
) -> tuple[EngineChoice, Engine | None]:
    """Chooses the fastest installed engine, at the fastest precision that agrees with float32.

    bfloat16 is chosen only if it is at least 1.3 times as fast as float32 in the same engine, and agrees with it. The
    choice is saved next to the store, so that later runs find the embeddings of earlier ones although timings vary.

    Args:
        engine: value of `--engine`.
        precision: value of `--precision`.
        trunk: images, float32 `(batch, h, w, 3)` → embeddings, one output or several.
        read_sample: reads the first batch of images, uint8 `(b, h, w, 3)`, or None if no image can be decoded; called
            only if engines have to be compared.
        count: total number of images to embed.
        notes: the files that save the choice, one for each output, so that the embeddings of a layer are found again
            with any combination of layers.

    Returns:
        The choice, and an engine if one was built for the benchmark.

    Raises:
        UserError: the engine is not installed or does not support the network, or the precision is not available.
    """
    on_gpu = bool(tf.config.list_logical_devices("GPU")) and engine != "openvino"
    _check_wanted(engine, precision, on_gpu)
    if engine == "auto" and (on_gpu or not has_openvino()):
        engine = "tensorflow"
    if engine != "auto" and precision != "auto":
        return EngineChoice(engine, precision, "as requested"), None
    if on_gpu:
        return EngineChoice(engine, "float32", "on the GPU, with TensorFloat-32 if it has it"), None
    if engine == "tensorflow" and not has_bfloat16():
        return EngineChoice(engine, "float32", "this CPU has no bfloat16 instructions"), None
    wanted = {"engine": engine, "precision": precision, "openvino": openvino_version()}
    kept = [one for one in map(_read_note, notes) if one and one["wanted"] == wanted and count < _GREW * one["count"]]
    if kept:
        choice, built, count = EngineChoice(*kept[0]["choice"]), None, kept[0]["count"]
    else:
        sample = read_sample()
        if sample is None:
            return EngineChoice("tensorflow", "float32", "no image could be decoded"), None
        choice, built = _measure(engine, precision, trunk, sample, count)
    content = {"choice": dataclasses.astuple(choice), "wanted": wanted, "count": count}
    for note in notes if len(kept) < len(notes) else ():
        write_atomically(note, json.dumps(content).encode())
    return choice, built


def has_openvino() -> bool:
    """Whether OpenVINO is installed."""
    return bool(openvino_version())


def openvino_version() -> str:
    """The version of OpenVINO; empty if it is not installed."""
    try:
        return importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        return ""


def freeze(trunk: keras.Model, *, batch_size: int, dtype: Any) -> Any:
    """Freezes a trunk to a function without variables, for static batches.

    Args:
        trunk: images `(batch, h, w, 3)`, float32, 0 to 255 → embeddings, one output or several.
        batch_size: size of every batch.
        dtype: dtype of the input.

    Returns:
        A concrete function with the outputs of the trunk, in order.

    Raises:
        UserError: its weights are larger than a graph can be.
    """
    size = sum(int(np.prod(weight.shape)) for weight in trunk.weights) * np.dtype(np.float32).itemsize
    if size > _LARGEST_GRAPH_BYTES:
        raise UserError(
            f"the frozen part of {trunk.name} has {size / 1e9:.1f} GB of weights, but TensorFlow can't freeze more "
            f"than {_LARGEST_GRAPH_BYTES / 1e9:.1f} GB. Give smaller --backbone_kwargs, or choose a smaller --backbone."
        )
    shape = (batch_size, *trunk.input_shape[1:])

    @tf.function(input_signature=(tf.TensorSpec(shape, dtype),), autograph=False)
    def run_trunk(images: tf.Tensor) -> tf.Tensor:
        return trunk(tf.cast(images, tf.float32), training=False)

    return convert_variables_to_constants_v2(run_trunk.get_concrete_function())


def has_bfloat16() -> bool:
    """Whether the CPU has bfloat16 instructions (AVX-512 BF16 or AMX), according to Linux."""
    return any(flag in read_cpu_flags() for flag in ("avx512_bf16", "amx_bf16"))


def read_cpu_flags() -> frozenset[str]:
    """The instruction sets of the CPU from `/proc/cpuinfo`; empty if there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def mean_cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Mean cosine similarity between two embeddings of the same images.

    Args:
        first: `(b, ...)`.
        second: the same shape.

    Returns:
        -1 to 1; an image whose embeddings are both zero counts as 1.
    """
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (first, second))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean(np.where(norms > 0, np.sum(a * b, axis=1) / np.where(norms > 0, norms, 1), 1.0)))


def _check_wanted(engine: str, precision: str, on_gpu: bool) -> None:
    if engine == "openvino" and not has_openvino():
        raise UserError(
            "OpenVINO is not installed. Install it, or leave --engine out: pip install 'tl_keras[openvino]'."
        )
    if precision == "float16" and engine == "openvino":
        raise UserError("--precision=float16 needs a GPU, but OpenVINO runs on the CPU. Use --precision=auto.")
    if precision == "float16" and not on_gpu:
        raise UserError("--precision=float16 needs a GPU, but TensorFlow finds none. Use --precision=auto.")
    if precision == "bfloat16" and on_gpu:
        raise UserError("--precision=bfloat16 is only available on the CPU. Use --precision=float16 or auto.")


def _measure(
    engine: str, precision: str, trunk: keras.Model, sample: np.ndarray, count: int
) -> tuple[EngineChoice, Engine]:
    """Benchmarks the requested engines; engines are skipped if the computation is short."""
    notes: list[str] = []
    best: _Timed | None = None
    for name in ("openvino", "tensorflow") if engine == "auto" else (engine,):
        if best and best.seconds_for(count) < _WORTH_SECONDS[name]:
            notes.append(f"{name} not benchmarked: the trunk takes less than {_WORTH_SECONDS[name]:.0f} s")
            break
        try:
            timed = _measure_precision(name, precision, trunk, sample, count)
        except UserError as error:
            if engine != "auto":
                raise
            notes.append(f"openvino can't be used: {error}")
            continue
        if timed.note:
            notes.append(timed.note)
        if best:
            faster = timed if timed.seconds < best.seconds else best
            slower = best if faster is timed else timed
            notes.append(f"{faster.name} is {slower.seconds / faster.seconds:.2f} times as fast as {slower.name}")
            best = faster
        best = best or timed
    if best is None:
        raise UserError(notes[-1])
    return EngineChoice(best.name, best.precision, "; ".join(notes) or "as requested"), best.engine


@dataclasses.dataclass(frozen=True)
class _Timed:
    """A benchmarked engine; `seconds` is the time of a batch."""

    name: str
    precision: str
    engine: Any
    seconds: float
    batch_size: int
    note: str

    def seconds_for(self, count: int) -> float:
        return self.seconds * count / self.batch_size


def _measure_precision(name: str, precision: str, trunk: keras.Model, sample: np.ndarray, count: int) -> _Timed:
    """Benchmarks one engine with float32, and with bfloat16 if it may be faster."""
    wanted = "float32" if precision == "auto" else precision
    # the batch size is fixed, so that results do not depend on the number of images
    size = _OPENVINO_SAMPLE if name == "openvino" else BATCH_SIZE
    exact = build_engine(EngineChoice(name, wanted, ""), trunk, batch_size=size)
    exact_embeddings, exact_seconds = _time(exact, sample[:size])
    timed = _Timed(name, wanted, exact, exact_seconds, size, "")
    if precision != "auto":
        return timed
    if timed.seconds_for(count) < _WORTH_SECONDS["bfloat16"]:
        note = f"bfloat16 not benchmarked: the trunk takes less than {_WORTH_SECONDS['bfloat16']:.0f} s"
        return dataclasses.replace(timed, note=note)
    if not has_bfloat16():
        return dataclasses.replace(timed, note="this CPU has no bfloat16 instructions")
    fast = exact.at("bfloat16")  # type: ignore[union-attr]
    fast_embeddings, fast_seconds = _time(fast, sample[:size])
    faster = exact_seconds / fast_seconds
    cosine = min(mean_cosine(*pair) for pair in zip(exact_embeddings, fast_embeddings, strict=True))
    saw = f"bfloat16 is {faster:.2f} times as fast, mean cosine similarity to float32 {cosine:.4f}"
    if faster >= FASTER_AT_LEAST and cosine >= COSINE_AT_LEAST:
        return _Timed(name, "bfloat16", fast, fast_seconds, size, saw)
    return dataclasses.replace(timed, note=f"{saw}; required: {FASTER_AT_LEAST} and {COSINE_AT_LEAST}")


def _time(engine: Any, images: np.ndarray) -> tuple[list[np.ndarray], float]:
    """Returns embeddings and the shortest time in seconds; the first run, which optimizes the graph, is not timed."""
    start = time.perf_counter()
    embeddings = engine.run(images)
    seconds: list[float] = []
    for _ in range(_TIMED_RUNS if time.perf_counter() - start < _SLOW_SECONDS else 1):
        start = time.perf_counter()
        engine.run(images)
        seconds.append(time.perf_counter() - start)
    return embeddings, min(seconds)


def _as_list(shapes: Any) -> list[Any]:
    """The output shapes of a network as a list."""
    return shapes if isinstance(shapes, list) else [shapes]


@contextlib.contextmanager
def _openvino_errors(network: str) -> Iterator[None]:
    try:
        yield
    # OpenVINO raises plain RuntimeErrors; an installation may lack libraries
    except (RuntimeError, ImportError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
        reason = next((line for line in lines if "No conversion rule" in line), lines[-1]).strip("- ")[:200].rstrip(".")
        raise UserError(f"OpenVINO does not support {network}: {reason}. Use --engine=tensorflow.") from error


def _match_outputs(model: Any, frozen: Any) -> list[int]:
    """Finds the positions of the frozen function's outputs in the converted model."""
    names = [output.get_names() for output in model.outputs]
    positions = []
    for output in frozen.outputs:
        wanted = {output.name, output.name.split(":")[0]}
        positions.append(next(number for number, known in enumerate(names) if wanted & set(known)))
    return positions


def session_config(precision: str) -> Any:
    """Options of a session; for `bfloat16` those of TF Serving's `--mixed_precision=bfloat16`."""
    config = tf.compat.v1.ConfigProto()
    rewrites = config.graph_options.rewrite_options
    if precision == "bfloat16":
        rewrites.auto_mixed_precision_onednn_bfloat16 = 1  # RewriterConfig.ON
    if precision == "float16":
        rewrites.auto_mixed_precision = 1
    config.gpu_options.allow_growth = True
    return config


def _read_note(note: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_whole = isinstance(content, dict) and {"choice", "wanted", "count"} <= content.keys()
    return content if is_whole else None
