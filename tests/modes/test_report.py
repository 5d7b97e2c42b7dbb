"""The report of real runs: what finetune, extract and evaluate put into it."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import SMALL_NETWORK, run_main, write_colour_folder
from tl_keras.errors import UserError
from tl_keras.jobs import inspection
from tl_keras.report import compose


def text_of(run: Path) -> str:
    """The page without its pictures."""
    return re.sub(r"data:image/jpeg;base64,[^\"]*", "data:", (run / "report.html").read_text())


def pictures_of(run: Path) -> int:
    return (run / "report.html").read_text().count("data:image/jpeg")


def test_a_finetune_run_has_all_of_it(trained):
    run, text = trained[0], text_of(trained[0])
    metrics = json.loads((run / "metrics.json").read_text())
    assert f"{100 * metrics['test']['accuracy']:.1f} %" in text
    headings = ("Summary", "Learning curves", "Confusion matrix", "Least confident predictions", "Calibration")
    for heading in (*headings, "Model card"):
        assert f">{heading}</" in text
    assert "evidence in " in text  # heat maps
    assert "nearest training images" in text
    assert "tl_keras finetune " in text
    assert metrics["timing"]["seconds"]["report"] > 0
    assert set(metrics["audit"]) == {"findings", "leaks", "shift"}
    names = {path.name for path in run.iterdir()}
    assert {"report.html", "MODEL_CARD.md", "audit.csv", "plots"} <= names
    assert {path.name for path in (run / "plots").iterdir()} >= {"learning_loss.svg", "reliability.svg", "coverage.svg"}
    with (run / "audit.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(metrics["audit"]["findings"].values()) == len(rows)


@pytest.fixture(scope="module")
def leaky(tmp_path_factory) -> Path:
    """Colours in two splits, one image in both, and a name that is HTML."""
    root = tmp_path_factory.mktemp("leaky") / "photos"
    for split, each, first in (("train", 12, 0), ("val", 6, 12), ("test", 12, 18)):
        write_colour_folder(root / split, each=each, first=first)
        (root / split / "red").rename(root / split / "red <b>&")
    shutil.copy(root / "test/green/018.jpg", root / "train/green/leak.jpg")
    return root


@pytest.mark.parametrize(
    ("probe", "heat"),
    [
        ("logistic_regression", True),
        ("rbf_svm", True),
        ("knn", False),
        *(pytest.param(probe, True, marks=pytest.mark.slow) for probe in ("linear_svm", "ridge")),
    ],
)
def test_each_probe_has_heat_maps_but_for_votes(probe, heat, leaky, store_dir, tmp_path, capsys):
    flags = (f"--dataset=folder:{leaky}", *SMALL_NETWORK, f"--store_dir={store_dir}", "--noexport")
    run = tmp_path / "run"
    assert run_main("--mode=extract", *flags, f"--probe={probe}", "--probe_parameter=1", f"--run_dir={run}") == 0
    text, screen = text_of(run), capsys.readouterr().out
    assert ("evidence in " in text) == heat
    assert ("the predictions have no gradient with respect to the feature map" in text) != heat
    assert "nearest training images" in text
    assert "Learning curves" not in text
    assert "red &lt;b&gt;&amp;" in text
    assert "<b>&" not in text
    told = "eak: 1 of 36 test images are also in another split; test accuracy of this classifier: "
    assert f"warning: l{told}" in screen
    assert f'<p class="note">L{told}' in text
    assert "eak: 1 of 36 test images are also in another split" in (run / "MODEL_CARD.md").read_text()
    assert "audit: leak 1" in screen
    assert f"report: {run}/report.html" in screen
    again = (f"--classifier={run}", f"--run_dir={tmp_path / 'again'}", "--noreport")
    assert run_main("--mode=evaluate", *again) == 0  # knows what the run's audit found
    leaks = [json.loads((one / "metrics.json").read_text()) for one in (run, tmp_path / "again")]
    expected = leaks[0]["audit"]["leaks"]
    for name in ("leaked", "accuracy_with", "accuracy_without"):
        assert leaks[1]["leaks"]["test"][name] == expected[name]
    assert "warning: the classifier was trained on 1 of the 36 test images, or on copies of them" in (
        capsys.readouterr().out
    )


def test_a_trained_tail_shows_its_own_neighbours(leaky, store_dir, tmp_path):
    flags = (f"--dataset=folder:{leaky}", *SMALL_NETWORK, f"--store_dir={store_dir}", "--noexport", "--epochs=2")
    assert run_main("--mode=finetune", *flags, "--trainable=last:2", f"--run_dir={tmp_path / 'run'}", "--seeds=2") == 0
    text = text_of(tmp_path / "run")
    assert "nearest training images" in text
    assert "evidence in " in text
    assert "Over 2 random seeds, test accuracy is " in text


def test_evaluate_reports_a_run_and_an_exported_model(trained, tmp_path, capsys):
    pictures = []
    for number, path in enumerate(trained):
        run = tmp_path / str(number)
        flags = ("--corruptions", "--corruption_images=4") if number == 0 else ()
        data = f"--dataset=folder:{tmp_path / 'others'}"
        write_colour_folder(tmp_path / "others", each=6, first=60)
        assert run_main("--mode=evaluate", f"--classifier={path}", data, f"--run_dir={run}", *flags) == 0
        assert f"report: {run}/report.html" in capsys.readouterr().out
        text = text_of(run)
        assert (">Robustness</" in text) == (number == 0)
        assert ("an exported model has no gradients. Evaluate its run folder instead." in text) == (number == 1)
        assert ("It is unknown whether the classifier was trained on some of these" in text) == (number == 1)
        assert ("None of these images is identical to a training image" in text) == (number == 0)
        assert ("An exported model does not record its training images" in text) == (number == 1)
        assert "nearest training images" not in text
        pictures.append(pictures_of(run))
    assert pictures[0] == 2 * pictures[1]  # each with its heat map


def test_without_a_report_there_is_none_and_no_audit(leaky, store_dir, tmp_path):
    flags = (f"--dataset=folder:{leaky}", *SMALL_NETWORK, f"--store_dir={store_dir}", "--noexport", "--epochs=1")
    assert run_main("--mode=finetune", *flags, "--noreport", f"--run_dir={tmp_path / 'run'}") == 0
    assert not {"report.html", "MODEL_CARD.md", "audit.csv", "plots"} & {
        path.name for path in (tmp_path / "run").iterdir()
    }
    assert "audit" not in json.loads((tmp_path / "run" / "metrics.json").read_text())


def test_the_card_is_filled_in_and_checked_before_anything_is_computed(trained, tmp_path, capsys):
    card = tmp_path / "card.json"
    card.write_text('{"intended_use": "Sorting <beads>."}')
    run = (f"--classifier={trained[0]}", f"--run_dir={tmp_path / 'run'}", f"--card={card}")
    assert run_main("--mode=evaluate", *run) == 0
    assert "Sorting &lt;beads&gt;." in text_of(tmp_path / "run")
    assert "Sorting <beads>." in (tmp_path / "run" / "MODEL_CARD.md").read_text()
    card.write_text('{"limit": "x"}')
    capsys.readouterr()
    assert run_main("--mode=evaluate", *run, "--overwrite") == 1
    assert "the field 'limit' is unknown. Did you mean: limits" in capsys.readouterr().err
    assert (tmp_path / "run" / "report.html").is_file()
    assert run_main("--mode=evaluate", *run, "--overwrite", "--noreport") == 1
    assert (
        "--card has entries for the report, which --noreport disables. Leave one of them out."
        in capsys.readouterr().err
    )


def test_what_evaluate_warns_of_stands_in_the_report_too(trained, colour_folder, tmp_path):
    """The run's own training images, given as if they were new."""
    data = (f"--dataset=folder:{colour_folder}", f"--run_dir={tmp_path / 'run'}")
    assert run_main("--mode=evaluate", f"--classifier={trained[0]}", *data) == 0
    trained_on = (trained[0] / "splits.csv").read_text().count(",train,")
    warning = f"he classifier was trained on {trained_on} of the "
    assert warning in text_of(tmp_path / "run")
    assert warning in (tmp_path / "run" / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (KeyboardInterrupt(), 130, "report: interrupted; the run is complete without it"),
        (
            UserError("the disk is full: free some."),
            1,
            "warning: the report could not be written: the disk is full: free some. The run is",
        ),
        (
            ValueError("odd\n"),
            1,
            "warning: the report could not be written: ValueError: odd. The run is complete without it",
        ),
    ],
)
@pytest.mark.parametrize("mode", ["finetune", "evaluate"])
def test_a_report_that_fails_takes_nothing_with_it(
    mode, error, status, told, trained, leaky, store_dir, tmp_path, monkeypatch, capsys
):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(compose, "write_report", fail)
    training = (f"--dataset=folder:{leaky}", *SMALL_NETWORK, f"--store_dir={store_dir}", "--noexport", "--epochs=1")
    flags = training if mode == "finetune" else (f"--classifier={trained[0]}",)
    assert run_main(f"--mode={mode}", *flags, f"--run_dir={tmp_path / 'run'}") == status
    output = capsys.readouterr()
    assert told in output.out
    assert output.out.splitlines()[-1].startswith("test accuracy ")
    assert output.err == ""
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test"]["n"] > 0
    assert "report" in metrics["timing"]["seconds"]


@pytest.mark.parametrize("flags", [("--augment=crop",), ("--augment=flip", "--shots=3"), ("--trainable=all",)])
def test_every_way_to_train_has_its_report(flags, leaky, store_dir, tmp_path):
    common = (f"--dataset=folder:{leaky}", *SMALL_NETWORK, f"--store_dir={store_dir}", "--noexport", "--epochs=1")
    assert run_main("--mode=finetune", *common, *flags, f"--run_dir={tmp_path / 'run'}") == 0
    assert "nearest training images" in text_of(tmp_path / "run")


def test_too_many_images_are_left_to_the_audit(leaky, store_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inspection, "_IMAGES_AT_MOST", 50)
    common = (f"--dataset=folder:{leaky}", *SMALL_NETWORK, f"--store_dir={store_dir}", "--noexport", "--epochs=1")
    assert run_main("--mode=finetune", *common, f"--run_dir={tmp_path / 'run'}") == 0
    assert "audit: 91 images are too many for the report; use --mode=audit" in capsys.readouterr().out
    text = text_of(tmp_path / "run")
    assert "nearest training images" not in text
    assert "evidence in " in text
