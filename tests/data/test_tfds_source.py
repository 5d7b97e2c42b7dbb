"""TFDS: the real builder of Stanford Dogs on archives of the same layout, and small builders of ours."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from tests.conftest import SMALL_NETWORK, make_image, run_main
from tl_keras.data import tfds_source
from tl_keras.data.examples import split_source
from tl_keras.data.sources import load_source
from tl_keras.data.splits import UNUSED, carve
from tl_keras.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")

URL = "http://vision.stanford.edu/aditya86/ImageNetDogs/"
BREEDS = 120  # the builder insists on them; in the archive in no order, with capitals, as in the real one
FOLDERS = [f"n{(number * 37) % BREEDS + 2085620:08d}-Breed_{number}" for number in range(BREEDS)]
ANNOTATION = """<annotation><size><width>24</width><height>20</height></size>
<object><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>20</xmax><ymax>18</ymax></bndbox></object></annotation>"""


def as_jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(make_image(seed, size=(20, 24))).save(file, "JPEG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def as_mat(files: list[str]) -> bytes:
    content = io.BytesIO()
    scipy.io.savemat(content, {"file_list": np.array([[name] for name in files], dtype=object)})
    return content.getvalue()


@pytest.fixture(scope="module")
def dogs(tmp_path_factory) -> tuple[Path, dict[str, bytes], set[str], dict]:
    """The data folder with the three archives put where our advice says; images, those of test, and checksums."""
    data_dir = tmp_path_factory.mktemp("tfds")
    manual = data_dir / "downloads" / "manual"
    manual.mkdir(parents=True)
    images = {
        f"{folder}/{folder.split('-')[0]}_{number}.jpg": as_jpeg(1000 * index + number)
        for index, folder in enumerate(FOLDERS)
        for number in range(2 if index < 60 else 1)
    }
    test = {name for name in images if name.endswith("_1.jpg")}
    train = [name for name in images if name not in test]
    write_tar(manual / "images.tar", {f"Images/{name}": content for name, content in images.items()})
    write_tar(
        manual / "annotation.tar",
        {f"Annotation/{name.removesuffix('.jpg')}": ANNOTATION.encode() for name in images},
    )
    lists = {"file_list": list(images), "train_list": train, "test_list": sorted(test)}
    write_tar(manual / "lists.tar", {f"{name}.mat": as_mat(files) for name, files in lists.items()})
    checksums = {
        f"{URL}{path.name}": tfds.download.checksums.UrlInfo(
            path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest(), path.name
        )
        for path in manual.iterdir()
    }
    return data_dir, images, test, checksums


@pytest.fixture(scope="module")
def prepared(dogs):
    """The source, with no change to TFDS but the checksums that its builder expects: those of our archives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds.builder_cls("stanford_dogs"), "url_infos", dogs[3])
        patch.setattr("urllib.request.urlopen", refuse)
        return load_source("stanford_dogs", data_dir=str(dogs[0]), classes=())


def refuse(*args, **kwargs):
    raise AssertionError("nothing may be fetched: all is there")


def test_the_real_builder_expects_the_files_that_the_fixture_makes(dogs):
    real = tfds.builder_cls("stanford_dogs").url_infos
    assert {url: info.filename for url, info in real.items()} == {url: info.filename for url, info in dogs[3].items()}


def test_every_dog_has_its_breed_and_its_split(dogs, prepared):
    _, images, test, _ = dogs
    assert len(images) == 180
    assert prepared.name == "stanford_dogs"
    assert prepared.notes == ("TensorFlow Datasets stanford_dogs/0.2.0",)
    assert prepared.class_names == tuple(sorted(folder.lower() for folder in FOLDERS))
    assert len(set(prepared.ids)) == len(prepared.ids) == 180
    by_content = {content: name for name, content in images.items()}
    read = dict(prepared.read(range(180)))
    assert len(read) == 180
    for position, content in read.items():
        name = by_content[content]  # the very bytes that were put into the archive
        assert prepared.class_names[prepared.labels[position]] == name.split("/")[0].lower()
        assert prepared.splits[position] == (2 if name in test else 0)


def test_an_audit_goes_through_them(dogs, prepared, tmp_path):
    places = (f"--data_dir={dogs[0]}", f"--store_dir={tmp_path / 'store'}", f"--run_dir={tmp_path / 'run'}")
    assert run_main("--mode=audit", "--dataset=stanford_dogs", *places, *SMALL_NETWORK) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["n"] == 180
    assert "unreadable" not in metrics["findings"]


def test_only_what_is_asked_for_is_read_in_the_order_in_which_it_is_stored(prepared):
    everything = dict(prepared.read(range(180)))
    wanted = [150, 3, 77]
    found = list(prepared.read(np.array(wanted)))
    assert [position for position, _ in found] == sorted(wanted)
    assert all(content == everything[position] for position, content in found)
    assert list(prepared.read([])) == []


def test_val_is_carved_from_train_and_test_stays(prepared):
    splits = carve(prepared.ids, prepared.splits, val_fraction=0.3, test_fraction=None)
    np.testing.assert_array_equal(splits == 2, prepared.splits == 2)
    assert 15 < np.sum(splits == 1) < 60
    assert np.sum(splits == 0) + np.sum(splits == 1) == 120


def test_a_prepared_set_has_the_same_ids_again(dogs, prepared):
    again = load_source("stanford_dogs:0.2.0", data_dir=str(dogs[0]), classes=())
    assert list(again.ids) == list(prepared.ids)
    np.testing.assert_array_equal(again.labels, prepared.labels)


def test_some_breeds(dogs, prepared):
    chosen = tuple(sorted(folder.lower() for folder in FOLDERS[:2]))
    some = load_source("stanford_dogs", data_dir=str(dogs[0]), classes=chosen)
    assert some.class_names == chosen
    assert len(some.ids) == 4
    everything = dict(zip(prepared.ids, (content for _, content in prepared.read(range(180))), strict=True))
    for position, content in some.read([3, 0]):
        assert content == everything[some.ids[position]]


def test_archives_that_are_not_the_real_ones_are_refused_with_what_to_do(dogs, tmp_path):
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    for path in (dogs[0] / "downloads" / "manual").iterdir():
        (manual / path.name).symlink_to(path)
    with pytest.raises(UserError) as error:  # the checksums that TFDS has are those of the real archives
        load_source("stanford_dogs", data_dir=str(tmp_path), classes=())
    text = str(error.value)
    assert "\n" not in text
    assert "TFDS could not prepare stanford_dogs: NonMatchingChecksumError" in text


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Three splits, the labels of test hidden; classes in no order, and fields of no use to us."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = None
    NAMES = ("square", "circle", "hexagon")

    def _info(self):
        features = tfds.features.FeaturesDict({
            "photo": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "shape": tfds.features.ClassLabel(names=list(self.NAMES)),
            "note": tfds.features.Text(),
        })
        return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("photo", "shape"))

    def _split_generators(self, dl_manager):
        return {"test": self._examples(5, None), "validation": self._examples(6, 7), "train": self._examples(12, 31)}

    def _examples(self, count, seed):
        for number in range(count):
            label = -1 if seed is None else (number * seed) % 3
            yield number, {"photo": make_image(number), "shape": label, "note": "x"}

    def _generate_examples(self):
        raise NotImplementedError


class Unlabelled(Shapes):
    """A set without a class label."""

    def _info(self):
        features = tfds.features.FeaturesDict({"photo": tfds.features.Image(shape=(None, None, 3))})
        return tfds.core.DatasetInfo(builder=self, features=features)


class TestAlone(Shapes):
    """A set that has nothing to learn from."""

    __test__ = False

    def _split_generators(self, dl_manager):
        return {"test": self._examples(5, 7)}


def test_validation_is_val_and_hidden_labels_are_not_used(tmp_path):
    source = load_source("shapes", data_dir=str(tmp_path), classes=())
    assert source.class_names == ("circle", "hexagon", "square")
    counts = {split: int(np.sum(source.splits == split)) for split in (0, 1, 2, UNUSED)}
    assert counts == {0: 12, 1: 6, 2: 0, UNUSED: 5}
    known = source.splits >= 0
    assert source.labels[known].min() == 0
    for split, seed in ((0, 31), (1, 7)):
        positions = np.flatnonzero(source.splits == split)
        wanted = {make_image(number).tobytes(): Shapes.NAMES[number * seed % 3] for number in range(12)}
        for position, content in source.read(positions):
            pixels = np.array(Image.open(io.BytesIO(content)))
            assert source.class_names[source.labels[position]] == wanted[pixels.tobytes()]
    splits, _ = split_source(source, val_fraction=0.1, test_fraction=None, shots=None, seed=0)
    np.testing.assert_array_equal(splits, source.splits)
    some = load_source("shapes", data_dir=str(tmp_path), classes=("circle", "square"))
    assert some.class_names == ("circle", "square")
    assert set(some.splits) == {0, 1}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "unlabelled",
            "--dataset=unlabelled is not a classification data set: it has no image with a single label (its features ",
        ),
        ("test_alone", "the TFDS data set test_alone has no train split (it has: test). Choose another."),
        ("shapes:9.9.9", "--dataset=shapes:9.9.9: TFDS can't load it: "),
        ("shapes/large", "--dataset=shapes/large: TFDS can't load it: "),
        ("stanford_dog", "--dataset=stanford_dog is not a TFDS data set. Did you mean: stanford_dogs"),
    ],
)
def test_a_set_of_no_use_is_refused(tmp_path, name, text):
    with pytest.raises(UserError) as error:
        tfds_source.load(name, data_dir=str(tmp_path))
    assert str(error.value).startswith(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "kind"), [("photos", "folder"), ("my/photos", "folder"), ("m.csv", "csv")])
def test_data_of_ones_own_that_was_meant_is_guessed(tmp_path, monkeypatch, name, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).mkdir() if kind == "folder" else (tmp_path / name).write_text("path,label")
    with pytest.raises(UserError) as error:
        tfds_source.load(name, data_dir=None)
    assert f"For your own data: --dataset={kind}:{name}." in str(error.value)
