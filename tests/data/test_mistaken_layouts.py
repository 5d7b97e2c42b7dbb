"""Folders and manifests as people really have them: read as they are meant, or refused in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import COLOURS, make_image, write_colour_folder, write_image
from tl_keras.data.depth import DepthCheck
from tl_keras.data.sources import load_source
from tl_keras.data.splits import SPLITS, carve, check_classes
from tl_keras.errors import UserError


def load(path: Path | str, **options):
    return load_source(f"folder:{path}", data_dir=None, **options)


def load_csv(folder: Path, text: str):
    (folder / "m.csv").write_text(text)
    return load_source(f"csv:{folder / 'm.csv'}", data_dir=None)


def error_of(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("first", "second"),
    [("Training", "Testing"), ("training_set", "test_set"), ("TRAIN", "Dev"), ("trainset", "validation_set")],
)
def test_folders_that_are_splits_under_other_names_are_splits(tmp_path, first, second):
    write_colour_folder(tmp_path / first, each=4)
    write_colour_folder(tmp_path / second, each=2)
    source = load(tmp_path)
    assert source.class_names == ("blue", "green", "red")
    counts = [int((source.splits == number).sum()) for number in range(3)]
    assert counts == ([12, 6, 0] if second.lower()[0] in "dv" else [12, 0, 6])


@pytest.mark.parametrize(("first", "second"), [("A", "B"), ("fold1", "fold2"), ("source", "target")])
def test_folders_that_look_like_splits_are_no_classes(tmp_path, first, second):
    for name in (first, second):
        write_colour_folder(tmp_path / name, each=2)
    assert error_of(load, tmp_path) == (
        f"the folders {first}, {second} in {tmp_path} all contain the same folders (blue, green, red), like splits. If "
        "they are splits, rename them to train, val and test. If they are classes, list the images with "
        "--dataset=csv:PATH."
    )


def test_splits_are_known_by_most_of_their_classes_through_a_wrapper_and_beside_a_stray_image(tmp_path):
    for name in ("seg_train", "seg_pred"):
        write_colour_folder(tmp_path / name / name, each=2)
    write_image(tmp_path / "seg_pred" / "preview.jpg", make_image(1))
    shutil.rmtree(tmp_path / "seg_pred" / "seg_pred" / "red")
    assert "the folders seg_pred, seg_train in " in error_of(load, tmp_path)


def test_a_class_with_a_model_beside_its_images_is_a_class(tmp_path, trained):
    write_colour_folder(tmp_path, each=2)
    shutil.copytree(trained[1], tmp_path / "blue" / "model" / "1")
    assert load(tmp_path).class_names == ("blue", "green", "red")


def test_classes_whose_subfolders_differ_are_classes(tmp_path):
    for name, inner in (("cats", "2020"), ("dogs", "2021")):
        write_image(tmp_path / name / inner / "1.jpg", make_image(1))
    assert load(tmp_path).class_names == ("cats", "dogs")


def test_a_wrapper_folder_is_named(tmp_path):
    write_colour_folder(tmp_path / "PetImages", each=2)
    assert error_of(load, tmp_path) == (
        "only one class: PetImages. It contains 3 folders (blue, green, red). Did you mean "
        f"--dataset=folder:{tmp_path}/PetImages?"
    )


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information"])
def test_folders_that_systems_make_are_left_out(tmp_path, name):
    write_colour_folder(tmp_path / "train", each=2)
    write_colour_folder(tmp_path / "val", each=2)
    for place in (tmp_path, tmp_path / "train", tmp_path / "train" / "blue"):
        write_image(place / name / "000.jpg" / "SYNOPHOTO_THUMB_M.jpg", make_image(1))
    source = load(tmp_path)
    assert (len(source.ids), source.class_names) == (12, ("blue", "green", "red"))


def test_runs_and_models_in_the_datas_folder_are_no_class(tmp_path, trained):
    write_colour_folder(tmp_path, each=2)
    shutil.copytree(trained[0], tmp_path / "runs" / "first")
    shutil.copytree(trained[1], tmp_path / "saved_models" / "m" / "1")
    source = load(tmp_path)
    assert (source.class_names, source.notes) == (("blue", "green", "red"), ())


def test_images_of_a_split_without_class_folders_are_counted(tmp_path):
    write_colour_folder(tmp_path / "train", each=4)
    for number in range(7):
        write_image(tmp_path / "test" / f"{number}.jpg", make_image(number))
    assert load(tmp_path).notes == (
        f"warning: 7 images in {tmp_path}/test are not in a class folder and are left out, because they have "
        "no label. Classify them with --mode=predict. A split without class folders is held out from train",
    )


def test_files_with_other_suffixes_are_counted(tmp_path):
    write_colour_folder(tmp_path, each=2)
    for number in range(3):
        (tmp_path / "red" / f"{number}.PPM").write_text("P3")
    (tmp_path / "blue" / "notes").write_text("")
    assert load(tmp_path).notes == ("note: 4 files with other suffixes left out: .ppm (3), no suffix (1)",)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (
            "path,label\na.jpg,cat\nb.jpg,Tomato, healthy\n",
            "line 3 has 3 cells, but the header has 2. Put cells that contain a comma in quotes.",
        ),
        (
            "path;label\na.jpg;cat\nb.jpg;Tomato; healthy\n",
            "line 3 has 3 cells, but the header has 2. Put cells that contain a semicolon in quotes.",
        ),
        (
            "path,label,id\na.jpg,cat,1\nb.jpg,dog,\n",
            "line 3 has no id, but other lines have one. Ids determine the split of an image: give every line an id, "
            "or remove the column to use the paths.",
        ),
        (
            "path,label,id\na.jpg,cat,p1\nb.jpg,dog,p1\n",
            ": lines 2 and 3 both have the id p1. Ids must be unique. If the column has another meaning, such as "
            "a patient, rename it; then the paths are used.",
        ),
        ("path,label\na.jpg,cat\nb.jpg,dog\na.jpg,cat\n", ": lines 2 and 4 name a.jpg. Delete one of them."),
        (
            "path,label\na.jpg,cat\nb.jpg,dog\n./a.jpg,dog\n",
            ": lines 2 and 4 name a.jpg, with the labels cat and dog. Keep the correct one.",
        ),
        (
            "path,label\nhttps://example.org/a.jpg,cat\n",
            " line 2: https://example.org/a.jpg is a URL. Images are not downloaded: give paths of files.",
        ),
    ],
)
def test_manifests_that_would_be_read_wrongly_are_refused(tmp_path, rows, text):
    for name in ("a.jpg", "b.jpg"):
        write_image(tmp_path / name, make_image(1))
    told = error_of(load_csv, tmp_path, rows)
    assert told == f"{tmp_path}/m.csv{text}" or told == f"{tmp_path}/m.csv {text}"


def test_manifests_that_mean_what_they_say_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.jpg", "b.jpg"):
        write_image(tmp_path / name, make_image(1))
    assert load_csv(tmp_path, "path,label\na.jpg,cat,,\nb.jpg,dog\n").class_names == ("cat", "dog")
    assert len(load_csv(tmp_path, 'path,label,"a;b;c;d"\na.jpg,cat,1\n~/b.jpg,dog,2\n').ids) == 2
    assert list(load_csv(tmp_path, "path,label,id\na.jpg,cat,\nb.jpg,dog,\n").ids) == ["a.jpg", "b.jpg"]
    assert load_csv(tmp_path, "path,label\na.jpg,Blue\nb.jpg,blue\n").notes == (
        "warning: classes differ only in upper and lower case: Blue and blue",
    )
    assert load_csv(tmp_path, "path,label\na.jpg,nan\nb.jpg,blue\n").notes == (
        "warning: the class nan may mean images without a label",
    )


def test_a_row_that_is_added_moves_no_other(tmp_path):
    def splits(ids: list[str]) -> dict[str, int]:
        given = carve(ids, np.zeros(len(ids), np.int8), val_fraction=0.1, test_fraction=0.2)
        return dict(zip(ids, given.tolist(), strict=True))

    before, after = splits([f"{n}" for n in range(500)]), splits([f"{n}" for n in range(501)])
    assert all(after[one] == split for one, split in before.items())


@pytest.mark.parametrize(("classes", "each"), [(300, 4), (6, 2), (1000, 5), (3, 1)])
def test_carving_leaves_every_class_an_image_in_train(classes, each):
    ids = [f"{label}/{number}" for label in range(classes) for number in range(each)]
    labels = np.repeat(np.arange(classes), each)
    given = np.zeros(len(ids), np.int8)
    splits = carve(ids, given, val_fraction=0.1, test_fraction=0.2, labels=labels)
    assert set(labels[splits == SPLITS.index("train")]) == set(range(classes))
    plain = carve(ids, given, val_fraction=0.1, test_fraction=0.2)
    moved = np.flatnonzero(splits != plain)
    assert len(moved) == len(set(range(classes)) - set(labels[plain == 0]))  # one of each class that lacked one
    if (splits == 1).any():
        check_classes(labels, splits, [str(label) for label in range(classes)])


def png16(values: np.ndarray) -> bytes:
    import tensorflow as tf

    return tf.io.encode_png(values[..., np.newaxis].astype(np.uint16)).numpy()


def test_sixteen_bits_of_which_few_are_used_are_told():
    check, random = DepthCheck(), np.random.default_rng(0)
    for number in range(5):
        check.look(png16(random.integers(0, 256, (8, 8))))
        check.look(png16(random.integers(0, 4096, (8, 8))))
        check.look(png16(random.integers(0, 65536, (8, 8))))
        check.look(write_image_bytes(number))
        check.look(png16(np.zeros((8, 8))))
    check.look(b"\x89PNG\r\n\x1a\n" + b"\0" * 16 + b"\x10")
    assert check.notes() == [
        "warning: 10 of 20 inspected images with 16 bits per channel use less than an eighth of the range. Only the "
        "upper 8 bits are used, so these images look nearly black: rescale them, or convert them to 8 bits"
    ]


def write_image_bytes(seed: int) -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(make_image(seed, COLOURS["red"])).save(file, "PNG")
    return file.getvalue()
