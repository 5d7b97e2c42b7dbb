"""A version of a model whose network runs in OpenVINO; images are decoded with the same ops as in its graph."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import saved_model_pb2

from tl_keras.backbones.engines import OPENVINO_BATCH, OPENVINO_TYPES
from tl_keras.backbones.openvino_requests import Requests
from tl_keras.classifier import EXAMPLE_FEATURE, NETWORK_FUNCTION, TOP_K, read_decoding, read_labels
from tl_keras.data.images import open_decoder
from tl_keras.serving.graphs import DEFAULT_SIGNATURE, IMAGE_INPUT, as_strings, divide_signatures

_OUTPUTS = ("embeddings", "probabilities")  # of the network's function, in this order
_CALLS = {"PartitionedCall", "StatefulPartitionedCall"}


class OpenVinoGraph:
    """An exported model whose network runs in OpenVINO.

    Attributes:
        signatures: name → `SignatureDef`.
        internal_signatures: signatures that clients cannot run but metadata shows.
        warm_up_requests: number of warm-up requests to run: one, because all signatures share the compiled networks,
            which have run before.
    """

    warm_up_requests: int | None = 1

    def __init__(self, path: Path, *, precision: str) -> None:
        """Converts and compiles the network.

        Args:
            path: the version folder.
            precision: `float32` or `bfloat16`.

        Raises:
            RuntimeError: OpenVINO can't convert it, or the model was exported by another version or program.
            OSError: there is no model at `path`.
        """
        import openvino

        self._labels = as_strings([label.encode() for label in read_labels(path)])
        model = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
        self.signatures, self.internal_signatures = divide_signatures(model.meta_graphs[0])
        core = openvino.Core()
        network = _read_network(core, model.meta_graphs[0], path)
        shape = [side.get_length() for side in list(network.inputs[0].partial_shape)[1:]]
        self._decode_one = open_decoder(image_size=shape[0], **read_decoding(path))
        self._decoders = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")
        self._compiled = {}
        for size, hint in ((1, "LATENCY"), (OPENVINO_BATCH, "THROUGHPUT")):
            network.reshape([size, *shape])  # the same weights, prepared for another batch size
            hints = {"INFERENCE_PRECISION_HINT": OPENVINO_TYPES[precision], "PERFORMANCE_HINT": hint}
            self._compiled[size] = core.compile_model(network, "CPU", hints)
        self._order = [_find_output(network, name) for name in _OUTPUTS]
        self._shapes = [tuple(network.outputs[place].shape[1:]) for place in self._order]
        self._own = threading.local()
        for count in (1, OPENVINO_BATCH + 1):  # the first request of a compiled network takes longest
            self._run(np.zeros((count, *shape), np.float32))

    def run(self, name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs a signature: see `Graph.run`."""
        if name == "pixels":
            images = inputs["images"]
            return self._answer(self._run(images)[1], np.isfinite(images).all(axis=(1, 2, 3)))
        if name == "embeddings":
            return {"embeddings": self._embed(inputs[IMAGE_INPUT])[0]}
        if name == "classify":
            _, probabilities, valid = self._embed(as_strings([_read_example(one) for one in inputs["inputs"]]))
            answer = self._answer(probabilities, valid)
            return {"classes": answer["labels"], "scores": answer["scores"]}
        _, probabilities, valid = self._embed(inputs[IMAGE_INPUT])
        return self._answer(probabilities, valid)

    def close(self) -> None:
        """Releases the memory."""
        self._decoders.shutdown(wait=True)
        self._own, self._compiled = threading.local(), {}

    def _embed(self, image_bytes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Computes embeddings and probabilities, zeros for invalid images, and whether images are valid."""
        # image by image on all cores: starting the pipeline in the graph takes longer than decoding an image
        images = list(self._decoders.map(self._decode, image_bytes))
        valid = np.array([image is not None for image in images], bool)
        outputs = self._make_outputs(len(valid))
        if valid.any():
            good = np.stack([image for image in images if image is not None])
            for output, found in zip(outputs, self._run(good.astype(np.float32)), strict=True):
                output[valid] = found
        return outputs[0], outputs[1], valid

    def _decode(self, content: bytes) -> np.ndarray | None:
        """Decodes one image, uint8 `(size, size, 3)`; None if it is invalid."""
        if not content:  # padding rows are not decoded
            return None
        try:
            return self._decode_one(content)
        except tf.errors.OpError:
            return None

    def _make_outputs(self, count: int) -> list[np.ndarray]:
        return [np.zeros((count, *shape), np.float32) for shape in self._shapes]

    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        """Computes embeddings and probabilities, float32 `(n, ...)`."""
        # each part runs on one core: a few images are faster on all cores
        size = 1 if len(images) <= OPENVINO_BATCH else OPENVINO_BATCH
        outputs = self._make_outputs(len(images))
        self._find_requests(size).run(images, size=size, outputs=outputs, places=self._order)
        return outputs

    def _find_requests(self, size: int) -> Requests:
        """The requests of the current thread, for parallel parts; they can't be shared between threads."""
        if not hasattr(self._own, "requests"):
            self._own.requests = {}
        if size not in self._own.requests:
            self._own.requests[size] = Requests(self._compiled[size])
        found: Requests = self._own.requests[size]
        return found

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


def _read_network(core: Any, meta: Any, path: Path) -> Any:
    """Reads the network, images → embeddings and probabilities, from a SavedModel.

    OpenVINO reads the default signature of a SavedModel, with its variables. It is given a copy of the graph whose
    default signature calls the function of the network.

    Args:
        core: `openvino.Core`.
        meta: the `MetaGraphDef`; it is changed.
        path: the version folder.

    Returns:
        An `openvino.Model`.

    Raises:
        RuntimeError: OpenVINO can't convert it, or the model has no such function.
    """
    if "pixels" not in meta.signature_def:
        raise RuntimeError("it has no signature that takes pixels")
    signature = meta.signature_def["pixels"]
    call = _find_network(meta.graph_def, signature)
    meta.graph_def.node.append(call)
    default = meta.signature_def[DEFAULT_SIGNATURE]
    default.Clear()
    default.method_name = signature.method_name
    default.inputs["images"].CopyFrom(signature.inputs["images"])
    for number, name in enumerate(_OUTPUTS):
        default.outputs[name].name = f"{call.name}:{number}"
        default.outputs[name].dtype = tf.float32.as_datatype_enum
    for name in [name for name in meta.signature_def if name != DEFAULT_SIGNATURE]:
        del meta.signature_def[name]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps files that are mapped
        model = saved_model_pb2.SavedModel(saved_model_schema_version=1, meta_graphs=[meta])
        (Path(folder) / "saved_model.pb").write_bytes(model.SerializeToString())
        _link(path / "variables", Path(folder) / "variables")
        return core.read_model(folder)


def _find_network(graph: Any, signature: Any) -> Any:
    """Makes a node that calls the function of the network with the images of the signature `pixels`.

    The signature calls a function that calls the function of the network; on the way down the variables that are
    passed are followed by name.

    Args:
        graph: a `GraphDef`.
        signature: the `SignatureDef` of `pixels`.

    Raises:
        RuntimeError: there is no such function.
    """
    functions = {function.signature.name: function for function in graph.library.function}
    node_name = next(iter(signature.outputs.values())).name.split(":")[0]
    call = next(node for node in graph.node if node.name == node_name)
    inputs = _list_data(call)
    while call is not None and call.attr["f"].func.name in functions:
        function = functions[call.attr["f"].func.name]
        if NETWORK_FUNCTION in function.signature.name:
            found = tf.compat.v1.NodeDef(name=NETWORK_FUNCTION, op=call.op, attr=call.attr)
            found.input.extend([signature.inputs["images"].name.split(":")[0], *inputs[1:]])
            return found
        passed = dict(zip([one.name for one in function.signature.input_arg], inputs, strict=True))
        call = next((node for node in function.node_def if node.op in _CALLS), None)
        inputs = [passed.get(name, "") for name in _list_data(call)] if call is not None else []
    raise RuntimeError("its network was not found: it was not exported by this version of tl_keras; export it again")


def _list_data(node: Any) -> list[str]:
    """The inputs of a node, without those that only determine the order."""
    return [name for name in node.input if not name.startswith("^")]


def _find_output(network: Any, name: str) -> int:
    return next(place for place, output in enumerate(network.outputs) if name in output.get_names())


def _link(source: Path, target: Path) -> None:
    """Makes a folder appear elsewhere: as a link where the operating system allows it, otherwise as a copy."""
    try:
        os.symlink(source.resolve(), target, target_is_directory=True)
    except OSError:
        shutil.copytree(source, target)


def _read_example(serialized: bytes) -> bytes:
    """Reads the image in a serialized example; empty, and therefore invalid, if it has none or several."""
    try:
        values = tf.train.Example.FromString(serialized).features.feature[EXAMPLE_FEATURE].bytes_list.value
    except DecodeError:
        return b""
    return values[0] if len(values) == 1 else b""
