"""Finetuning: calibration and repeated seeds, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import SMALL, run_main
from tl_keras.classifier import load, load_trained
from tl_keras.evaluation.metrics import measure
from tl_keras.jobs import finish
from tl_keras.run import History
from tl_keras.training import stages, trainer


@pytest.fixture
def finetune_flags(colour_folder, store_dir) -> list[str]:
    data = [f"--dataset=folder:{colour_folder}", f"--store_dir={store_dir}"]
    return ["--mode=finetune", *data, *SMALL, "--learning_rate=0.05"]


@pytest.fixture
def finetune(finetune_flags, tmp_path):
    def run(name: str, *flags: str) -> Path:
        assert run_main(*finetune_flags, "--noexport", f"--run_dir={tmp_path / name}", *flags) == 0
        return tmp_path / name

    return run


def read(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_the_temperature_is_in_the_classifier_and_changes_no_class(finetune, colour_folder, capsys):
    flags = ("--epochs=2", "--val_fraction=0.4")  # twenty images and more, on which a temperature can be fitted
    with_it, without = finetune("with", *flags), finetune("without", *flags, "--nocalibrate")
    calibrated, plain = np.load(with_it / "probabilities.npy"), np.load(without / "probabilities.npy")
    np.testing.assert_array_equal(calibrated.argmax(1), plain.argmax(1))
    temperature = read(with_it)["calibration"]["temperature"]
    assert temperature != 1
    assert read(without)["calibration"]["temperature"] == 1
    logits = np.log(plain) / temperature
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(calibrated, expected, atol=1e-5)
    before = read(with_it)["calibration"]["before"]["test"]
    assert before["ece"] == pytest.approx(read(without)["test"]["ece"], abs=1e-6)
    assert [layer.name for layer in load_trained(str(with_it)).network.layers][-1] == "temperature"
    ids = [line.split(",")[0] for line in (with_it / "predictions.csv").read_text().splitlines()[1:]]
    rows = [one["probabilities"] for one in load(str(with_it)).predict([colour_folder / one for one in ids[:5]])]
    np.testing.assert_allclose(rows, calibrated[:5], atol=1e-4)
    assert f"calibration: temperature {temperature:.2f}, fitted on val" in capsys.readouterr().out


@pytest.mark.parametrize("trainable", ["head", pytest.param("last:2", marks=pytest.mark.slow)])
def test_other_seeds_tell_the_spread_and_leave_the_run_as_it_is(finetune, capsys, trainable):
    flags = ("--epochs=1", f"--trainable={trainable}")
    once, often = finetune("once", *flags), finetune("often", *flags, "--seeds=3")
    np.testing.assert_allclose(np.load(often / "probabilities.npy"), np.load(once / "probabilities.npy"), atol=1e-5)
    for name, other in zip(
        load_trained(str(once)).network.get_weights(), load_trained(str(often)).network.get_weights(), strict=True
    ):
        np.testing.assert_allclose(name, other, atol=1e-5)
    found, test = read(often)["seeds"], read(often)["test"]
    assert len(found["accuracies"]) == 3
    assert found["accuracies"][0] == pytest.approx(test["accuracy"])
    assert found["min"] <= found["mean"] <= found["max"]
    assert "3 seeds: test accuracy " in capsys.readouterr().out
    assert read(often)["timing"]["seconds"]["seeds"] > 0
    assert (often / "history.csv").read_text().count("\n") == (once / "history.csv").read_text().count("\n")


@pytest.mark.parametrize("complete", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_interruption_in_further_seeds_loses_nothing_of_the_run(
    finetune_flags, tmp_path, capsys, monkeypatch, complete
):
    made = []

    def new_head(*args, **kwargs):
        if len(made) == complete:
            raise KeyboardInterrupt
        made.append(None)
        return stages.new_head(*args, **kwargs)

    monkeypatch.setattr(trainer, "new_head", new_head)
    arguments = [*finetune_flags, "--epochs=1", "--seeds=3", "--export", f"--export_dir={tmp_path / 'models'}"]
    assert run_main(*arguments, f"--run_dir={tmp_path / 'run'}") == 130
    out = capsys.readouterr().out
    assert f"seeds: interrupted after {complete} of 3; the run is kept and will be completed" in out
    assert "1 seeds" not in out
    found = read(tmp_path / "run")
    assert ("seeds" in found) == (complete == 2)
    assert found["test"]["n"] > 0
    assert (tmp_path / "run" / "classifier").is_dir()
    assert list((tmp_path / "models").rglob("saved_model.pb"))


def test_a_run_that_another_process_continues_stops_in_training(finetune_flags, tmp_path, capsys, monkeypatch):
    folder, marker = tmp_path / "run", tmp_path / "run" / "unfinished.json"
    keep = History.keep

    def lose(self, *rows):
        content = json.loads(marker.read_text())
        content["process"] |= {"id": 7, "host": "elsewhere", "machine": "another"}
        marker.write_text(json.dumps(content))
        keep(self, *rows)

    monkeypatch.setattr(History, "keep", lose)
    assert run_main(*finetune_flags, "--epochs=3", f"--run_dir={folder}") == 1
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == (
        f"tl_keras: error: process 7 on elsewhere has continued the run in {folder}, so this process stops. If that "
        "one does not complete it, run the same command again."
    )
    assert "epoch 2/3" not in out
    assert not (folder / "metrics.json").exists()
    assert json.loads(marker.read_text())["process"]["id"] == 7


def test_an_interrupted_export_is_made_up_for(finetune_flags, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(finish, "export_saved_model", interrupt)
    arguments = [*finetune_flags, "--epochs=1", "--export", f"--export_dir={tmp_path / 'models'}"]
    assert run_main(*arguments, f"--run_dir={tmp_path / 'run'}") == 130
    captured = capsys.readouterr()
    run = tmp_path / "run"
    assert (
        f"export: interrupted; the rest of the run is complete. Export it with --mode=export --classifier={run}"
        in captured.out
    )
    assert captured.out.splitlines()[-1].startswith("test accuracy ")
    assert "run again with --overwrite" not in captured.err
    monkeypatch.undo()
    assert run_main("--mode=export", f"--classifier={run}", f"--export_dir={tmp_path / 'models'}") == 0


def test_figures_are_measured_on_what_is_calibrated(finetune):
    folder = finetune("run", "--epochs=1")
    values = np.load(folder / "probabilities.npy")
    rows = [line.split(",") for line in (folder / "predictions.csv").read_text().splitlines()[1:]]
    labels = (folder / "labels.txt").read_text().splitlines()
    test = [number for number, row in enumerate(rows) if row[1] == "test"]
    expected = measure(values[test], np.array([labels.index(rows[number][2]) for number in test]))
    assert read(folder)["test"]["nll"] == pytest.approx(expected["nll"])
