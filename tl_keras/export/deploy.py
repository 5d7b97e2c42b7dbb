"""Files for TF Serving: configuration, containers, Kubernetes, a client; `--mode=export --deploy=DIR`."""

from __future__ import annotations

import importlib.resources
import json
import os
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

from tl_keras.run import write_atomically

TFSERVING_VERSION = "2.20.0"  # the newest release of TF Serving in July 2026
MOST_IMAGES = 256  # images per request, like --max_request_images of the local server
_QUEUE_SECONDS = 2.0  # maximum waiting time in the queue; beyond it requests are rejected
_LONGEST_WAIT_MICROS = 10_000
_MEMORY_FACTOR = 12  # times the version folder: two versions during a reload, each 3 (benchmarks.saved_model) to 6
_MEMORY_BASE_MIB = 2048  # sixteen images of up to 50 million pixels are decoded in parallel
_POLL_SECONDS = 60
_TEMPLATES = ("Dockerfile", "compose.yaml", "kubernetes.yaml", "kserve.yaml", "client.py", "README.md")


def write_deployment(
    folder: Path,
    version: Path,
    *,
    batch_sizes: Sequence[int],
    images_per_second: Mapping[str, Mapping[int, float]],
    bfloat16: bool,
    difference: float | None,
    cores: int,
) -> list[str]:
    """Writes all files for TF Serving, for one exported model.

    Args:
        folder: the folder; it is created if it does not exist.
        version: the version folder.
        batch_sizes: batch sizes of the server, increasing.
        images_per_second: precision → batch size → measured speed.
        bfloat16: whether the server uses bfloat16.
        difference: largest difference of a probability with bfloat16; None if it was not measured.
        cores: number of CPU cores of the measurement.

    Returns:
        The names of the files. An existing `models.config` that differs is kept; the new one is `models.config.new`.

    Raises:
        UserError: the folder can't be written.
    """
    name, export_dir, number = version.parent.name, version.parent.parent, int(version.name)
    speeds = images_per_second["bfloat16" if bfloat16 else "float32"]
    flags = list_flags(bfloat16=bfloat16)
    size_bytes = sum(path.stat().st_size for path in version.rglob("*") if path.is_file())
    values = {
        "name": name,
        "service": _as_service_name(name),
        "image": f"{_as_service_name(name)}:{number}",
        "export_dir": os.path.join(".", os.path.relpath(export_dir.resolve(), folder.resolve())),
        "tfserving_version": TFSERVING_VERSION,
        "flags_json": ", ".join(json.dumps(flag) for flag in flags),
        "flags_yaml": "\n".join(f"      - {json.dumps(flag)}" for flag in flags),
        "flags_kubernetes": "\n".join(f"            - {json.dumps(flag)}" for flag in flags),
        "memory_mib": _MEMORY_BASE_MIB + _MEMORY_FACTOR * (size_bytes >> 20),
        "cores": cores,
        "requested_cores": max(1, cores - 1),  # a node reserves some of its cores
        "largest": batch_sizes[-1],
        "table": _describe_speeds(images_per_second),
        "precision": _describe_precision(bfloat16, difference),
    }
    files = {
        "models.config": make_models_config(version),
        "batching.config": make_batching_config(batch_sizes, speeds=speeds, cores=cores),
        "monitoring.config": make_monitoring_config(),
        "server.flags": "".join(f"{flag}\n" for flag in flags),
        **{file: _fill(file, values) for file in _TEMPLATES},
    }
    if _differs(folder / "models.config", files["models.config"]):
        files["models.config.new"] = files.pop("models.config")  # its labels decide which version clients get
    for file, content in files.items():
        write_atomically(folder / file, content.encode())
    return list(files)


def list_flags(*, bfloat16: bool) -> list[str]:
    """Lists the flags of the server, with paths inside the container."""
    return [
        "--port=8500",
        "--rest_api_port=8501",
        "--model_config_file=/config/models.config",
        f"--model_config_file_poll_wait_seconds={_POLL_SECONDS}",
        # otherwise the server exits if a label exists before its version is loaded (tensorflow/serving#1608)
        "--allow_version_labels_for_unavailable_models=true",
        "--enable_batching=true",
        "--batching_parameters_file=/config/batching.config",
        "--monitoring_config_file=/config/monitoring.config",
        "--enable_grpc_healthcheck_service=true",
        *(["--mixed_precision=bfloat16"] if bfloat16 else []),
    ]


def make_models_config(version: Path) -> str:
    """Makes `ModelServerConfig` as text: the version is `canary`, the previous one (or the same) is `stable`."""
    model = version.parent
    names = [path.name for path in model.iterdir() if path.name.isascii() and path.name.isdecimal()]
    numbers = sorted(int(name) for name in names if int(name) <= int(version.name))
    config = model_server_config_pb2.ModelServerConfig()
    one = config.model_config_list.config.add(
        name=model.name, base_path=f"/models/{model.name}", model_platform="tensorflow"
    )
    one.model_version_policy.specific.versions.extend(numbers[-2:])
    one.version_labels["stable"] = numbers[-2:][0]
    one.version_labels["canary"] = numbers[-1]
    return str(text_format.MessageToString(config))


def make_batching_config(batch_sizes: Sequence[int], *, speeds: Mapping[int, float], cores: int) -> str:
    """Makes `BatchingParameters` as text (tensorflow_serving/session_bundle/session_bundle_config.proto).

    A request waits for others at most half as long as it takes itself. Requests larger than the largest batch are
    split; otherwise they would be rejected, and a larger warm-up request would prevent a version from loading.
    """
    largest = batch_sizes[-1]
    most = max(MOST_IMAGES, largest)
    wait_micros = min(round(0.5e6 / speeds[1]), _LONGEST_WAIT_MICROS)
    queued = max(-(-most // largest), round(_QUEUE_SECONDS * speeds[largest] / largest))
    sizes = "".join(f"allowed_batch_sizes: {size}\n" for size in batch_sizes)
    return (
        f"max_batch_size {{ value: {most} }}\n"
        "enable_large_batch_splitting { value: true }\n"
        f"max_execution_batch_size {{ value: {largest} }}\n"
        f"batch_timeout_micros {{ value: {wait_micros} }}\n"
        f"max_enqueued_batches {{ value: {queued} }}\n"
        f"num_batch_threads {{ value: {cores} }}\n"
        f"{sizes}"
    )


def make_monitoring_config() -> str:
    """Makes `MonitoringConfig` as text (tensorflow_serving/config/monitoring_config.proto).

    It enables Prometheus at the usual path of TF Serving.
    """
    return 'prometheus_config {\n  enable: true\n  path: "/monitoring/prometheus/metrics"\n}\n'


def _differs(path: Path, content: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") != content
    except OSError:
        return False


def _describe_precision(bfloat16: bool, difference: float | None) -> str:
    measured = "" if difference is None else f" It changes probabilities by up to {difference:.1e}."
    if bfloat16:
        return (
            "`server.flags` has `--mixed_precision=bfloat16`, which is at least 1.3 times as fast as float32 "
            f"here.{measured}"
        )
    if difference is None:
        return "The precision is float32: this CPU has no bfloat16 instructions."
    return (
        "The precision is float32: bfloat16 is used only if it is at least 1.3 times as fast in every measurement and "
        f"changes probabilities by at most 0.001.{measured}"
    )


def _fill(file: str, values: Mapping[str, object]) -> str:
    path = importlib.resources.files("tl_keras.export").joinpath("deploy", f"{file}.template")
    return string.Template(path.read_text(encoding="utf-8")).substitute(values)


def _as_service_name(name: str) -> str:
    """Makes a name for Kubernetes: RFC 1123, at most 63 characters of a-z, 0-9 and -."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:63].strip("-") or "classifier"


def _describe_speeds(images_per_second: Mapping[str, Mapping[int, float]]) -> str:
    sizes = list(next(iter(images_per_second.values())))
    lines = ["| precision | " + " | ".join(map(str, sizes)) + " |", "|---" * (len(sizes) + 1) + "|"]
    for precision, speeds in images_per_second.items():
        lines.append(f"| {precision} | " + " | ".join(f"{speeds[size]:.0f}" for size in sizes) + " |")
    return "\n".join(lines)
