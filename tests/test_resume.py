"""Runs that are killed at any moment, and continued: the same bits as without the interruption."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import SMALL, run_main, write_colour_folder
from tests.processes import Process
from tl_keras.run import has_ended

DEADLINE = 300.0
RUNS = {
    "head": ("--mode=finetune", "--epochs=6", "--dropout=0.3", "--augment=flip"),
    "tail": ("--mode=finetune", "--epochs=4", "--trainable=last:1", "--weights={earlier}", "--dropout=0.2"),
    "network": ("--mode=finetune", "--epochs=4", "--trainable=all", "--augment=crop", "--dropout=0.2"),
    "seeds": ("--mode=finetune", "--epochs=2", "--trainable=all", "--seeds=3", "--shots=5"),
    "report": ("--mode=finetune", "--epochs=3", "--report", "--engine=openvino"),
    "probes": ("--mode=extract", "--probe=logistic_regression,linear_svm,knn", "--feature_layer=pool1,embedding_pool"),
}
SLOW_KILLS = {"head": 12, "tail": 12, "network": 12, "seeds": 12, "report": 12, "probes": 12}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_colour_folder(tmp_path_factory.mktemp("data") / "colours", each=40)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory, data) -> Path:
    """A run whose network others continue from."""
    root = tmp_path_factory.mktemp("earlier")
    flags = (f"--dataset=folder:{data}", *SMALL, "--trainable=all", "--epochs=2", f"--store_dir={root / 'store'}")
    assert run_main("--mode=finetune", *flags, "--noexport", f"--run_dir={root / 'run'}") == 0
    return root / "run"


class Job:
    """One command, with folders of its own."""

    def __init__(self, name: str, root: Path, data: Path, earlier: Path):
        self.run, self.models = root / "run", root / "models"
        weights = () if "--weights={earlier}" in RUNS[name] else ("--weights=none",)
        network = () if not weights else ("--backbone=SmallConvNet", "--image_size=16")
        self.command = [
            *(*weights, *network, f"--dataset=folder:{data}", "--noreport"),
            *("--engine=tensorflow", "--precision=float32", "--learning_rate=0.01"),
            *(f"--run_dir={self.run}", f"--export_dir={self.models}", f"--store_dir={root / 'store'}"),
            *(flag.replace("{earlier}", str(earlier)) for flag in RUNS[name]),  # the last of two flags counts
        ]
        if RUNS[name][0] == "--mode=extract":
            self.command.remove("--learning_rate=0.01")

    def start(self) -> Process:
        return Process(*self.command)

    def finish(self) -> None:
        process = self.start()
        _, error = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0, error

    def kill_after(self, seconds: float) -> bool:
        """Kills the process after some seconds: by SIGKILL, by SIGTERM, or by two of them; False: it ended before."""
        process, way = self.start(), int(seconds * 1000) % 4
        try:
            process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM if way in {0, 1} else signal.SIGKILL)
            if way == 1:
                time.sleep(seconds % 0.5)  # in the evaluation, perhaps
                process.send_signal(signal.SIGTERM)
            _, error = process.communicate(timeout=DEADLINE)
            assert "Traceback" not in error
            return not has_ended(self.run)  # it may have been complete, and about to exit
        assert process.returncode == 0
        return False

    def results(self) -> dict[str, object]:
        """What must be the same to the bit."""
        versions = sorted(self.models.glob("*/*"))
        history = self.run / "history.csv"
        rows = [line.rsplit(",", 1)[0] for line in history.read_text().splitlines()] if history.is_file() else []
        metrics = json.loads((self.run / "metrics.json").read_text())
        return {
            "predictions": (self.run / "predictions.csv").read_bytes(),
            "probabilities": np.load(self.run / "probabilities.npy").tobytes(),
            "exported": serve(versions[0]).tobytes(),
            "versions": [version.name for version in versions],
            "history": rows,
            "seeds": metrics.get("seeds"),
            "candidates": [(one["layer"], one["value"], one["val_accuracy"]) for one in metrics.get("candidates", ())],
            "unfinished": (self.run / "unfinished.json").exists(),
            "report": (self.run / "report.html").exists(),
        }


def serve(version: Path) -> np.ndarray:
    """Probabilities of the exported model for some images."""
    from tests.conftest import COLOURS, make_image
    from tl_keras.classifier import load

    images = np.stack([make_image(number, colour, (16, 16)) for number, colour in enumerate(COLOURS.values())])
    return load(str(version)).predict_pixels(images.astype(np.float32))


def check_kills(name: str, root: Path, data: Path, earlier: Path, *, kills: int, seed: int) -> None:
    """Kills a command at random moments until it was killed so often; every run that ends must be the same."""
    Process("--version").wait(DEADLINE)  # the server of forks imports TensorFlow, which is no part of a run
    whole = Job(name, root / "whole", data, earlier)
    start = time.monotonic()
    whole.finish()
    longest, draw, done, number = time.monotonic() - start, random.Random(seed), 0, 0
    expected = whole.results()
    while done < kills:
        cut, number = Job(name, root / f"cut{number}", data, earlier), number + 1
        while done < kills and cut.kill_after(draw.uniform(0.0, 1.0) * longest):
            done += 1
        if not has_ended(cut.run):
            cut.finish()
        assert cut.results() == expected, f"seed {seed}, kill {done}"


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path, data, earlier):
    check_kills("tail", tmp_path, data, earlier, kills=1, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_run_survives_many_kills(name, tmp_path, data, earlier):
    check_kills(name, tmp_path, data, earlier, kills=SLOW_KILLS[name], seed=len(name))
