"""The doctor: each thing that can be wrong with a machine, and what it advises."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import os
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tl_keras.backbones.store import EmbeddingStore
from tl_keras.config import Config, EngineConfig
from tl_keras.errors import UserError
from tl_keras.jobs.result import Result
from tl_keras.modes import doctor

NOBODY = 65534


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine on which all is well: a home of its own, no GPU, a large disk."""
    for name, folder in (("HOME", "home"), ("KERAS_HOME", "keras"), ("TFDS_DATA_DIR", "tfds")):
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
    monkeypatch.setattr(doctor, "find_nvidia", lambda: "")
    set_free(monkeypatch, 100e9)
    monkeypatch.setattr(doctor, "import_tfds", lambda: sys.modules[__name__])


__version__ = "4.9.10"  # this module stands for TFDS


def set_free(monkeypatch, free: float) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(free)))


def look(capsys, store_dir: Path) -> tuple[Result, list[str]]:
    result = doctor.run(Config("doctor", engine=EngineConfig(store_dir=str(store_dir))))
    return result, capsys.readouterr().out.splitlines()


def to_do(lines: list[str]) -> list[str]:
    return [line.removeprefix("to do ") for line in lines if line.startswith("to do ")]


def test_a_machine_on_which_all_is_well(capsys, tmp_path):
    result, lines = look(capsys, tmp_path / "store")
    assert result.exit_status == 0
    assert lines[-1] == "all ok"
    assert all(line.startswith("ok    ") for line in lines[:-1])
    assert f"ok    no GPU; {os.cpu_count()} CPU cores" in lines
    assert "ok    TensorFlow Datasets 4.9.10 can be imported" in lines
    assert f"ok    embedding store {tmp_path}/store: 0 stores, 0 MB, 100 GB free" in lines
    assert f"ok    ImageNet weights {tmp_path}/keras/models, 100 GB free" in lines
    assert f"ok    TFDS data {tmp_path}/tfds, 100 GB free" in lines
    assert f"tensorflow {tf.__version__}" in lines[1]


def test_looking_leaves_nothing_behind(capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    look(capsys, tmp_path / "not" / "yet")
    assert sorted(tmp_path.rglob("*")) == before


# GPUs


def see_nothing_of(monkeypatch, place="/proc/driver/nvidia/gpus/0000:01:00.0"):
    monkeypatch.setattr(doctor, "find_nvidia", lambda: place)
    monkeypatch.setattr(tf.test, "is_built_with_cuda", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")


def advise(monkeypatch, capsys, tmp_path) -> str:
    result, lines = look(capsys, tmp_path)
    assert result.exit_status == 1
    assert lines[-1] == "1 to do"
    (line,) = to_do(lines)
    what, advice = line.split(", but TensorFlow does not find it: ")
    assert what == "there is an NVIDIA GPU (/proc/driver/nvidia/gpus/0000:01:00.0)"
    return advice


@pytest.mark.parametrize("value", ["", "-1", " -1 "])
def test_a_gpu_that_a_variable_hides(monkeypatch, capsys, tmp_path, value):
    see_nothing_of(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert advise(monkeypatch, capsys, tmp_path) == (
        f"CUDA_VISIBLE_DEVICES={value!r} hides it: unset CUDA_VISIBLE_DEVICES"
    )


def test_a_variable_that_names_a_gpu_hides_none(monkeypatch, capsys, tmp_path):
    see_nothing_of(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "hides" not in advise(monkeypatch, capsys, tmp_path)


def test_a_tensorflow_that_is_built_without_cuda(monkeypatch, capsys, tmp_path):
    see_nothing_of(monkeypatch)
    monkeypatch.setattr(tf.test, "is_built_with_cuda", lambda: False)
    assert advise(monkeypatch, capsys, tmp_path) == (
        "this TensorFlow is built without CUDA (tensorflow-cpu?): pip install 'tensorflow[and-cuda]'"
    )


def test_a_driver_that_is_not_installed(monkeypatch, capsys, tmp_path):
    see_nothing_of(monkeypatch)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    assert doctor.explain_unseen() == "the NVIDIA driver is not installed: install it, then run nvidia-smi"


def test_cuda_libraries_that_do_not_fit(monkeypatch, capsys, tmp_path):
    see_nothing_of(monkeypatch)
    assert advise(monkeypatch, capsys, tmp_path) == (
        "the CUDA libraries are missing or have another version: pip install 'tensorflow[and-cuda]'"
    )


def test_what_is_simplest_to_mend_is_said_first(monkeypatch):
    see_nothing_of(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setattr(tf.test, "is_built_with_cuda", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "unset" in doctor.explain_unseen()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "built without CUDA" in doctor.explain_unseen()


def test_gpus_that_tensorflow_sees_are_named(monkeypatch, capsys, tmp_path):
    see_nothing_of(monkeypatch)
    gpus = [types.SimpleNamespace(name=f"/physical_device:GPU:{number}") for number in range(2)]
    details = {gpus[0].name: {"device_name": "NVIDIA H100"}, gpus[1].name: {}}
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus)
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: details[gpu.name])
    result, lines = look(capsys, tmp_path)
    assert "ok    GPU: NVIDIA H100, /physical_device:GPU:1" in lines
    assert result.exit_status == 0


@pytest.mark.parametrize(
    ("there", "found"),
    [
        ([], ""),
        (["/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm"], "/dev/nvidia0"),
        (["/dev/nvidiactl"], ""),
        (["/proc/driver/nvidia/gpus/0000:01:00.0", "/dev/nvidia1"], "/dev/nvidia1"),
    ],
)
def test_a_gpu_is_where_linux_shows_one(monkeypatch, there, found):
    monkeypatch.undo()
    monkeypatch.setattr(doctor.glob, "glob", lambda pattern: fnmatch.filter(there, pattern))
    assert doctor.find_nvidia() == found


# the rest of the machine


def test_a_package_that_is_missing_is_named_with_what_installs_it(monkeypatch, capsys, tmp_path):
    version = importlib.metadata.version

    def find(name):
        if name in {"scipy", "tensorflow-datasets"}:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", find)
    result, lines = look(capsys, tmp_path)
    assert to_do(lines) == [
        "tensorflow-datasets is not installed: pip install tensorflow-datasets",
        "scipy is not installed: pip install scipy",
    ]
    assert (result.exit_status, lines[-1]) == (1, "2 to do")
    (installed,) = [line for line in lines if f"tensorflow {tf.__version__}, keras " in line]
    assert "scipy" not in installed


@pytest.mark.parametrize(("version", "is_fine"), [((3, 10), False), ((3, 11), True), ((3, 13), True), ((3, 14), False)])
def test_a_python_that_tensorflow_does_not_support(monkeypatch, version, is_fine):
    monkeypatch.setattr(sys, "version_info", (*version, 0, "final", 0))
    first = next(doctor._check_versions())
    assert first.advice == ("" if is_fine else "use Python 3.11 to 3.13")


def test_tfds_that_cannot_be_imported_is_one_line(monkeypatch, capsys, tmp_path):
    def fail():
        raise UserError("TensorFlow Datasets can't be imported:\n  no protobuf. folder:PATH works without it.")

    monkeypatch.setattr(doctor, "import_tfds", fail)
    assert to_do(look(capsys, tmp_path)[1]) == [
        "TensorFlow Datasets: TensorFlow Datasets can't be imported: no protobuf. folder:PATH works without it."
    ]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            {"avx2", "avx512f", "avx512_bf16", "fpu"},
            "CPU has avx2 (fast float32), avx512f (faster float32), avx512_bf16 (bfloat16 trunks, about twice as fast)"
            "; it does not have amx_bf16",
        ),
        ({"sse"}, "CPU has no instructions for fast inference; it does not have avx2, avx512f, avx512_bf16, amx_bf16"),
    ],
)
def test_what_the_cpu_can_do(monkeypatch, capsys, tmp_path, flags, text):
    monkeypatch.setattr(doctor, "read_cpu_flags", lambda: frozenset(flags))
    assert f"ok    {text}" in look(capsys, tmp_path)[1]


def test_a_cpu_that_has_all_lacks_none(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, "read_cpu_flags", lambda: frozenset(doctor._CPU_FLAGS))
    (line,) = [line for line in look(capsys, tmp_path)[1] if line.startswith("ok    CPU has")]
    assert "not " not in line


def test_a_cpu_that_does_not_say_what_it_can(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, "read_cpu_flags", frozenset)
    assert any("(its instruction sets can't be read here)" in line for line in look(capsys, tmp_path)[1])


# folders


def fill(folder: Path, count: int, rows: int) -> list[EmbeddingStore]:
    stores = [EmbeddingStore(str(folder), {"backbone": f"B{number:02d}"}) for number in range(count)]
    for number, store in enumerate(stores):
        keys = [bytes([row]) for row in range(rows + number)]
        store.write(keys, np.zeros((len(keys), 50_000), np.float32))
        store.close()
    return stores


def test_stores_are_listed_with_the_command_that_clears_them(capsys, tmp_path):
    stores = fill(tmp_path / "my store", 12, 1)
    lines = look(capsys, tmp_path / "my store")[1]
    (total,) = [line for line in lines if "embedding store" in line]
    assert f"embedding store {tmp_path}/my store: 12 stores, " in total
    listed = [line for line in lines if "rm '" in line]
    assert len(listed) == 10  # the largest
    assert listed[0].startswith(f"ok      {stores[-1].path.name}: ")
    assert not any(stores[number].path.name in line for line in listed for number in (0, 1))
    command = listed[0].split("(to delete it: ")[1].rstrip(")")
    assert os.system(command) == 0
    assert not list((tmp_path / "my store").glob(f"{stores[-1].path.name}*"))
    assert len(list((tmp_path / "my store").glob("*.sqlite"))) == 11


def test_little_disk_is_said_of_each_folder(monkeypatch, capsys, tmp_path):
    set_free(monkeypatch, 4e9)
    result, lines = look(capsys, tmp_path / "store")
    found = to_do(lines)
    assert [line.split(" ")[0] for line in found] == ["embedding", "ImageNet", "TFDS"]
    assert all(line.endswith(", 4 GB free: less than 5 GB are free: free some space") for line in found)
    assert (result.exit_status, lines[-1]) == (1, "3 to do")


@pytest.fixture
def private(tmp_path):
    """A folder that another user made; root may look everywhere, and so becomes that other."""
    folder = tmp_path / "private"
    folder.mkdir()
    folder.chmod(0)
    if os.geteuid():
        yield folder
    else:
        modes = {parent: parent.stat().st_mode for parent in folder.parents}
        for parent, mode in modes.items():
            parent.chmod(mode | 0o111)
        os.setresuid(NOBODY, NOBODY, 0)
        yield folder
        os.setresuid(0, 0, 0)
        for parent, mode in modes.items():
            parent.chmod(mode)
    folder.chmod(0o700)


@pytest.mark.parametrize("rest", ["", "store", "x/store"])
def test_a_folder_that_cannot_be_written_is_named(private, rest):
    findings = list(doctor._check_folders(str(private / rest)))
    assert findings[0].what == f"embedding store {private / rest}: 0 stores, 0 MB"
    named, advice = findings[0].advice.split(" is not writable: ")
    assert Path(named) in (private, private.parent)
    assert advice == "change its permissions, or choose another folder"


def test_a_store_whose_place_is_a_file_is_named(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    lines = look(capsys, tmp_path / "file" / "store")[1]
    assert to_do(lines) == [
        f"embedding store {tmp_path}/file/store: 0 stores, 0 MB: {tmp_path}/file is a file: choose another folder"
    ]


def test_without_variables_the_folders_are_those_of_the_home(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("KERAS_HOME")
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    doctor.run(Config("doctor"))
    lines = capsys.readouterr().out
    for text in ("store {}/.cache/tl_keras: 0", "weights {}/.keras/models, ", "data {}/tensorflow_datasets, "):
        assert text.format(tmp_path / "home") in lines
