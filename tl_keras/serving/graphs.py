"""A version of a model, loaded like in TF Serving: in a TF1 session, without Keras and without Python code."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tl_keras.backbones.engines import session_config
from tl_keras.serving.errors import RequestError, code_of, invalid

DEFAULT_SIGNATURE, IMAGE_INPUT = "serving_default", "image_bytes"
_TIMED_RUNS = 3
_INIT_OP = "__saved_model_init_op"


class Graph:
    """A loaded SavedModel with its signatures and a session that runs them.

    Attributes:
        signatures: name → `SignatureDef`.
        internal_signatures: signatures that clients cannot run but metadata shows.
        warm_up_requests: number of warm-up requests to run before the model is served; None for all.
    """

    warm_up_requests: int | None = None

    def __init__(self, path: Path, *, precision: str) -> None:
        """Loads the model.

        Args:
            path: the version folder.
            precision: `float32`, or `bfloat16`, like TF Serving with `--mixed_precision=bfloat16`.

        Raises:
            OSError: there is no model at `path`.
            ValueError: it is damaged; TensorFlow also raises other exceptions.
        """
        self._graph = tf.Graph()
        self._session = tf.compat.v1.Session(graph=self._graph, config=session_config(precision))
        with self._graph.as_default():
            meta = tf.compat.v1.saved_model.load(self._session, ["serve"], str(path))
        self.signatures, self.internal_signatures = divide_signatures(meta)
        self._runners = {name: self._make_runner(signature) for name, signature in self.signatures.items()}

    def run(self, name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs a signature.

        Args:
            name: the signature.
            inputs: name → array `(n, ...)`; strings as arrays of bytes.

        Returns:
            Name of the output → array `(n, ...)`.

        Raises:
            RequestError: TensorFlow rejects the inputs.
        """
        signature = self.signatures[name]
        try:
            found = self._runners[name](*[inputs[key] for key in sorted(signature.inputs)])
        except tf.errors.OpError as error:
            raise RequestError(code_of(error.error_code), error.message.splitlines()[0]) from error
        except ValueError as error:
            raise invalid(str(error)) from error
        return dict(zip(sorted(signature.outputs), found, strict=True))

    def close(self) -> None:
        """Releases the memory of the session."""
        self._session.close()

    def _make_runner(self, signature: Any) -> Any:
        """Makes a callable of the session that does not parse names in each call."""
        fetches = [signature.outputs[key].name for key in sorted(signature.outputs)]
        feeds = [signature.inputs[key].name for key in sorted(signature.inputs)]
        with self._graph.as_default():
            return self._session.make_callable(fetches, feed_list=feeds)


def divide_signatures(meta: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Copies the signatures of a `MetaGraphDef`: those that clients can run, and internal ones."""
    found = {name: type(one).FromString(one.SerializeToString()) for name, one in meta.signature_def.items()}
    internal = {name: found.pop(name) for name in [_INIT_OP] if name in found}
    return found, internal


def find_signature(graph: Graph, name: str) -> tuple[str, Any]:
    """Finds a signature by the name in a request; empty for the default.

    Raises:
        RequestError: the model has no such signature.
    """
    found = name or DEFAULT_SIGNATURE
    if found not in graph.signatures:
        raise invalid(f'Serving signature name: "{found}" not found in signature def')
    return found, graph.signatures[found]


def check_inputs(signature: Any, inputs: Mapping[str, np.ndarray]) -> int:
    """Checks names, types and shapes before a request joins others in a batch.

    Returns:
        The number of rows.

    Raises:
        RequestError: a name, type or shape does not fit the signature.
    """
    sent, wanted = set(inputs), set(signature.inputs)
    if sent != wanted:
        raise invalid(
            f"input size does not match signature: {len(sent)}!={len(wanted)} len({{{_join(sent)}}}) != "
            f"len({{{_join(wanted)}}}). Sent extra: {{{_join(sent - wanted)}}}. Missing but required: "
            f"{{{_join(wanted - sent)}}}."
        )
    rows = set()
    for name, array in inputs.items():
        info = signature.inputs[name]
        _check_type(name, array, tf.as_dtype(info.dtype))
        if not array.ndim:
            raise invalid("Batching Run() input tensors must have at least one dimension")
        expected = [dim.size for dim in info.tensor_shape.dim]
        fits = len(expected) == array.ndim and all(e in {-1, n} for e, n in zip(expected, array.shape, strict=True))
        if not info.tensor_shape.unknown_rank and not fits:
            raise invalid(f"input {name} has shape {list(array.shape)}, and the signature takes {expected}")
        rows.add(len(array))
    if len(rows) > 1:
        raise invalid("Batching Run() input tensors must have equal 0th-dimension size")
    return rows.pop() if rows else 0


def time_run(graph: Any, images: np.ndarray, *, seconds: float) -> float:
    """Measures the shortest of several runs of `serving_default`, in seconds.

    Args:
        graph: a `Graph` or engine that has already run a batch of this size, so that it is warmed up.
        images: encoded images, `(n,)` of bytes.
        seconds: minimum total time; there are at least three runs.
    """
    times = list[float]()
    while len(times) < _TIMED_RUNS or sum(times) < seconds:
        start = time.perf_counter()
        graph.run(DEFAULT_SIGNATURE, {IMAGE_INPUT: images})
        times.append(time.perf_counter() - start)
    return min(times)


def as_strings(values: Sequence[bytes]) -> np.ndarray:
    """Makes an array of bytes for string tensors; NumPy's bytes type would remove trailing zeros."""
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _check_type(name: str, array: np.ndarray, dtype: tf.DType) -> None:
    given = tf.string if array.dtype == object else tf.as_dtype(array.dtype)
    if given != dtype:
        raise invalid(f"Expects arg[0] to be {dtype.name} but {given.name} is provided (input {name})")


def _join(names: set[str]) -> str:
    return ",".join(sorted(names))
