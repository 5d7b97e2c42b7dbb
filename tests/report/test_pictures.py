"""Thumbs, light, and what a heat map shows in words."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from tests.conftest import make_image
from tl_keras.report.pictures import describe_heat, encode_thumb, light_up


def decode(address: str) -> Image.Image:
    head, _, content = address.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


@pytest.mark.parametrize(("shape", "size"), [((300, 400), (100, 75)), ((400, 300), (75, 100)), ((40, 30), (30, 40))])
def test_a_thumb_is_at_most_so_large_and_never_enlarged(shape, size):
    assert decode(encode_thumb(make_image(1, size=shape), side=100)).size == size


def test_a_thumb_of_noise_is_bounded():
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3)).astype(np.uint8)
    assert len(encode_thumb(noise, side=168)) < 30_000


def test_light_falls_where_the_heat_is():
    image, heat = np.full((40, 60, 3), 200, np.uint8), np.zeros((4, 6), np.float32)
    heat[:2, :3] = 1
    lit = light_up(image, heat)
    assert (lit[:12, :20] > 190).all()
    assert (lit[28:, 40:] < 50).all()
    assert lit.min() > 20  # what does not matter can still be made out


def heat_at(rows: slice, columns: slice) -> np.ndarray:
    heat = np.zeros((6, 6), np.float32)
    heat[rows, columns] = 1
    return heat


@pytest.mark.parametrize(
    ("heat", "words"),
    [
        (heat_at(slice(0, 2), slice(0, 2)), "the upper left"),
        (heat_at(slice(0, 2), slice(4, 6)), "the upper right"),
        (heat_at(slice(4, 6), slice(2, 4)), "the lower center"),
        (heat_at(slice(2, 4), slice(2, 4)), "the center"),
        (heat_at(slice(2, 4), slice(0, 2)), "the middle left"),
        (heat_at(slice(0, 6), slice(0, 5)), "the whole image"),
        (np.zeros((6, 6), np.float32), ""),
    ],
)
def test_places_in_words(heat, words):
    assert describe_heat(heat) == words
