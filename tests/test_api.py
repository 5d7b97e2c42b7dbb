"""The modes as Python functions: the command line's settings and defaults, its errors, and no output."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tl_keras
from tests.conftest import COLOURS, make_image, run_main, write_image
from tl_keras import api
from tl_keras.config import build_config, convert_keywords, define_flags, parse_flags, read_flags
from tl_keras.config.reference import API_MODES
from tl_keras.config.settings import list_fields
from tl_keras.jobs.result import Result
from tl_keras.run import RunFolder

ROOT = Path(__file__).parent.parent


def read_command_line(*arguments: str):
    values = define_flags()
    parse_flags(values, arguments)
    return read_flags(values)


@pytest.mark.parametrize("mode", API_MODES)
def test_the_defaults_are_those_of_the_command_line(mode):
    needed = {"evaluate": {"classifier": "x"}, "export": {"classifier": "x"}}
    needed["predict"] = {"classifier": "x", "images": ["a", "b"]}
    given = needed.get(mode, {})
    flags = [f"--{name}={','.join(value) if isinstance(value, list) else value}" for name, value in given.items()]
    assert build_config(mode, convert_keywords(given)) == read_command_line(mode, *flags)
    assert callable(getattr(tl_keras, mode))


def test_values_are_those_that_python_has():
    given = {
        "classes": ["a", "b,c"],
        "shots": 3,
        "test_fraction": 0.25,
        "learning_rate": 1,
        "report": False,
        "run_dir": Path("runs") / "x",
        "data_dir": "~/data",
    }
    config = build_config("finetune", convert_keywords({**given, "backbone_kwargs": {"alpha": 0.5}, "weights": None}))
    assert (config.backbone.backbone_kwargs, config.backbone.weights) == ("alpha=0.5", "none")  # None: as in Keras
    assert config.data.classes == ("a", "b,c")
    assert (config.data.shots, config.data.test_fraction, config.training.learning_rate) == (3, 0.25, 1.0)
    assert (config.evaluation.report, config.run.run_dir) == (False, "runs/x")
    assert config.data.data_dir == str(Path.home() / "data")
    assert build_config("extract", convert_keywords({"probe": "knn"})).probe.probe == ("knn",)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"epoch": 3}, "epoch is not a setting. Did you mean: epochs"),
        ({"lr": 3}, "lr is not a setting. Did you mean: learning_rate? See `tl_keras finetune --help=all`."),
        ({"classes": 3}, "classes=3 is not a sequence of strings."),
        ({"classes": [b"a"]}, "classes=[b'a'] is not a sequence of strings."),
        ({"epochs": "3"}, "epochs='3' is not a whole number."),
        ({"epochs": 2.5}, "epochs=2.5 is not a whole number."),
        ({"epochs": True}, "epochs=True is not a whole number."),
        ({"dropout": "high"}, "dropout='high' is not a number."),
        ({"report": 1}, "report=1 is not true or false."),
        ({"backbone": 7}, "backbone=7 is not text."),
        ({"epochs": 0}, "--epochs=0 is out of range. Allowed: 1 or more."),
        ({"images": ["a.jpg"]}, "--images is not used by --mode=finetune. It belongs to: predict. Leave it out."),
        ({"dataset": "folder:/nowhere"}, "--dataset=folder:/nowhere does not exist."),
    ],
    ids=str,
)
def test_a_mistake_is_the_command_lines_error(settings, text, capfd):
    with pytest.raises(tl_keras.UserError) as error:
        tl_keras.finetune(**{"backbone": "SmallConvNet", "weights": "none", **settings})
    assert str(error.value).startswith(text)
    assert capfd.readouterr() == ("", "")


def test_none_is_the_default_and_a_path_is_a_source():
    assert build_config("finetune", convert_keywords({"backbone": None, "shots": None})).backbone.backbone == "ResNet50"
    assert build_config("audit", convert_keywords({"classifier": None})) == build_config("audit", {})
    for path, source in ((Path("photos"), "folder:photos"), (Path("a/b.csv"), "csv:a/b.csv")):
        assert build_config("finetune", convert_keywords({"dataset": path})).data.dataset == source
    assert build_config("finetune", convert_keywords({"seed": np.int64(3)})).run.seed == 3


def test_a_run_that_is_resumed_has_its_own_settings(tmp_path, monkeypatch):
    config = build_config("finetune", {"dataset": "digits", "backbone": "SmallConvNet", "epochs": 7})
    RunFolder.create(str(tmp_path / "run"), overwrite=False, config=config.as_dict(), flags=config.as_flags())
    seen = []
    monkeypatch.setattr(api, "run_mode", lambda settings, screen: seen.append(settings) or Result())
    tl_keras.finetune(resume=True, run_dir=tmp_path / "run")
    assert (seen[0].data.dataset, seen[0].training.epochs, seen[0].run.resume) == ("digits", 7, True)
    with pytest.raises(tl_keras.UserError, match="--epochs=8 is not what the run was started with"):
        tl_keras.finetune(resume=True, run_dir=tmp_path / "run", epochs=8)
    (tmp_path / "run" / "metrics.json").write_text("{}")
    (tmp_path / "run" / "unfinished.json").unlink()
    with pytest.raises(tl_keras.UserError, match="is complete: there is nothing to resume"):
        tl_keras.finetune(resume=True, run_dir=tmp_path / "run")


def test_an_interrupted_run_interrupts_the_program(monkeypatch):
    monkeypatch.setattr(api, "run_mode", lambda settings, screen: Result(exit_status=130))
    with pytest.raises(KeyboardInterrupt):
        tl_keras.finetune(dataset="digits")


def test_predictions_need_a_file():
    with pytest.raises(tl_keras.UserError, match="output is missing"):
        tl_keras.predict(classifier="x", images=["a.jpg"])


def test_importing_a_package_leaves_the_functions_callable(monkeypatch):
    seen = []
    for name in ("audit", "export"):
        importlib.import_module(f"tl_keras.{name}")
        monkeypatch.setattr(api, name, lambda **settings: seen.append(settings) or Result())
        getattr(tl_keras, name)(classifier="x")
    assert seen == [{"classifier": "x"}] * 2
    import tl_keras.audit.findings as findings

    assert findings.FINDINGS_HEADER


def test_a_notebooks_way_from_images_to_predictions(colour_folder, store_dir, tmp_path, capfd):
    small = {"backbone": "SmallConvNet", "image_size": 16, "weights": "none", "store_dir": store_dir}
    result = tl_keras.finetune(
        dataset=f"folder:{colour_folder}",
        epochs=3,
        report=False,
        run_dir=tmp_path / "run",
        export_dir=tmp_path / "models",
        **small,
    )
    assert capfd.readouterr() == ("", "")
    assert isinstance(result, Result)
    assert (result.run_dir, result.exit_status, result.is_complete) == (tmp_path / "run", 0, True)
    assert not (tmp_path / "run" / "unfinished.json").exists()
    assert result.metrics["test"]["accuracy"] > 0.9
    red = write_image(tmp_path / "red.png", make_image(1, COLOURS["red"]))
    assert result.classifier.predict(red)[0]["predicted"] == "red"

    evaluated = tl_keras.evaluate(classifier=result.run_dir, report=False, run_dir=tmp_path / "evaluated")
    assert evaluated.metrics["test"]["accuracy"] == result.metrics["test"]["accuracy"]
    tl_keras.predict(classifier=result.run_dir, images=[red], output=tmp_path / "predictions.csv")
    assert (tmp_path / "predictions.csv").read_text().splitlines()[1].startswith(f"{red},red,")
    again = tl_keras.export(classifier=result.run_dir, export_dir=tmp_path / "models")
    assert again.exported == tmp_path / "models" / "colours-SmallConvNet" / "2"
    np.testing.assert_allclose(
        again.classifier.predict(red)[0]["probabilities"],
        result.classifier.predict(red)[0]["probabilities"],
        atol=1e-5,
    )
    audited = tl_keras.audit(dataset=f"folder:{colour_folder}", run_dir=tmp_path / "audit", **small)
    assert "findings" in audited.metrics
    with pytest.raises(tl_keras.UserError, match="has no classifier"):
        _ = audited.classifier
    assert capfd.readouterr() == ("", "")


# what the screen shows


def test_everything_that_the_screen_shows_is_in_the_log(trained, capfd, store_dir, colour_folder, tmp_path):
    arguments = ["finetune", f"--dataset=folder:{colour_folder}", f"--store_dir={store_dir}", "--backbone=SmallConvNet"]
    arguments += ["--image_size=16", "--weights=none", "--epochs=2", "--noexport", f"--run_dir={tmp_path / 'run'}"]
    assert run_main(*arguments) == 0
    out = capfd.readouterr().out
    assert (tmp_path / "run" / "run.log").read_text(encoding="utf-8") == out
    assert out.splitlines()[-1].startswith("test accuracy ")

    assert run_main(*arguments, "--quiet", "--overwrite") == 0
    quiet = capfd.readouterr()
    assert quiet.out == out.splitlines()[-1] + "\n"
    assert quiet.err == ""
    logged = (tmp_path / "run" / "run.log").read_text(encoding="utf-8").splitlines()
    assert len(logged) == len(out.splitlines())


def test_an_error_is_in_the_log_too(colour_folder, store_dir, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    arguments = ["finetune", f"--dataset=folder:{colour_folder}", f"--store_dir={store_dir}", "--backbone=SmallConvNet"]
    arguments += ["--image_size=16", "--weights=none", "--epochs=1", f"--run_dir={tmp_path / 'run'}", "--noreport"]
    assert run_main(*arguments, f"--export_dir={tmp_path / 'file'}") == 1
    error = capfd.readouterr().err
    assert error.startswith("tl_keras: error: ")
    assert (tmp_path / "run" / "run.log").read_text(encoding="utf-8").endswith(error)


def test_a_quiet_doctor_and_a_quiet_comparison_show_their_results(trained, tmp_path, capfd):
    assert run_main("doctor", "--quiet", f"--store_dir={tmp_path}") in {0, 1}
    assert capfd.readouterr().out.splitlines()[-1] in {"all ok", "1 to do", "2 to do", "3 to do"}
    other = tmp_path / "other"
    shutil.copytree(trained[0], other)
    assert run_main("evaluate", "--quiet", f"--compare={trained[0]},{other}") == 0
    assert "get the same 13 images right and wrong" in capfd.readouterr().out


def test_images_that_are_left_out_are_a_warning_in_every_mode(colour_folder, trained, store_dir, tmp_path, capfd):
    shutil.copytree(colour_folder, tmp_path / "data")
    (tmp_path / "data" / "red" / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    data = f"--dataset=folder:{tmp_path / 'data'}"
    small = ["--backbone=SmallConvNet", "--image_size=16", "--weights=none", f"--store_dir={store_dir}", "--noexport"]
    settings = {"finetune": [*small, "--epochs=1"], "evaluate": [f"--classifier={trained[0]}"]}
    for mode, flags in settings.items():
        run = tmp_path / mode
        arguments = [data, *flags, "--quiet", "--noreport", "--max_broken_fraction=0.1", f"--run_dir={run}"]
        assert run_main(mode, *arguments) == 0
        assert f"broken: 1 image left out, listed in {run}/broken.csv" in capfd.readouterr().out.splitlines()


# types

SCRIPT = """
import tl_keras

result = tl_keras.finetune(dataset="digits", epochs=3, report=False)
reveal_type(result)
reveal_type(result.classifier)
reveal_type(tl_keras.load_classifier("x").predict("a.jpg"))
tl_keras.export(classifier="x")
tl_keras.audit(dataset="digits")
tl_keras.finetune(epochs="3")
tl_keras.finetune(epoch=3)
tl_keras.finetune(optimizer="adamm")
tl_keras.predict(images=["a.jpg"], epochs=3)
"""


def test_a_type_checker_knows_settings_and_results(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--no-incremental",
        "--config-file=",
        str(tmp_path / "script.py"),
    ]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout
    lines = [line for line in found.splitlines() if line.startswith(str(tmp_path)) or "script.py" in line]
    text = "\n".join(lines)
    assert 'Revealed type is "tl_keras.jobs.result.Result"' in text
    assert 'Revealed type is "tl_keras.classifier.loaded.LoadedClassifier"' in text
    assert 'Revealed type is "list[dict[str, Any]]"' in text or "builtins.list[builtins.dict" in text
    errors = {int(line.split(":")[1]) for line in lines if ": error:" in line}
    assert errors == {10, 11, 12, 13}


def test_every_setting_has_a_keyword():
    for mode in API_MODES:
        keywords = importlib.import_module("tl_keras.config.keywords").__dict__[f"{mode.capitalize()}Keywords"]
        assert set(keywords.__annotations__) == {field.name for _, field in list_fields(mode)}
