"""Auditing a folder in which everything is wrong that can be."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import html
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import COLOURS, SMALL_NETWORK, make_image, run_main, write_colour_folder, write_image
from tl_keras.audit.examine import describe_origin
from tl_keras.audit.findings import KINDS
from tl_keras.config import FINDINGS, BackboneConfig, Config, DataConfig
from tl_keras.data.sources import load_source
from tl_keras.jobs.lineage import find_weights
from tl_keras.modes import audit as audit_mode


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three colours in three splits, 24 + 8 + 12 each, and one of each fault."""
    root = tmp_path_factory.mktemp("faulty") / "photos"
    for split, each, first in (("train", 24, 0), ("val", 8, 24), ("test", 12, 32)):
        write_colour_folder(root / split, each=each, first=first)
    shutil.copy(root / "test/red/032.jpg", root / "train/red/leak.jpg")
    shutil.copy(root / "train/red/001.jpg", root / "train/red/copy.jpg")
    shutil.copy(root / "train/red/002.jpg", root / "train/blue/two_labels.jpg")
    Image.open(root / "test/green/032.jpg").save(root / "train/green/pixels.png")
    write_image(root / "train/green/mislabelled.jpg", make_image(999, COLOURS["blue"]), quality=95)
    write_image(root / "train/red/blank.png", np.full((20, 24, 3), (90, 20, 160), np.uint8))
    write_image(root / "train/blue/wide.jpg", make_image(5, COLOURS["blue"], size=(10, 60)), quality=95)
    (root / "train/blue/broken.jpg").write_bytes(b"no image at all")
    write_image(root / "train/blue/wrong.png", make_image(7, COLOURS["blue"]), format="JPEG")
    return root


def hash_all(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Audited:
    def __init__(self, run: Path, screen: str):
        with (run / "audit.csv").open(newline="") as file:
            self.rows = list(csv.DictReader(file))
        self.metrics = json.loads((run / "metrics.json").read_text())
        self.screen, self.run = screen, run

    def ids(self, kind: str) -> list[str]:
        return [row["id"] for row in self.rows if row["finding"] == kind]


def audit(root: Path, *flags: str) -> Audited:
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        assert run_main("--mode=audit", f"--run_dir={root / 'audit'}", "--overwrite", *flags) == 0
    return Audited(root / "audit", screen.getvalue())


@pytest.fixture(scope="module")
def audited(faulty, store_dir, tmp_path_factory) -> Audited:
    root, before = tmp_path_factory.mktemp("audited"), hash_all(faulty)
    clean = f"--write_clean_csv={root / 'clean.csv'}"
    found = audit(root, f"--dataset=folder:{faulty}", *SMALL_NETWORK, f"--store_dir={store_dir}", clean)
    assert hash_all(faulty) == before
    return found


def test_every_fault_is_found(audited):
    assert audited.ids("unreadable") == ["train/blue/broken.jpg"]
    assert audited.ids("leak") == ["train/green/pixels.png", "train/red/leak.jpg"]
    assert audited.ids("two_labels") == ["train/red/002.jpg"]
    assert audited.ids("duplicate") == ["train/red/copy.jpg"]
    assert audited.ids("blank") == ["train/red/blank.png"]
    assert audited.ids("suffix") == ["train/blue/wrong.png"]
    assert audited.ids("aspect") == ["train/blue/wide.jpg"]
    assert "train/green/mislabelled.jpg" in audited.ids("label")
    assert audited.ids("outlier")
    severities = [("high", "medium", "low").index(row["severity"]) for row in audited.rows]
    assert severities == sorted(severities)
    leak = next(row for row in audited.rows if row["id"] == "train/red/leak.jpg")
    assert leak["other_id"] == "test/red/032.jpg"
    assert leak["evidence"] == "same bytes as test/red/032.jpg: in train and in test"


def test_the_findings_are_shown_with_their_pictures(audited):
    text = (audited.run / "report.html").read_text()
    assert f"report: {audited.run}/report.html" in audited.screen
    assert text.count("data:image/jpeg") > 10
    plain = re.sub(r"data:image/jpeg;base64,[^\"]*", "", text)
    for row in audited.rows[:8]:
        assert row["id"] in plain
        assert row["evidence"] in html.unescape(plain)
    assert "test accuracy of a logistic regression on these embeddings: " in html.unescape(plain)
    assert "tl_keras audit " in plain


def test_the_screen_counts_each_kind_and_tells_what_leaks_do(audited):
    lines = audited.screen.splitlines()
    assert "leak: 2 (the same image, or nearly the same, in two splits)" in lines
    assert "unreadable: 1 (can't be read or decoded; left out)" in lines
    told = next(line for line in lines if line.startswith("leak: 2 of 36 test images are also in another split;"))
    assert "test accuracy of a logistic regression on these embeddings: 1.000 [0.904, 1.000] with them, " in told
    assert told.endswith(" without them")
    leaks = audited.metrics["leaks"]
    assert (leaks["split"], leaks["leaked"]) == ("test", 2)
    assert 0 <= leaks["accuracy_without"] <= leaks["accuracy_with"] <= 1
    assert audited.metrics["findings"]["leak"] == 2
    assert lines[-1] == f"{len(audited.rows)} findings on {audited.metrics['n']} images · {audited.run}/audit.csv"


def test_the_clean_manifest_is_data_without_what_it_names(faulty, audited):
    source = load_source(f"csv:{audited.run.parent / 'clean.csv'}", data_dir=None)
    left_out = {"leak.jpg", "pixels.png", "copy.jpg", "blank.png", "broken.jpg"}
    names = {str(Path(path).relative_to(faulty)) for path in source.paths}
    assert not left_out & {Path(name).name for name in names}
    assert {"train/green/mislabelled.jpg", "test/red/032.jpg", "train/blue/wrong.png"} <= names
    assert "train/red/002.jpg" not in names  # under two labels: one of them goes
    assert source.class_names == ("blue", "green", "red")
    assert [str(Path(source.paths[n]).relative_to(faulty)).split("/")[0] for n in range(len(source.ids))] == [
        ("train", "val", "test")[split] for split in source.splits
    ]


def test_ids_stay_what_they_were_so_that_runs_can_be_compared(faulty, audited):
    source = load_source(f"csv:{audited.run.parent / 'clean.csv'}", data_dir=None)
    assert set(source.ids) < set(load_source(f"folder:{faulty}", data_dir=None).ids)


def test_classes_and_splits_are_written(audited):
    assert audited.metrics["classes"]["green"] == {"train": 26, "val": 8, "test": 12}
    assert audited.metrics["environment"]["engine"]
    assert (audited.run / "splits.csv").read_text().startswith("id,split,label\n")


def test_names_that_a_csv_can_not_hold_are_left_out_and_said(store_dir, tmp_path):
    for number in range(3):
        write_image(tmp_path / f"photos/a/{number}.jpg", make_image(number))
    os.rename(tmp_path / "photos/a/1.jpg", os.fsencode(tmp_path / "photos/a/") + b"/\xff.jpg")
    spaces = ["Screenshot 9.41.00\u202fAM.jpg", "\u5199\u3000\u771f.jpg", "a\u00a0b.jpg"]  # macOS, Japanese, Word
    odd = [*spaces, "\U0001f469\u200d\U0001f680.jpg", 'q"u,o;te.jpg']
    for number, name in enumerate(odd):
        write_image(tmp_path / "photos/a" / name, make_image(20 + number))
    clean = tmp_path / "clean.csv"
    flags = (*SMALL_NETWORK, f"--store_dir={store_dir}", f"--write_clean_csv={clean}")
    found = audit(tmp_path, f"--dataset=folder:{tmp_path / 'photos'}", *flags)
    assert "clean: 1 files are left out, because a CSV file can't hold their names: rename them" in found.screen
    source = load_source(f"csv:{clean}", data_dir=None)
    assert sorted(source.ids) == sorted(f"a/{name}" for name in ("0.jpg", "2.jpg", *odd))
    assert all(os.path.isfile(path) for path in source.paths)


def test_nothing_of_the_users_is_replaced(store_dir, tmp_path, capsys):
    image = write_image(tmp_path / "photos/a.jpg", make_image(1))
    manifest = tmp_path / "data.csv"
    manifest.write_text("path,label,camera\nphotos/a.jpg,a,x\n")
    common = (f"--dataset=csv:{manifest}", *SMALL_NETWORK, f"--store_dir={store_dir}", "--overwrite")
    before = hash_all(tmp_path)
    told = ("is the audited file", "is one of the audited images")
    for number, mine in enumerate((manifest, image)):
        text = refuse(capsys, *common, f"--run_dir={tmp_path / 'run'}", f"--write_clean_csv={mine}")
        assert f"--write_clean_csv={mine} {told[number]}. Give another name." in text
        assert {path: digest for path, digest in hash_all(tmp_path).items() if path in before} == before, number
    (tmp_path / "other.csv").write_text("mine")
    common = common[:-1]
    text = refuse(capsys, *common, f"--run_dir={tmp_path / 'run2'}", f"--write_clean_csv={tmp_path / 'other.csv'}")
    assert "other.csv already exists. Give another name, or --overwrite." in text
    assert not (tmp_path / "run2").exists()  # the corrected command finds no folder in its way


def test_other_kinds_can_be_left_out(faulty, store_dir, tmp_path):
    flags = ("--clean=suffix,aspect", f"--write_clean_csv={tmp_path / 'clean.csv'}", "--classes=blue,red")
    found = audit(tmp_path, f"--dataset=folder:{faulty}", *SMALL_NETWORK, f"--store_dir={store_dir}", *flags)
    names = {Path(path).name for path in load_source(f"csv:{tmp_path / 'clean.csv'}", data_dir=None).paths}
    assert not {"wrong.png", "wide.jpg"} & names
    assert {"copy.jpg", "leak.jpg"} <= names
    assert f"without suffix, aspect · {tmp_path / 'clean.csv'}" in found.screen


def test_a_classifier_brings_its_data_its_network_and_its_predictions(trained, store_dir, tmp_path):
    found = audit(tmp_path, f"--classifier={trained[0]}", f"--store_dir={store_dir}")
    assert "data: colours: " in found.screen
    assert found.metrics["n"] == 90
    assert f"--classifier={trained[0]}" in (found.run / "run.flags").read_text()
    assert run_main(f"--flagfile={found.run / 'run.flags'}", "--overwrite") == 0


def test_a_classifiers_own_predictions_judge_its_leaks(faulty, store_dir, tmp_path):
    data = (
        f"--dataset=folder:{faulty}",
        *SMALL_NETWORK,
        "--noreport",
        f"--store_dir={store_dir}",
        "--max_broken_fraction=0.1",
    )
    run = tmp_path / "run"
    assert run_main("--mode=finetune", *data, "--epochs=3", "--noexport", f"--run_dir={run}") == 0
    found = audit(tmp_path, f"--classifier={run}", f"--store_dir={store_dir}")
    trained = json.loads((run / "metrics.json").read_text())
    assert found.metrics["leaks"]["accuracy_with"] == trained["test"]["accuracy"]
    assert found.metrics["leaks"]["judge"] == str(run)
    assert len(found.metrics["leaks"]["copies_in"]["train"]) == found.metrics["leaks"]["leaked"]
    (run / "splits.csv").write_text("id,split,label\n")  # damaged: whose predictions they are can't be known
    damaged = audit(tmp_path, f"--classifier={run}", f"--store_dir={store_dir}")
    assert damaged.metrics["leaks"]["judge"] == "a logistic regression on these embeddings"
    others = tmp_path / "others"  # other images, one in two splits, under ids that the classifier has predicted
    for split, first in (("train", 200), ("val", 300), ("test", 332)):
        write_colour_folder(others / split, each=6, first=first)
    for folder in others.glob("test/*"):
        for number, path in enumerate(sorted(folder.iterdir())):
            path.rename(folder / f"{32 + number:03d}.jpg")
    shutil.copy(others / "test/red/032.jpg", others / "train/red/leak.jpg")
    found = audit(tmp_path, f"--classifier={run}", f"--dataset=folder:{others}", f"--store_dir={store_dir}")
    assert found.metrics["leaks"]["judge"] == "a logistic regression on these embeddings"


def test_how_long_many_images_take_is_said_before(faulty, store_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(audit_mode, "_MANY", 100)
    found = audit(tmp_path, f"--dataset=folder:{faulty}", *SMALL_NETWORK, f"--store_dir={store_dir}")
    told = f"note: finding the nearest neighbors of {found.metrics['n']} images takes about 0.0 hours on two cores, and"
    assert [line for line in found.screen.splitlines() if line.startswith(told)]


def test_leaving_out_test_images_because_a_model_doubts_them_is_warned_of(faulty, store_dir, tmp_path):
    data = tmp_path / "photos"
    shutil.copytree(faulty, data)
    for number in range(2):  # blue through and through, in the folder of the greens
        path = data / f"test/green/doubted{number}.jpg"
        write_image(path, make_image(1100 + number, COLOURS["blue"]), quality=95)
    flags = ("--clean=outlier,label,leak", f"--write_clean_csv={tmp_path / 'clean.csv'}")
    found = audit(tmp_path, f"--dataset=folder:{data}", *SMALL_NETWORK, f"--store_dir={store_dir}", *flags)
    doubted = {row["id"] for row in found.rows if row["finding"] in {"outlier", "label"}}
    count = sum(not one.startswith("train/") for one in doubted)
    told = f"warning: {count} val and test images are left out because of estimates of a model (label, outlier)"
    assert count > 0
    assert told in found.screen
    assert "warning: --weights=none: an untrained network finds few modified copies" in found.screen


def test_data_that_can_not_be_trained_on_is_audited_all_the_same(store_dir, tmp_path):
    write_image(tmp_path / "photos/only/a.jpg", make_image(1))
    write_image(tmp_path / "photos/only/b.jpg", make_image(2))
    shutil.copy(tmp_path / "photos/only/a.jpg", tmp_path / "photos/only/c.jpg")
    found = audit(tmp_path, f"--dataset=folder:{tmp_path / 'photos'}", *SMALL_NETWORK, f"--store_dir={store_dir}")
    assert found.metrics["n"] == 3
    assert {row["finding"] for row in found.rows} & {"duplicate", "leak"}


def test_few_images_of_many_classes_and_large_ones_warn_of_nothing(store_dir, tmp_path, recwarn):
    for number in range(12):
        write_image(tmp_path / f"photos/{number // 2}/{number}.png", make_image(number))
    large = np.zeros((9_500, 9_500), np.uint8)  # Pillow warns above 89 million pixels
    large[0, 0] = 255
    write_image(tmp_path / "photos/0/large.png", large)
    found = audit(tmp_path, f"--dataset=folder:{tmp_path / 'photos'}", *SMALL_NETWORK, f"--store_dir={store_dir}")
    assert found.ids("huge") == ["0/large.png"]
    assert [str(one.message) for one in recwarn if issubclass(one.category, (UserWarning, RuntimeWarning))] == []


def test_images_without_labels_are_audited(store_dir, tmp_path):
    for number in range(4):
        write_image(tmp_path / f"photos/{number}.jpg", make_image(number))
    shutil.copy(tmp_path / "photos/1.jpg", tmp_path / "photos/9.jpg")
    clean = tmp_path / "clean.csv"
    flags = (*SMALL_NETWORK, f"--store_dir={store_dir}", f"--write_clean_csv={clean}", "--clean=duplicate,leak")
    found = audit(tmp_path, f"--dataset=folder:{tmp_path / 'photos'}", *flags)
    assert [row["other_id"] != "" for row in found.rows if row["finding"] in {"duplicate", "leak"}] == [True]
    assert len(clean.read_text().splitlines()) == 1 + 4


def refuse(capsys, *flags: str) -> str:
    capsys.readouterr()
    assert run_main("--mode=audit", *flags) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--clean=leek",), "--clean=leek is not known. Did you mean: leak? Allowed: unreadable,"),
        (
            ("--classifier=nowhere",),
            "nowhere does not exist. Give a run folder (runs/NAME) or an exported version folder.",
        ),
        (
            ("--classifier=runs/a", "--backbone=VGG16"),
            "--classifier has its own backbone, weights, image size and resizing. Leave out the flags for them.",
        ),
        (("--epochs=3",), "--epochs is not used by --mode=audit."),
        (
            ("--dataset=digits", *SMALL_NETWORK, "--write_clean_csv=clean.csv"),
            "--write_clean_csv lists image files, but digits has none. Leave it out, or use --dataset=folder:",
        ),
        (
            ("--dataset=folder:.", *SMALL_NETWORK, "--write_clean_csv=/proc/no/clean.csv"),
            "/proc/no/clean.csv can't be written: No such file or directory. Choose another place.",
        ),
    ],
)
def test_mistakes_get_one_line(flags, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert text in refuse(capsys, *flags)


def test_nothing_readable_gets_one_line(store_dir, tmp_path, capsys):
    (tmp_path / "photos/a").mkdir(parents=True)
    (tmp_path / "photos/a/1.jpg").write_bytes(b"x")
    flags = (f"--dataset=folder:{tmp_path / 'photos'}", *SMALL_NETWORK, f"--store_dir={store_dir}")
    text = refuse(capsys, *flags, f"--run_dir={tmp_path / 'run'}")
    assert f"none of the images can be read; {tmp_path / 'run'}/broken.csv has the reasons. Repair them." in text


@pytest.mark.parametrize(
    ("dataset", "weights", "warned"),
    [
        ("stanford_dogs", "imagenet", "the images of stanford_dogs come from ImageNet's training set: a network"),
        ("imagenette/320px:1.0.0", "imagenet", "the images of imagenette come from ImageNet: a network with"),
        ("stl10", "imagenet", "the images of stl10 come from ImageNet: a"),
        ("imagenet2012_subset/1pct", "imagenet", "the training images of imagenet2012_subset come from ImageNet: a"),
        ("imagenet_v2", "imagenet", ""),  # new images (Recht et al. 2019)
        ("stanford_dogs", "none", ""),
        ("stanford_dogs", "weights.h5", ""),
        ("folder:imagenette", "imagenet", ""),
        ("cifar10", "imagenet", ""),
    ],
)
def test_sets_drawn_from_imagenet_are_named(dataset, weights, warned):
    told = describe_origin(dataset, weights)
    assert told.startswith(f"warning: {warned}") if warned else not told


def test_the_kinds_that_flags_know_are_those_that_are_found():
    assert tuple(KINDS) == FINDINGS


def test_what_a_network_began_with_is_found_through_runs(tmp_path):
    def write(name: str, weights: str) -> str:
        (tmp_path / name).mkdir(exist_ok=True)
        config = Config("finetune", DataConfig("digits"), BackboneConfig("VGG16", weights=weights))
        (tmp_path / name / "config.json").write_text(json.dumps(config.as_dict()))
        return str(tmp_path / name)

    first = write("first", "imagenet")
    assert find_weights(write("second", first)) == "imagenet"
    assert find_weights("none") == "none"
    assert find_weights(str(tmp_path)) == str(tmp_path)  # no run
    circle = write("circle", "none")
    assert find_weights(write("circle", circle)) == circle
