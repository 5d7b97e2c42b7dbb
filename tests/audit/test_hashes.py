"""Perceptual hashes: what must be alike, and what must not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from tl_keras.audit.hashes import BITS, THUMB, correlate, distance, hash_image


def photograph(seed: int) -> Image.Image:
    """Shapes on a ground: a photograph's low frequencies, unlike those of noise, say what it shows."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((200, 160), Image.Resampling.BICUBIC)


def thumb_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L").resize((THUMB, THUMB), Image.Resampling.BOX))


def hash_of(image: Image.Image) -> np.ndarray:
    return hash_image(thumb_of(image))


def compress(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=40)
    return Image.open(file)


CHANGES = {
    "as it is": lambda image: image,
    "recompressed": compress,
    "resized": lambda image: image.resize((90, 72)),
    "mirrored": ImageOps.mirror,
    "cropped by 5 %": lambda image: image.crop((5, 4, 195, 156)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_near_and_another_image_far(change):
    for seed in range(10):
        original = hash_of(photograph(seed))
        assert distance(original, hash_of(CHANGES[change](photograph(seed)))) <= 10
        assert distance(original, hash_of(photograph(seed + 100))) > 12
        assert correlate(thumb_of(photograph(seed)), thumb_of(CHANGES[change](photograph(seed)))) > 0.99
        assert correlate(thumb_of(photograph(seed)), thumb_of(photograph(seed + 100))) < 0.9


def test_what_is_blank_correlates_with_nothing():
    blank = np.full((THUMB, THUMB), 90, np.uint8)
    assert correlate(blank, thumb_of(photograph(1))) == 0
    assert correlate(blank, blank) == 0


def test_distances_are_symmetric_and_bounded():
    hashes = [hash_of(photograph(seed)) for seed in range(6)]
    for one in hashes:
        for other in hashes:
            assert distance(one, other) == distance(other, one)
            assert 0 <= distance(one, other) <= BITS
