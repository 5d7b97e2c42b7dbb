"""Mistakes that a user makes, and the one line that each gets."""

from __future__ import annotations

import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SMALL_NETWORK, make_image, run_main, write_colour_folder, write_image

TRAIN, READ = "--mode=finetune", "--mode=extract"
COLOURS = "--dataset=folder:{colours}"
NET = " ".join(SMALL_NETWORK)


def nothing(tmp: Path) -> None:
    pass


def manifest(text: str | bytes) -> Callable[[Path], None]:
    def prepare(tmp: Path) -> None:
        write_image(tmp / "a.png", make_image(1))
        write_image(tmp / "b.png", make_image(2))
        (tmp / "m.csv").write_bytes(text if isinstance(text, bytes) else text.encode())

    return prepare


def one_class(tmp: Path) -> None:
    write_image(tmp / "one" / "cats" / "a.jpg", make_image(1))


def train_and_val(tmp: Path) -> None:
    for split in ("train", "val"):
        write_colour_folder(tmp / "two" / split, each=3, first=0 if split == "train" else 3)


def flat_folder(tmp: Path) -> None:
    write_image(tmp / "flat" / "a.jpg", make_image(1))


def val_alone_has_a_class(tmp: Path) -> None:
    for number in range(3):
        for place in ("train/a", "train/b", "val/a", "val/b", "val/c"):
            write_image(tmp / "data" / place / f"{number}.jpg", make_image(number))


def unreadable_class(tmp: Path) -> None:
    write_colour_folder(tmp / "data", each=8)
    write_image(tmp / "c.tif", make_image(1))
    rows = [f"{path.relative_to(tmp)},{path.parent.name},train" for path in sorted((tmp / "data").rglob("*.jpg"))]
    rows += [row.replace("train", "val") for row in rows[:3]]
    rows = ["path,label,split", *rows[3:], "c.tif,c,train", "data/x.jpg,c,val"]
    write_image(tmp / "data" / "x.jpg", make_image(2))
    (tmp / "m.csv").write_text("\n".join(rows) + "\n")


def splits_and_more(tmp: Path) -> None:
    for place in ("train/a", "train/b", "val/a", "val/b", "unlabelled"):
        write_image(tmp / "data" / place / "1.jpg", make_image(1))


def half_broken(tmp: Path) -> None:
    write_colour_folder(tmp / "data", each=10)
    for number in range(5):
        (tmp / "data" / "red" / f"{number:03d}.jpg").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 20)


def truncated(tmp: Path) -> None:
    write_colour_folder(tmp / "data", each=10)
    for number in range(5):
        path = tmp / "data" / "red" / f"{number:03d}.jpg"
        path.write_bytes(path.read_bytes()[:500])


def a_file(tmp: Path) -> None:
    (tmp / "file").write_text("not a folder")


def empty_folder(tmp: Path) -> None:
    (tmp / "empty").mkdir()


def full_run_dir(tmp: Path) -> None:
    (tmp / "run").mkdir()
    (tmp / "run" / "thesis.txt").write_text("precious")


def text_weights(tmp: Path) -> None:
    (tmp / "w.h5").write_text("not HDF5")


def other_weights(tmp: Path) -> None:
    import keras

    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    network.save_weights(tmp / "other.weights.h5")


def damaged_run(tmp: Path) -> None:
    (tmp / "run" / "classifier").mkdir(parents=True)
    (tmp / "run" / "classifier" / "classifier.json").write_text('{"labels": ["a", "b"]}')
    (tmp / "run" / "classifier" / "network.keras").write_bytes(b"no zip")


MISTAKES: list[tuple[str, str, Callable[[Path], None], str]] = [
    # the command line
    ("no mode", "--dataset=digits", nothing, "--mode is missing. Allowed: finetune,"),
    ("unknown mode", "--mode=finetun", nothing, "--mode=finetun is not known. Did you mean: finetune?"),
    ("unknown flag", f"{TRAIN} --epoch=3", nothing, "--epoch is not a flag. Did you mean --epochs?"),
    ("another mode's flag", "--mode=predict --epochs=3", nothing, "--epochs is not used by --mode=predict."),
    ("no number", f"{TRAIN} --epochs=ten", nothing, "--epochs=ten is not a whole number."),
    ("too small", f"{TRAIN} --epochs=0", nothing, "--epochs=0 is out of range. Allowed: 1 or more."),
    ("too large", f"{TRAIN} --dropout=2", nothing, "--dropout=2.0 is out of range. Allowed: 0 to 0.95."),
    ("not a number", f"{TRAIN} --momentum=nan", nothing, "--momentum=nan is out of range."),
    ("no step", f"{TRAIN} --learning_rate=0", nothing, "--learning_rate=0.0 is out of range. Allowed: above 0"),
    ("unknown choice", f"{TRAIN} --optimizer=adan", nothing, "--optimizer=adan is not known. Did you mean: adam,"),
    ("empty", f"{TRAIN} --dataset=", nothing, "--dataset is empty."),
    ("all carved", f"{TRAIN} --val_fraction=0.5 --test_fraction=0.6", nothing, "leave nothing to train on"),
    ("warm-up", f"{TRAIN} --warmup_epochs=20", nothing, "--warmup_epochs=20 is more than --epochs=10."),
    ("no flag file", "--flagfile={tmp}/nope.flags", nothing, "Unable to open flagfile"),
    ("a stray word", f"{TRAIN} digits", nothing, "'digits' is not a flag."),
    ("bad name", f"{TRAIN} --model_name=a/b", nothing, "--model_name=a/b can't be part of a TF Serving URL"),
    ("no classifier", "--mode=export", nothing, "--classifier is missing."),
    ("no images", "--mode=predict --classifier={run}", nothing, "--images is missing."),
    # data
    ("no folder", f"{TRAIN} --dataset=folder:{{tmp}}/nope {NET}", nothing, "nope does not exist. Check the path."),
    ("a file", f"{TRAIN} --dataset=folder:{{tmp}}/file {NET}", a_file, "is not a folder. Give a folder with one"),
    ("empty folder", f"{TRAIN} --dataset=folder:{{tmp}}/empty {NET}", empty_folder, "no images in"),
    ("one class", f"{TRAIN} --dataset=folder:{{tmp}}/one {NET}", one_class, "only one class: cats."),
    (
        "class only in val",
        f"{TRAIN} --dataset=folder:{{tmp}}/data {NET}",
        val_alone_has_a_class,
        "train has no example of c,",
    ),
    (
        "a folder beside the splits",
        f"{TRAIN} --dataset=folder:{{tmp}}/data {NET}",
        splits_and_more,
        "has splits (train, val) and other folders (unlabelled). Move the other folders away",
    ),
    ("unknown class", f"{TRAIN} {COLOURS} --classes=red,gren {NET}", nothing, "no class 'gren'. Did you mean: green"),
    (
        "too many shots",
        f"{TRAIN} {COLOURS} --shots=99 {NET}",
        nothing,
        "--shots=99 is more than the smallest class has",
    ),
    ("no val", f"{TRAIN} {COLOURS} --val_fraction=0 {NET}", nothing, "val has no examples"),
    ("HEIC", f"{TRAIN} --dataset=folder:{{tmp}}/data {NET}", half_broken, "HEIC is not supported by TensorFlow"),
    ("truncated", f"{TRAIN} --dataset=folder:{{tmp}}/data {NET}", truncated, "5 of 30 images are broken, more than"),
    ("no manifest", f"{TRAIN} --dataset=csv:{{tmp}}/m.csv {NET}", nothing, "m.csv can't be read: No such file"),
    (
        "no columns",
        f"{TRAIN} --dataset=csv:{{tmp}}/m.csv {NET}",
        manifest("a.png,x\n"),
        "Expected the columns path,label",
    ),
    ("no rows", f"{TRAIN} --dataset=csv:{{tmp}}/m.csv {NET}", manifest("path,label\n"), "m.csv has no rows."),
    ("no label", f"{TRAIN} --dataset=csv:{{tmp}}/m.csv {NET}", manifest("path,label\na.png,\n"), "line 2 has no label"),
    (
        "unknown split",
        f"{TRAIN} --dataset=csv:{{tmp}}/m.csv {NET}",
        manifest("path,label,split\na.png,x,holdout\n"),
        "line 2: split 'holdout' is not known. Allowed: train, val, test.",
    ),
    (
        "one id twice",
        f"{TRAIN} --dataset=csv:{{tmp}}/m.csv {NET}",
        manifest("path,label\na.png,x\n./a.png,y\n"),
        "lines 2 and 3 name a.png, with the labels x and y. Keep the correct one.",
    ),
    (
        "no file exists",
        f"{TRAIN} --dataset=csv:{{tmp}}/m.csv {NET}",
        manifest("path,label\nx/a.png,x\n"),
        "none of the 1 files in",
    ),
    (
        "a label of two lines",
        f"{TRAIN} --dataset=csv:{{tmp}}/m.csv {NET}",
        manifest('path,label\na.png,"x\ny"\nb.png,z\n'),
        "the class name 'x\\ny' has a line break",
    ),
    ("not UTF-8", f"{TRAIN} --dataset=csv:{{tmp}}/m.csv {NET}", manifest(b"path,label\n\xe9.png,x\n"), "is not UTF-8"),
    (
        "a path alone",
        f"{TRAIN} --dataset={{tmp}}/one {NET}",
        one_class,
        "is a path. For your own data: --dataset=folder:",
    ),
    ("unknown TFDS set", f"{TRAIN} --dataset=stanford_dogz {NET}", nothing, "Did you mean: stanford_dogs"),
    ("a text set", f"{TRAIN} --dataset=glue/cola --data_dir={{tmp}} {NET}", nothing, "is not a"),
    ("no path", f"{TRAIN} --dataset=folder: {NET}", nothing, "--dataset=folder: has no path. Add it:"),
    ("nobody's home", f"{TRAIN} --dataset=folder:~nobody_here/x {NET}", nothing, "~nobody_here/x does not exist."),
    ("a comma too many", "--mode=predict --classifier={run} --images=a.jpg,", nothing, "--images has an empty part"),
    (
        "a stray quote",
        f"{TRAIN} --dataset=csv:{{tmp}}/m.csv {NET}",
        manifest('path,label\na.png,"x\n' + "b.png,y\n" * 20_000),
        "is not valid CSV: field larger than field limit",
    ),
    (
        "the only train image is no image",
        f"{TRAIN} --dataset=csv:{{tmp}}/m.csv --max_broken_fraction=0.5 {NET}",
        unreadable_class,
        "train has no example of c,",
    ),
    # backbone
    (
        "unknown backbone",
        f"{TRAIN} {COLOURS} --backbone=ResNet5",
        nothing,
        "Unknown backbone 'ResNet5'. Nearest: ResNet50",
    ),
    ("bad kwargs", f"{TRAIN} --backbone_kwargs=alpha", nothing, "'alpha' is not name=value"),
    ("unknown kwarg", f"{TRAIN} {COLOURS} --backbone_kwargs=beta=1 {NET}", nothing, "has no argument beta=1"),
    (
        "tiny images",
        f"{TRAIN} {COLOURS} --backbone=VGG16 --weights=none --image_size=8",
        nothing,
        "VGG16 does not support --image_size=8",
    ),
    ("no weights file", f"{TRAIN} {COLOURS} --weights={{tmp}}/w.h5", nothing, "is not a weights file."),
    ("text as weights", f"{TRAIN} {COLOURS} --backbone=SmallConvNet --weights={{tmp}}/w.h5", text_weights, "w.h5"),
    (
        "another network's weights",
        f"{TRAIN} {COLOURS} --backbone=SmallConvNet --weights={{tmp}}/other.weights.h5",
        other_weights,
        "conv1",
    ),
    ("weights we have not", f"{TRAIN} {COLOURS} --backbone=SmallConvNet", nothing, "has no ImageNet weights"),
    (
        "a run of another network",
        f"{TRAIN} {COLOURS} --weights={{run}} --backbone=VGG16",
        nothing,
        "is a SmallConvNet of 16 pixels; it can't become VGG16",
    ),
    ("unknown part", f"{TRAIN} {COLOURS} {NET} --trainable=tail", nothing, "--trainable='tail' is not understood."),
    (
        "no such layer",
        f"{TRAIN} {COLOURS} {NET} --trainable=from:conv9",
        nothing,
        "has no layer 'conv9'. Nearest: conv",
    ),
    (
        "nothing to train",
        f"{TRAIN} {COLOURS} {NET} --trainable=from:embedding_pool",
        nothing,
        "selects only layers of SmallConvNet without trainable weights",
    ),
    (
        "too many layers",
        f"{TRAIN} {COLOURS} {NET} --trainable=last:99",
        nothing,
        "selects more layers than SmallConvNet has",
    ),
    (
        "float16 here",
        f"{TRAIN} {COLOURS} {NET} --precision=float16 --run_dir={{tmp}}/r",
        nothing,
        "float16 needs a GPU",
    ),
    # extract
    ("unknown probe", f"{READ} {COLOURS} --probe=rbf", nothing, "--probe=rbf is not known. Did you mean: rbf_svm?"),
    ("no probe", f"{READ} {COLOURS} --probe=", nothing, "--probe is empty. Allowed: logistic_regression,"),
    ("no probe and no output", f"{READ} {COLOURS} --probe=none", nothing, "only computes embeddings. Give it --emb"),
    ("a pooling of nothing", f"{READ} {COLOURS} {NET} --pooling=max", nothing, "--pooling=max needs a feature map,"),
    ("a probe twice", f"{READ} {COLOURS} --probe=knn,knn", nothing, "--probe=knn,knn lists a name twice. List each"),
    (
        "one value, two probes",
        f"{READ} {COLOURS} --probe=knn,ridge --probe_parameter=3",
        nothing,
        "--probe_parameter applies to a single probe. Give one --probe, or leave it out.",
    ),
    (
        "half a neighbour",
        f"{READ} {COLOURS} --probe=knn --probe_parameter=2.5",
        nothing,
        "--probe_parameter=2.5 is not a number of neighbors. Give a whole number.",
    ),
    (
        "more neighbours than images",
        f"{READ} {COLOURS} {NET} --probe=knn --probe_parameter=500 --run_dir={{tmp}}/r",
        nothing,
        "--probe=knn can't use 500 neighbors: train has only ",
    ),
    (
        "a probe and nothing",
        f"{READ} {COLOURS} --probe=knn,",
        nothing,
        "--probe has an empty part. Remove the extra comma.",
    ),
    ("a layer twice", f"{READ} {COLOURS} --feature_layer=fc1,fc1", nothing, "--feature_layer=fc1,fc1 lists a name"),
    (
        "no strength",
        f"{READ} {COLOURS} --probe_parameter=0",
        nothing,
        "--probe_parameter=0.0 is out of range. Allowed: 1e-09 to",
    ),
    (
        "fc2 of another size",
        f"{READ} {COLOURS} --backbone=VGG16 --image_size=96",
        nothing,
        "have ImageNet weights only for images of 224 x 224 pixels, not 96.",
    ),
    (
        "shots for no probe",
        f"{READ} {COLOURS} --probe=none --embeddings_output=e.npz --shots=3",
        nothing,
        "--shots selects training images of a probe, which --probe=none does not fit. Leave --shots out.",
    ),
    ("draws of nothing", f"{READ} {COLOURS} --repeats=3", nothing, "several times. Give --shots too"),
    (
        "one shot and sigmoids",
        f"{READ} {COLOURS} {NET} --probe=linear_svm --shots=1 --run_dir={{tmp}}/r",
        nothing,
        "--probe=linear_svm needs at least two training images per class",
    ),
    (
        "refitted on all there is",
        f"{READ} --dataset=folder:{{tmp}}/two {NET} --refit=train+val --run_dir={{tmp}}/r",
        train_and_val,
        "--refit=train+val leaves no images for evaluation, because there is no test split.",
    ),
    (
        "no such feature layer",
        f"{READ} {COLOURS} {NET} --feature_layer=conv9",
        nothing,
        "--feature_layer=conv9: SmallConvNet has no such layer. Nearest: conv",
    ),
    (
        "embeddings as what",
        f"{READ} {COLOURS} --embeddings_output=e.csv",
        nothing,
        "--embeddings_output=e.csv has an unknown suffix. Allowed: .npz, .parquet. Rename the file.",
    ),
    (
        "embeddings of two layers",
        f"{READ} {COLOURS} --feature_layer=pool1,pool2 --embeddings_output=e.npz",
        nothing,
        "--embeddings_output writes embeddings of a single layer. Give one --feature_layer.",
    ),
    (
        "embeddings into a file",
        f"{READ} {COLOURS} {NET} --embeddings_output={{tmp}}/file/e.npz --run_dir={{tmp}}/r",
        a_file,
        "file/e.npz can't be written",
    ),
    ("no labels to learn", f"{READ} --dataset=folder:{{tmp}}/flat {NET}", flat_folder, "no images in "),
    ("epochs of a probe", f"{READ} --epochs=3", nothing, "--epochs is not used by --mode=extract. It belongs to: fine"),
    # places
    ("a full run folder", f"{TRAIN} {COLOURS} {NET} --run_dir={{tmp}}/run --overwrite", full_run_dir, "already exists"),
    (
        "no run folder",
        f"{TRAIN} {COLOURS} {NET} --run_dir={{tmp}}/file/run",
        a_file,
        "file/run can't be written: Not a directory",
    ),
    (
        "no store",
        f"{TRAIN} {COLOURS} {NET} --run_dir={{tmp}}/r --store_dir={{tmp}}/file/s",
        a_file,
        "(--store_dir) can't be written",
    ),
    (
        "no model folder",
        "--mode=export --classifier={run} --export_dir={tmp}/file",
        a_file,
        "the model folder",
    ),
    # training
    (
        "the loss explodes",
        f"{TRAIN} {COLOURS} {NET} --trainable=all --optimizer=sgd --learning_rate=1000 --run_dir={{tmp}}/r",
        nothing,
        "Try a smaller --learning_rate",
    ),
    # finished classifiers
    ("no run", "--mode=export --classifier={tmp}/nope", nothing, "nope does not exist. Give a run folder"),
    (
        "no classifier in it",
        "--mode=predict --classifier={tmp} --images={run}/labels.txt",
        nothing,
        "contains no classifier.",
    ),
    ("damaged", "--mode=export --classifier={tmp}/run", damaged_run, "is damaged"),
    (
        "exported already",
        "--mode=export --classifier={model}",
        nothing,
        "is already an exported model. Give a run folder, or --deploy",
    ),
    ("whose data?", "--mode=evaluate --classifier={model}", nothing, "--dataset is missing"),
    (
        "unknown label",
        "--mode=evaluate --classifier={run} --dataset=digits",
        nothing,
        "the label '0' (and 9 more labels), which is not a class of the classifier",
    ),
    ("no match", "--mode=predict --classifier={run} --images={tmp}/*.jpg", nothing, "*.jpg matches no image."),
]


def the_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    assert error[0].startswith("tl_keras: error: ")
    return error[0]


@pytest.mark.parametrize(
    ("arguments", "prepare", "text"), [row[1:] for row in MISTAKES], ids=[row[0] for row in MISTAKES]
)
def test_a_mistake_gets_one_line(
    arguments, prepare, text, trained, colour_folder, store_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(store_dir))
    prepare(tmp_path)
    places = {"tmp": tmp_path, "colours": colour_folder, "run": trained[0], "model": trained[1]}
    capsys.readouterr()
    assert run_main(*arguments.format(**places).split()) == 1
    assert text in the_line(capsys)


def test_there_are_thirty_and_more():
    assert len(MISTAKES) >= 30


def test_the_same_files_under_two_spellings_of_one_name_are_one_id(tmp_path, capsys):
    for name in ("é.png", "e\u0301.png"):  # composed and decomposed
        write_image(tmp_path / "data" / "a" / name, make_image(1))
    write_image(tmp_path / "data" / "b" / "1.png", make_image(2))
    assert run_main(TRAIN, f"--dataset=folder:{tmp_path / 'data'}", *SMALL_NETWORK) == 1
    assert "two images have the id a/é.png" in the_line(capsys)


def test_a_disk_that_is_too_small_is_foreseen(colour_folder, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    arguments = [f"--dataset=folder:{colour_folder}", *SMALL_NETWORK, f"--run_dir={tmp_path / 'run'}"]
    assert run_main(TRAIN, *arguments, f"--store_dir={tmp_path / 'store'}") == 1
    assert "GB free. Give a --store_dir on a larger disk" in the_line(capsys)


def test_the_network_is_missed_at_once_and_by_name(tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError(socket.gaierror(-2, "Name or service not known"))

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    assert run_main(TRAIN, f"--data_dir={tmp_path}", *SMALL_NETWORK) == 1
    line = the_line(capsys)
    assert "stanford_dogs can't be downloaded" in line
    assert "http://vision.stanford.edu/aditya86/ImageNetDogs/images.tar" in line
    assert f"put the files into {tmp_path}/downloads/manual" in line


def test_weights_that_cannot_be_fetched_are_named_before_anything_is_computed(
    colour_folder, tmp_path, capsys, monkeypatch
):
    import keras

    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(keras.src.utils.file_utils, "urlretrieve", refuse)
    assert run_main(TRAIN, f"--dataset=folder:{colour_folder}", f"--run_dir={tmp_path / 'run'}") == 1
    line = the_line(capsys)
    assert "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5" in line
    assert "https://storage.googleapis.com/" in line
    assert not (tmp_path / "run").exists()


def test_tfds_that_cannot_be_imported_leaves_folders_usable(colour_folder, store_dir, tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert run_main(TRAIN, "--dataset=mnist", *SMALL_NETWORK) == 1
    line = the_line(capsys)
    assert "TensorFlow Datasets can't be imported" in line
    assert "folder:PATH and csv:PATH work without it" in line
    arguments = [
        f"--dataset=folder:{colour_folder}",
        *SMALL_NETWORK,
        "--epochs=1",
        "--noexport",
        f"--store_dir={store_dir}",
    ]
    assert run_main(TRAIN, *arguments, f"--run_dir={tmp_path / 'run'}") == 0


def test_an_unwritable_home_is_said(colour_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    arguments = [f"--dataset=folder:{colour_folder}", *SMALL_NETWORK, f"--run_dir={tmp_path / 'run'}"]
    assert run_main(TRAIN, *arguments) == 1
    assert "the embedding store /dev/null/cache/tl_keras (--store_dir) can't be written" in the_line(capsys)
