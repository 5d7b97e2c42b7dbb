"""The calls of both APIs: predict, classify, regress, metadata, status."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from google.protobuf import any_pb2
from tensorflow.core.framework import tensor_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    input_pb2,
)

from tl_keras.serving.batching import Arrays, Batcher
from tl_keras.serving.errors import RequestError, invalid
from tl_keras.serving.graphs import DEFAULT_SIGNATURE, Graph, as_strings, check_inputs, find_signature
from tl_keras.serving.models import Models, Version

METADATA_FIELD = "signature_def"
_CLASSIFY_INPUT, _CLASSES, _SCORES = "inputs", "classes", "scores"  # saved_model/signature_constants.h
_PART = 1 << 16  # number of values that are read at once
_RESERVE, _SMALL_BYTES = 8, 1 << 20  # an eighth of the budget is reserved for requests up to this size


@dataclasses.dataclass(frozen=True)
class Served:
    """A loaded version that accepts requests.

    Attributes:
        graph: its signatures.
        batcher: runs the signatures.
        labels: class names.
        description: engine and precision, for the screen.
    """

    graph: Graph
    batcher: Batcher
    labels: tuple[str, ...]
    description: str

    def __str__(self) -> str:
        """Describes its engine."""
        return self.description


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a request.

    Attributes:
        request_bytes: maximum size of a body or message.
        images: maximum number of rows.
        seconds: maximum time from the arrival of the request to its answer.
        bytes_in_flight: maximum size of all requests that are being read or answered.
    """

    request_bytes: int
    images: int
    seconds: float
    bytes_in_flight: int

    def deadline(self, seconds: float | None = None) -> float:
        """Deadline of a request that arrives now, in seconds of `time.monotonic`; the client may set an earlier one."""
        return time.monotonic() + min(self.seconds, self.seconds if seconds is None else seconds)

    def check_rows(self, rows: int) -> None:
        """Checks the number of rows of a request.

        Raises:
            RequestError: there are too many.
        """
        if rows > self.images:
            raise invalid(f"the request holds {rows} images; this server takes at most {self.images} in one")

    def check_bytes(self, size: int) -> None:
        """Checks that a short message does not expand to a large tensor.

        Raises:
            RequestError: the tensor is too large.
        """
        if size > self.request_bytes:
            raise invalid(f"what the request stands for is larger than a request may be ({self.request_bytes} bytes)")


class Budget:
    """Budget of bytes for the requests of all clients; used in the thread of the event loop."""

    def __init__(self, limits: Limits) -> None:
        """Args: limits: limits of the server."""
        self._left = limits.bytes_in_flight
        self._reserve = limits.bytes_in_flight // _RESERVE

    def take(self, size: int, *, held: int = 0) -> None:
        """Takes bytes for a request. Large requests leave a reserve for small ones.

        Args:
            size: number of bytes.
            held: number of bytes that the request already holds.

        Raises:
            RequestError: not enough is left.
        """
        reserve = self._reserve if held + size > _SMALL_BYTES else 0
        if size > self._left - reserve:
            raise RequestError(
                grpc.StatusCode.RESOURCE_EXHAUSTED, "the server holds as many bytes as it may; try later"
            )
        self._left -= size

    def give_back(self, size: int) -> None:
        """Returns bytes to the budget."""
        self._left += size


async def predict(
    served: Served,
    signature_name: str,
    inputs: Arrays,
    *,
    limits: Limits,
    deadline: float,
    output_filter: Sequence[str] = (),
) -> Arrays:
    """Runs a signature.

    Args:
        served: the version.
        signature_name: name of the signature; empty for the default.
        inputs: name → array `(n, ...)`.
        limits: limits of the request.
        deadline: latest time, in seconds of `time.monotonic`.
        output_filter: names of the outputs to return; empty for all.

    Returns:
        Name of the output → array `(n, ...)`.

    Raises:
        RequestError: the request can't be answered.
    """
    name, signature = find_signature(served.graph, signature_name)
    rows = check_inputs(signature, inputs)
    limits.check_rows(rows)
    for number, output in enumerate(output_filter):
        if output not in signature.outputs:
            expected = ",".join(sorted(signature.outputs))
            raise invalid(
                f"output tensor alias not found in signature: {output} "
                f"Outputs expected to be in the set {{{expected}}}."
            )
        if output in output_filter[:number]:
            raise invalid(f"duplicate output tensor alias: {output}")
    outputs = await served.batcher.run(name, inputs, rows=rows, deadline=deadline)
    return {name: outputs[name] for name in output_filter} if output_filter else outputs


async def classify(
    served: Served, signature_name: str, examples: Sequence[bytes], *, limits: Limits, deadline: float
) -> tuple[np.ndarray, np.ndarray]:
    """Runs a signature from examples to classes and scores.

    Args:
        served: the version.
        signature_name: name of the signature; empty for the default.
        examples: n serialized `tf.train.Example`s.
        limits: limits of the request.
        deadline: latest time, in seconds of `time.monotonic`.

    Returns:
        Classes, bytes `(n, k)`, and scores, float32 `(n, k)`.

    Raises:
        RequestError: the request can't be answered, or the signature does not support this API.
    """
    name, signature = _find_signature(served, signature_name)
    if len(signature.outputs) not in {1, 2}:
        raise invalid(f"Expected one or two output Tensors, found {len(signature.outputs)}")
    if _CLASSIFY_INPUT not in signature.inputs:
        raise invalid(f"No classification inputs found in SignatureDef: {name}")
    if not {_CLASSES, _SCORES} & set(signature.outputs):
        raise invalid(
            f'Expected classification signature outputs to contain at least one of "{_CLASSES}" or "{_SCORES}". '
            f"Signature was: {name}"
        )
    outputs = await _run_examples(served, name, examples, limits, deadline)
    return outputs[_CLASSES], outputs[_SCORES]


async def regress(served: Served, signature_name: str) -> None:
    """Answers like TF Serving for a model without a regression signature, which classifiers do not have.

    Raises:
        RequestError: always.
    """
    name, signature = _find_signature(served, signature_name)
    if len(signature.outputs) != 1:
        raise invalid("Expected one output Tensor.")
    missing = "inputs" if _CLASSIFY_INPUT not in signature.inputs else "outputs"
    raise invalid(f"No regression {missing} found in SignatureDef: {name}")


def read_input(message: input_pb2.Input, *, limits: Limits) -> list[bytes]:
    """Reads the serialized examples of a Classify or Regress call, and merges the context into each.

    Raises:
        RequestError: there are no examples, too many, or the repeated context is too large.
    """
    kind = message.WhichOneof("kind")
    examples = getattr(message, kind).examples if kind else []
    if not examples:
        raise invalid("Input is empty.")
    limits.check_rows(len(examples))
    if kind == "example_list":
        return [example.SerializeToString() for example in examples]
    context = message.example_list_with_context.context.SerializeToString()
    limits.check_bytes(len(context) * len(examples))
    return merge(context, [example.SerializeToString() for example in examples])


def merge(context: bytes, examples: Sequence[bytes]) -> list[bytes]:
    """Merges the context into each example. Features of the example take precedence, as in TF Serving (util.cc).

    Args:
        context: serialized `tf.train.Example`.
        examples: serialized `tf.train.Example`s.
    """
    # concatenated messages are merged when they are parsed (protobuf encoding, "Last One Wins")
    return [context + example for example in examples]


def describe_metadata(version: Version, served: Served) -> get_model_metadata_pb2.GetModelMetadataResponse:
    """Lists the signatures of a version."""
    signatures = get_model_metadata_pb2.SignatureDefMap()
    for name, signature in (*served.graph.signatures.items(), *served.graph.internal_signatures.items()):
        signatures.signature_def[name].CopyFrom(signature)
    response = get_model_metadata_pb2.GetModelMetadataResponse()
    response.model_spec.name = version.model
    response.model_spec.version.value = version.number
    packed = any_pb2.Any()
    packed.Pack(signatures)
    response.metadata[METADATA_FIELD].CopyFrom(packed)
    return response


def describe_status(
    models: Models, name: str, *, number: int | None = None, label: str = ""
) -> get_model_status_pb2.GetModelStatusResponse:
    """Reports the status of the versions of a model.

    Raises:
        RequestError: there is no such model or version.
    """
    response = get_model_status_pb2.GetModelStatusResponse()
    for version in models.find_all(name, number=number, label=label):
        status = response.model_version_status.add(version=version.number)
        status.state = get_model_status_pb2.ModelVersionStatus.State.Value(version.state)
        status.status.error_code = grpc.StatusCode.UNKNOWN.value[0] if version.error else 0
        status.status.error_message = version.error
    return response


async def _run_examples(
    served: Served, name: str, examples: Sequence[bytes], limits: Limits, deadline: float
) -> Mapping[str, np.ndarray]:
    limits.check_rows(len(examples))
    outputs = await served.batcher.run(
        name, {_CLASSIFY_INPUT: as_strings(examples)}, rows=len(examples), deadline=deadline
    )
    # a signature may have only one of them
    shape = next(iter(outputs.values())).shape
    return {_CLASSES: np.full(shape, b"", object), _SCORES: np.zeros(shape, np.float32), **outputs}


def _find_signature(served: Served, name: str) -> tuple[str, Any]:
    """Finds the signature of a classify or regress call.

    Raises:
        RequestError: the signature does not exist, or has several inputs.
    """
    found = name or DEFAULT_SIGNATURE
    if found not in served.graph.signatures:
        raise invalid(f"No signature was found with the name: {found}")
    signature = served.graph.signatures[found]
    if len(signature.inputs) != 1:
        raise invalid("Expected one input Tensor.")
    return found, signature


def make_array(proto: tensor_pb2.TensorProto, *, limits: Limits) -> np.ndarray:
    """Reads a tensor of a gRPC call; checks its size first, because a single value may expand to gigabytes.

    Raises:
        RequestError: it is too large or inconsistent.
    """
    dims = [dim.size for dim in proto.tensor_shape.dim]
    if any(dim < 0 for dim in dims):
        raise invalid(f"a tensor can't have the shape {dims}")
    if dims:
        limits.check_rows(dims[0])
    try:
        dtype = tf.as_dtype(proto.dtype)
        number, given = math.prod(dims), max(len(proto.string_val), len(proto.float_val))
        if given > max(number, 1):
            raise invalid(f"a tensor of the shape {dims} can't hold {given} values")
        each = max(map(len, proto.string_val), default=0) if dtype == tf.string else dtype.size
        limits.check_bytes(number * each if len(proto.string_val) < 2 else 0)  # several strings are not repeated
        if dtype == tf.float32 and len(proto.float_val) > _PART:
            return _read_floats(proto.float_val, number).reshape(dims)
        return np.asarray(tf.make_ndarray(proto))
    except (ValueError, TypeError) as error:
        raise invalid(f"a tensor does not fit its shape {dims}: {error}") from error


def _read_floats(values: Any, number: int) -> np.ndarray:
    """Reads numbers in parts, to release the global interpreter lock between them. The last one is repeated."""
    array = np.full(number, values[-1], np.float32)
    for start in range(0, len(values), _PART):
        part = values[start : start + _PART]
        array[start : start + len(part)] = part
    return array
