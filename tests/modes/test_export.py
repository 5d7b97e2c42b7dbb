"""Exporting a run that has ended: what it was compared with lies in the run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import run_main
from tl_keras.export import saved_model
from tl_keras.export.parity import Agreement

AGREED = Agreement(count=16, decisions=1.0, largest_difference=1e-6, batch_difference=1e-7)


@pytest.fixture(autouse=True)
def asked(monkeypatch) -> list[tuple[list[bytes], object]]:
    """Stands for the fresh process: what it was asked to compare."""
    seen = []

    class Parity:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def compare(self, folder, samples, expected):
            seen.append((samples, expected))
            return AGREED

    monkeypatch.setattr(saved_model, "ParityProcess", Parity)
    return seen


@pytest.mark.parametrize("inside", ["", "classifier"])
def test_a_run_and_the_classifier_in_it_are_exported_alike(trained, tmp_path, asked, capsys, inside):
    flags = [f"--classifier={trained[0] / inside}", f"--export_dir={tmp_path}", "--model_name=m"]
    assert run_main("--mode=export", *flags) == 0
    ((samples, expected),) = asked
    assert len(samples) == len(expected) > 1
    last = capsys.readouterr().out.splitlines()[-3:]
    assert last[0] == f"try it: tl_keras serve --classifier={tmp_path}/m/1"
    assert last[1].startswith("then send a request: echo ")
    assert last[2] == f"exported · {tmp_path}/m/1"
    assert (tmp_path / "m" / "1" / "assets" / "labels.txt").read_text() == "blue\ngreen\nred\n"


def test_the_name_is_that_of_data_and_backbone_unless_given(trained, tmp_path):
    assert run_main("--mode=export", f"--classifier={trained[0]}", f"--export_dir={tmp_path}") == 0
    assert os.listdir(tmp_path) == ["colours-SmallConvNet"]


@pytest.mark.parametrize(
    ("gone", "text"),
    [
        ("classifier/samples.npz", "{}/classifier/samples.npz is missing or damaged: "),
        ("classifier/network.keras", "{} contains no classifier. Give the folder of a complete run"),
    ],
)
def test_what_a_run_lacks_is_named_and_nothing_is_exported(trained, tmp_path, capsys, gone, text):
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    (run / gone).unlink()
    assert run_main("--mode=export", f"--classifier={run}", f"--export_dir={tmp_path / 'models'}") == 1
    assert capsys.readouterr().err.startswith("tl_keras: error: " + text.format(run))
    assert not (tmp_path / "models").exists()


def test_a_run_that_was_killed_before_it_was_evaluated_is_exported(trained, tmp_path):
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    (run / "metrics.json").unlink()
    assert run_main("--mode=export", f"--classifier={run}", f"--export_dir={tmp_path / 'models'}") == 0


def test_a_deployment_is_measured_and_written(trained, tmp_path, capsys):
    flags = (f"--classifier={trained[0]}", f"--export_dir={tmp_path / 'models'}", f"--deploy={tmp_path / 'deploy'}")
    assert run_main("--mode=export", *flags) == 0
    assert "exported · " in capsys.readouterr().out
    config = tmp_path / "deploy" / "models.config"
    before = config.read_text()
    assert "| float32 |" in (tmp_path / "deploy" / "README.md").read_text()
    assert run_main("--mode=export", *flags) == 0  # a second version: stable stays where it is until someone moves it
    output = capsys.readouterr().out
    assert f"deploy: {tmp_path / 'deploy'}/models.config differs and is kept" in output
    assert config.read_text() == before
    assert 'key: "canary"\n      value: 2' in (tmp_path / "deploy" / "models.config.new").read_text()


def test_a_version_folder_is_deployed_without_being_exported_again(trained, tmp_path, capsys):
    flags = (f"--classifier={trained[1]}", f"--deploy={tmp_path / 'deploy'}")
    assert run_main("--mode=export", *flags) == 0
    assert "exported · " not in capsys.readouterr().out
    assert (tmp_path / "deploy" / "batching.config").is_file()


def test_a_deployment_that_can_not_be_written_is_found_out_first(trained, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    flags = (f"--classifier={trained[0]}", f"--export_dir={tmp_path / 'models'}", f"--deploy={tmp_path / 'file' / 'x'}")
    assert run_main("--mode=export", *flags) == 1
    assert f"--deploy={tmp_path / 'file' / 'x'} can't be written: " in capsys.readouterr().err
    assert not (tmp_path / "models").exists()
