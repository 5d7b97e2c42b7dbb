"""Runs upon runs, and runs that end badly: what one run leaves, the next one reads."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import SMALL, run_main, write_colour_folder
from tests.processes import Process
from tl_keras.run import has_ended

ROOT = Path(__file__).parent.parent
DEADLINE = 300.0
NETWORK = ("--backbone=SmallConvNet", "--image_size=16")
LEARN = ("--weights=none", "--trainable=all", "--learning_rate=0.005")


def read(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_colour_folder(tmp_path_factory.mktemp("data") / "colours", each=60)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def learned(data, store, tmp_path_factory) -> Path:
    """A run that trained its whole network, which other runs continue from."""
    run = tmp_path_factory.mktemp("learned") / "run"
    flags = (f"--dataset=folder:{data}", *NETWORK, *LEARN, "--epochs=2", "--noreport", "--noexport")
    assert run_main("--mode=finetune", *flags, f"--run_dir={run}", f"--store_dir={store}") == 0
    return run


@pytest.fixture
def finetune(data, store, tmp_path):
    """Trains in a folder of its own; gives that folder."""

    def run(name: str, *flags: str, status: int = 0, mode: str = "finetune") -> Path:
        places = (f"--run_dir={tmp_path / name}", f"--store_dir={store}")
        arguments = [f"--mode={mode}", f"--dataset=folder:{data}", "--noreport", "--noexport", *places, *flags]
        assert run_main(*arguments) == status
        return tmp_path / name

    return run


@pytest.mark.parametrize("mode", ["finetune", pytest.param("extract", marks=pytest.mark.slow)])
def test_a_network_that_an_earlier_run_trained_is_never_tested_on_its_training_images_in_silence(
    finetune, tmp_path, capsys, mode
):
    first = finetune("first", *NETWORK, *LEARN, "--epochs=2", "--test_fraction=0.05")
    middle = finetune("middle", f"--weights={first}", "--test_fraction=0.05", "--epochs=1")  # trains a head alone
    capsys.readouterr()
    epochs = ("--epochs=1",) if mode == "finetune" else ()
    second = finetune("second", f"--weights={middle}", "--test_fraction=0.5", *epochs, "--report", mode=mode)
    out = capsys.readouterr().out
    leak = read(second)["leaks"]["test"]
    rows = [line.split(",")[:2] for line in (second / "splits.csv").read_text().splitlines()[1:]]
    trained = {line.split(",")[0] for line in (first / "splits.csv").read_text().splitlines() if ",train," in line}
    expected = sum(split == "test" and name in trained for name, split in rows)
    assert leak["leaked"] == expected > 0
    before, after = out.split("probe: " if mode == "extract" else "head epoch 1", 1)
    warning = next(line for line in before.splitlines() if line.startswith(f"warning: {first} was trained on "))
    assert f"{expected} of the {len([None for row in rows if row[1] == 'test'])} test images" in warning
    assert f"without {expected} images that are training images too)" in after.splitlines()[-1]
    assert f"{leak['accuracy_without']:.3f} [" in after.splitlines()[-1]
    for file in ("report.html", "MODEL_CARD.md"):
        assert f"was trained on {expected} of the" in (second / file).read_text()
    assert "middle was trained on" not in out


@pytest.mark.parametrize("fate", [pytest.param("deleted", marks=pytest.mark.slow), "replaced"])
def test_the_images_of_an_earlier_run_stay_known_without_its_folder(finetune, tmp_path, capsys, fate):
    first = finetune("first", *NETWORK, *LEARN, "--epochs=1", "--test_fraction=0.05")
    middle = finetune("middle", f"--weights={first}", "--test_fraction=0.05", "--epochs=1")
    if fate == "deleted":
        shutil.rmtree(first)
    else:
        finetune("first", *NETWORK, *LEARN, "--epochs=1", "--dataset=digits", "--overwrite")
    capsys.readouterr()
    second = finetune("second", f"--weights={middle}", "--test_fraction=0.5", "--epochs=1")
    assert f"warning: {first} was trained on " in capsys.readouterr().out
    assert read(second)["leaks"]["test"]["leaked"] > 0
    data = next(flag for flag in (second / "run.flags").read_text().splitlines() if flag.startswith("--dataset="))
    evaluated = f"--run_dir={tmp_path / 'evaluated'}"
    assert run_main("--mode=evaluate", f"--classifier={middle}", data, "--noreport", evaluated) == 0
    assert read(tmp_path / "evaluated")["leaks"]


def test_images_that_are_in_val_and_test_are_told(data, finetune, tmp_path, capsys):
    rows = ["path,label,split"]
    for path in sorted(data.glob("*/*.jpg")):
        number = int(path.stem)
        rows.append(f"{path},{path.parent.name},{'train' if number < 40 else 'val' if number < 50 else 'test'}")
    copy = tmp_path / "copy.jpg"
    copy.write_bytes((data / "red" / "045.jpg").read_bytes())
    (tmp_path / "m.csv").write_text("\n".join([*rows, f"{copy},red,test"]))
    finetune("run", *NETWORK, "--weights=none", "--epochs=1", f"--dataset=csv:{tmp_path / 'm.csv'}")
    out = capsys.readouterr().out
    assert "warning: val has exact copies of 1 of the 31 test images" in out
    assert "warning: 1 of the 31 test images is a val image of the classifier's run, used for selection" in out


def test_images_that_are_in_train_and_test_are_told_without_a_report(data, finetune, tmp_path, capsys):
    rows = ["path,label,split"]
    for path in sorted(data.glob("*/*.jpg")):
        number = int(path.stem)
        rows.append(f"{path},{path.parent.name},{'train' if number < 40 else 'val' if number < 50 else 'test'}")
    copy = data / "red" / "copy.jpg"
    copy.write_bytes((data / "red" / "000.jpg").read_bytes())
    try:
        (tmp_path / "m.csv").write_text("\n".join([*rows, f"{copy},red,test"]))
        run = finetune("run", *NETWORK, "--weights=none", "--epochs=1", f"--dataset=csv:{tmp_path / 'm.csv'}")
    finally:
        copy.unlink()
    assert "warning: train has exact copies of 1 of the 31 test images" in capsys.readouterr().out
    assert read(run)["leaks"]["test"]["leaked"] == 1


def test_the_resizing_of_an_earlier_run_is_kept(finetune):
    first = finetune("first", *NETWORK, "--weights=none", "--epochs=1", "--resize=pad")
    second = finetune("second", f"--weights={first}", "--epochs=1")
    assert json.loads((second / "config.json").read_text())["backbone"]["resize"] == "pad"
    third = finetune("third", f"--weights={first}", "--epochs=1", "--resize=squash")
    assert json.loads((third / "config.json").read_text())["backbone"]["resize"] == "squash"


SEEDS = [
    ("--shots=2",),
    *(pytest.param(flags, marks=pytest.mark.slow) for flags in (("--trainable=all",), ("--dropout=0.3",))),
]


@pytest.mark.parametrize("flags", SEEDS)
def test_each_of_several_seeds_is_a_run_of_its_own(finetune, flags):
    common = ("--dataset=digits", *NETWORK, "--weights=none", "--epochs=2", "--learning_rate=0.01", *flags)
    several = read(finetune("several", *common, "--seeds=2"))["seeds"]["accuracies"]
    alone = [read(finetune(f"seed{seed}", *common, f"--seed={seed}"))["test"]["accuracy"] for seed in range(2)]
    assert several == pytest.approx(alone)
    assert len(set(several)) > 1


def test_a_tail_that_diverges_leaves_the_heads_stage(finetune, learned, capsys):
    explode = ("--trainable=all", "--optimizer=sgd", "--momentum=0.99", "--backbone_learning_rate=1000", "--epochs=3")
    run = finetune("run", f"--weights={learned}", *explode, "--learning_rate=0.01", status=1)
    captured = capsys.readouterr()
    assert "warning: the loss became " in captured.out
    assert "tail: no epoch improved on val over the previous stage; its weights are kept" in captured.out
    assert "Traceback" not in captured.err
    assert read(run)["test"]["accuracy"] > 0.5
    assert has_ended(run)
    assert run_main("--mode=evaluate", f"--classifier={run}", "--noreport", f"--run_dir={run}-evaluated") == 0


def test_a_run_that_fails_does_not_cost_the_run_that_it_was_to_replace(finetune, data, capsys):
    run = finetune("run", *NETWORK, "--weights=none", "--epochs=1")
    before = (run / "predictions.csv").read_bytes()
    explode = ("--weights=none", "--trainable=all", "--optimizer=sgd", "--learning_rate=1000", "--momentum=0.99")
    finetune("run", *NETWORK, *explode, "--epochs=3", "--overwrite", status=1)
    kept = run.with_name("run.replaced")
    assert (kept / "predictions.csv").read_bytes() == before
    finetune("run", *NETWORK, "--weights=none", "--epochs=2", "--overwrite")
    assert not kept.exists()
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_a_run_with_a_failure_keeps_the_run_that_it_was_to_replace(finetune, learned, capsys):
    finetune("run", f"--weights={learned}", "--epochs=1")
    explode = ("--trainable=all", "--optimizer=sgd", "--momentum=0.99", "--backbone_learning_rate=1000", "--epochs=2")
    run = finetune("run", f"--weights={learned}", *explode, "--learning_rate=0.01", "--overwrite", status=1)
    assert f"the earlier run is kept: {run}.replaced" in capsys.readouterr().out
    assert (run.with_name("run.replaced") / "classifier").is_dir()


def start(*flags: str) -> Process:
    return Process("--mode=finetune", "--noreport", *flags)


def wait_for(path: Path, text: str = "") -> None:
    deadline = time.monotonic() + DEADLINE
    while not (path.is_file() and text in path.read_text()):
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)], ids=str)
def test_a_classifier_is_there_from_the_heads_stage_on(data, tmp_path, learned, number):
    run = tmp_path / "run"
    flags = (f"--dataset=folder:{data}", f"--weights={learned}", "--trainable=all", "--epochs=60", "--noexport")
    process = start(*flags, f"--run_dir={run}", f"--store_dir={tmp_path / 'store'}")
    wait_for(run / "history.csv", "tail,2,")
    process.send_signal(number)
    out, error = process.communicate(timeout=DEADLINE)
    assert "Traceback" not in error
    if number == signal.SIGTERM:
        assert process.returncode == 130
        assert read(run)["interrupted"] is True
        assert f"to continue: tl_keras finetune --resume --run_dir={run}" in out
    assert run_main("--mode=evaluate", f"--classifier={run}", "--noreport", f"--run_dir={tmp_path / 'evaluated'}") == 0
    assert read(tmp_path / "evaluated")["test"]["accuracy"] > 0.5
    assert run_main("--mode=export", f"--classifier={run}", f"--export_dir={tmp_path / 'models'}") == 0
    assert (run / "unfinished.json").is_file()  # whoever reads a run does not end it


def test_resume_takes_the_settings_of_the_run(data, tmp_path, finetune, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = (*NETWORK, "--weights=none", "--epochs=3", "--val_fraction=0.2")
    whole = finetune("whole", *flags)
    run = finetune("runs/cut", *flags)
    (run / "metrics.json").unlink()
    (run / "unfinished.json").write_text("{}")
    assert run_main("--mode=finetune", "--resume", "--epochs=4", f"--run_dir={run}") == 1
    assert "--epochs=4 is not what the run was started with (3). --resume continues a run with its own settings" in (
        capsys.readouterr().err
    )
    assert run_main("--mode=extract", "--resume", f"--run_dir={run}") == 1
    assert "the run is one of --mode=finetune, not of --mode=extract" in capsys.readouterr().err
    assert run_main("--mode=finetune", "--resume") == 0  # the latest in the folder runs
    assert "head: trained before the interruption; best epoch by val" in capsys.readouterr().out
    np.testing.assert_array_equal(np.load(run / "probabilities.npy"), np.load(whole / "probabilities.npy"))
    assert run_main("--mode=finetune", "--resume", f"--run_dir={run}") == 0
    assert f"the run in {run} is complete: there is nothing to resume" in capsys.readouterr().out
    assert run_main("--mode=finetune", "--resume") == 1
    assert "--resume: the folder runs has no unfinished run of --mode=finetune." in capsys.readouterr().err


def test_a_manifest_that_grew_after_an_interruption_is_trained_on_anew(data, tmp_path, finetune, capsys):
    """The checkpoint is of other data: the run ends as one that never was interrupted, and says so."""
    rows = [f"{path},{path.parent.name}" for path in sorted(data.rglob("*.jpg"))]
    manifest = tmp_path / "images.csv"
    manifest.write_text("\n".join(["path,label", *rows[::3]]))
    flags = (f"--dataset=csv:{manifest}", *NETWORK, "--weights=none", "--epochs=2")
    run = finetune("run", *flags)
    (run / "metrics.json").unlink()
    (run / "unfinished.json").write_text("{}")
    manifest.write_text("\n".join(["path,label", *rows[::3], *rows[1::9]]))
    capsys.readouterr()
    finetune("run", *flags)
    shown = capsys.readouterr().out
    assert "head: the checkpoint does not match this data and these starting weights, or is damaged" in shown
    assert has_ended(run)
    whole = finetune("whole", *flags)
    for name in ("predictions.csv", "splits.csv", "probabilities.npy"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


def test_an_export_that_was_interrupted_after_its_version_was_there_is_not_made_twice(data, tmp_path, finetune):
    models = f"--export_dir={tmp_path / 'models'}"
    run = finetune("run", *NETWORK, "--weights=none", "--epochs=1", "--export", models)
    (run / "metrics.json").unlink()
    extra = next((tmp_path / "models").glob("*/1")) / "assets.extra" / "tl_keras.json"
    (run / "unfinished.json").write_text(json.dumps({"run_id": json.loads(extra.read_text())["run_id"]}))
    finetune("run", *NETWORK, "--weights=none", "--epochs=1", "--export", models)
    assert [path.name for path in (tmp_path / "models").glob("*/*")] == ["1"]
    assert read(run)["export"]["path"].endswith("/1")
    assert has_ended(run)


@pytest.mark.parametrize(
    "settings",
    [{"KERAS_BACKEND": "torch"}, pytest.param({"KERAS_HOME": "{tmp}"}, marks=pytest.mark.slow)],
    ids=lambda one: next(iter(one)),
)
def test_what_other_programs_set_for_keras_changes_nothing(data, tmp_path, settings):
    (tmp_path / "keras.json").write_text(
        '{"backend": "torch", "image_data_format": "channels_first", "floatx": "float16", "epsilon": 1e-07}'
    )
    environment = {**os.environ, **{name: value.replace("{tmp}", str(tmp_path)) for name, value in settings.items()}}
    command = [sys.executable, "-m", "tl_keras.main", "--mode=finetune", "--epochs=1", "--noexport", *SMALL]
    places = (f"--dataset=folder:{data}", f"--run_dir={tmp_path / 'run'}", f"--store_dir={tmp_path / 'store'}")
    done = subprocess.run([*command, *places], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
