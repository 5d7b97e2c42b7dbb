"""The gRPC API of TF Serving, with its protos, reflection and the health service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection
from tensorflow.core.framework import tensor_pb2
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

from tl_keras.serving import calls
from tl_keras.serving.batching import Arrays
from tl_keras.serving.errors import RequestError, invalid, precondition
from tl_keras.serving.graphs import DEFAULT_SIGNATURE
from tl_keras.serving.grpc_gate import MOST_RPCS, Gate, StreamLimit
from tl_keras.serving.metrics import Metrics
from tl_keras.serving.models import Models, Version
from tl_keras.serving.reload import read_config
from tl_keras.serving.workers import Workers

_MOST_RELOADS = 4  # limit of concurrent reload requests
_CONNECTION_STREAMS = 1024
_PART = 1 << 16  # number of values that are converted at once
_FIELDS = {  # tensor.proto: fields of the numeric types
    tf.float32: "float_val",
    tf.float64: "double_val",
    tf.bool: "bool_val",
    tf.int64: "int64_val",
    tf.uint64: "uint64_val",
    tf.uint32: "uint32_val",
    **dict.fromkeys((tf.int32, tf.int16, tf.int8, tf.uint16, tf.uint8), "int_val"),
}
_PREDICTION = prediction_service_pb2.DESCRIPTOR.services_by_name["PredictionService"]
_MODEL = model_service_pb2.DESCRIPTOR.services_by_name["ModelService"]
_NO_NAME = "ModelSpec has no name specified."
_CLASSIFY_METHOD, _REGRESS_METHOD = "tensorflow/serving/classify", "tensorflow/serving/regress"


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):  # type: ignore[misc]
    """Predict, Classify, Regress, MultiInference and GetModelMetadata."""

    def __init__(self, models: Models, metrics: Metrics, limits: calls.Limits, workers: Workers) -> None:
        """Args: models: served models; metrics: request counters; limits: request limits; workers: convert tensors."""
        self._models, self._metrics, self._limits, self._workers = models, metrics, limits, workers

    async def Predict(  # noqa: N802 (the proto's name)
        self, request: predict_pb2.PredictRequest, context: Any
    ) -> predict_pb2.PredictResponse:
        """Runs a signature."""

        async def work(version: Version, served: calls.Served, deadline: float) -> predict_pb2.PredictResponse:
            del version
            name = request.model_spec.signature_name or DEFAULT_SIGNATURE
            if name not in served.graph.signatures:
                raise precondition(f'Serving signature key "{name}" not found.')
            inputs = await self._workers.run(request.ByteSize(), self._read_tensors, request)
            outputs = await calls.predict(
                served,
                name,
                inputs,
                limits=self._limits,
                deadline=deadline,
                output_filter=list(request.output_filter),
            )
            return await self._workers.run(sum(array.nbytes for array in outputs.values()), _write_tensors, outputs)

        return await self._run("Predict", request, request.model_spec, context, work)

    async def Classify(  # noqa: N802
        self, request: classification_pb2.ClassificationRequest, context: Any
    ) -> classification_pb2.ClassificationResponse:
        """Runs a signature on examples."""

        async def work(
            version: Version, served: calls.Served, deadline: float
        ) -> classification_pb2.ClassificationResponse:
            del version
            response = classification_pb2.ClassificationResponse()
            examples = calls.read_input(request.input, limits=self._limits)
            response.result.CopyFrom(await self._classify(served, request.model_spec, examples, deadline))
            return response

        return await self._run("Classify", request, request.model_spec, context, work)

    async def Regress(  # noqa: N802
        self, request: regression_pb2.RegressionRequest, context: Any
    ) -> regression_pb2.RegressionResponse:
        """Rejects the request, like TF Serving for a classifier."""

        async def work(version: Version, served: calls.Served, deadline: float) -> regression_pb2.RegressionResponse:
            del version, deadline
            calls.read_input(request.input, limits=self._limits)
            await calls.regress(served, request.model_spec.signature_name)
            return regression_pb2.RegressionResponse()

        return await self._run("Regress", request, request.model_spec, context, work)

    async def MultiInference(  # noqa: N802
        self, request: inference_pb2.MultiInferenceRequest, context: Any
    ) -> inference_pb2.MultiInferenceResponse:
        """Runs several signatures of one model on the same examples."""

        async def work(version: Version, served: calls.Served, deadline: float) -> inference_pb2.MultiInferenceResponse:
            _check_tasks(request, served)
            examples = calls.read_input(request.input, limits=self._limits)
            response = inference_pb2.MultiInferenceResponse()
            for task in request.tasks:
                if task.method_name == _REGRESS_METHOD:
                    await calls.regress(served, task.model_spec.signature_name)
                result = response.results.add()
                result.classification_result.CopyFrom(await self._classify(served, task.model_spec, examples, deadline))
                result.model_spec.CopyFrom(task.model_spec)
                result.model_spec.version.value = version.number
            return response

        spec = request.tasks[0].model_spec if request.tasks else model_pb2.ModelSpec()
        return await self._run("MultiInference", request, spec, context, work)

    async def GetModelMetadata(  # noqa: N802
        self, request: get_model_metadata_pb2.GetModelMetadataRequest, context: Any
    ) -> get_model_metadata_pb2.GetModelMetadataResponse:
        """Returns the signatures of a model."""
        del context
        spec = request.model_spec
        if not request.HasField("model_spec"):
            raise invalid("Missing ModelSpec")
        if not spec.name:
            raise invalid(_NO_NAME)
        if not request.metadata_field:
            raise invalid("GetModelMetadataRequest must specify at least one metadata_field")
        for field in request.metadata_field:
            if field != calls.METADATA_FIELD:
                raise invalid(f"Metadata field {field} is not supported")
        with self._models.use(spec.name, **_read_spec(spec)) as (version, served):
            return calls.describe_metadata(version, served)

    async def _classify(
        self, served: calls.Served, spec: model_pb2.ModelSpec, examples: list[bytes], deadline: float
    ) -> classification_pb2.ClassificationResult:
        classes, scores = await calls.classify(
            served, spec.signature_name, examples, limits=self._limits, deadline=deadline
        )
        result = classification_pb2.ClassificationResult()
        for labels, numbers in zip(classes.tolist(), scores.tolist(), strict=True):
            row = result.classifications.add()
            for label, score in zip(labels, numbers, strict=True):
                row.classes.add(label=label.decode("utf-8", "replace"), score=score)
        return result

    def _read_tensors(self, request: predict_pb2.PredictRequest) -> Arrays:
        return {name: calls.make_array(request.inputs[name], limits=self._limits) for name in request.inputs}

    async def _run(
        self,
        api: str,
        request: Any,
        spec: model_pb2.ModelSpec,
        context: Any,
        work: Callable[[Version, calls.Served, float], Awaitable[Any]],
    ) -> Any:
        """Finds the version, runs the call, and counts it.

        Raises:
            RequestError: the call can't be answered.
        """
        start, code = time.perf_counter(), grpc.StatusCode.INTERNAL.name
        deadline = self._limits.deadline(context.time_remaining())
        try:
            if api == "MultiInference" and not request.tasks:
                raise invalid(f"{_NO_NAME} Inference request must have tasks")
            if not spec.name:
                has_spec = api == "MultiInference" or request.HasField("model_spec")
                raise invalid(_NO_NAME if has_spec else "Missing ModelSpec")
            with self._models.use(spec.name, **_read_spec(spec)) as (version, served):
                response = await work(version, served, deadline)
            if hasattr(response, "model_spec"):
                response.model_spec.name = spec.name
                response.model_spec.signature_name = spec.signature_name or DEFAULT_SIGNATURE
                response.model_spec.version.value = version.number
            code = "OK"
            return response
        except RequestError as error:
            code = error.code.name
            raise
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED.name
            raise
        finally:
            self._metrics.count(spec.name, api=api, entrypoint="GRPC", status=code, seconds=time.perf_counter() - start)


class ModelService(model_service_pb2_grpc.ModelServiceServicer):  # type: ignore[misc]
    """GetModelStatus and HandleReloadConfigRequest."""

    def __init__(self, models: Models, workers: Workers, note_health: Callable[[], Awaitable[None]]) -> None:
        """Args: models: served models; workers: load models; note_health: updates the health service."""
        self._models, self._workers, self._note_health = models, workers, note_health
        self._reloads = 0

    async def GetModelStatus(  # noqa: N802
        self, request: get_model_status_pb2.GetModelStatusRequest, context: Any
    ) -> get_model_status_pb2.GetModelStatusResponse:
        """Returns the status of the versions of a model."""
        del context
        if not request.HasField("model_spec"):
            raise invalid("Missing ModelSpec")
        return calls.describe_status(self._models, request.model_spec.name, **_read_spec(request.model_spec))

    async def HandleReloadConfigRequest(  # noqa: N802
        self, request: model_management_pb2.ReloadConfigRequest, context: Any
    ) -> model_management_pb2.ReloadConfigResponse:
        """Applies a new list of models, and answers when each model has an available version."""

        def work() -> model_management_pb2.ReloadConfigResponse:
            entries = read_config(request.config)
            self._models.configure(entries)
            self._models.poll()
            self._models.check_loaded(entries)
            return model_management_pb2.ReloadConfigResponse()

        del context
        if self._reloads >= _MOST_RELOADS:
            raise RequestError(grpc.StatusCode.RESOURCE_EXHAUSTED, "other reloads are under way; try later")
        self._reloads += 1
        try:
            return await self._workers.load_models(work)
        finally:
            self._reloads -= 1
            await self._note_health()


class Health:
    """Reports to gRPC's health service whether the models are loaded."""

    def __init__(self, models: Models) -> None:
        """Args: models: served models."""
        self._models = models
        self.servicer = health.HealthServicer()
        self._told: int | None = None

    async def note(self) -> None:
        """Updates the status: NOT_SERVING if a model has no loaded version."""
        kinds = health_pb2.HealthCheckResponse
        status = kinds.NOT_SERVING if self._models.find_missing() else kinds.SERVING
        if status == self._told:
            return
        self._told = status
        for name in ("", _PREDICTION.full_name, _MODEL.full_name):
            await self.servicer.set(name, status)


def build_server(
    models: Models, metrics: Metrics, limits: calls.Limits, budget: calls.Budget, *, workers: Workers
) -> tuple[grpc.aio.Server, Health]:
    """Builds the gRPC server, without a port, and its health service.

    Args:
        models: served models.
        metrics: counts requests.
        limits: limits of a request.
        budget: memory budget of all requests.
        workers: threads that parse messages and load models.
    """
    server = grpc.aio.server(
        interceptors=[StreamLimit()],
        maximum_concurrent_rpcs=MOST_RPCS,
        options=[
            ("grpc.max_receive_message_length", limits.request_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_concurrent_streams", _CONNECTION_STREAMS),
            ("grpc.so_reuseport", 0),  # otherwise two servers could share a port unnoticed
        ],
    )
    gate, health_service = Gate(limits, budget, workers), Health(models)
    gate.add(server, _PREDICTION, PredictionService(models, metrics, limits, workers))
    gate.add(server, _MODEL, ModelService(models, workers, health_service.note))
    health_pb2_grpc.add_HealthServicer_to_server(health_service.servicer, server)
    services = (_PREDICTION, _MODEL, health_pb2.DESCRIPTOR.services_by_name["Health"])
    reflection.enable_server_reflection((*(one.full_name for one in services), reflection.SERVICE_NAME), server)
    return server, health_service


def _read_spec(spec: model_pb2.ModelSpec) -> dict[str, Any]:
    choice = spec.WhichOneof("version_choice")
    return {
        "number": spec.version.value if choice == "version" else None,
        "label": spec.version_label if choice == "version_label" else "",
    }


def _check_tasks(request: inference_pb2.MultiInferenceRequest, served: calls.Served) -> None:
    """Validates the request like multi_inference.cc."""
    seen, tensors = set(), set()
    for task in request.tasks:
        if not task.model_spec.name:
            raise invalid("Found ModelSpec with an empty model name.")
        if task.model_spec.name != request.tasks[0].model_spec.name:
            raise invalid("All ModelSpecs in a MultiInferenceRequest must access the same model name.")
        name = task.model_spec.signature_name or DEFAULT_SIGNATURE
        if name in seen:
            raise invalid(f"Duplicate evaluation of signature: {name}")
        seen.add(name)
        if name not in served.graph.signatures:
            raise invalid(f"Requested signature not found in model graph: {name}")
        signature = served.graph.signatures[name]
        tensors |= {info.name for info in signature.inputs.values()}
        if task.method_name not in {_CLASSIFY_METHOD, _REGRESS_METHOD}:
            raise RequestError(grpc.StatusCode.UNIMPLEMENTED, f"Unsupported signature method_name: {task.method_name}")
    if len(tensors) > 1 and all(task.method_name == _CLASSIFY_METHOD for task in request.tasks):
        raise invalid("Input tensor must be the same for all Signatures.")


def _write_tensors(outputs: Arrays) -> predict_pb2.PredictResponse:
    response = predict_pb2.PredictResponse()
    for name, array in outputs.items():
        _write_tensor(array, response.outputs[name])
    return response


def _write_tensor(array: np.ndarray, proto: tensor_pb2.TensorProto) -> None:
    """Converts an array like TF Serving's `AsProtoField`: numbers in typed fields, which clients read, not as bytes."""
    kind = tf.as_dtype(array.dtype)
    if (field := _FIELDS.get(kind)) is None:
        proto.CopyFrom(tf.make_tensor_proto(array, shape=array.shape))  # strings are in their typed field
        return
    proto.dtype = kind.as_datatype_enum
    proto.tensor_shape.CopyFrom(tf.TensorShape(array.shape).as_proto())
    flat = array.ravel()
    for start in range(0, len(flat), _PART):
        getattr(proto, field).extend(flat[start : start + _PART].tolist())
