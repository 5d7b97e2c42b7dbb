"""Engines: what runs a frozen trunk, as fast as the machine allows at a precision that costs nothing."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
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

FASTER_AT_LEAST = 1.3  # benchmarks/trunk.py, precision: below that, bfloat16's loss of accuracy buys nothing
COSINE_AT_LEAST = 0.995  # at 0.990 (MobileNetV2) a probe lost 1 to 2 points when served in float32
_WORTH_SECONDS = 5.0  # a trunk that is done sooner is not worth a comparison
_GREW = 10  # so many times the images: the question is asked again
_TIMED_RUNS = 2


@dataclasses.dataclass(frozen=True)
class Precision:
    """The precision that was chosen, and why.

    Attributes:
        name: `float32`, `bfloat16` or `float16`.
        reason: what is shown to the user.
    """

    name: str
    reason: str


class TensorFlowEngine:
    """Runs a trunk as a graph frozen to constants, with static batches.

    Its own session, because the rewriters that lower the precision are set for a whole session: nothing else that runs
    in the process is touched by them.
    """

    def __init__(self, trunk: keras.Model, *, batch_size: int, precision: str, dtype: Any = np.uint8) -> None:
        """Freezes the trunk.

        Args:
            trunk: images `(batch, h, w, 3)`, float32, 0 to 255 → embeddings.
            batch_size: of every batch it will run.
            precision: `float32`, `bfloat16` (on the CPU by oneDNN) or `float16` (GPU).
            dtype: of what it is given: uint8 for images, float32 for feature maps.
        """
        self.batch_size = batch_size
        shape = (batch_size, *trunk.input_shape[1:])

        @tf.function(input_signature=(tf.TensorSpec(shape, dtype),), autograph=False)
        def run_trunk(images: tf.Tensor) -> tf.Tensor:
            return trunk(tf.cast(images, tf.float32), training=False)

        frozen = convert_variables_to_constants_v2(run_trunk.get_concrete_function())
        self._graph = tf.Graph()
        with self._graph.as_default():
            tf.graph_util.import_graph_def(frozen.graph.as_graph_def(), name="")
        self._session = tf.compat.v1.Session(graph=self._graph, config=_session_config(precision))
        self._feed, self._fetch = frozen.inputs[0].name, frozen.outputs[0].name

    def at(self, precision: str) -> TensorFlowEngine:
        """Returns an engine of the same frozen graph at another precision: freezing takes seconds."""
        engine = copy.copy(self)
        engine._session = tf.compat.v1.Session(graph=self._graph, config=_session_config(precision))
        return engine

    def run(self, images: np.ndarray) -> np.ndarray:
        """Embeds up to `batch_size` images; a smaller batch is padded and cut off again.

        Args:
            images: uint8 `(b, h, w, 3)`.

        Returns:
            float32 `(b, ...)`.
        """
        count = len(images)
        if count < self.batch_size:
            images = np.concatenate([images, np.zeros((self.batch_size - count, *images.shape[1:]), images.dtype)])
        embeddings: np.ndarray = self._session.run(self._fetch, {self._feed: images})
        return embeddings[:count]


class PixelEngine:
    """The trunk of a network that is trained whole: it hands the decoded pixels on, so that they are decoded once."""

    def run(self, images: np.ndarray) -> np.ndarray:
        """Returns the images, uint8 `(b, h, w, 3)`, as they are."""
        return images


def choose_precision(
    wanted: str, trunk: keras.Model, sample: np.ndarray, *, count: int, note: Path
) -> tuple[Precision, TensorFlowEngine | None]:
    """Takes bfloat16 only where it is at least 1.3 times faster and true to float32.

    The answer is written down beside the store: a second run must find the embeddings of the first, whatever the
    clock says that day.

    Args:
        wanted: `--precision`.
        trunk: images, float32 `(batch, h, w, 3)` → embeddings.
        sample: the first batch of images, uint8 `(b, h, w, 3)`.
        count: images to embed in all.
        note: the file that keeps the answer.

    Returns:
        The precision, and an engine where one was built to find out.

    Raises:
        UserError: float16 without a GPU, or bfloat16 with one.
    """
    on_gpu = bool(tf.config.list_logical_devices("GPU"))
    if wanted == "float16" and not on_gpu:
        raise UserError("--precision=float16 needs a GPU, and TensorFlow sees none. Use --precision=auto.")
    if wanted == "bfloat16" and on_gpu:
        raise UserError("--precision=bfloat16 is the CPU's; on a GPU use --precision=float16 or auto.")
    if wanted != "auto":
        return Precision(wanted, "asked for"), None
    if on_gpu:
        return Precision("float32", "on the GPU, with TensorFloat-32 where it has it"), None
    if not has_bfloat16():
        return Precision("float32", "this CPU has no bfloat16 instructions"), None
    kept = _read_note(note)
    if kept and count < _GREW * kept["count"]:
        return Precision(kept["precision"], kept["reason"]), None
    precision, engine = _measure(trunk, sample, count)
    write_atomically(
        note, json.dumps({"precision": precision.name, "reason": precision.reason, "count": count}).encode()
    )
    return precision, engine


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


def _measure(trunk: keras.Model, sample: np.ndarray, count: int) -> tuple[Precision, TensorFlowEngine]:
    exact = TensorFlowEngine(trunk, batch_size=len(sample), precision="float32")
    exact_embeddings, exact_seconds = _time(exact, sample)
    if exact_seconds * count / len(sample) < _WORTH_SECONDS:
        return Precision("float32", f"the trunk takes less than {_WORTH_SECONDS:.0f} s"), exact
    fast = exact.at("bfloat16")
    fast_embeddings, fast_seconds = _time(fast, sample)
    faster, cosine = exact_seconds / fast_seconds, mean_cosine(exact_embeddings, fast_embeddings)
    saw = f"bfloat16 is {faster:.2f} times as fast, mean cosine to float32 {cosine:.4f}"
    if faster >= FASTER_AT_LEAST and cosine >= COSINE_AT_LEAST:
        return Precision("bfloat16", saw), fast
    return Precision("float32", f"{saw}; needed: {FASTER_AT_LEAST} and {COSINE_AT_LEAST}"), exact


def _time(engine: TensorFlowEngine, images: np.ndarray) -> tuple[np.ndarray, float]:
    """Embeddings, and the shortest of some runs in seconds; the first, which optimises the graph, is not timed."""
    embeddings = engine.run(images)
    seconds = []
    for _ in range(_TIMED_RUNS):
        start = time.perf_counter()
        engine.run(images)
        seconds.append(time.perf_counter() - start)
    return embeddings, min(seconds)


def _session_config(precision: str) -> Any:
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
    is_whole = isinstance(content, dict) and {"precision", "reason", "count"} <= content.keys()
    return content if is_whole else None
