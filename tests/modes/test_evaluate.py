"""Evaluating: which images are scored, under which class number, and which are left out and why."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import COLOURS, SMALL, make_image, run_main, write_colour_folder, write_image
from tl_keras.classifier import LoadedClassifier, load
from tl_keras.data.corruptions import CORRUPTIONS, STRENGTHS
from tl_keras.evaluation.metrics import measure
from tl_keras.modes import evaluate

load_once = functools.cache(load)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(evaluate, "load", load_once)


class Evaluated:
    """What a run folder of `--mode=evaluate` holds."""

    def __init__(self, path: Path):
        self.path = path
        self.metrics = json.loads((path / "metrics.json").read_text())
        self.rows = self.table("predictions.csv")
        self.probabilities = np.load(path / "probabilities.npy")

    def table(self, name: str) -> list[dict[str, str]]:
        with (self.path / name).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def ids(self, split: str) -> list[str]:
        return [row["id"] for row in self.rows if row["split"] == split]


@pytest.fixture
def score(trained, tmp_path):
    def run(dataset: Path | None = None, *flags: str, which: int = 0) -> Evaluated:
        data = [f"--dataset=folder:{dataset}"] if dataset else []
        arguments = [f"--classifier={trained[which]}", f"--run_dir={tmp_path / 'run'}", "--overwrite", *data, *flags]
        assert run_main("--mode=evaluate", *arguments) == 0
        return Evaluated(tmp_path / "run")

    return run


@pytest.fixture
def refuse(trained, tmp_path, capsys):
    def run(*flags: str, which: int = 0) -> str:
        arguments = [f"--classifier={trained[which]}", f"--run_dir={tmp_path / 'run'}", *flags]
        capsys.readouterr()
        assert run_main("--mode=evaluate", *arguments) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error.removeprefix("tl_keras: error: ").rstrip("\n")

    return run


@pytest.fixture
def fresh(tmp_path) -> Path:
    """Images that the classifier never saw, three a class."""
    return write_colour_folder(tmp_path / "fresh", each=3, first=100)


# its own data


def test_val_and_test_of_the_run_are_scored_again_and_train_is_not(score, trained):
    found, before = score(), Evaluated(trained[0])
    for split in ("val", "test"):
        assert found.ids(split) == before.ids(split)
        for figure in ("n", "accuracy", "accuracy_ci95", "mean_per_class_accuracy", "top5_accuracy"):
            assert found.metrics[split][figure] == before.metrics[split][figure]
    np.testing.assert_allclose(found.probabilities, before.probabilities, atol=1e-5)
    assert {row["split"] for row in found.table("splits.csv")} == {"val", "test"}
    assert found.metrics["timing"]["trunk_images"] == len(found.rows)
    assert found.metrics["environment"]["precision"] == "float32"


def test_some_of_its_classes_keep_their_numbers(score, trained):
    found, before = score(None, "--classes=green,red"), Evaluated(trained[0])
    assert {row["label"] for row in found.rows} == {"green", "red"}
    kept = [number for number, row in enumerate(before.rows) if row["label"] != "blue"]
    np.testing.assert_allclose(found.probabilities, before.probabilities[kept], atol=1e-5)
    assert (found.path / "labels.txt").read_text().split() == sorted(COLOURS)


def test_data_that_was_moved_is_named(trained, tmp_path, refuse):
    run = tmp_path / "moved"
    shutil.copytree(trained[0], run)
    config = json.loads((run / "config.json").read_text())
    config["data"]["dataset"] = "folder:/nowhere"
    (run / "config.json").write_text(json.dumps(config))
    assert refuse(f"--classifier={run}") == "--dataset=folder:/nowhere does not exist. Check the path."


def test_what_was_evaluated_can_be_evaluated_again_by_its_flags(score, tmp_path):
    first = score(None, "--classes=green,red")
    flags = [flag for flag in (first.path / "run.flags").read_text().splitlines() if "run_dir" not in flag]
    assert run_main(*flags, f"--run_dir={tmp_path / 'again'}") == 0
    np.testing.assert_array_equal(Evaluated(tmp_path / "again").probabilities, first.probabilities)


# another source


def test_a_folder_without_splits_is_test_as_a_whole(score, fresh, capsys):
    found = score(fresh)
    assert "val" not in found.metrics
    assert found.metrics["test"]["n"] == 9
    assert found.metrics["test"]["accuracy"] > 0.7
    out = capsys.readouterr().out
    assert "warning" not in out
    assert "data: fresh: val 0, test 9; 3 classes" in out
    assert out.splitlines()[-1].startswith("test accuracy ")


@pytest.mark.parametrize(
    ("splits", "scored"),
    [
        (("train", "val", "test"), {"val": 2, "test": 2}),
        (("train", "val"), {"val": 2}),
        (("train", "test"), {"test": 2}),
        (("valid",), {"val": 2}),
        (("train",), {"test": 2}),
    ],
    ids=str,
)
def test_of_a_source_with_splits_val_and_test_are_scored(score, tmp_path, capsys, splits, scored):
    for split in splits:
        for name in ("green", "red"):
            write_image(tmp_path / "data" / split / name / "1.jpg", make_image(7, COLOURS[name]))
    found = score(tmp_path / "data")
    assert {split: found.metrics[split]["n"] for split in ("val", "test") if split in found.metrics} == scored
    headline = "test" if "test" in scored else "val"
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{headline} accuracy ")


def test_a_class_that_the_source_lacks_moves_no_other(score, fresh):
    shutil.rmtree(fresh / "blue")
    found = score(fresh, which=1)
    assert found.probabilities.shape == (6, 3)
    assert [row["predicted"] for row in found.rows] == ["green"] * 3 + ["red"] * 3
    assert found.metrics["test"]["mean_per_class_accuracy"] == 1


@pytest.mark.parametrize("certainty", [{"threshold_confidence": 0.95}, {}], ids=["now", "before version 0.2"])
def test_figures_are_those_of_the_rows(score, trained, fresh, tmp_path, capsys, certainty):
    shutil.move(fresh / "red" / "100.jpg", fresh / "green" / "wrong.jpg")
    run, chosen = tmp_path / "trained", {"target_accuracy": 0.95, "threshold": 0.6, **certainty}
    shutil.copytree(trained[0], run)  # whose val is too small to guarantee anything
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | {"reject": chosen}))
    found = score(fresh, f"--classifier={run}")
    labels = [sorted(COLOURS).index(row["label"]) for row in found.rows]
    expected = measure(found.probabilities, np.array(labels))
    assert {name: found.metrics["test"][name] for name in expected} == expected
    reject = found.metrics["reject"]  # there is no val to choose another threshold on
    assert (reject["threshold"], reject["run"]) == (chosen["threshold"], str(run))
    reached = found.probabilities.max(1) >= chosen["threshold"]
    assert reject["test"]["n"] == reached.sum()
    told = "95 % or more, with 95 % certainty" if certainty else "95 % on val"
    line = f"at confidence ≥ 0.600 (chosen by the classifier's run for an accuracy of {told}): "
    assert line in capsys.readouterr().out
    assert expected["accuracy"] < 1


@pytest.mark.parametrize(
    ("name", "hint"), [("Gren", "Did you mean: green? "), ("xyz", ""), ("red ", "Did you mean: red")], ids=repr
)
def test_a_label_that_the_classifier_does_not_know_is_named(refuse, fresh, tmp_path, name, hint):
    write_image(fresh / name / "1.jpg", make_image(1))
    for which in (0, 1):
        text = refuse(f"--dataset=folder:{fresh}", which=which)
        assert text.startswith(f"the data has the label {name!r}, which is not a class of the classifier. {hint}")
        assert text.endswith("Rename it, or leave it out with --classes.")
    assert not (tmp_path / "run").exists()


def test_an_unknown_label_can_be_left_out(score, fresh):
    write_image(fresh / "violet" / "1.jpg", make_image(1))
    assert score(fresh, "--classes=red,green,blue").metrics["test"]["n"] == 9


def test_images_that_were_trained_on_are_counted(score, colour_folder, trained, capsys):
    found = score(colour_folder)
    count = sum(row["split"] == "train" for row in Evaluated(trained[0]).table("splits.csv"))
    out = capsys.readouterr().out
    leaks = found.metrics["leaks"]["test"]
    assert leaks["leaked"] == count
    assert leaks["accuracy_with"] == found.metrics["test"]["accuracy"]
    held_out = {row["id"] for row in Evaluated(trained[0]).table("splits.csv") if row["split"] != "train"}
    right = [row["label"] == row["predicted"] for row in found.rows if row["id"] in held_out]
    assert leaks["accuracy_without"] == np.mean(right)
    line = next(one for one in out.splitlines() if "was trained on" in one)
    start = f"warning: the classifier was trained on {count} of the {len(found.rows)} test images, or on "
    assert line.startswith(start)
    assert line.endswith(" without them")
    assert "with the same ids" not in out
    assert "was trained on" in (found.path / "report.html").read_text()


def test_images_that_were_trained_on_are_found_under_other_names_and_labels(
    score, trained, fresh, colour_folder, capsys
):
    trained_on = sorted((colour_folder / "red").iterdir())
    for number, path in enumerate(trained_on):
        shutil.copy(path, fresh / "blue" / f"copy-{number}.jpg")
    found = score(fresh)
    train = {row["id"] for row in Evaluated(trained[0]).table("splits.csv") if row["split"] == "train"}
    leaked = sum(f"red/{path.name}" in train for path in trained_on)
    assert 0 < leaked < len(trained_on)
    assert found.metrics["leaks"]["test"]["leaked"] == leaked
    assert f"was trained on {leaked} of the" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["gone", "short", "empty", "other", "splits"])
def test_a_run_that_does_not_say_what_it_was_trained_on_is_evaluated_all_the_same(
    trained, fresh, tmp_path, capsys, damage
):
    run = tmp_path / "trained"
    shutil.copytree(trained[0], run)
    digests = run / "digests.npy"
    if damage == "gone":
        digests.unlink()
    elif damage == "short":
        np.save(digests, np.load(digests)[:5])
    elif damage == "splits":
        (run / "splits.csv").write_text("id,label\na,b\n")
    else:
        digests.write_bytes(b"" if damage == "empty" else b"no numbers at all")
    arguments = (f"--classifier={run}", f"--dataset=folder:{fresh}", f"--run_dir={tmp_path / 'run'}")
    assert run_main("--mode=evaluate", *arguments) == 0
    out = capsys.readouterr().out
    assert f"note: {run} does not record which images it was trained on: its splits.csv or digests.npy is" in out
    found = Evaluated(tmp_path / "run")
    assert found.metrics["leaks"] is None
    assert "It is unknown whether the classifier was trained on" in (found.path / "report.html").read_text()


def test_what_the_network_was_trained_on_before_counts_too(colour_folder, store_dir, fresh, tmp_path, capsys):
    common = (*SMALL, f"--store_dir={store_dir}", "--noexport", "--epochs=1")
    write_colour_folder(tmp_path / "other", each=6, first=400)
    before, after = tmp_path / "before", tmp_path / "after"
    data = f"--dataset=folder:{colour_folder}"
    assert run_main("--mode=finetune", data, *common, "--trainable=last:2", f"--run_dir={before}") == 0
    data = f"--dataset=folder:{tmp_path / 'other'}"
    flags = [flag for flag in common if not flag.startswith(("--backbone", "--weights", "--image_size"))]
    assert run_main("--mode=finetune", data, *flags, f"--weights={before}", f"--run_dir={after}") == 0
    used = [row["id"] for row in csv.DictReader((before / "splits.csv").open()) if row["split"] == "train"][:2]
    for one in used:
        shutil.copy(colour_folder / one, fresh / one.replace("/", "/again-"))
    capsys.readouterr()
    evaluated = (f"--classifier={after}", f"--dataset=folder:{fresh}", f"--run_dir={tmp_path / 'run'}", "--noreport")
    assert run_main("--mode=evaluate", *evaluated) == 0
    assert Evaluated(tmp_path / "run").metrics["leaks"]["test"]["leaked"] == 2
    assert "the classifier was trained on 2 of the 11 test images, or on copies of them" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["imagenet", "none"])
def test_a_run_folder_may_be_called_as_weights_are(trained, fresh, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained[0], name)
    flags = (f"--classifier={name}", f"--dataset=folder:{fresh}", f"--run_dir={tmp_path / 'run'}", "--noreport")
    assert run_main("--mode=evaluate", *flags) == 0
    assert Evaluated(tmp_path / "run").metrics["leaks"] == {}


def test_an_earlier_run_that_is_gone_is_named(trained, fresh, tmp_path, capsys):
    run = tmp_path / "trained"
    shutil.copytree(trained[0], run)
    config = json.loads((run / "config.json").read_text())
    config["backbone"]["weights"] = "runs/gone"
    (run / "config.json").write_text(json.dumps(config))
    flags = (f"--classifier={run}", f"--dataset=folder:{fresh}", f"--run_dir={tmp_path / 'run'}", "--noreport")
    assert run_main("--mode=evaluate", *flags) == 0
    gone = "note: the network started with runs/gone, which does not exist any more"
    told = f"{gone}: the training images of that run are unknown"
    assert told in capsys.readouterr().out.splitlines()


def test_val_images_that_are_val_again_are_told(trained, colour_folder, tmp_path, capsys):
    val = [row["id"] for row in Evaluated(trained[0]).table("splits.csv") if row["split"] == "val"]
    for one in val:
        (tmp_path / "data" / "val" / one).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(colour_folder / one, tmp_path / "data" / "val" / one)
    for name in ("red", "green", "blue"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        shutil.copy(next((colour_folder / name).iterdir()), tmp_path / "data" / "train" / name / "x.jpg")
    flags = (f"--classifier={trained[0]}", f"--dataset=folder:{tmp_path / 'data'}", f"--run_dir={tmp_path / 'run'}")
    assert run_main("--mode=evaluate", *flags, "--noreport") == 0
    told = f"warning: {len(val)} of the {len(val)} val images are val images of the classifier's run, used"
    assert told in capsys.readouterr().out


def test_images_on_which_choices_were_made_are_told(score, trained, colour_folder, fresh, capsys):
    val = [row["id"] for row in Evaluated(trained[0]).table("splits.csv") if row["split"] == "val"]
    for one in val:
        shutil.copy(colour_folder / one, fresh / one.replace("/", "/again-"))
    assert score(fresh).metrics["leaks"] == {}
    told = f"warning: {len(val)} of the {9 + len(val)} test images are val images of the classifier's run, used"
    assert told in capsys.readouterr().out


def test_other_images_under_the_ids_of_trained_ones_are_told_apart(score, colour_folder, tmp_path, capsys):
    write_colour_folder(tmp_path / "namesakes", each=3, first=100)
    for folder in (tmp_path / "namesakes").iterdir():
        for path, name in zip(sorted(folder.iterdir()), sorted((colour_folder / folder.name).iterdir()), strict=False):
            path.rename(folder / name.name)
    found = score(tmp_path / "namesakes")
    assert found.metrics["leaks"] == {}
    assert "but with different content; if they show the same" in capsys.readouterr().out


# broken images


def break_some(folder: Path) -> None:
    """One that is no image, one of a format that is not read, one cut off, one empty."""
    (folder / "blue" / "100.jpg").write_bytes(b"no image")
    write_image(folder / "green" / "101.tiff", make_image(1))
    path = folder / "red" / "102.jpg"
    path.write_bytes(path.read_bytes()[:400])
    (folder / "red" / "empty.jpg").write_bytes(b"")


def test_broken_images_are_left_out_with_their_reasons(score, fresh, capsys):
    break_some(fresh)
    found = score(fresh, "--max_broken_fraction=0.5")
    broken = {row["id"]: row["reason"].split(":")[0] for row in found.table("broken.csv")}
    assert broken == {
        "blue/100.jpg": "not an image",
        "green/101.tiff": "TIFF is not supported by TensorFlow",
        "red/102.jpg": "can't be decoded",
        "red/empty.jpg": "empty or unreadable file",
    }
    assert f"broken: 4 images left out, listed in {found.path}/broken.csv" in capsys.readouterr().out
    ids = ["blue/101.jpg", "blue/102.jpg", *(f"green/{number}.jpg" for number in (100, 101, 102))]
    assert found.ids("test") == [*ids, "red/100.jpg", "red/101.jpg"]
    assert [row["id"] for row in found.table("splits.csv")] == found.ids("test")
    assert found.metrics["test"]["n"] == len(found.probabilities) == 7
    np.testing.assert_allclose(found.probabilities.sum(1), 1, atol=1e-5)
    assert found.metrics["test"]["accuracy"] > 0.7


def test_broken_images_of_two_splits_are_left_out_of_each(score, tmp_path):
    for split in ("val", "test"):
        write_colour_folder(tmp_path / "data" / split, each=3, first=100)
        path = tmp_path / "data" / split / "red" / f"10{len(split) - 3}.jpg"
        path.write_bytes(path.read_bytes()[:400])
    found = score(tmp_path / "data", "--max_broken_fraction=0.5")
    assert [row["id"] for row in found.table("broken.csv")] == ["test/red/101.jpg", "val/red/100.jpg"]
    assert (found.metrics["val"]["n"], found.metrics["test"]["n"]) == (8, 8)
    assert [row["split"] for row in found.rows] == ["val"] * 8 + ["test"] * 8
    assert [row["label"] for row in found.rows] == [row["predicted"] for row in found.rows]


@pytest.mark.parametrize(("limit", "count"), [("0.1", 3), ("0.3", 4)], ids=["while reading", "while decoding"])
def test_too_many_broken_ones_are_refused_and_listed(refuse, fresh, tmp_path, limit, count):
    break_some(fresh)  # of eleven: three are seen when they are read, the fourth when it is decoded
    text = refuse(f"--dataset=folder:{fresh}", f"--max_broken_fraction={limit}")
    assert text.startswith(f"{count} of 11 images are broken, more than --max_broken_fraction={limit}. The first is ")
    with (tmp_path / "run" / "broken.csv").open() as file:
        assert len(list(csv.DictReader(file))) == count
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize("content", [b"no image", b"\xff\xd8\xff\xe0 a JPEG's beginning"], ids=["read", "decoded"])
def test_a_source_of_nothing_but_broken_images_is_refused(refuse, tmp_path, content):
    for name in ("red", "green"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "1.jpg").write_bytes(content)
    text = refuse(f"--dataset=folder:{tmp_path}/data", "--max_broken_fraction=1")
    assert text == (
        f"none of the 2 images can be used; {tmp_path}/run/broken.csv has the reasons. Repair them, or give other "
        "images."
    )


def test_a_split_of_nothing_but_broken_images_is_left_out(score, tmp_path):
    write_colour_folder(tmp_path / "data" / "test", each=2, first=100)
    (tmp_path / "data" / "val" / "red").mkdir(parents=True)
    (tmp_path / "data" / "val" / "red" / "1.jpg").write_bytes(b"\xff\xd8\xff\xe0 a JPEG's beginning")
    found = score(tmp_path / "data", "--max_broken_fraction=0.5")
    assert "val" not in found.metrics
    assert found.metrics["test"]["n"] == len(found.rows) == 6


# order


def test_a_source_may_be_read_in_any_order(score, fresh, monkeypatch):
    expected = score(fresh)
    load_source = evaluate.load_source

    def shuffled(*args, **kwargs):
        source = load_source(*args, **kwargs)

        def read(positions):
            return iter(sorted(source.read(positions), key=lambda item: -item[0]))

        return dataclasses.replace(source, read=read)

    monkeypatch.setattr(evaluate, "load_source", shuffled)
    found = score(fresh)
    assert found.rows == expected.rows
    # an image's place in its batch may decide the last bit: on CPUs with AVX2 alone it does
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-6)


def test_more_than_a_batch_is_scored_in_order(score, tmp_path):
    root = write_colour_folder(tmp_path / "many", each=23, first=200)  # 69: two full batches, and five
    found = score(root)
    assert len(found.rows) == 69
    assert [row["label"] for row in found.rows] == [name for name in sorted(COLOURS) for _ in range(23)]
    assert found.metrics["test"]["accuracy"] > 0.9


def test_a_run_without_a_name_is_named_after_data_and_classifier(trained, fresh, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_main("--mode=evaluate", f"--classifier={trained[1]}", f"--dataset=folder:{fresh}") == 0
    (path,) = (tmp_path / "runs").iterdir()
    assert path.name.startswith("evaluate-fresh-1-2")


def test_an_interruption_leaves_no_metrics(trained, fresh, tmp_path, monkeypatch):
    def fail(self, contents):
        raise KeyboardInterrupt

    monkeypatch.setattr(LoadedClassifier, "predict_batches", fail)
    arguments = [f"--classifier={trained[0]}", f"--dataset=folder:{fresh}", f"--run_dir={tmp_path / 'run'}"]
    assert run_main("--mode=evaluate", *arguments) == 130
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "config.json",
        "run.flags",
        "run.log",
        "unfinished.json",
    ]


def write_slices(path: Path, ids: list[str]) -> Path:
    path.write_text("id,camera\n" + "".join(f"{one},{'AB'[number % 2]}\n" for number, one in enumerate(ids)))
    return path


def test_slices_are_measured_and_the_worst_is_named(score, trained, tmp_path, capsys):
    ids = score().ids("test")
    capsys.readouterr()
    again = score(None, f"--slices={write_slices(tmp_path / 'slices.csv', ids)}")
    cameras = again.metrics["test"]["slices"]["columns"]["camera"]
    assert sorted(cameras) == ["A", "B"]
    assert sum(one["n"] for one in cameras.values()) == len(ids)
    assert [row["value"] for row in again.table("slices.csv") if row["split"] == "test"] == ["A", "B"]
    assert "slices: " in capsys.readouterr().out


def test_slices_of_other_images_are_refused(refuse, tmp_path):
    path = write_slices(tmp_path / "slices.csv", ["nobody.jpg"])
    assert refuse(f"--slices={path}").startswith(f"--slices={path} contains none of the ")


@pytest.mark.parametrize("which", [0, 1], ids=["run", "exported"])
def test_corruptions_are_measured_on_images_that_are_drawn(score, fresh, capsys, which):
    found = score(fresh, "--corruptions", "--corruption_images=7", which=which).metrics["robustness"]
    assert (found["n"], found["split"]) == (7, "test")
    assert list(found["corruptions"]) == list(CORRUPTIONS)
    assert all(len(rows) == STRENGTHS for rows in found["corruptions"].values())
    assert found["clean"]["accuracy"] == 1
    every = [one["accuracy"] for rows in found["corruptions"].values() for one in rows]
    assert found["mean_accuracy"] == pytest.approx(np.mean(every))
    low, high = found["mean_accuracy_ci95"]
    assert low <= found["mean_accuracy"] <= high
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("corruptions: 7 test images, clean 1.000 [") for line in lines)
    assert any(line.split() == ["corruption", *"12345"] for line in lines)
    assert any(line.startswith("pixelation ") for line in lines)


def write_predictions(folder: Path, wrong: set[int]) -> Path:
    folder.mkdir()
    rows = [f"{number}.jpg,test,x,{'y' if number in wrong else 'x'},0.9,0.9" for number in range(60)]
    header = "id,split,label,predicted,probability,label_probability"
    (folder / "predictions.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder


def test_runs_are_compared_in_a_sentence(tmp_path, capsys):
    first = write_predictions(tmp_path / "A", set(range(14)) | {50, 51})
    second = write_predictions(tmp_path / "B", {20, 21, 22} | {50, 51})
    assert run_main("--mode=evaluate", f"--compare={first},{second}") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "test", "accuracy"]
    assert lines[1].split() == ["A", "0.733", "[0.610,", "0.829]", "n=60"]
    assert lines[-1].startswith(
        "B is better: 14 images only B gets right, 3 only A, p = 0.013; difference +0.183 [+0.0"
    )
    third = write_predictions(tmp_path / "C", {20, 21, 22, 23})
    assert run_main("--mode=evaluate", f"--compare={first},{second},{third}") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "p values are adjusted for 3 comparisons (Holm)"
    assert "B and C are not significantly different on these images" in lines[-2]
    assert "p = 0.035" in lines[-4]  # that of A and C, 0.0118, times three: the larger one may not be less


def test_with_a_run_folder_a_comparison_is_kept(tmp_path, capsys):
    runs = [write_predictions(tmp_path / name, wrong) for name, wrong in (("A", {1, 2}), ("B", {1}))]
    compare = f"--compare={runs[0]},{runs[1]}"
    assert run_main("--mode=evaluate", compare, f"--run_dir={tmp_path / 'kept'}") == 0
    (found,) = json.loads((tmp_path / "kept" / "metrics.json").read_text())["compared"]
    assert found["runs"] == ["A", "B"]
    assert compare in (tmp_path / "kept" / "run.flags").read_text()


def test_interrupted_corruptions_leave_the_figures_there(trained, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "measure_corruptions", interrupt)
    flags = (f"--classifier={trained[0]}", f"--run_dir={tmp_path / 'run'}", "--corruptions", "--corruption_images=4")
    assert run_main("--mode=evaluate", *flags) == 130
    output = capsys.readouterr()
    assert "corruptions: interrupted; the evaluation is complete without them" in output.out
    assert output.out.splitlines()[-1].startswith("test accuracy ")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test"]["n"] > 0
    assert "robustness" not in metrics
    assert (tmp_path / "run" / "report.html").is_file()


def test_images_that_are_gone_when_they_are_to_be_corrupted_cost_the_corruptions_alone(
    trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(evaluate, "make_images", lambda *args, **kwargs: [])
    flags = (f"--classifier={trained[0]}", f"--run_dir={tmp_path / 'run'}", "--corruptions", "--noreport")
    assert run_main("--mode=evaluate", *flags) == 1
    out = capsys.readouterr().out
    assert "warning: --corruptions: none of the images can be read any more. Check the files. The" in out
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["n"] > 0


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path, capsys):
    for name in "ab":
        (tmp_path / name).mkdir()
    first = write_predictions(tmp_path / "a" / "run", set(range(14)))
    second = write_predictions(tmp_path / "b" / "run", set())
    assert run_main("--mode=evaluate", f"--compare={first},{second}") == 0
    assert "b/run is better: 14 images only b/run gets right, 0 only a/run, p" in capsys.readouterr().out


def test_a_run_whose_audit_found_leaks_is_named_where_it_is_compared(tmp_path, capsys):
    first, second = write_predictions(tmp_path / "A", {1, 2, 3}), write_predictions(tmp_path / "B", set())
    leaks = {"split": "test", "leaked": 24}
    for found in ({"audit": {"leaks": leaks}}, {"leaks": {"test": {"leaked": 24}, "val": {"leaked": 3}}}):
        (second / "metrics.json").write_text(json.dumps({"test": {}, **found}))
        (first / "metrics.json").write_text(json.dumps({"test": {}, "audit": {"leaks": None}, "leaks": None}))
        assert run_main("--mode=evaluate", f"--compare={first},{second}") == 0
        warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
        assert warned == [
            "warning: 24 of the test images of B, or copies of them, are among its training images: its accuracy may "
            "be too good"
        ]


def test_val_is_not_compared_with_test(tmp_path, capsys):
    first, second = write_predictions(tmp_path / "A", {1}), write_predictions(tmp_path / "B", set())
    rows = (second / "predictions.csv").read_text()
    (second / "predictions.csv").write_text(rows.replace(",test,", ",val,"))
    assert run_main("--mode=evaluate", f"--compare={first},{second}") == 1
    assert "can't be compared with metrics on test: A has test, B has val. Compare runs" in capsys.readouterr().err


def test_a_run_that_has_not_ended_can_not_be_compared(tmp_path, capsys):
    first = write_predictions(tmp_path / "A", set())
    assert run_main("--mode=evaluate", f"--compare={first},{tmp_path / 'gone'}") == 1
    assert "gone/predictions.csv can't be read: No such file or directory. Give the folders" in capsys.readouterr().err
