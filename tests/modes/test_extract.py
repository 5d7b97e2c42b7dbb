"""`--mode=extract`, as a user runs it: on photographs of three colours that a test makes."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import tl_keras
from tests.conftest import SMALL, run_main, write_colour_folder
from tl_keras.modes import extract
from tl_keras.probes import memory

NET = ("--mode=extract", *SMALL, "--engine=tensorflow")


class Place:
    """Runs with a store of their own."""

    def __init__(self, root: Path, dataset: str) -> None:
        self.root, self.dataset, self.count = root, dataset, 0

    def run(self, *flags: str, status: int = 0, export: bool = False) -> Path:
        self.count += 1
        run_dir = self.root / f"run{self.count}"
        places = [f"--run_dir={run_dir}", f"--store_dir={self.root / 'store'}", f"--export_dir={self.root / 'models'}"]
        flags = (*flags, *([] if export else ["--noexport"]))
        assert run_main(*NET, f"--dataset={self.dataset}", *places, *flags) == status
        return run_dir


def metrics_of(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def place(tmp_path_factory, colour_folder):
    return Place(tmp_path_factory.mktemp("extract"), f"folder:{colour_folder}")


@pytest.fixture(scope="module")
def exported(place):
    return place.run(export=True)


def test_a_run_leaves_what_finetunes_does(exported):
    names = {path.name for path in exported.iterdir()}
    assert names >= {
        *("config.json", "run.flags", "labels.txt", "splits.csv", "metrics.json", "predictions.csv"),
        *("probabilities.npy", "classifier"),
    }
    metrics = metrics_of(exported)
    assert metrics["test"]["accuracy"] > 0.9
    assert metrics["timing"]["trunk_images"] == 90
    assert metrics["environment"]["engine"] == "tensorflow"
    assert metrics["export"]["decisions"] == 1
    assert metrics["export"]["largest_difference"] < 1e-5


def test_nothing_that_is_written_is_a_pickle(exported):
    files = {path.name for path in (exported / "classifier").iterdir()}
    assert files == {"network.keras", "classifier.json", "samples.npz"}
    network = keras.models.load_model(exported / "classifier" / "network.keras", compile=False, safe_mode=True)
    assert network.output_shape == (None, 3)


def test_the_run_and_the_exported_model_answer_as_was_evaluated(exported, colour_folder):
    rows = rows_of(exported / "predictions.csv")[:12]
    expected = np.load(exported / "probabilities.npy")[:12]
    for path in (exported, metrics_of(exported)["export"]["path"]):
        answers = tl_keras.load_classifier(str(path)).predict([colour_folder / row["id"] for row in rows])
        assert [answer["predicted"] for answer in answers] == [row["predicted"] for row in rows]
        found = np.stack([answer["probabilities"] for answer in answers])
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_other_modes_take_an_extracted_run(exported, place, colour_folder, tmp_path, capsys):
    assert run_main("--mode=evaluate", f"--classifier={exported}", f"--run_dir={tmp_path / 'e'}") == 0
    assert metrics_of(tmp_path / "e")["test"]["accuracy"] == metrics_of(exported)["test"]["accuracy"]
    output = tmp_path / "p.csv"
    one = next(colour_folder.glob("red/*.jpg"))
    assert run_main("--mode=predict", f"--classifier={exported}", f"--images={one}", f"--output={output}") == 0
    assert rows_of(output)[0]["predicted"] == "red"
    assert run_main("--mode=export", f"--classifier={exported}", f"--export_dir={tmp_path / 'm'}") == 0
    assert list((tmp_path / "m").glob("*/1/saved_model.pb"))


def test_a_second_run_computes_nothing_and_gives_the_same(exported, place):
    again = place.run()
    assert metrics_of(again)["timing"]["trunk_images"] == 0
    assert (again / "predictions.csv").read_bytes() == (exported / "predictions.csv").read_bytes()


def test_finetune_reads_the_embeddings_that_extract_kept(exported, place, colour_folder):
    run = place.root / "tuned"
    flags = [f"--dataset=folder:{colour_folder}", *SMALL, "--engine=tensorflow", "--epochs=1", "--noexport"]
    assert run_main("--mode=finetune", *flags, f"--run_dir={run}", f"--store_dir={place.root / 'store'}") == 0
    assert metrics_of(run)["timing"]["trunk_images"] == 0


def test_layers_and_probes_are_compared_in_one_pass_and_the_best_on_val_wins(tmp_path, colour_folder, capsys):
    place = Place(tmp_path, f"folder:{colour_folder}")
    run = place.run(
        "--feature_layer=pool1,pool2,embedding_pool", "--probe=knn,ridge", "--pooling=max", "--choose_by=val"
    )
    metrics, screen = metrics_of(run), capsys.readouterr().out
    assert metrics["timing"]["trunk_images"] == 90  # each image once, for three layers
    candidates = metrics["candidates"]
    assert [(one["layer"], one["probe"], one["dim"]) for one in candidates] == [
        (layer, probe, dim)
        for layer, dim in (("pool1_max", 32), ("pool2_max", 64), ("embedding_pool", 128))
        for probe in ("knn", "ridge")
    ]
    best = max(one["val_accuracy"] for one in candidates)
    assert metrics["probe"]["val_accuracy"] == best == metrics["val"]["accuracy"]
    assert metrics["probe"] == next(one for one in candidates if one["val_accuracy"] == best)
    for one in candidates:
        low, high = one["val_accuracy_ci95"]
        assert 0 <= low <= one["val_accuracy"] <= high <= 1
        row = next(line for line in screen.splitlines() if re.match(rf"{one['layer']} +{one['probe']} ", line))
        assert f"{one['val_accuracy']:.3f} [{low:.3f}, {high:.3f}]" in row
        assert row.endswith("best on val") == (one == metrics["probe"])
    written = rows_of(run / "candidates.csv")
    assert [(row["layer"], int(row["dim"]), float(row["val_accuracy"])) for row in written] == [
        (one["layer"], one["dim"], one["val_accuracy"]) for one in candidates
    ]
    assert [[float(row["ci95_low"]), float(row["ci95_high"])] for row in written] == [
        one["val_accuracy_ci95"] for one in candidates
    ]
    again = place.run("--feature_layer=pool2", "--pooling=max", "--probe_parameter=1")
    assert metrics_of(again)["timing"]["trunk_images"] == 0


def test_the_parameter_is_chosen_by_the_scores_that_are_written(exported):
    probe = metrics_of(exported)["probe"]
    scores = dict(map(tuple, probe["tried"]))
    assert min(scores) == pytest.approx(1e-6)
    assert max(scores) == pytest.approx(1e5)
    assert len(scores) == 16
    assert scores[probe["value"]] == max(scores.values())
    assert probe["chosen_by"].startswith("5-fold cross-validation within train and val")


def test_one_value_is_taken_as_it_is(place):
    probe = metrics_of(place.run("--probe_parameter=0.25", "--scale=none"))["probe"]
    assert (probe["parameter"], probe["value"], probe["chosen_by"], probe["tried"]) == ("C", 0.25, "asked for", [])


def test_test_decides_nothing(tmp_path):
    """With the labels of test turned round, everything but test's own figures stays."""
    runs = {}
    for name in ("right", "wrong"):
        colours = write_colour_folder(tmp_path / "all", each=24)
        lines = ["path,label,split"]
        for number, path in enumerate(sorted(colours.glob("*/*.jpg"))):
            split = ("train", "train", "val", "test")[number % 4]
            label = path.parent.name
            if name == "wrong" and split == "test":
                label = {"red": "blue", "blue": "green", "green": "red"}[label]
            lines.append(f"{path.relative_to(tmp_path)},{label},{split}")
        manifest = tmp_path / "m.csv"
        manifest.write_text("\n".join(lines))
        runs[name] = Place(tmp_path / name, f"csv:{manifest}").run("--probe=logistic_regression,knn")
    right, wrong = metrics_of(runs["right"]), metrics_of(runs["wrong"])
    assert right["val"] == wrong["val"]
    assert right["probe"]["value"] == wrong["probe"]["value"]
    np.testing.assert_array_equal(*(np.load(run / "probabilities.npy") for run in runs.values()))
    assert right["test"]["accuracy"] > 0.8 > 0.2 > wrong["test"]["accuracy"]


def test_refitted_on_val_too_the_figures_of_val_stay_those_of_before(place, exported):
    refitted = place.run("--refit=train+val", export=True)
    before, after = (np.load(run / "probabilities.npy") for run in (exported, refitted))
    is_val = np.array([row["split"] == "val" for row in rows_of(exported / "predictions.csv")])
    np.testing.assert_array_equal(before[is_val], after[is_val])
    assert np.abs(before[~is_val] - after[~is_val]).max() > 0
    assert metrics_of(refitted)["export"]["largest_difference"] < 1e-5  # test's, by the refitted probe


def test_a_classifier_that_was_refitted_on_val_is_not_praised_for_val(place, tmp_path, capsys):
    run = place.run("--refit=train+val", "--probe_parameter=1")
    capsys.readouterr()
    assert run_main("--mode=evaluate", f"--classifier={run}", f"--run_dir={tmp_path / 'e'}") == 0
    rows = rows_of(tmp_path / "e" / "predictions.csv")
    count = sum(row["split"] == "val" for row in rows)
    assert count
    assert f"the classifier was trained on {count} of the {count} val images, or on copies" in capsys.readouterr().out


def write_manifest(path: Path, colours: Path, split_of, more: str = "") -> str:
    """Every image in the split that its number gives."""
    images = enumerate(sorted(colours.glob("*/*.jpg")))
    rows = [f"{image},{image.parent.name},{split_of(number)}\n" for number, image in images]
    path.write_text("path,label,split\n" + "".join(rows) + more)
    return f"csv:{path}"


def test_a_test_split_that_can_not_be_decoded_leaves_nothing_to_refit_for(place, colour_folder, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 a JPEG's beginning")
    dataset = write_manifest(
        tmp_path / "m.csv", colour_folder, lambda n: "train" if n % 3 else "val", "broken.jpg,red,test\n"
    )
    flags = ("--refit=train+val", "--probe_parameter=1", "--max_broken_fraction=0.1")
    Place(place.root / "broken", dataset).run(*flags, f"--store_dir={place.root / 'store'}", status=1)
    assert "--refit=train+val leaves no images for evaluation" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "chosen"), [(("--probe_parameter=1",), False), (("--probe=knn",), True)])
def test_a_headline_from_val_says_what_was_chosen_on_it_and_no_more(
    place, colour_folder, tmp_path, capsys, flags, chosen
):
    dataset = write_manifest(tmp_path / "m.csv", colour_folder, lambda n: "train" if n % 3 else "val")
    other = Place(tmp_path, dataset)
    run = other.run(*flags, "--choose_by=val", f"--store_dir={place.root / 'store'}")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("val accuracy ")
    assert last.endswith(str(run))
    assert "there is no test split" in last
    assert ("selected on it" in last) == chosen


def test_neighbours_that_nobody_asked_for_are_no_mistake_of_the_users(place):
    """Of few shots beside a large val: what is chosen fits what it is fitted on."""
    run = place.run("--probe=knn", "--shots=2", "--val_fraction=0.5")
    probe = metrics_of(run)["probe"]
    assert 1 <= probe["value"] <= 6
    assert sum(row["split"] == "train" for row in rows_of(run / "splits.csv")) == 6


def test_draws_are_refitted_as_the_run_is(tmp_path):
    place = Place(tmp_path, "digits")
    flags = ("--classes=1,7,8", "--shots=2", "--repeats=2", "--probe_parameter=0.001", "--refit=train+val")
    metrics = metrics_of(place.run(*flags))
    assert metrics["few_shot"]["accuracies"][0] == metrics["test"]["accuracy"]


def test_an_interruption_leaves_no_metrics_and_no_model(place, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(extract, "fit_probe", interrupt)
    before = sorted(place.root.glob("models/*/*"))
    run = place.run("--probe_parameter=1", export=True, status=130)
    assert not (run / "metrics.json").exists()
    assert not (run / "classifier").exists()
    assert sorted(place.root.glob("models/*/*")) == before


def too_little_memory(monkeypatch):
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 1000)


def no_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)


@pytest.mark.parametrize(
    ("flags", "prepare", "text"),
    [
        ((), too_little_memory, "needs about 0.0 GB of memory, but only 0.0 GB are free."),
        (("--embeddings_output=e.parquet",), no_pyarrow, "--embeddings_output=*.parquet needs pyarrow."),
        (("--probe=knn", "--probe_parameter=400"), None, "--probe=knn can't use 400 neighbors: train has only "),
        (("--probe=ridge", "--shots=1"), None, "--probe=ridge needs at least two training images per class"),
    ],
    ids=["memory", "pyarrow", "neighbours", "sigmoids"],
)
def test_what_would_stop_a_run_is_found_before_the_trunk(place, tmp_path, monkeypatch, capsys, flags, prepare, text):
    monkeypatch.chdir(tmp_path)
    if prepare:
        prepare(monkeypatch)
    place.run(*flags, f"--store_dir={tmp_path / 'store'}", status=1)
    shown = capsys.readouterr()
    assert text in shown.err
    assert shown.err.count("\n") == 1
    assert not (tmp_path / "store").exists()


def test_few_shots_are_drawn_several_times(tmp_path, capsys):
    place = Place(tmp_path, "digits")
    flags = ("--classes=1,7,8", "--probe=ridge", "--probe_parameter=1")
    run = place.run("--shots=3", "--repeats=4", *flags)
    few = metrics_of(run)["few_shot"]
    assert (few["shots"], few["split"], len(few["accuracies"])) == (3, "test", 4)
    assert few["mean"] == pytest.approx(np.mean(few["accuracies"]))
    assert few["standard_deviation"] == pytest.approx(np.std(few["accuracies"], ddof=1))
    assert few["accuracies"][0] == metrics_of(run)["test"]["accuracy"]  # the first draw is the run's own
    assert len(set(few["accuracies"])) > 1
    assert sum(row["split"] == "train" for row in rows_of(run / "splits.csv")) == 9
    assert (
        f"3 images per class, 4 draws: test accuracy {few['mean']:.3f} (standard deviation " in capsys.readouterr().out
    )
    alone = metrics_of(place.run("--shots=3", *flags))
    assert alone["test"] == metrics_of(run)["test"]


# a linear SVM becomes the layers that ridge does
@pytest.mark.parametrize("probe", ["knn", "rbf_svm", pytest.param("ridge", marks=pytest.mark.slow)])
def test_every_kind_of_head_is_exported_and_its_size_said(place, probe, capsys):
    run = place.run(f"--probe={probe}", "--shots=8", export=True)
    assert metrics_of(run)["export"]["decisions"] == 1
    assert metrics_of(run)["export"]["largest_difference"] < 1e-5
    assert re.search(rf"^head: {probe}, \d+\.\d MB in the exported model$", capsys.readouterr().out, re.MULTILINE)


def test_an_unknown_layer_is_answered_with_names_and_shapes(place, capsys):
    place.run("--feature_layer=pool", status=1)
    error = capsys.readouterr().err
    assert "--feature_layer=pool: SmallConvNet has no such layer. Nearest: pool1 (8x8x32), pool2 (4x4x64)." in error
    assert "Ends of blocks: conv1 (16x16x32), pool1 (8x8x32), conv2 (8x8x64)" in error


@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_images_without_labels_give_embeddings_alone(tmp_path, colour_folder, kind, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(colour_folder.glob("*/*.jpg"))[:10]):
        shutil.copy(path, flat / f"{number}.jpg")
    (flat / "5.jpg").write_bytes(b"no image")
    (flat / "m.csv").write_text("path\n" + "".join(f"{number}.jpg\n" for number in range(10)))
    dataset = f"folder:{flat}" if kind == "folder" else f"csv:{flat / 'm.csv'}"
    output = tmp_path / "e.npz"
    run = Place(tmp_path, dataset).run(f"--embeddings_output={output}", "--max_broken_fraction=0.2")
    with np.load(output, allow_pickle=False) as file:
        assert file["embedding"].shape == (9, 128)
        assert file["id"].tolist() == [f"{number}.jpg" for number in range(10) if number != 5]
        assert set(file["label"]) == set(file["split"]) == {""}
    assert rows_of(run / "broken.csv")[0]["id"] == "5.jpg"
    assert metrics_of(run)["timing"]["trunk_images"] == 9
    assert capsys.readouterr().out.splitlines()[-1] == f"the images have no labels: no probe is trained · {run}"


def test_embeddings_alone_need_neither_labels_nor_train(tmp_path, colour_folder, capsys):
    """Of labelled images too, and of a manifest whose images are all of one split."""
    output = tmp_path / "e.npz"
    flags = ("--probe=none", f"--embeddings_output={output}")
    run = Place(tmp_path, f"folder:{colour_folder}").run(*flags)
    with np.load(output, allow_pickle=False) as file:
        assert file["embedding"].shape == (90, 128)
        assert set(file["label"]) == {"blue", "green", "red"}
        assert set(file["split"]) == {"train", "val", "test"}
    assert not (run / "classifier").exists()
    assert capsys.readouterr().out.splitlines()[-1] == f"--probe=none · {run}"
    images = sorted(colour_folder.glob("*/*.jpg"))[:3]
    (tmp_path / "m.csv").write_text("path,split\n" + "".join(f"{image},test\n" for image in images))
    run = Place(tmp_path / "other", f"csv:{tmp_path / 'm.csv'}").run(*flags, f"--store_dir={tmp_path / 'store'}")
    with np.load(output, allow_pickle=False) as file:
        assert file["id"].tolist() == [str(image) for image in images]


@pytest.mark.parametrize("content", [b"no image", b"\xff\xd8\xff\xe0 a JPEG's beginning"], ids=["read", "decoded"])
def test_a_folder_of_nothing_but_broken_images_is_one_line(tmp_path, capsys, content):
    (tmp_path / "flat").mkdir()
    for number in range(3):
        (tmp_path / "flat" / f"{number}.jpg").write_bytes(content)
    place = Place(tmp_path, f"folder:{tmp_path / 'flat'}")
    run = place.run(f"--embeddings_output={tmp_path / 'e.npz'}", "--max_broken_fraction=1", status=1)
    error = capsys.readouterr().err
    assert error.startswith("tl_keras: error: ")
    assert error.count("\n") == 1
    assert len(rows_of(run / "broken.csv")) == 3
    assert not (tmp_path / "e.npz").exists()


def test_without_a_probe_labels_are_written_and_nothing_is_learnt(tmp_path, place):
    output = tmp_path / "e.npz"
    run = place.run("--probe=none", f"--embeddings_output={output}")
    with np.load(output, allow_pickle=False) as file:
        assert set(file["label"]) == {"blue", "green", "red"}
        assert set(file["split"]) == {"train", "val", "test"}
    assert not {"val", "test", "probe"} & metrics_of(run).keys()
    assert not (run / "classifier").exists()


def test_both_engines_decide_alike(place, exported):
    other = place.run("--engine=openvino")
    assert metrics_of(other)["environment"]["engine"] == "openvino"
    assert metrics_of(other)["timing"]["trunk_images"] == 90
    first, second = (rows_of(run / "predictions.csv") for run in (exported, other))
    assert [row["predicted"] for row in first] == [row["predicted"] for row in second]
    np.testing.assert_allclose(*(np.load(run / "probabilities.npy") for run in (exported, other)), atol=1e-3)


def test_embeddings_are_those_that_the_exported_model_gives(place, exported, colour_folder, tmp_path):
    import tensorflow as tf

    output = tmp_path / "e.npz"
    place.run(f"--embeddings_output={output}", "--probe_parameter=1")
    with np.load(output, allow_pickle=False) as file:
        ids, splits, labels, embeddings = (file[name] for name in ("id", "split", "label", "embedding"))
    assert [[i, s, n] for i, s, n in zip(ids, splits, labels, strict=True)] == [
        list(row.values()) for row in rows_of(exported / "splits.csv")
    ]
    model = tf.saved_model.load(metrics_of(exported)["export"]["path"])
    images = tf.constant([(colour_folder / one).read_bytes() for one in ids[:8]])
    served = model.signatures["embeddings"](image_bytes=images)["embeddings"]
    np.testing.assert_allclose(embeddings[:8], served, atol=1e-5)


def test_an_extracted_run_lends_its_backbone(exported, place, capsys):
    run = place.root / "lent"
    flags = [f"--dataset={place.dataset}", f"--weights={exported}", "--noexport", f"--store_dir={place.root / 'store'}"]
    assert run_main("--mode=extract", *flags, f"--run_dir={run}", "--feature_layer=pool2", "--engine=tensorflow") == 0
    assert metrics_of(run)["probe"]["layer"] == "pool2_avg"


def test_the_article_is_the_article(capsys):
    flags = Path(__file__).parent.parent.parent / "flags" / "article_extract.flags"
    assert run_main(f"--flagfile={flags}", "--dry_run") == 0
    assert set(capsys.readouterr().out.splitlines()) >= {
        *("--mode=extract", "--dataset=stanford_dogs", "--backbone=VGG16", "--weights=imagenet", "--feature_layer=fc2"),
        *("--probe=logistic_regression", "--probe_parameter=1.0", "--scale=none", "--max_iter=1000", "--seed=0"),
        *("--image_size=224", "--resize=crop", "--refit=train"),
    }
    text = flags.read_text()
    assert "4,096" in text
    assert "--feature_layer=block5_pool --pooling=flatten" in text
