"""What is installed: the wheel with everything it needs, and its metadata."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

from tests.processes import Process

ROOT = Path(__file__).parent.parent
_DEADLINE = 600.0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(ROOT)]
    subprocess.run(command, check=True, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_has_every_file_of_the_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "tl_keras").rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "docs/"))]


def test_its_metadata_is_what_a_registry_wants(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = message_from_string(archive.read(name).decode())
    for key in ("Name", "Version", "Summary", "Author", "Keywords", "Requires-Python"):
        assert metadata[key], key
    assert (metadata["License-Expression"] or metadata["License"]) == "Apache-2.0"
    assert metadata["Requires-Python"] == "<3.14,>=3.11"
    assert "Programming Language :: Python :: 3.13" in metadata.get_all("Classifier")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# tl_keras")


def test_the_installed_command_runs_from_an_empty_folder(wheel, tmp_path):
    """The wheel's files and its script, not the checkout; the dependencies are those of this environment."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run([*command, f"--prefix={tmp_path / 'installed'}", str(wheel)], check=True)
    (site,) = (tmp_path / "installed").glob("lib/python*/site-packages")
    (tmp_path / "empty").mkdir()

    def run(*command: str) -> list[str]:
        environment = {**os.environ, "PYTHONPATH": str(site)}
        result = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path / "empty", env=environment, check=True
        )
        return result.stdout.splitlines()

    assert run(sys.executable, "-c", "import tl_keras; print(tl_keras.__file__)") == [
        str(site / "tl_keras" / "__init__.py")
    ]
    small = ["--backbone=SmallConvNet", "--image_size=16", "--weights=none", "--epochs=1", "--store_dir=store"]
    installed = str(tmp_path / "installed" / "bin" / "tl_keras")
    *warnings, last = run(installed, "finetune", "--dataset=digits", *small, "--quiet")
    assert [line for line in warnings if not line.startswith("warning:")] == []
    assert re.match(r"test accuracy 0\.\d{3} \[.+\] n=\d+ · runs/.+ · saved_models/digits-SmallConvNet/1$", last)


def test_the_citation_has_the_packages_version():
    from tl_keras import __version__

    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_notebook_runs(tmp_path):
    cells = json.loads((ROOT / "docs" / "start" / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    code = list[str]()
    for cell in cells:
        if cell["cell_type"] == "code":
            *statements, value = "".join(cell["source"]).split("\n")
            is_value = re.match(r"[\w.]+[\[/(,.]|result\.\w+$", value) and "=" not in value.split("(")[0]
            code.append("\n".join([*statements, f"print({value})" if is_value else value]))
    (tmp_path / "notebook.py").write_text("\n".join(code), encoding="utf-8")
    process = Process(script=tmp_path / "notebook.py", cwd=tmp_path)
    output, error = process.communicate(timeout=_DEADLINE)
    assert process.returncode == 0, error[-2000:]
    assert "report.html" in output
    assert "saved_models/digits-SmallConvNet/1" in output
