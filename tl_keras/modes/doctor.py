"""`--mode=doctor`: checks the installation, the devices and the caches; each line is ok or says what to do."""

from __future__ import annotations

import dataclasses
import glob
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator

import tensorflow as tf

from tl_keras.backbones.engines import read_cpu_flags
from tl_keras.backbones.store import list_stores
from tl_keras.config import Config, default_store_dir
from tl_keras.data.tfds_source import import_tfds
from tl_keras.errors import UserError
from tl_keras.jobs.result import Result
from tl_keras.run import Screen, existing_parent
from tl_keras.version import __version__

_PYTHON = ((3, 11), (3, 14))
_PACKAGES = ("tensorflow", "keras", "tensorflow-datasets", "scikit-learn", "scipy", "numpy", "absl-py", "protobuf")
_FREE_BYTES = 5 << 30
_CPU_FLAGS = {
    "avx2": "fast float32",
    "avx512f": "faster float32",
    "avx512_bf16": "bfloat16 trunks, about twice as fast",
    "amx_bf16": "bfloat16 trunks, several times as fast",
}


_OPTIONAL = {
    "openvino": "faster engine on most CPUs: pip install 'tl_keras[openvino]'",
    "uvicorn": "for --mode=serve: pip install 'tl_keras[serving]'",
    "pyarrow": "for embeddings as Parquet: pip install 'tl_keras[parquet]'",
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the doctor, with advice if something is wrong."""

    what: str
    advice: str = ""


def run(config: Config, screen: Screen | None = None) -> Result:
    """Checks versions, devices, CPU, TFDS, caches and disk space; the exit status is 1 if a check fails."""
    screen = screen or Screen()
    store_dir = config.engine.store_dir or default_store_dir()
    checks: tuple[Callable[[], Iterator[Check]], ...] = (
        _check_versions,
        _check_devices,
        _check_cpu,
        _check_tfds,
        lambda: _check_folders(store_dir),
    )
    failed = 0
    for check in checks:
        for finding in check():
            failed += bool(finding.advice)
            if finding.advice:
                screen.warning(f"to do {finding.what}: {finding.advice}")
            else:
                screen.line(f"ok    {finding.what}")
    screen.result(f"{failed} to do" if failed else "all ok")
    return Result(exit_status=1 if failed else 0)


def _check_versions() -> Iterator[Check]:
    supported = _PYTHON[0] <= sys.version_info[:2] < _PYTHON[1]
    yield Check(
        f"tl_keras {__version__}, Python {platform.python_version()}",
        "" if supported else "use Python 3.11 to 3.13",
    )
    installed = []
    for name in _PACKAGES:
        try:
            installed.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            yield Check(f"{name} is not installed", f"pip install {name}")
    yield Check(", ".join(installed))
    yield Check("optional: " + ", ".join(map(_describe_optional, _OPTIONAL)))


def _describe_optional(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {name} ({_OPTIONAL[name]})"


def _check_devices() -> Iterator[Check]:
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        names = [tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name) for gpu in gpus]
        yield Check(f"GPU: {', '.join(names)}")
        return
    present = find_nvidia()
    if not present:
        yield Check(f"no GPU; {os.cpu_count()} CPU cores")
        return
    yield Check(f"there is an NVIDIA GPU ({present}), but TensorFlow does not find it", explain_unseen())


def find_nvidia() -> str:
    """Finds the device file of an NVIDIA GPU on Linux; empty if there is none."""
    return next(iter(sorted(glob.glob("/proc/driver/nvidia/gpus/*") + glob.glob("/dev/nvidia[0-9]*"))), "")


def explain_unseen() -> str:
    """Explains why TensorFlow does not find an existing GPU, and what to do."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in {"", "-1"}:
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides it: unset CUDA_VISIBLE_DEVICES"
    if not tf.test.is_built_with_cuda():
        return "this TensorFlow is built without CUDA (tensorflow-cpu?): pip install 'tensorflow[and-cuda]'"
    if not shutil.which("nvidia-smi") and not os.path.exists("/proc/driver/nvidia/version"):
        return "the NVIDIA driver is not installed: install it, then run nvidia-smi"
    return "the CUDA libraries are missing or have another version: pip install 'tensorflow[and-cuda]'"


def _check_cpu() -> Iterator[Check]:
    flags = read_cpu_flags()
    if not flags:
        yield Check(f"CPU: {platform.machine()} (its instruction sets can't be read here)")
        return
    found = [f"{flag} ({use})" for flag, use in _CPU_FLAGS.items() if flag in flags]
    missing = [flag for flag in _CPU_FLAGS if flag not in flags]
    text = f"CPU has {', '.join(found) or 'no instructions for fast inference'}"
    yield Check(text + (f"; it does not have {', '.join(missing)}" if missing else ""))


def _check_tfds() -> Iterator[Check]:
    try:
        version = import_tfds().__version__
        yield Check(f"TensorFlow Datasets {version} can be imported")
    except UserError as error:
        yield Check("TensorFlow Datasets", " ".join(str(error).split()))


def _check_folders(store_dir: str) -> Iterator[Check]:
    stores = list_stores(store_dir)
    size = sum(stored for _, stored in stores)
    yield _check_disk(f"embedding store {store_dir}: {len(stores)} stores, {size / 1e6:,.0f} MB", store_dir)
    for path, stored in stores[:10]:
        yield Check(f"  {path.name}: {stored / 1e6:,.0f} MB (to delete it: rm '{path}'*)")
    keras_home = os.environ.get("KERAS_HOME") or os.path.join(os.path.expanduser("~"), ".keras")
    yield _check_disk(f"ImageNet weights {keras_home}/models", keras_home)
    data_dir = os.environ.get("TFDS_DATA_DIR") or os.path.join(os.path.expanduser("~"), "tensorflow_datasets")
    yield _check_disk(f"TFDS data {data_dir}", data_dir)


def _check_disk(what: str, folder: str) -> Check:
    existing = existing_parent(folder)
    if not os.path.isdir(existing):
        return Check(what, f"{existing} is a file: choose another folder")
    if not os.access(existing, os.W_OK):
        return Check(what, f"{existing} is not writable: change its permissions, or choose another folder")
    free = shutil.disk_usage(existing).free
    return Check(
        f"{what}, {free / 1e9:,.0f} GB free", "" if free > _FREE_BYTES else "less than 5 GB are free: free some space"
    )
