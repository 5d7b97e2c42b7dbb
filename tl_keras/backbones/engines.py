"""Engines: what runs a frozen trunk, as fast as the machine allows at a precision that costs nothing."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.metadata
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import (  # the documented way has no public name (TF 2.21)
    convert_variables_to_constants_v2,
)

from tl_keras.errors import UserError
from tl_keras.run import write_atomically

BATCH_SIZE = 32  # of the trunk, whatever the batch of training
FASTER_AT_LEAST = 1.3  # benchmarks/trunk.py, precision: below that, bfloat16's loss of accuracy buys nothing
COSINE_AT_LEAST = 0.995  # at 0.990 (MobileNetV2) a probe lost 1 to 2 points when served in float32
# A trunk that is done sooner is not worth a comparison. TensorFlow takes ten seconds to build and optimise its graph.
_WORTH_SECONDS = {"bfloat16": 5.0, "tensorflow": 60.0}
_OPENVINO_BATCH = 4  # two at once, the faster of 4 and 32 on five networks (benchmarks/extract.py, bare OpenVINO)
_OPENVINO_TYPES = {"float32": "f32", "bfloat16": "bf16"}
_GREW = 10  # so many times the images: the question is asked again
_TIMED_RUNS = 2
_SLOW_SECONDS = 1.0  # a batch that takes longer is timed once: clocks are not that noisy
_OPENVINO_SAMPLE = 8  # images that tell its speed: it runs them by four


@dataclasses.dataclass(frozen=True)
class EngineChoice:
    """What runs the trunk, and why.

    Attributes:
        engine: `tensorflow` or `openvino`.
        precision: `float32`, `bfloat16` or `float16`.
        reason: what is shown to the user.
    """

    engine: str
    precision: str
    reason: str

    def address(self) -> dict[str, str]:
        """What of it determines an embedding: engine, its version, precision."""
        own = openvino_version() if self.engine == "openvino" else tf.__version__
        return {"engine": f"{self.engine} {own}, keras {keras.__version__}", "precision": self.precision}


class TensorFlowEngine:
    """Runs a trunk as a graph frozen to constants, with static batches.

    Its own session, because the rewriters that lower the precision are set for a whole session: nothing else that runs
    in the process is touched by them.
    """

    def __init__(self, trunk: keras.Model, *, batch_size: int, precision: str, dtype: Any = np.uint8) -> None:
        """Freezes the trunk.

        Args:
            trunk: images `(batch, h, w, 3)`, float32, 0 to 255 → embeddings, one output or several.
            batch_size: of every batch it will run.
            precision: `float32`, `bfloat16` (on the CPU by oneDNN) or `float16` (GPU).
            dtype: of what it is given: uint8 for images, float32 for feature maps.
        """
        self.batch_size, self.precision = batch_size, precision
        frozen = freeze(trunk, batch_size=batch_size, dtype=dtype)
        self._graph = tf.Graph()
        with self._graph.as_default():
            tf.graph_util.import_graph_def(frozen.graph.as_graph_def(), name="")
        self._session = tf.compat.v1.Session(graph=self._graph, config=session_config(precision))
        self._feed, self._fetch = frozen.inputs[0].name, [output.name for output in frozen.outputs]

    def at(self, precision: str) -> TensorFlowEngine:
        """Returns an engine of the same frozen graph at another precision: freezing takes seconds."""
        engine = copy.copy(self)
        engine.precision = precision
        engine._session = tf.compat.v1.Session(graph=self._graph, config=session_config(precision))
        return engine

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        """Embeds up to `batch_size` images; a smaller batch is padded and cut off again.

        Args:
            images: uint8 `(b, h, w, 3)`.

        Returns:
            For each output float32 `(b, ...)`.
        """
        outputs = self._session.run(self._fetch, {self._feed: _pad(images, self.batch_size)})
        return [embeddings[: len(images)] for embeddings in outputs]


class OpenVinoEngine:
    """Runs a trunk in OpenVINO on the CPU, with small static batches, as many at once as the cores take."""

    def __init__(self, trunk: keras.Model, *, batch_size: int, precision: str) -> None:
        """Converts and compiles the trunk.

        Args:
            trunk: images `(batch, h, w, 3)`, float32, 0 to 255 → embeddings, one output or several.
            batch_size: the most images it is given at once.
            precision: `float32` or `bfloat16`.

        Raises:
            UserError: OpenVINO does not convert this network.
        """
        self.batch_size, self.precision = batch_size, precision
        self._part = min(_OPENVINO_BATCH, batch_size)
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

        def keep(request: Any, start: int) -> None:
            for output, position in zip(outputs, self._order, strict=True):
                part = output[start : start + self._part]
                part[:] = request.get_output_tensor(position).data[: len(part)]

        with _openvino_errors(self._name):
            self._queue.set_callback(keep)
            for start in range(0, len(images), self._part):
                self._queue.start_async({0: _pad(images[start : start + self._part], self._part)}, start)
            self._queue.wait_all()
        return outputs

    def _compile(self, precision: str) -> None:
        import openvino

        hints = {"INFERENCE_PRECISION_HINT": _OPENVINO_TYPES[precision], "PERFORMANCE_HINT": "THROUGHPUT"}
        self._queue = openvino.AsyncInferQueue(openvino.Core().compile_model(self._model, "CPU", hints))


class PixelEngine:
    """The trunk of a network that is trained whole: it hands the decoded pixels on, so that they are decoded once."""

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        """Returns the images, uint8 `(b, h, w, 3)`, as they are."""
        return [images]


Engine = TensorFlowEngine | OpenVinoEngine | PixelEngine


def build_engine(choice: EngineChoice, trunk: keras.Model | None, *, batch_size: int) -> Engine:
    """Builds what was chosen; without a trunk what hands the pixels on.

    Raises:
        UserError: OpenVINO does not convert this network.
    """
    if trunk is None:
        return PixelEngine()
    build = OpenVinoEngine if choice.engine == "openvino" else TensorFlowEngine
    return build(trunk, batch_size=batch_size, precision=choice.precision)


def choose_engine(
    engine: str, precision: str, trunk: keras.Model, sample: np.ndarray, *, count: int, notes: Sequence[Path]
) -> tuple[EngineChoice, Engine | None]:
    """Takes the fastest engine that is installed, at the fastest precision that is true to float32.

    bfloat16 is taken only where it is at least 1.3 times faster than the same engine's float32, and true to it.
    The answer is written down beside the store: a second run must find the embeddings of the first, whatever the
    clock says that day.

    Args:
        engine: `--engine`.
        precision: `--precision`.
        trunk: images, float32 `(batch, h, w, 3)` → embeddings, one output or several.
        sample: the first batch of images, uint8 `(b, h, w, 3)`.
        count: images to embed in all.
        notes: the files that keep the answer, one for each output: whichever layers are read together, a layer's
            embeddings are found again.

    Returns:
        The choice, and an engine where one was built to find out.

    Raises:
        UserError: an engine that is not installed or does not take the network, or a precision that is not to be had.
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
        choice, built = _measure(engine, precision, trunk, sample, count)
    content = {"choice": dataclasses.astuple(choice), "wanted": wanted, "count": count}
    for note in notes if len(kept) < len(notes) else ():
        write_atomically(note, json.dumps(content).encode())
    return choice, built


def has_openvino() -> bool:
    """Whether OpenVINO is installed."""
    return bool(openvino_version())


def openvino_version() -> str:
    """OpenVINO's version; empty where it is not installed."""
    try:
        return importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        return ""


def freeze(trunk: keras.Model, *, batch_size: int, dtype: Any) -> Any:
    """A trunk as a function without variables, for static batches.

    Args:
        trunk: images `(batch, h, w, 3)`, float32, 0 to 255 → embeddings, one output or several.
        batch_size: of every batch it will run.
        dtype: of what it is given.

    Returns:
        A concrete function; its outputs are the trunk's, in order.
    """
    shape = (batch_size, *trunk.input_shape[1:])

    @tf.function(input_signature=(tf.TensorSpec(shape, dtype),), autograph=False)
    def run_trunk(images: tf.Tensor) -> tf.Tensor:
        return trunk(tf.cast(images, tf.float32), training=False)

    return freeze_function(run_trunk.get_concrete_function())


def freeze_function(function: Any) -> Any:
    """A concrete function with its variables made constants and its calls inlined."""
    return convert_variables_to_constants_v2(function)


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself (AVX-512 BF16 or AMX), as Linux tells it."""
    return any(flag in read_cpu_flags() for flag in ("avx512_bf16", "amx_bf16"))


def read_cpu_flags() -> frozenset[str]:
    """The CPU's instruction sets as `/proc/cpuinfo` names them; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def mean_cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Mean over a batch of the cosine between two embeddings of the same image.

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
        raise UserError("--precision=float16 needs a GPU, and OpenVINO runs on the CPU here. Use --precision=auto.")
    if precision == "float16" and not on_gpu:
        raise UserError("--precision=float16 needs a GPU, and TensorFlow sees none. Use --precision=auto.")
    if precision == "bfloat16" and on_gpu:
        raise UserError("--precision=bfloat16 runs on the CPU only. On a GPU use --precision=float16 or auto.")


def _measure(
    engine: str, precision: str, trunk: keras.Model, sample: np.ndarray, count: int
) -> tuple[EngineChoice, Engine]:
    """The fastest of the engines asked for; a trunk that is soon done is not worth a comparison."""
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
    """An engine that was tried: the seconds are a batch's."""

    name: str
    precision: str
    engine: Any
    seconds: float
    batch_size: int
    note: str

    def seconds_for(self, count: int) -> float:
        return self.seconds * count / self.batch_size


def _measure_precision(name: str, precision: str, trunk: keras.Model, sample: np.ndarray, count: int) -> _Timed:
    """Float32 or, where it is faster and true to it, bfloat16; of one engine."""
    wanted = "float32" if precision == "auto" else precision
    # an engine always has the same batch, however few images there are: its bits must not depend on their number
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
    """Embeddings, and the shortest of some runs in seconds; the first, which optimises the graph, is not timed."""
    start = time.perf_counter()
    embeddings = engine.run(images)
    seconds: list[float] = []
    for _ in range(_TIMED_RUNS if time.perf_counter() - start < _SLOW_SECONDS else 1):
        start = time.perf_counter()
        engine.run(images)
        seconds.append(time.perf_counter() - start)
    return embeddings, min(seconds)


def _pad(images: np.ndarray, batch_size: int) -> np.ndarray:
    """A full batch: black images behind those given."""
    if len(images) == batch_size:
        return images
    return np.concatenate([images, np.zeros((batch_size - len(images), *images.shape[1:]), images.dtype)])


def _as_list(shapes: Any) -> list[Any]:
    """A network's output shapes, of one output or several."""
    return shapes if isinstance(shapes, list) else [shapes]


@contextlib.contextmanager
def _openvino_errors(network: str) -> Iterator[None]:
    try:
        yield
    # OpenVINO's own exceptions are RuntimeErrors without a class of their own; an install may lack its libraries
    except (RuntimeError, ImportError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
        reason = next((line for line in lines if "No conversion rule" in line), lines[-1]).strip("- ")[:200].rstrip(".")
        raise UserError(f"OpenVINO does not take {network}: {reason}. Use --engine=tensorflow.") from error


def _match_outputs(model: Any, frozen: Any) -> list[int]:
    """Where the converted model has each of the frozen function's outputs."""
    names = [output.get_names() for output in model.outputs]
    positions = []
    for output in frozen.outputs:
        wanted = {output.name, output.name.split(":")[0]}
        positions.append(next(number for number, known in enumerate(names) if wanted & set(known)))
    return positions


def session_config(precision: str) -> Any:
    """A session's options: of `bfloat16` what TF Serving's `--mixed_precision=bfloat16` sets."""
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
