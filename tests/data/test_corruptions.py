"""Corruptions against their published formulas."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest

from tl_keras.data.corruptions import CORRUPTIONS, STRENGTHS, corrupt

IMAGE = np.random.default_rng(0).integers(0, 256, (48, 48, 3)).astype(np.uint8)
SMOOTH = np.linspace(0, 255, 48 * 48 * 3).reshape(48, 48, 3).astype(np.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_grows_with_its_strength_and_is_the_same_each_time(name):
    distances = []
    for strength in range(1, STRENGTHS + 1):
        found = corrupt(SMOOTH, name, strength, seed=3)
        assert found.shape == SMOOTH.shape
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, corrupt(SMOOTH, name, strength, seed=3))
        distances.append(np.abs(found.astype(float) - SMOOTH).mean())
    assert distances[0] > 0
    assert distances[-1] > distances[0]


def test_noise_has_the_published_spread():
    grey = np.full((200, 200, 3), 128, np.uint8)
    assert corrupt(grey, "noise", 1, seed=0).std() == pytest.approx(0.08 * 255, rel=0.02)
    assert not np.array_equal(corrupt(grey, "noise", 1, seed=0), corrupt(grey, "noise", 1, seed=1))


def test_brightness_adds_to_the_value_of_hsv():
    found = corrupt(IMAGE, "brightness", 2, seed=0)
    for row, column in ((0, 0), (5, 40), (30, 7)):
        hue, saturation, value = colorsys.rgb_to_hsv(*(IMAGE[row, column] / 255))
        expected = 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.2)))
        np.testing.assert_allclose(found[row, column], expected, atol=0.51)
    black = np.zeros((4, 4, 3), np.uint8)
    assert (corrupt(black, "brightness", 1, seed=0) == round(25.5)).all()


def test_contrast_by_hand():
    mean = IMAGE.mean((0, 1))
    expected = np.rint((IMAGE - mean) * 0.2 + mean)
    np.testing.assert_array_equal(corrupt(IMAGE, "contrast", 3, seed=0), expected)


def test_blur_keeps_the_mean_and_pixelation_makes_blocks():
    blurred = corrupt(IMAGE, "blur", 3, seed=0)
    assert blurred.mean() == pytest.approx(IMAGE.mean(), abs=1)
    assert blurred.std() < IMAGE.std() / 5
    blocks = corrupt(IMAGE, "pixelation", 5, seed=0)
    assert len(np.unique(blocks.reshape(-1, 3), axis=0)) <= 12 * 12


def test_a_crop_shows_the_middle_alone():
    image = np.zeros((100, 100, 3), np.uint8)
    image[20:80, 20:80] = 200
    assert (corrupt(image, "crop", 5, seed=0) == 200).all()


def test_a_rotation_turns_either_way():
    ways = {corrupt(SMOOTH, "rotation", 5, seed=seed).tobytes() for seed in range(8)}
    assert len(ways) == 2
