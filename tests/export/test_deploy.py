"""Each file that TF Serving is started with, checked by what reads it: protos, schemas, the client's own run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from tensorflow_serving.config import model_server_config_pb2

from tests.serving.conftest import start_server
from tl_keras.export.deploy import make_batching_config, make_models_config, write_deployment
from tl_keras.export.warmup import BATCH_SIZES

SPEEDS = {"float32": {1: 20.0, 2: 22.0, 4: 23.0}, "bfloat16": {1: 31.0, 2: 38.0, 4: 41.0}}


@pytest.fixture
def version(tmp_path: Path) -> Path:
    for number in (3, 4):
        (tmp_path / "models" / "My_Model.v2" / str(number)).mkdir(parents=True)
    path = tmp_path / "models" / "My_Model.v2" / "4"
    (path / "saved_model.pb").write_bytes(bytes(50 << 20))
    return path


@pytest.fixture
def folder(version: Path, tmp_path: Path) -> Path:
    write_deployment(
        tmp_path / "deploy",
        version,
        batch_sizes=(1, 2, 4),
        images_per_second=SPEEDS,
        bfloat16=True,
        difference=0.0031,
        cores=2,
    )
    return tmp_path / "deploy"


def build_message(name: str, fields: list[tuple[str, int, str]]) -> object:
    """A message of a proto that pip has not: its fields (name, number, type) as TF Serving's repository has them.

    A type: int64, bool, string, or of a wrapper: Int64Value, BoolValue; `repeated` before it.
    """
    file = descriptor_pb2.FileDescriptorProto(name=f"{name}.proto", package="test", syntax="proto3")
    file.dependency.append("google/protobuf/wrappers.proto")
    message = file.message_type.add(name=name)
    for field, number, kind in fields:
        added = message.field.add(name=field, number=number)
        added.label = added.LABEL_REPEATED if kind.startswith("repeated ") else added.LABEL_OPTIONAL
        kind = kind.removeprefix("repeated ")
        if kind.endswith("Value"):
            added.type, added.type_name = added.TYPE_MESSAGE, f".google.protobuf.{kind}"
        else:
            added.type = {"int64": added.TYPE_INT64, "bool": added.TYPE_BOOL, "string": added.TYPE_STRING}[kind]
    from google.protobuf import wrappers_pb2

    pool = descriptor_pool.DescriptorPool()
    wrappers = descriptor_pb2.FileDescriptorProto()
    wrappers_pb2.DESCRIPTOR.CopyToProto(wrappers)
    pool.Add(wrappers)
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"test.{name}"))()


def test_models_config_is_read_by_its_proto(folder):
    config = text_format.Parse((folder / "models.config").read_text(), model_server_config_pb2.ModelServerConfig())
    (one,) = config.model_config_list.config
    assert (one.name, one.base_path, one.model_platform) == ("My_Model.v2", "/models/My_Model.v2", "tensorflow")
    assert list(one.model_version_policy.specific.versions) == [3, 4]
    assert dict(one.version_labels) == {"stable": 3, "canary": 4}


def test_a_first_version_is_stable_and_canary(tmp_path):
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / ".unfinished-x").mkdir()
    config = text_format.Parse(make_models_config(tmp_path / "m" / "1"), model_server_config_pb2.ModelServerConfig())
    assert dict(config.model_config_list.config[0].version_labels) == {"stable": 1, "canary": 1}


def test_an_older_version_is_deployed_without_the_newer(version):
    config = text_format.Parse(make_models_config(version.parent / "3"), model_server_config_pb2.ModelServerConfig())
    assert dict(config.model_config_list.config[0].version_labels) == {"stable": 3, "canary": 3}


def test_batching_config_keeps_tf_servings_rules(folder):
    fields = [  # tensorflow_serving/session_bundle/session_bundle_config.proto, BatchingParameters
        ("max_batch_size", 1, "Int64Value"),
        ("batch_timeout_micros", 2, "Int64Value"),
        ("max_enqueued_batches", 3, "Int64Value"),
        ("num_batch_threads", 4, "Int64Value"),
        ("thread_pool_name", 5, "StringValue"),
        ("allowed_batch_sizes", 6, "repeated int64"),
        ("pad_variable_length_inputs", 7, "bool"),
        ("enable_large_batch_splitting", 8, "BoolValue"),
        ("max_execution_batch_size", 9, "Int64Value"),
    ]
    read = text_format.Parse((folder / "batching.config").read_text(), build_message("BatchingParameters", fields))
    sizes = list(read.allowed_batch_sizes)
    assert sizes == sorted(set(sizes)) == [1, 2, 4]
    # one request may be larger than a batch, above all one of the warm-up file, or the version is not loaded
    assert read.enable_large_batch_splitting.value
    assert sizes[-1] == read.max_execution_batch_size.value
    assert read.max_batch_size.value == 256
    assert read.max_batch_size.value >= max(BATCH_SIZES)
    assert read.num_batch_threads.value == 2
    assert read.batch_timeout_micros.value == 10_000  # at most; a request alone takes 32 ms
    assert read.max_enqueued_batches.value == 64  # of one request of 256 images; two seconds of work would be 20


def test_a_fast_model_waits_less():
    text = make_batching_config((1, 2), speeds={1: 500.0, 2: 700.0}, cores=4)
    assert "batch_timeout_micros { value: 1000 }" in text


def test_monitoring_config_is_read_by_its_proto(folder):
    fields = [("enable", 1, "bool"), ("path", 2, "string")]  # tensorflow_serving/config/monitoring_config.proto
    text = (folder / "monitoring.config").read_text()
    inner = text.removeprefix("prometheus_config {").rstrip().removesuffix("}")
    read = text_format.Parse(inner, build_message("PrometheusConfig", fields))
    assert (read.enable, read.path) == (True, "/monitoring/prometheus/metrics")


def test_compose_fits_its_schema(folder):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    result = subprocess.run([*command, str(folder / "compose.yaml")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (service,) = yaml.safe_load((folder / "compose.yaml").read_text())["services"].values()
    assert "./../models/My_Model.v2:/models/My_Model.v2:ro" in service["volumes"]
    assert "--mixed_precision=bfloat16" in service["command"]
    assert service["deploy"]["resources"]["limits"]["memory"] == "2648M"


def test_kubernetes_manifests_fit_their_schema(folder):
    import kubernetes_validate

    documents = list(yaml.safe_load_all((folder / "kubernetes.yaml").read_text()))
    assert [one["kind"] for one in documents] == ["Deployment", "Service", "HorizontalPodAutoscaler"]
    for document in documents:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    deployment = documents[0]
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    assert deployment["metadata"]["name"] == "my-model-v2"
    assert container["readinessProbe"]["httpGet"]["path"] == "/v1/models/My_Model.v2/metadata"
    assert "--rest_api_port=8501" in container["args"]


def test_kserve_names_what_its_api_wants(folder):
    service = yaml.safe_load((folder / "kserve.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    model = service["spec"]["predictor"]["model"]
    assert model["modelFormat"] == {"name": "tensorflow"}
    assert model["storageUri"].endswith("/My_Model.v2")


def test_the_dockerfile_starts_the_server_with_the_flags(folder):
    lines = (folder / "Dockerfile").read_text().splitlines()
    flags = json.loads(next(line for line in lines if line.startswith("CMD ")).removeprefix("CMD "))
    assert flags == (folder / "server.flags").read_text().splitlines()
    assert "FROM tensorflow/serving:${TFSERVING_VERSION}" in lines
    assert "COPY --from=models My_Model.v2 /models/My_Model.v2" in lines


def test_a_models_config_that_was_edited_is_kept(version, folder):
    edited = (folder / "models.config").read_text().replace("value: 3", "value: 4")
    (folder / "models.config").write_text(edited)
    settings = {"batch_sizes": (1,), "images_per_second": {"float32": {1: 9.0}}, "bfloat16": False, "difference": None}
    assert "models.config.new" in write_deployment(folder, version, **settings, cores=2)
    assert (folder / "models.config").read_text() == edited
    assert "value: 3" in (folder / "models.config.new").read_text()
    (folder / "models.config").write_text((folder / "models.config.new").read_text())
    assert "models.config" in write_deployment(folder, version, **settings, cores=2)


def test_the_readme_says_which_precision_was_taken_and_why(version, folder, tmp_path):
    text = (folder / "README.md").read_text()
    assert "has `--mixed_precision=bfloat16`, which is at least 1.3 times as fast as float32 here. It changes" in text
    assert "It changes probabilities by up to 3.1e-03." in text
    write_deployment(
        tmp_path / "plain",
        version,
        batch_sizes=(1,),
        images_per_second={"float32": {1: 9.0}},
        bfloat16=False,
        difference=None,
        cores=2,
    )
    assert (
        "The precision is float32: this CPU has no bfloat16 instructions."
        in (tmp_path / "plain" / "README.md").read_text()
    )


def test_ports_are_published_on_this_machine_alone(folder):
    (service,) = yaml.safe_load((folder / "compose.yaml").read_text())["services"].values()
    assert service["ports"] == ["127.0.0.1:8500:8500", "127.0.0.1:8501:8501"]


def test_every_placeholder_is_filled(folder):
    for path in folder.iterdir():
        text = path.read_text()
        assert "$name" not in text, path
        assert "$$" not in text, path


@pytest.fixture(scope="module")
def client(trained, tmp_path_factory) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """The written client, run as a user runs it, against the local server."""
    root = tmp_path_factory.mktemp("client")
    deploy = root / "deploy"
    write_deployment(
        deploy,
        trained[1],
        batch_sizes=(1, 2),
        images_per_second={"float32": {1: 9, 2: 9}},
        bfloat16=False,
        difference=None,
        cores=2,
    )
    config = (deploy / "models.config").read_text().replace("/models/", f"{trained[1].parent.parent}/")
    (deploy / "local.config").write_text(config)
    with start_server(root / "log", f"--models_config={deploy / 'local.config'}", "--engine=tensorflow") as server:
        ports = [f"--port={server.rest.rpartition(':')[2]}", f"--grpc_port={server.grpc.rpartition(':')[2]}"]
        yield lambda *arguments: run_client(deploy, *ports, "--host=127.0.0.1", *arguments)


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--grpc", "--label=canary"),
        pytest.param(("--grpc",), marks=pytest.mark.slow),
        pytest.param(("--label=",), marks=pytest.mark.slow),
    ],
)
def test_the_client_asks_over_rest_and_grpc(client, colour_folder, flags):
    images = [str(colour_folder / "red" / "000.jpg"), str(colour_folder / "blue" / "001.jpg"), __file__]
    output = client(*flags, *images).stdout.splitlines()
    assert output[0].startswith(f"{images[0]}: red ")
    assert output[1].startswith(f"{images[1]}: blue ")
    assert output[2] == f"{images[2]}: not a readable image"


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--grpc", "--label=nobody"), "INVALID_ARGUMENT: Unrecognized servable version label: nobody"),
        (("--model=other", "--label="), "404: Servable not found for request: Latest(other)"),
        pytest.param(("--label=nobody",), "400: Unrecognized servable version label: nobody", marks=pytest.mark.slow),
    ],
)
def test_the_client_says_what_the_server_refused(client, colour_folder, flags, text):
    assert text in client(*flags, str(colour_folder / "red" / "000.jpg")).stderr


def test_the_client_names_a_missing_file(client):
    assert client("gone.jpg").stderr == "gone.jpg can't be read: No such file or directory\n"


def run_client(deploy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(deploy / "client.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)
