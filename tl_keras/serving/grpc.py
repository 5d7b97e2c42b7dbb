"""TF Serving's gRPC API, by its own protos; with reflection and the health service."""

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
from tl_keras.serving.errors import RequestError, invalid
from tl_keras.serving.graphs import DEFAULT_SIGNATURE, find_signature
from tl_keras.serving.metrics import Metrics
from tl_keras.serving.models import Models, Version
from tl_keras.serving.reload import read_config

_MOST_CALLS = 512  # at once: each may hold a whole message before it can be counted
_FIELDS = {  # tensor.proto: where numbers of a kind stand
    tf.float32: "float_val",
    tf.float64: "double_val",
    tf.bool: "bool_val",
    tf.int64: "int64_val",
    tf.uint64: "uint64_val",
    tf.uint32: "uint32_val",
    **dict.fromkeys((tf.int32, tf.int16, tf.int8, tf.uint16, tf.uint8), "int_val"),
}
_CLASSIFY_METHOD, _REGRESS_METHOD = "tensorflow/serving/classify", "tensorflow/serving/regress"


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):  # type: ignore[misc]
    """Predict, Classify, Regress, MultiInference and GetModelMetadata."""

    def __init__(self, models: Models, metrics: Metrics, limits: calls.Limits, budget: calls.Budget) -> None:
        """Args: models: what is served; metrics: counts requests; limits: what one may cost; budget: what all may."""
        self._models, self._metrics, self._limits, self._budget = models, metrics, limits, budget

    async def Predict(  # noqa: N802 (the proto's name)
        self, request: predict_pb2.PredictRequest, context: Any
    ) -> predict_pb2.PredictResponse:
        """Runs a signature."""

        async def work(version: Version, served: calls.Served, deadline: float) -> predict_pb2.PredictResponse:
            del version
            spec = request.model_spec
            inputs = {name: calls.make_array(request.inputs[name], limits=self._limits) for name in request.inputs}
            outputs = await calls.predict(
                served,
                spec.signature_name,
                inputs,
                limits=self._limits,
                deadline=deadline,
                output_filter=list(request.output_filter),
            )
            response = predict_pb2.PredictResponse()
            for name, array in outputs.items():
                response.outputs[name].CopyFrom(_as_proto(array))
            return response

        return await self._run("Predict", request.model_spec, context, work, size=request.ByteSize())

    async def Classify(  # noqa: N802
        self, request: classification_pb2.ClassificationRequest, context: Any
    ) -> classification_pb2.ClassificationResponse:
        """Runs a signature that takes examples."""

        async def work(
            version: Version, served: calls.Served, deadline: float
        ) -> classification_pb2.ClassificationResponse:
            del version
            response = classification_pb2.ClassificationResponse()
            examples = calls.read_input(request.input, limits=self._limits)
            response.result.CopyFrom(await self._classify(served, request.model_spec, examples, deadline))
            return response

        return await self._run("Classify", request.model_spec, context, work, size=request.ByteSize())

    async def Regress(  # noqa: N802
        self, request: regression_pb2.RegressionRequest, context: Any
    ) -> regression_pb2.RegressionResponse:
        """Refuses, as TF Serving does with a classifier."""

        async def work(version: Version, served: calls.Served, deadline: float) -> regression_pb2.RegressionResponse:
            del version, deadline
            calls.read_input(request.input, limits=self._limits)
            await calls.regress(served, request.model_spec.signature_name)
            return regression_pb2.RegressionResponse()

        return await self._run("Regress", request.model_spec, context, work, size=request.ByteSize())

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
        return await self._run("MultiInference", spec, context, work, size=request.ByteSize())

    async def GetModelMetadata(  # noqa: N802
        self, request: get_model_metadata_pb2.GetModelMetadataRequest, context: Any
    ) -> get_model_metadata_pb2.GetModelMetadataResponse:
        """A model's signatures."""

        def work() -> get_model_metadata_pb2.GetModelMetadataResponse:
            if not request.HasField("model_spec"):
                raise invalid("Missing ModelSpec")
            if not request.metadata_field:
                raise invalid("GetModelMetadataRequest must specify at least one metadata_field")
            for field in request.metadata_field:
                if field != calls.METADATA_FIELD:
                    raise invalid(f"Metadata field {field} is not supported")
            spec = request.model_spec
            with self._models.use(spec.name, **_read_spec(spec)) as (version, served):
                return calls.describe_metadata(version, served)

        return await _answer(context, work)

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

    async def _run(
        self,
        api: str,
        spec: model_pb2.ModelSpec,
        context: Any,
        work: Callable[[Version, calls.Served, float], Awaitable[Any]],
        *,
        size: int,
    ) -> Any:
        """Finds the version, works, counts; an error becomes gRPC's status."""
        start, code, held = time.perf_counter(), grpc.StatusCode.INTERNAL.name, 0
        deadline = self._limits.deadline(context.time_remaining())
        try:
            self._budget.take(size)
            held = size
            if not spec.name:
                raise invalid("Missing ModelSpec" if api != "MultiInference" else "Inference request must have tasks")
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
            await context.abort(error.code, error.message)
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED.name
            raise
        finally:
            self._budget.give_back(held)
            self._metrics.count(spec.name, api=api, entrypoint="GRPC", status=code, seconds=time.perf_counter() - start)


class ModelService(model_service_pb2_grpc.ModelServiceServicer):  # type: ignore[misc]
    """GetModelStatus and HandleReloadConfigRequest."""

    def __init__(self, models: Models) -> None:
        """Args: models: what is served."""
        self._models = models

    async def GetModelStatus(  # noqa: N802
        self, request: get_model_status_pb2.GetModelStatusRequest, context: Any
    ) -> get_model_status_pb2.GetModelStatusResponse:
        """Where the versions of a model are in their lives."""

        def work() -> get_model_status_pb2.GetModelStatusResponse:
            if not request.HasField("model_spec"):
                raise invalid("Missing ModelSpec")
            return calls.describe_status(self._models, request.model_spec.name, **_read_spec(request.model_spec))

        return await _answer(context, work)

    async def HandleReloadConfigRequest(  # noqa: N802
        self, request: model_management_pb2.ReloadConfigRequest, context: Any
    ) -> model_management_pb2.ReloadConfigResponse:
        """Takes a new list of models, and answers when each has a version that is there."""

        def work() -> model_management_pb2.ReloadConfigResponse:
            entries = read_config(request.config)
            self._models.configure(entries)
            self._models.poll()
            for entry in entries:
                with self._models.use(entry.name):
                    pass  # an error where no version of it is there
            return model_management_pb2.ReloadConfigResponse()

        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(None, work)
        except RequestError as error:
            await context.abort(error.code, error.message)


def build_server(models: Models, metrics: Metrics, limits: calls.Limits, budget: calls.Budget) -> grpc.aio.Server:
    """The gRPC server, without a port.

    Args:
        models: what is served.
        metrics: counts requests.
        limits: what one request may cost.
        budget: what all may hold.
    """
    server = grpc.aio.server(
        maximum_concurrent_rpcs=_MOST_CALLS,
        options=[
            ("grpc.max_receive_message_length", limits.request_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # else two servers could share a port unnoticed
        ],
    )
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
        PredictionService(models, metrics, limits, budget), server
    )
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(models), server)
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    names = (
        prediction_service_pb2.DESCRIPTOR.services_by_name["PredictionService"].full_name,
        model_service_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
        health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
        reflection.SERVICE_NAME,
    )
    reflection.enable_server_reflection(names, server)
    return server


def _read_spec(spec: model_pb2.ModelSpec) -> dict[str, Any]:
    choice = spec.WhichOneof("version_choice")
    return {
        "number": spec.version.value if choice == "version" else None,
        "label": spec.version_label if choice == "version_label" else "",
    }


async def _answer(context: Any, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except RequestError as error:
        await context.abort(error.code, error.message)


def _check_tasks(request: inference_pb2.MultiInferenceRequest, served: calls.Served) -> None:
    """As multi_inference.cc does."""
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
        signature = find_signature(served.graph, name)[1]
        tensors |= {info.name for info in signature.inputs.values()}
        if task.method_name not in {_CLASSIFY_METHOD, _REGRESS_METHOD}:
            raise RequestError(grpc.StatusCode.UNIMPLEMENTED, f"Unsupported signature method_name: {task.method_name}")
    if len(tensors) > 1 and all(task.method_name == _CLASSIFY_METHOD for task in request.tasks):
        raise invalid("Input tensor must be the same for all Signatures.")


def _as_proto(array: np.ndarray) -> tensor_pb2.TensorProto:
    """As TF Serving's `AsProtoField` does: numbers in their own field, which its clients read, not as bytes."""
    kind = tf.as_dtype(array.dtype)
    if (field := _FIELDS.get(kind)) is None:
        return tf.make_tensor_proto(array, shape=array.shape)  # strings stand in their field there
    proto = tensor_pb2.TensorProto(dtype=kind.as_datatype_enum, tensor_shape=tf.TensorShape(array.shape).as_proto())
    getattr(proto, field).extend(array.ravel().tolist())
    return proto
