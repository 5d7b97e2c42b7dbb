"""A disk that is full, and the same run again once there is space: real file systems of a few hundred kB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SMALL_NETWORK, run_main

ROOT = Path(__file__).parent.parent
# In a mount namespace of its own: a run on a small disk, the disk grows, the run again.
SCRIPT = """
set -e
mount -t tmpfs -o size="$2" tmpfs "$1/disk"
root=$1; shift 2
"$@" >"$root/out" 2>"$root/err" && status=0 || status=$?
echo "$status" >"$root/status"
if [ "$status" != 0 ]; then
    mount -o remount,size=500m "$root/disk"
    "$@" >"$root/out again" 2>"$root/err again"
fi
cp -r "$root/disk/run" "$root/kept"
"""


FLAGS = (*SMALL_NETWORK, "--trainable=all", "--epochs=3", "--learning_rate=0.01", "--engine=tensorflow")


def list_places(root: Path) -> list[str]:
    return [f"--{name}_dir={root / name}" for name in ("run", "store", "export")]


def can_mount() -> bool:
    command = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def run_on_disk(root: Path, size: str, colour_folder: Path) -> tuple[int, str]:
    """Runs on a disk of this size, then on a large one; exit status and stderr of the first run."""
    (root / "disk").mkdir(parents=True)
    command = [sys.executable, "-m", "tl_keras.main", "--mode=finetune", f"--dataset=folder:{colour_folder}"]
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SCRIPT, "sh", str(root), size]
    done = subprocess.run(
        [*namespace, *command, *FLAGS, *list_places(root / "disk")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr + "".join(path.read_text() for path in root.glob("err*"))
    return int((root / "status").read_text()), (root / "err").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, colour_folder) -> Path:
    """A run that had enough space."""
    root = tmp_path_factory.mktemp("whole")
    assert (
        run_main("--mode=finetune", f"--dataset=folder:{colour_folder}", *FLAGS, "--noexport", *list_places(root)) == 0
    )
    return root / "run"


@pytest.mark.skipif(not can_mount(), reason="no user namespaces on this machine")
@pytest.mark.parametrize(
    "size",
    ["200k", *(pytest.param(size, marks=pytest.mark.slow) for size in ("20k", "60k", "100k", "400k", "700k", "1m"))],
)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(size, whole, colour_folder, tmp_path):
    status, error = run_on_disk(tmp_path, size, colour_folder)
    lines = [line for line in error.splitlines() if not line.startswith("warning: ")]
    assert status in {0, 1}
    assert "Traceback" not in error
    if status:
        assert len(lines) == 1
        assert lines[0].startswith("tl_keras: error: ")
        assert "disk is full" in lines[0] or "No space left on device" in lines[0]
    assert status or size not in {"20k", "200k"}  # too small for the run
    kept = tmp_path / "kept"
    assert (kept / "probabilities.npy").read_bytes() == (whole / "probabilities.npy").read_bytes()
    assert json.loads((kept / "metrics.json").read_text())["export"]["path"]
