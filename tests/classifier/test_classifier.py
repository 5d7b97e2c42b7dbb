"""A finished classifier, wherever it lies: bytes go in, probabilities come out."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import tl_keras
from tests.conftest import COLOURS, build_classifier, make_image, write_image
from tl_keras.classifier import (
    Classifier,
    LoadedClassifier,
    find_folder,
    is_exported,
    load,
    load_samples,
    load_trained,
    read_labels,
    write_classifier,
)
from tl_keras.config import is_run
from tl_keras.errors import UserError
from tl_keras.export.parity import ParityProcess
from tl_keras.export.saved_model import write_version

NAMES = ("älg", "b,c", 'd "e"', "f g", "红 色", "🐶", "עברית")


def error_of(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def make_colours(count: int) -> list[bytes]:
    return [encode(make_image(number, list(COLOURS.values())[number % 3])) for number in range(count)]


def encode(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def build(classes: int) -> Classifier:
    return build_classifier(NAMES[:classes])


def predict_by_keras(classifier: Classifier, images: list[np.ndarray]) -> np.ndarray:
    size = (classifier.image_size, classifier.image_size)
    resized = [np.array(Image.fromarray(one).resize(size, Image.Resampling.BILINEAR)) for one in images]
    logits = classifier.network.predict(np.stack(resized).astype(np.float32), verbose=0).astype(np.float64)
    values = np.exp(logits - logits.max(1, keepdims=True))
    return values / values.sum(1, keepdims=True)


def save(classifier: Classifier, folder: Path, count: int = 3) -> tuple[list[bytes], np.ndarray]:
    images = [make_image(number) for number in range(count)]
    samples = [encode(image) for image in images]
    expected = predict_by_keras(classifier, images).astype(np.float32)
    write_classifier(classifier, folder / "classifier", samples=samples, expected=expected)
    return samples, expected


@pytest.fixture(scope="module")
def seven(tmp_path_factory) -> Path:
    """A run folder with a classifier of seven classes."""
    folder = tmp_path_factory.mktemp("seven")
    save(build(7), folder)
    return folder


@pytest.fixture(scope="module")
def loaded(seven) -> LoadedClassifier:
    return load(str(seven))


@pytest.fixture(scope="module")
def exported(trained) -> LoadedClassifier:
    return load(str(trained[1]))


# where it is loaded from


def test_run_folder_classifier_folder_and_exported_model_answer_alike(trained, exported, colour_folder):
    run, model = trained
    paths = sorted(colour_folder.rglob("00?.jpg"))
    answers = [load(str(run)), load(str(run / "classifier")), exported, tl_keras.load_classifier(str(model))]
    rows = [np.stack([row["probabilities"] for row in one.predict(paths)]) for one in answers]
    for row in rows[1:]:
        np.testing.assert_allclose(row, rows[0], atol=1e-6)
    assert {one.labels for one in answers} == {tuple(sorted(COLOURS))}
    found = [row["predicted"] for row in exported.predict(paths)]
    assert np.mean([name == path.parent.name for name, path in zip(found, paths, strict=True)]) > 0.9


def test_its_probabilities_are_those_of_the_network_on_the_decoded_image(seven, loaded):
    images = [make_image(number, COLOURS[tuple(COLOURS)[number % 3]], (40 + number, 30)) for number in range(40)]
    expected = predict_by_keras(load_trained(str(seven)), images)
    found = np.stack([row["probabilities"] for row in loaded.predict([encode(one) for one in images])])
    assert found.dtype == np.float32
    assert expected[:3].std(0).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=5e-3)  # some pixels differ by one level


def test_what_was_saved_is_loaded(seven):
    first, second = build(7), load_trained(str(seven))
    assert (second.name, second.labels, second.backbone, second.embedding_layer, second.resize) == (
        *("toy-Net", NAMES, "Net", "pool", "squash"),
    )
    assert second.image_size == 12
    for one, other in zip(first.network.weights, second.network.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    assert {path.name for path in (seven / "classifier").iterdir()} == {
        *("network.keras", "classifier.json", "samples.npz")
    }


def test_the_embedder_is_the_backbone_alone(seven):
    classifier = load_trained(str(seven))
    images = np.random.default_rng(0).uniform(0, 255, (3, 12, 12, 3)).astype(np.float32)
    embeddings = classifier.embedder.predict(images, verbose=0)
    assert embeddings.shape == (3, 6)
    logits = classifier.network.get_layer("logits")
    np.testing.assert_allclose(logits(embeddings), classifier.network.predict(images, verbose=0), atol=1e-4)
    assert classifier.embedder.name == "Net"


# samples


def test_samples_are_the_same_bytes_and_numbers(tmp_path):
    samples, expected = save(build(3), tmp_path, count=12)
    samples[3:5] = [b"", b"any bytes \0\0"]
    write_classifier(build(3), tmp_path / "classifier", samples=samples, expected=expected)
    found, numbers = load_samples(str(tmp_path))
    assert found == samples
    np.testing.assert_array_equal(numbers, expected)
    assert numbers.dtype == np.float32


def test_the_classifiers_own_folder_is_as_good_as_the_run(tmp_path, monkeypatch):
    samples, _ = save(build(2), tmp_path)
    monkeypatch.chdir(tmp_path)
    for path in (".", "classifier", str(tmp_path), f"{tmp_path}/classifier/"):
        assert load_samples(path)[0] == samples
        assert find_folder(path).resolve() == tmp_path / "classifier"


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no zip"),
        lambda path: path.write_bytes(path.read_bytes()[:200]),
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: np.savez(path, expected=np.zeros((2, 3))),
        lambda path: np.savez(path, image_0=np.zeros(3, np.uint8)),
        lambda path: np.savez(path, expected=np.array([{}], object), image_0=np.array([{}], object)),
    ],
    ids=["gone", "empty", "no zip", "the first bytes", "no end", "an image lacks", "no numbers", "a pickle"],
)
def test_damaged_samples_are_named(tmp_path, damage):
    save(build(2), tmp_path)
    path = tmp_path / "classifier" / "samples.npz"
    damage(path)
    text = error_of(load_samples, str(tmp_path))
    assert text.startswith(f"{path} is missing or damaged: ")
    assert text.endswith(". Train the classifier again.")


def test_a_flipped_byte_in_the_samples_is_noticed(tmp_path):
    save(build(2), tmp_path)
    path = tmp_path / "classifier" / "samples.npz"
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 1
    path.write_bytes(content)
    assert "is missing or damaged" in error_of(load_samples, str(tmp_path))


# damaged ones


def test_a_path_that_does_not_exist_is_named(tmp_path):
    assert error_of(load, str(tmp_path / "nope")) == (
        f"{tmp_path}/nope does not exist. Give a run folder (runs/NAME) or an exported version folder."
    )


@pytest.mark.parametrize("gone", ["classifier", "classifier/network.keras", "classifier/classifier.json"])
def test_a_run_that_has_not_ended_holds_no_classifier(seven, tmp_path, gone):
    shutil.copytree(seven, tmp_path / "run")
    path = tmp_path / "run" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert error_of(load, str(tmp_path / "run")).startswith(
        f"{tmp_path}/run contains no classifier. Give the folder of a"
    )


def test_a_file_is_no_classifier(tmp_path):
    (tmp_path / "x.keras").write_text("")
    assert "contains no classifier" in error_of(load, str(tmp_path / "x.keras"))


def change(**values: object):
    def damage(folder: Path) -> None:
        path = folder / "classifier.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "network.keras").write_bytes(b"no zip"),
        lambda folder: (folder / "network.keras").write_bytes((folder / "network.keras").read_bytes()[:2000]),
        lambda folder: (folder / "network.keras").write_bytes(b""),
        lambda folder: (folder / "classifier.json").write_text("{"),
        lambda folder: (folder / "classifier.json").write_text("[]"),
        lambda folder: (folder / "classifier.json").write_text("{}"),
        change(labels=None),
        change(labels=["a"]),
        change(labels=[*NAMES, "one too many"]),
        change(embedding_layer="conv9"),
    ],
    ids=[
        *("no zip", "half a network", "an empty network", "half a description", "a list", "nothing described"),
        *("no labels", "one label", "eight labels", "no such layer"),
    ],
)
def test_a_damaged_classifier_is_named(seven, tmp_path, damage):
    shutil.copytree(seven, tmp_path / "run")
    damage(tmp_path / "run" / "classifier")
    text = error_of(load, str(tmp_path / "run"))
    assert text.startswith((
        f"the classifier in {tmp_path}/run is damaged: ",
        f"{tmp_path}/run/classifier/classifier.json is damaged: ",
    ))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda path: (path / "saved_model.pb").write_bytes(b"no model"), "the exported model {} is damaged: "),
        (lambda path: (path / "saved_model.pb").write_bytes(b""), "the exported model {} is damaged: "),
        (
            lambda path: (path / "saved_model.pb").write_bytes((path / "saved_model.pb").read_bytes()[:-1000]),
            "the exported model {} is damaged: ",
        ),
        (
            lambda path: (path / "assets" / "labels.txt").unlink(),
            "{} has no assets/labels.txt, so it was not exported by",
        ),
        (lambda path: (path / "saved_model.pb").unlink(), "{} contains no classifier."),
    ],
    ids=["no model", "an empty one", "half a model", "no labels", "no graph"],
)
def test_a_damaged_export_is_named(trained, tmp_path, damage, text):
    shutil.copytree(trained[1], tmp_path / "1")
    damage(tmp_path / "1")
    assert error_of(load, str(tmp_path / "1")).startswith(text.format(tmp_path / "1"))


def test_a_model_of_others_is_said_to_be_one(tmp_path):
    tf.saved_model.save(tf.Module(), str(tmp_path / "1"))
    assert is_exported(tmp_path / "1")
    assert error_of(load, str(tmp_path / "1")).endswith(
        "so it was not exported by tl_keras. Give a model exported by tl_keras."
    )


def test_what_is_trained_further_is_a_run_and_no_export(trained, tmp_path):
    run, model = trained
    assert (
        error_of(load_trained, str(model))
        == f"{model} is an exported model, but a run folder is needed here. Give a run folder: runs/NAME."
    )
    assert is_run(str(run))
    assert not is_run(str(run / "metrics.json"))
    assert not is_run("imagenet")


@pytest.mark.parametrize("names", [("a", "b"), NAMES, ("a ", " b"), ("\u3000", "x\u00a0"), ("0", "00")], ids=repr)
def test_labels_are_read_as_they_were_written(tmp_path, names):
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "labels.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    assert read_labels(tmp_path) == list(names)


@pytest.mark.slow
def test_a_network_of_more_than_2_gb_is_exported(tmp_path):
    """A graph can't be larger than 2 GB, but its variables can."""
    images = keras.Input((8, 8, 3))
    embedding = keras.layers.Dense(9_000, name="embedding")(keras.layers.Flatten()(images))
    wide = keras.layers.Dense(60_000)(embedding)  # 2.2 GB
    classifier = Classifier(keras.Model(images, keras.layers.Dense(2)(wide)), "x", ("a", "b"), "X", "embedding", "crop")
    write_version(classifier, tmp_path, name="x", max_pixels=10**6)
    image = make_image(0, COLOURS["red"], (8, 8))
    expected = tf.nn.softmax(classifier.network(image[np.newaxis].astype("float32"))).numpy()
    with ParityProcess() as fresh:
        agreement = fresh.compare(tmp_path, [tf.io.encode_png(image).numpy()], expected)
    shutil.rmtree(tmp_path)  # pytest would keep it
    assert agreement.largest_difference < 1e-3


@pytest.mark.parametrize("number", [28, 30])
def test_a_disk_that_fails_while_a_classifier_is_saved_is_one_line(tmp_path, monkeypatch, number):
    def fail(self, path):
        raise OSError(number, "x")

    monkeypatch.setattr(keras.Model, "save", fail)
    text = error_of(write_classifier, build(2), tmp_path / "c", samples=[], expected=np.zeros((0, 2)))
    assert str(tmp_path / "c") in text
    assert not (tmp_path / "c" / "network.keras").exists()


# predict


@pytest.fixture
def red(tmp_path) -> Path:
    return write_image(tmp_path / "红 色.PNG", make_image(1, COLOURS["red"]))


@pytest.mark.parametrize("form", [str, Path, lambda path: path.read_bytes()], ids=["text", "Path", "bytes"])
def test_one_image_is_a_path_or_bytes_and_so_is_each_of_several(exported, red, form):
    (alone,) = exported.predict(form(red))
    assert alone["predicted"] == alone["labels"][0] == "red"
    assert alone["error"] == ""
    for found in (
        exported.predict([form(red)] * 2),
        exported.predict((form(red),)),
        exported.predict([red, form(red)]),
    ):
        assert {row["predicted"] for row in found} == {"red"}
        np.testing.assert_allclose(found[0]["probabilities"], alone["probabilities"], atol=1e-6)


def test_none_is_no_image(exported):
    assert exported.predict([]) == []
    assert list(exported.predict_batches(iter(()))) == []


def test_a_prediction_has_the_best_classes_in_order(loaded):
    for row in loaded.predict(make_colours(5)):
        values = row["probabilities"]
        assert set(row) == {"predicted", "probability", "labels", "scores", "probabilities", "error"}
        assert values.shape == (7,)
        assert values.sum() == pytest.approx(1, abs=1e-5)
        best = np.argsort(-values)[:5]
        assert row["labels"] == [NAMES[number] for number in best]
        assert row["scores"] == values[best].tolist()
        assert (row["predicted"], row["probability"]) == (row["labels"][0], row["scores"][0])
        assert [type(score) for score in row["scores"]] == [float] * 5


def test_two_classes_have_two_best(tmp_path):
    save(build(2), tmp_path)
    for row in load(str(tmp_path)).predict([*make_colours(3), b"no image"]):
        assert len(row["labels"]) == len(row["scores"]) == len(row["probabilities"]) == 2
        assert set(row["labels"]) in ({NAMES[0], NAMES[1]}, {""})


BROKEN = {
    "a missing path": ("/nope/x.jpg", "can't be read: No such file or directory"),
    "a folder": ("/", "can't be read: Is a directory"),
    "no bytes": (b"", "empty or unreadable file"),
    "text": (b"no image", "not an image: supported formats are JPEG, PNG, GIF, BMP and WebP"),
    "TIFF": (encode(make_image(1), "TIFF"), "TIFF is not supported by TensorFlow: convert it, for example"),
    "half a JPEG": (encode(make_image(1, size=(90, 90)), "JPEG")[:900], "can't be decoded: "),
    "half a PNG": (encode(make_image(1))[:300], "can't be decoded: "),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("which", ["loaded", "exported"])
def test_a_broken_image_says_why_among_good_ones(name, which, request, red):
    classifier = request.getfixturevalue(which)
    image, reason = BROKEN[name]
    before, row, after = classifier.predict([red, image, red])
    assert row["error"].startswith(reason)
    assert "\n" not in row["error"]
    assert "{{" not in row["error"]
    assert (row["predicted"], row["probability"]) == ("", 0)
    assert not row["probabilities"].any()
    assert set(row["labels"]) == {""}
    assert before["error"] == after["error"] == ""
    np.testing.assert_array_equal(before["probabilities"], after["probabilities"])
    (alone,) = classifier.predict(image)
    assert alone["error"] == row["error"]


def test_arrays_and_images_of_pillow_are_classified_as_their_files(loaded, red):
    file = encode(make_image(3, COLOURS["red"]))
    with Image.open(io.BytesIO(file)) as image:
        image.load()
    pixels = np.asarray(image)
    (expected,) = loaded.predict(file)
    for given in (pixels, image, [pixels], pixels[None], bytearray(file)):
        (row,) = loaded.predict(given)
        np.testing.assert_array_equal(row["probabilities"], expected["probabilities"])
    (opaque,) = loaded.predict(image.convert("RGBA"))
    np.testing.assert_array_equal(opaque["probabilities"], expected["probabilities"])
    assert loaded.predict([]) == []
    deep = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
    for wrong in (3, pixels / 255, pixels[:, :, 0], {"a": 1}, pixels[:0], deep):
        for given in (wrong, [wrong]):
            with pytest.raises(UserError, match="can't classify a "):
                loaded.predict(given)


def test_an_image_of_pillow_is_turned_as_its_exif_says_and_damage_is_named(loaded, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(make_image(3, COLOURS["red"], size=(20, 40))).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        (row,) = loaded.predict(opened)
    (expected,) = loaded.predict(tmp_path / "a.png")
    np.testing.assert_array_equal(row["probabilities"], expected["probabilities"])
    names = np.array([str(tmp_path / "a.png")] * 2)
    assert [one["predicted"] for one in loaded.predict(names)] == [expected["predicted"]] * 2
    with Image.open(io.BytesIO(encode(make_image(1, size=(90, 90)), "JPEG")[:900])) as cut:
        (row,) = loaded.predict(cut)
    assert row["error"].startswith("can't be read: image file is truncated")


def test_bytes_reach_the_decoder_as_they_are(exported, red):
    content = red.read_bytes()
    for more in (b"\0", b"\0\0\0\0", b"\n"):
        (row,) = exported.predict(content + more)
        assert row["predicted"] == "red"


def test_a_stream_is_read_a_batch_at_a_time_and_answered_in_order(loaded):
    contents = make_colours(9)
    single = [row["predicted"] for row in loaded.predict(contents)]
    assert len(set(single)) > 1
    asked = []

    def stream():
        for number in range(100):
            asked.append(number)
            yield contents[number % 9]

    batches = loaded.predict_batches(stream())
    assert asked == []
    first = next(batches)
    assert (len(first), len(asked)) == (32, 32)
    rest = list(batches)
    assert [len(batch) for batch in rest] == [32, 32, 4]
    predicted = [row["predicted"] for batch in [first, *rest] for row in batch]
    assert predicted == [single[number % 9] for number in range(100)]


def test_paths_are_read_when_their_batch_comes(exported, tmp_path, monkeypatch):
    image = make_image(1, COLOURS["red"])
    paths = [write_image(tmp_path / f"{number}.png", image) for number in range(40)]
    read = []
    original = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read.append(self) or original(self))
    sizes = []
    serve = exported._serve
    monkeypatch.setattr(
        exported, "_serve", lambda image_bytes: sizes.append(len(read)) or serve(image_bytes=image_bytes)
    )
    assert len(exported.predict(paths)) == 40
    assert sizes == [32, 40]
