"""Looking at a run's images: the right picture for the right row, whatever order a source reads in."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from tests.conftest import make_image
from tl_keras.audit.duplicates import Images
from tl_keras.audit.examine import Audit
from tl_keras.audit.findings import Finding
from tl_keras.data.examples import Examples
from tl_keras.data.sources import Source
from tl_keras.data.splits import UNUSED
from tl_keras.jobs.inspection import examine_examples, list_audited_images, measure_leaks

SPLITS = np.array([0, UNUSED, 2, 0, 1, UNUSED, 0], np.int8)


def encode(seed: int, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(make_image(seed, size=(40, 50))).save(file, kind)
    return file.getvalue()


@pytest.fixture
def examples() -> Examples:
    """Number 6 shows the pixels of number 2, in another format; numbers 1 and 5 are not used."""
    contents = [encode(seed, "PNG") for seed in (0, 1, 2, 3, 4, 2)] + [encode(2, "BMP")]

    def read(positions):
        for position in sorted(map(int, positions), reverse=True):
            yield position, contents[position]

    labels = np.array([0, 0, 1, 0, 0, 1, 1], np.int32)
    source = Source("s", [f"{n}.img" for n in range(7)], labels, ("a", "b"), np.zeros(7, np.int8), read)
    digests = np.array([np.void(bytes([number]) * 32) for number in range(7)], "V32")
    return Examples(source, SPLITS, digests, {1: "no image"})


@pytest.mark.parametrize("every", [True, False])
def test_pixels_are_compared_of_the_rows_that_are_meant(examples, every):
    embeddings = np.eye(5)[[0, 1, 2, 3, 1]].astype(np.float32)  # positions 2 and 6 are neighbours
    audit = examine_examples(examples, [], embeddings, all_pixels=every, show_progress=lambda text: None)
    leaks = [(one.id, one.other_id, one.evidence) for one in audit.findings if one.kind == "leak"]
    assert leaks == [("6.img", "2.img", "same pixels as 2.img: in train and in test")]
    assert [(one.id, one.evidence) for one in audit.findings if one.kind == "unreadable"] == [("1.img", "no image")]


def test_odd_files_that_are_not_used_are_left_out(examples):
    odd = [Finding("0.img", "tiny", "low", "x"), Finding("5.img", "tiny", "low", "x")]
    audit = examine_examples(
        examples, odd, np.eye(5, dtype=np.float32), all_pixels=False, show_progress=lambda text: None
    )
    assert [one.id for one in audit.findings if one.kind == "tiny"] == ["0.img"]


def test_images_are_those_in_use(examples):
    rows, images = list_audited_images(examples)
    assert rows.tolist() == [0, 2, 3, 4, 6]
    assert images.ids == ["0.img", "2.img", "3.img", "4.img", "6.img"]
    assert images.labels.tolist() == [0, 1, 0, 0, 1]
    assert images.splits == ["train", "test", "train", "val", "train"]
    assert images.evaluated == "test"


def leaky(*ids: str) -> tuple[Audit, Images]:
    images = Images([*"abcdef"], np.array([0, 1, 0, 1, 0, 1]), ("x", "y"), ["train", *["test"] * 5])
    copied = np.isin(images.ids, ids)[:, np.newaxis] & np.array([True, False, False])
    return Audit([], np.zeros((6, 2)), None, copied), images


def test_what_leaks_do_to_the_accuracy_by_hand():
    audit, images = leaky("b", "c")
    found, lines = measure_leaks(audit, images, np.array([1, 0, 0, 0, 0]), "it")
    # right: b, c, e of b to f; without b and c one of three
    assert (found["leaked"], found["accuracy_with"], found["accuracy_without"]) == (2, 3 / 5, 1 / 3)
    assert found["copies_in"] == {"train": ["b", "c"], "val": [], "test": []}
    assert lines == [
        "leak: 2 of 5 test images are also in another split; test accuracy of it: 0.600 [0.231, 0.882] with them, "
        "0.333 [0.061, 0.792] without them"
    ]


def test_without_leaks_or_with_nothing_else_little_is_said():
    assert measure_leaks(*leaky(), np.zeros(5), "it") == ({}, [])
    found, lines = measure_leaks(*leaky(*"bcdef"), np.array([1, 0, 1, 0, 1]), "it")
    assert "accuracy_without" not in found
    assert lines[0].endswith("with them")
