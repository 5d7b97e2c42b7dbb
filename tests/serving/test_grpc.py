"""The gRPC API, through the official stubs."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

INVALID, PRECONDITION = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION


@pytest.fixture(scope="module")
def channel(server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc) as opened:
        yield opened


@pytest.fixture(scope="module")
def stub(channel):
    return prediction_service_pb2_grpc.PredictionServiceStub(channel)


def spec(model: str, signature: str = "", **more: object) -> model_pb2.ModelSpec:
    return model_pb2.ModelSpec(name=model, signature_name=signature, **more)


def make_request(model: str, images: list[bytes], signature: str = "") -> predict_pb2.PredictRequest:
    request = predict_pb2.PredictRequest(model_spec=spec(model, signature))
    request.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto(images, tf.string, [len(images)]))
    return request


def make_example(image: bytes) -> tf.train.Example:
    example = tf.train.Example()
    example.features.feature["image_bytes"].bytes_list.value.append(image)
    return example


def test_predict_answers_as_rest_does(stub, server, model, photographs):
    answer = stub.Predict(make_request(model, [*photographs, b"broken"]))
    assert answer.model_spec.name == model
    assert answer.model_spec.version.value == 1
    assert answer.model_spec.signature_name == "serving_default"
    arrays = {name: tf.make_ndarray(answer.outputs[name]) for name in answer.outputs}
    assert {name: array.dtype.kind for name, array in arrays.items()} == {
        "probabilities": "f",
        "labels": "O",
        "scores": "f",
        "class_ids": "i",
        "valid": "b",
    }
    assert arrays["valid"].tolist() == [True] * 9 + [False]
    body = {"inputs": [{"b64": base64.b64encode(one).decode()} for one in photographs]}
    _, rest = server.ask(f"/v1/models/{model}:predict", body)
    np.testing.assert_array_equal(np.array(rest["outputs"]["probabilities"], np.float32), arrays["probabilities"][:9])
    assert [row[0].decode() for row in arrays["labels"][:9]] == [row[0] for row in rest["outputs"]["labels"]]


def test_numbers_stand_in_the_fields_that_tf_servings_clients_read(stub, model, photographs):
    outputs = stub.Predict(make_request(model, [photographs[0], b"broken"])).outputs
    assert list(outputs["valid"].bool_val) == [True, False]
    assert len(outputs["probabilities"].float_val) == len(outputs["scores"].float_val) == 6
    assert outputs["class_ids"].int64_val[0] in range(3)
    assert list(outputs["class_ids"].int64_val[3:]) == [-1, -1, -1]
    assert len(outputs["labels"].string_val) == 6
    assert not any(outputs[name].tensor_content for name in outputs)


def test_an_empty_batch_gives_empty_outputs(stub, model):
    answer = stub.Predict(make_request(model, []))
    assert tf.make_ndarray(answer.outputs["probabilities"]).shape == (0, 3)
    assert tf.make_ndarray(answer.outputs["labels"]).shape == (0, 3)


def test_output_filter(stub, model, photographs):
    request = make_request(model, photographs[:1])
    request.output_filter.append("scores")
    assert list(stub.Predict(request).outputs) == ["scores"]
    request.output_filter[:] = ["nothing"]
    check_error(stub.Predict, request, INVALID, "output tensor alias not found in signature: nothing")
    request.output_filter[:] = ["scores", "scores"]
    check_error(stub.Predict, request, INVALID, "duplicate output tensor alias: scores")


def test_requests_that_predict_refuses(stub, model, photographs):
    check_error(stub.Predict, make_request("nobody", [b""]), grpc.StatusCode.NOT_FOUND, "Latest(nobody)")
    check_error(stub.Predict, make_request(model, [b""], "x"), PRECONDITION, 'Serving signature key "x" not found.')
    check_error(stub.Predict, make_request("", [b""]), INVALID, "ModelSpec has no name specified.")
    check_error(stub.Predict, predict_pb2.PredictRequest(), INVALID, "Missing ModelSpec")
    request = make_request(model, [b""])
    request.model_spec.version.value = 9
    check_error(stub.Predict, request, grpc.StatusCode.NOT_FOUND, f"Specific({model}, 9)")
    request.model_spec.version_label = "stable"
    check_error(stub.Predict, request, INVALID, "Unrecognized servable version label: stable")
    wrong = predict_pb2.PredictRequest(model_spec=spec(model))
    check_error(stub.Predict, wrong, INVALID, "Missing but required: {image_bytes}")
    wrong.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto([1.0]))
    check_error(stub.Predict, wrong, INVALID, "to be string but float32 is provided")
    wrong.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto(b"scalar"))
    check_error(stub.Predict, wrong, INVALID, "at least one dimension")
    wrong.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto(["x"] * 65))
    check_error(stub.Predict, wrong, INVALID, "at most 64")


def test_a_tensor_that_claims_a_terabyte_is_refused(stub, model):
    request = predict_pb2.PredictRequest(model_spec=spec(model, "pixels"))
    proto = request.inputs["images"]
    proto.dtype = tf.float32.as_datatype_enum
    for size in (64, 100000, 100000, 3):
        proto.tensor_shape.dim.add(size=size)
    proto.float_val.append(1.0)
    check_error(stub.Predict, request, INVALID, "is larger than a request may be")


def test_classify(stub, model, photographs):
    request = classification_pb2.ClassificationRequest(model_spec=spec(model, "classify"))
    check_error(stub.Classify, request, INVALID, "Input is empty.")
    request.input.example_list.examples.extend(make_example(one) for one in (*photographs[::3], b"broken"))
    result = stub.Classify(request).result
    assert [one.classes[0].label for one in result.classifications] == ["blue", "green", "red", ""]
    request.model_spec.signature_name = ""
    check_error(stub.Classify, request, INVALID, "Expected one or two output Tensors, found 5")
    request.model_spec.signature_name = "embeddings"
    check_error(stub.Classify, request, INVALID, "No classification inputs found in SignatureDef")
    request.model_spec.signature_name = "x"
    check_error(stub.Classify, request, INVALID, "No signature was found with the name: x")


def test_an_example_wins_over_its_context(stub, model, photographs):
    request = classification_pb2.ClassificationRequest(model_spec=spec(model, "classify"))
    request.input.example_list_with_context.context.CopyFrom(make_example(photographs[0]))
    request.input.example_list_with_context.examples.extend([make_example(photographs[3]), tf.train.Example()])
    labels = [one.classes[0].label for one in stub.Classify(request).result.classifications]
    assert labels == ["green", "blue"]


def test_regress_is_refused_as_tf_serving_refuses_it(stub, model):
    request = regression_pb2.RegressionRequest(model_spec=spec(model))
    request.input.example_list.examples.append(make_example(b""))
    check_error(stub.Regress, request, INVALID, "Expected one output Tensor.")
    request.model_spec.signature_name = "embeddings"
    check_error(stub.Regress, request, INVALID, "No regression inputs found in SignatureDef")


def test_multi_inference(stub, model, photographs):
    request = inference_pb2.MultiInferenceRequest()
    request.tasks.add(model_spec=spec(model, "classify"), method_name="tensorflow/serving/classify")
    request.input.example_list.examples.extend(make_example(one) for one in photographs[::3])
    (result,) = stub.MultiInference(request).results
    labels = [one.classes[0].label for one in result.classification_result.classifications]
    assert labels == ["blue", "green", "red"]
    assert result.model_spec.name == model
    request.tasks.add(model_spec=spec(model, "classify"), method_name="tensorflow/serving/classify")
    check_error(stub.MultiInference, request, INVALID, "Duplicate evaluation of signature: classify")
    request.tasks[1].model_spec.signature_name = "embeddings"
    request.tasks[1].method_name = "tensorflow/serving/regress"
    check_error(stub.MultiInference, request, INVALID, "No regression inputs")
    request.tasks[1].model_spec.signature_name = "x"
    check_error(stub.MultiInference, request, INVALID, "Requested signature not found in model graph: x")
    nobody = inference_pb2.MultiInferenceRequest()
    check_error(stub.MultiInference, nobody, INVALID, "ModelSpec has no name specified.")
    request.tasks[1].model_spec.signature_name = "embeddings"
    request.tasks[1].method_name = "something"
    check_error(stub.MultiInference, request, grpc.StatusCode.UNIMPLEMENTED, "Unsupported signature method_name")
    request.tasks[1].model_spec.name = "other"
    check_error(stub.MultiInference, request, INVALID, "must access the same model name")


def test_metadata(stub, model):
    request = get_model_metadata_pb2.GetModelMetadataRequest(model_spec=spec(model), metadata_field=["signature_def"])
    answer = stub.GetModelMetadata(request)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    assert answer.metadata["signature_def"].Unpack(signatures)
    names = {"serving_default", "pixels", "embeddings", "classify", "__saved_model_init_op"}
    assert set(signatures.signature_def) == names
    request.metadata_field[:] = []
    check_error(stub.GetModelMetadata, request, INVALID, "must specify at least one metadata_field")
    request.metadata_field[:] = ["x"]
    check_error(stub.GetModelMetadata, request, INVALID, "Metadata field x is not supported")
    request.model_spec.name = ""
    check_error(stub.GetModelMetadata, request, INVALID, "ModelSpec has no name specified.")


def test_status(channel, model):
    stub = model_service_pb2_grpc.ModelServiceStub(channel)
    answer = stub.GetModelStatus(get_model_status_pb2.GetModelStatusRequest(model_spec=spec(model)))
    (status,) = answer.model_version_status
    assert (status.version, status.state) == (1, get_model_status_pb2.ModelVersionStatus.AVAILABLE)
    request = get_model_status_pb2.GetModelStatusRequest(model_spec=spec("nobody"))
    check_error(stub.GetModelStatus, request, grpc.StatusCode.NOT_FOUND, "Could not find any versions of model nobody")


def test_a_reload_may_not_leave_the_models_folder(channel, tmp_path):
    stub = model_service_pb2_grpc.ModelServiceStub(channel)
    request = model_management_pb2.ReloadConfigRequest()
    check_error(stub.HandleReloadConfigRequest, request, INVALID, "Only ModelConfigList is currently supported")
    request.config.model_config_list.config.add(name="other", base_path=str(tmp_path))
    check_error(stub.HandleReloadConfigRequest, request, INVALID, "outside of what may be served")
    request.config.model_config_list.config[0].model_platform = "pytorch"
    check_error(stub.HandleReloadConfigRequest, request, INVALID, "requests unsupported platform pytorch")


def test_a_deadline_is_honoured(stub, model, photographs):
    with pytest.raises(grpc.RpcError) as caught:
        stub.Predict(make_request(model, photographs * 7), timeout=0.001)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert stub.Predict(make_request(model, photographs), timeout=30).outputs


def test_streams_of_one_client_leave_room_for_others(channel, stub, model, photographs):
    """Health's `Watch` stays open: 600 of them took all places that calls had."""
    stub_of_health = health_pb2_grpc.HealthStub(channel)
    watching = [stub_of_health.Watch(health_pb2.HealthCheckRequest()) for _ in range(600)]
    try:
        answers = [read_first(one) for one in watching]
        assert answers.count(health_pb2.HealthCheckResponse.SERVING) == 256
        assert answers.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 344
        with grpc.insecure_channel(channel_target(channel), [("grpc.use_local_subchannel_pool", 1)]) as other:
            others = prediction_service_pb2_grpc.PredictionServiceStub(other)
            assert others.Predict(make_request(model, photographs[:1]), timeout=30).outputs
            assert health_pb2_grpc.HealthStub(other).Check(health_pb2.HealthCheckRequest(), timeout=30).status
        assert stub.Predict(make_request(model, photographs[:1]), timeout=30).outputs
    finally:
        for one in watching:
            one.cancel()


def read_first(stream) -> object:
    try:
        return next(stream).status
    except grpc.RpcError as error:
        return error.code()


def channel_target(channel) -> str:
    return channel._channel.target().decode()


def test_calls_whose_message_does_not_come_leave_room_for_others(server, stub, model, photographs):
    """They wait for as long as a request may take, and take no place."""
    with grpc.insecure_channel(server.grpc, [("grpc.use_local_subchannel_pool", 1)]) as slow:
        predict = slow.stream_unary("/tensorflow.serving.PredictionService/Predict")
        silent, hold = threading.Event(), []

        def wait() -> Iterator[bytes]:
            silent.wait(60)
            yield b""

        hold = [predict.future(wait()) for _ in range(40)]
        assert stub.Predict(make_request(model, photographs[:1]), timeout=30).outputs
        silent.set()
        for one in hold:
            assert one.exception(timeout=60).code() == INVALID


def test_messages_of_too_many_fields_are_refused_before_they_are_parsed(channel, model):
    """An empty string takes two bytes of a message and an object in memory."""
    predict = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
    head = predict_pb2.PredictRequest(model_spec=spec(model)).SerializeToString()

    def make(tensor: bytes) -> bytes:
        entry = b"\x0a\x01a\x12" + as_varint(len(tensor)) + tensor
        return head + b"\x12" + as_varint(len(entry)) + entry

    floats = b"\x2d\0\0\0\0"  # float_val, one by one
    for tensor in (b"\x42\0" * 1_000_000, floats * 400_000, b"\x52" + as_varint(2_000_000) + b"\1" * 2_000_000):
        check_error(predict, make(tensor), INVALID, "the message has more than 65536 fields")
    check_error(predict, make(b"\x08\x07" + b"\x42\0" * 60_000), INVALID, "can't hold 60000 values")
    check_error(predict, b"\xff" * 100_000, grpc.StatusCode.INTERNAL, "is no tensorflow.serving.PredictRequest")
    check_error(predict, b"", INVALID, "Missing ModelSpec")


def test_no_message_stays_in_memory(server, channel, model):
    """gRPC keeps the error of a call that is refused, with its frames, for as long as Python's collector waits."""
    predict = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
    request = make_request(model, [bytes(2_500_000)], "x").SerializeToString()

    def ask(times: int) -> int:
        for _ in range(times):
            check_error(predict, request, PRECONDITION, "not found")
        lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) // 1024

    before = ask(5)
    assert ask(40) < before + 50


def as_varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def test_large_tensors_of_numbers(stub, model):
    """Pixels in `float_val`, which is read in parts, are as those in `tensor_content`."""
    pixels = np.random.default_rng(0).uniform(0, 255, (48, 16, 16, 3)).astype(np.float32)
    answers = []
    for values in (pixels, pixels[:3], np.concatenate([pixels[:40], np.full((8, 16, 16, 3), 7, np.float32)])):
        request = predict_pb2.PredictRequest(model_spec=spec(model, "pixels"))
        proto = request.inputs["images"]
        proto.CopyFrom(tf.make_tensor_proto(values))
        answers.append(stub.Predict(request).outputs["probabilities"])
        proto.ClearField("tensor_content")
        given = values.ravel() if values is pixels or len(values) == 3 else values[:41].ravel()[: 40 * 768 + 1]
        proto.float_val.extend(given.tolist())
        assert stub.Predict(request).outputs["probabilities"] == answers[-1]


def test_health(channel):
    stub = health_pb2_grpc.HealthStub(channel)
    assert stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_the_services_and_their_messages(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="tensorflow.serving.PredictionService"),
    ]
    services, files = list(stub.ServerReflectionInfo(iter(asked)))
    names = {one.name for one in services.list_services_response.service}
    assert {"tensorflow.serving.PredictionService", "tensorflow.serving.ModelService", "grpc.health.v1.Health"} <= names
    file = descriptor_pb2.FileDescriptorProto.FromString(files.file_descriptor_response.file_descriptor_proto[0])
    assert {method.name for method in file.service[0].method} == {
        "Predict",
        "Classify",
        "Regress",
        "MultiInference",
        "GetModelMetadata",
    }


def check_error(call, request, code: grpc.StatusCode, words: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=30)
    assert caught.value.code() == code
    assert words in caught.value.details()
