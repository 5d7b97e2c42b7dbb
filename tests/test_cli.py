"""Every mode and every flag file, as a user runs them."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import COLOURS, SMALL, make_image, run_main, write_colour_folder, write_image

ROOT = Path(__file__).parent.parent


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_all_that_the_contract_names(trained):
    run, model = trained
    names = {path.name for path in run.iterdir()}
    assert names >= {
        *("config.json", "run.flags", "labels.txt", "splits.csv", "history.csv", "metrics.json"),
        *("predictions.csv", "probabilities.npy", "logs", "checkpoints", "classifier"),
    }
    assert not [path for path in run.rglob("*") if "tmp" in path.name or "unfinished" in path.name]
    assert (model / "assets" / "labels.txt").read_text().split() == sorted(COLOURS)


def test_metrics_predictions_and_probabilities_agree(trained):
    run, _ = trained
    metrics = json.loads((run / "metrics.json").read_text())
    rows = read_csv(run / "predictions.csv")
    probabilities = np.load(run / "probabilities.npy")
    labels = (run / "labels.txt").read_text().split()
    assert list(rows[0]) == ["id", "split", "label", "predicted", "probability", "label_probability"]
    assert probabilities.shape == (len(rows), 3)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    for row, values in zip(rows, probabilities, strict=True):
        assert row["predicted"] == labels[int(values.argmax())]
        assert float(row["label_probability"]) == pytest.approx(values[labels.index(row["label"])], abs=1e-5)
    for split in ("val", "test"):
        part = [row for row in rows if row["split"] == split]
        right = sum(row["label"] == row["predicted"] for row in part)
        assert metrics[split]["n"] == len(part)
        assert metrics[split]["accuracy"] == pytest.approx(right / len(part))
        low, high = metrics[split]["accuracy_ci95"]
        assert low <= metrics[split]["accuracy"] <= high
        assert set(metrics[split]) >= {"mean_per_class_accuracy", "top5_accuracy", "nll", "ece"}
    assert metrics["test"]["accuracy"] > 0.9  # three plain colours
    assert metrics["timing"]["trunk_images"] == 90
    stages = ["imports", "backbone", "data", "trunk", "training", "evaluation", "export", "report"]
    assert list(metrics["timing"]["seconds"]) == stages
    assert set(metrics["environment"]) >= {"tensorflow", "keras", "device", "engine", "precision"}


def test_every_image_is_in_one_split_and_every_evaluated_one_is_scored(trained):
    run, _ = trained
    splits = read_csv(run / "splits.csv")
    assert len({row["id"] for row in splits}) == len(splits) == 90
    evaluated = {row["id"] for row in splits if row["split"] != "train"}
    assert {row["id"] for row in read_csv(run / "predictions.csv")} == evaluated


def test_the_same_run_again_computes_nothing_and_gives_the_same_numbers(trained, store_dir, tmp_path, capsys):
    run, _ = trained
    flags = (run / "run.flags").read_text().splitlines()
    again = [flag for flag in flags if not flag.startswith(("--run_dir", "--export"))]
    assert run_main(*again, f"--run_dir={tmp_path / 'again'}", "--noexport") == 0
    metrics = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert metrics["timing"]["trunk_images"] == 0
    assert "0 images to compute, 90 cached" in capsys.readouterr().out
    first, second = np.load(run / "probabilities.npy"), np.load(tmp_path / "again" / "probabilities.npy")
    np.testing.assert_array_equal(first, second)


def test_new_images_alone_are_computed_and_move_no_other(trained, colour_folder, store_dir, tmp_path):
    run, _ = trained
    more = write_colour_folder(tmp_path / "colours", each=30)
    write_colour_folder(more, each=10, first=500)  # which no other test has sent through the same store
    flags = [flag for flag in (run / "run.flags").read_text().splitlines()]
    kept = [flag for flag in flags if not flag.startswith(("--run_dir", "--export", "--dataset"))]
    assert run_main(*kept, f"--dataset=folder:{more}", f"--run_dir={tmp_path / 'run'}", "--noexport") == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["timing"]["trunk_images"] == 30
    before = {row["id"]: row["split"] for row in read_csv(run / "splits.csv")}
    after = {row["id"]: row["split"] for row in read_csv(tmp_path / "run" / "splits.csv")}
    assert before.items() <= after.items()


def test_the_last_line_says_accuracy_interval_count_and_places(colour_folder, store_dir, tmp_path, capsys):
    arguments = [f"--run_dir={tmp_path / 'run'}", f"--store_dir={store_dir}", f"--export_dir={tmp_path / 'm'}"]
    assert run_main("--mode=finetune", f"--dataset=folder:{colour_folder}", *SMALL, "--epochs=1", *arguments) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    headline, run, model = last.split(" · ")
    assert re.fullmatch(r"test accuracy \d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\] n=13", headline)
    assert (run, model) == (str(tmp_path / "run"), f"{tmp_path / 'm'}/colours-SmallConvNet/1")


@pytest.mark.parametrize("which", [0, 1], ids=["run folder", "exported model"])
def test_predict_writes_a_row_an_image_and_a_broken_one_stops_nothing(trained, tmp_path, which):
    good = write_image(tmp_path / "in" / "a b 红.PNG", make_image(1, COLOURS["red"]))
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "in" / ".hidden.jpg").write_bytes(b"no image")
    output = tmp_path / "out" / "predictions.csv"
    arguments = [f"--classifier={trained[which]}", f"--images={tmp_path / 'in'}", f"--output={output}"]
    assert run_main("--mode=predict", *arguments) == 0
    rows = read_csv(output)
    assert list(rows[0]) == [
        *("id", "predicted", "probability", "label_2", "probability_2", "label_3", "probability_3"),
        *("label_4", "probability_4", "label_5", "probability_5", "error"),
    ]
    by_id = {row["id"]: row for row in rows}
    assert by_id[str(good)]["predicted"] == "red"
    assert by_id[str(good)]["error"] == ""
    assert by_id[str(tmp_path / "in" / "broken.jpg")]["error"].startswith("not an image")
    assert len(rows) == 2


def test_evaluate_scores_the_run_as_the_run_did(trained, tmp_path):
    run, _ = trained
    assert run_main("--mode=evaluate", f"--classifier={run}", f"--run_dir={tmp_path / 'run'}") == 0
    first, second = (json.loads((path / "metrics.json").read_text()) for path in (run, tmp_path / "run"))
    for split in ("val", "test"):
        assert second[split]["n"] == first[split]["n"]
        assert second[split]["accuracy"] == first[split]["accuracy"]
        assert second[split]["nll"] == pytest.approx(first[split]["nll"], abs=1e-4)


def test_evaluate_on_another_folder_takes_all_of_it_and_warns_of_training_images(
    trained, colour_folder, tmp_path, capsys
):
    _, model = trained
    arguments = [f"--dataset=folder:{colour_folder}", f"--run_dir={tmp_path / 'run'}"]
    assert run_main("--mode=evaluate", f"--classifier={trained[0]}", *arguments) == 0
    assert "was trained on" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test"]["n"] == 90
    assert "val" not in metrics
    arguments = [f"--dataset=folder:{colour_folder}", f"--run_dir={tmp_path / 'run2'}"]
    assert run_main("--mode=evaluate", f"--classifier={model}", *arguments) == 0


def test_export_takes_the_next_version(trained, tmp_path, capsys):
    arguments = [f"--classifier={trained[0]}", f"--export_dir={tmp_path}", "--model_name=colours"]
    for version in ("1", "2"):
        assert run_main("--mode=export", *arguments) == 0
        assert (tmp_path / "colours" / version / "saved_model.pb").is_file()
    out = capsys.readouterr().out
    assert "decisions agree in 1.000" in out
    assert "curl" in out
    assert sorted(path.name for path in (tmp_path / "colours").iterdir()) == ["1", "2"]


def test_doctor_has_a_line_for_each_thing(store_dir, trained, capsys):
    status = run_main("--mode=doctor", f"--store_dir={store_dir}")
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok", "to do")) for line in lines[:-1])
    text = "\n".join(lines)
    for word in ("Python", "tensorflow", "CPU", "TensorFlow Datasets", "embedding store", "rm '", "ImageNet weights"):
        assert word in text
    assert status == (1 if any(line.startswith("to do") for line in lines) else 0)


@pytest.mark.parametrize("path", sorted((ROOT / "flags").glob("*.flags")), ids=lambda path: path.stem)
def test_every_flag_file_is_understood_and_says_what_to_expect(path, capsys):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert run_main(f"--flagfile={path}", "--dry_run") == 0
    assert "--mode=" in capsys.readouterr().out


def test_the_article_is_the_article(capsys):
    assert run_main(f"--flagfile={ROOT / 'flags' / 'article_finetune.flags'}", "--dry_run") == 0
    settings = capsys.readouterr().out.splitlines()
    assert set(settings) >= {
        *("--dataset=stanford_dogs", "--backbone=ResNet50", "--weights=imagenet", "--trainable=head"),
        *("--optimizer=sgd", "--learning_rate=0.001", "--momentum=0.9", "--batch_size=32", "--epochs=10"),
        *("--resize=crop", "--image_size=224", "--nostandardize", "--schedule=constant"),
    }


def test_finetune_alone_is_stanford_dogs_on_resnet50(capsys):
    assert run_main("--mode=finetune", "--dry_run") == 0
    assert set(capsys.readouterr().out.splitlines()) >= {"--dataset=stanford_dogs", "--backbone=ResNet50"}


def test_help_and_import_load_no_tensorflow():
    code = (
        "import sys, tl_keras, tl_keras.main; tl_keras.main.main(['x', '--help']); print('tensorflow' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.splitlines()[-1] == "False"


def test_help_is_fast():
    def seconds(*arguments: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True, cwd=ROOT)
        return time.perf_counter() - start

    bare = min(seconds("-c", "") for _ in range(5))
    assert (
        min(seconds("-m", "tl_keras.main", "--help") for _ in range(5)) - bare < 1
    )  # with TensorFlow it would be several


def test_the_screen_is_free_of_tensorflows_chatter(trained, tmp_path):
    command = [sys.executable, "-m", "tl_keras.main", "--mode=export", f"--classifier={trained[0]}"]
    result = subprocess.run(
        [*command, f"--export_dir={tmp_path}"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stderr == ""
