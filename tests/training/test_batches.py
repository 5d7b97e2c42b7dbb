"""Batches from the store: every example once an epoch, and crops that are what they say."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tl_keras.training.batches import EpochOrder, crop_and_mirror, make_batches, predict_logits

POSITIONS = np.arange(1000, 1103)  # 103 examples, which is no multiple of a batch
LABELS = (POSITIONS * 7) % 5


def read(positions: np.ndarray, views: np.ndarray) -> np.ndarray:
    """Embeddings from which position and view can be told."""
    return np.stack([positions, views], 1).astype(np.float32)


def collect(batches: tf.data.Dataset) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
    """Sizes of the batches, positions, views, labels."""
    parts = list(batches.as_numpy_iterator())
    values = np.concatenate([embeddings for embeddings, _ in parts])
    labels = np.concatenate([labels for _, labels in parts])
    return [len(part) for part, _ in parts], values[:, 0].astype(int), values[:, 1].astype(int), labels


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(("batch_size", "sizes"), [(10, [10] * 10 + [3]), (103, [103]), (500, [103]), (1, [1] * 103)])
def test_every_example_is_there_once_with_its_label_and_the_last_batch_is_partial(batch_size, sizes, seed):
    batches = make_batches(read, POSITIONS, LABELS, batch_size=batch_size, order=seed and EpochOrder(seed))
    assert int(batches.cardinality()) == len(sizes)
    for _ in range(2):
        found_sizes, positions, views, labels = collect(batches)
        assert found_sizes == sizes
        assert sorted(positions) == POSITIONS.tolist()
        np.testing.assert_array_equal(labels, (positions * 7) % 5)
        assert not views.any()


def test_the_types_are_what_a_model_takes():
    spec = make_batches(
        lambda p, v: np.zeros((len(p), 4, 4, 3), np.uint8), POSITIONS, LABELS, batch_size=8
    ).element_spec
    assert spec == (tf.TensorSpec((None, 4, 4, 3), tf.float32), tf.TensorSpec((None,), tf.int32))


def test_without_a_seed_the_order_is_kept():
    np.testing.assert_array_equal(collect(make_batches(read, POSITIONS, LABELS, batch_size=8))[1], POSITIONS)


def orders(seed: int, epochs: int = 3) -> list[list[int]]:
    keras.utils.set_random_seed(0)
    batches = make_batches(read, POSITIONS, LABELS, batch_size=8, order=EpochOrder(seed))
    return [collect(batches)[1].tolist() for _ in range(epochs)]


def test_each_epoch_has_another_order_and_a_seed_gives_them_again():
    first = orders(1)
    assert len({tuple(order) for order in first}) == 3
    assert POSITIONS.tolist() not in first
    assert orders(1) == first
    assert not any(order in first for order in orders(2))


def test_an_epoch_can_be_continued_at_any_step():
    order = EpochOrder(1)
    whole = [collect(make_batches(read, POSITIONS, LABELS, batch_size=8, order=order)) for _ in range(3)][2]
    order.epoch = 2
    rest = make_batches(read, POSITIONS, LABELS, batch_size=8, order=order, first_step=5, num_views=1)
    assert int(rest.cardinality()) == 13 - 5
    sizes, positions, _, labels = collect(rest)
    assert sizes == whole[0][5:]
    np.testing.assert_array_equal(positions, whole[1][40:])
    np.testing.assert_array_equal(labels, whole[3][40:])


def test_each_epoch_draws_one_stored_view_of_each_example():
    keras.utils.set_random_seed(0)
    batches = make_batches(read, POSITIONS, LABELS, batch_size=8, order=EpochOrder(1), num_views=2)
    epochs = []
    for _ in range(4):
        _, positions, views, _ = collect(batches)
        assert set(views) == {0, 1}
        assert 30 < views.sum() < 73  # 103 fair coins: beyond 4 deviations
        epochs.append(tuple(views[np.argsort(positions)]))
    assert len(set(epochs)) == 4


def pictures(count: int = 64, side: int = 24) -> np.ndarray:
    """Red rises to the right, green downwards: a crop tells where it comes from."""
    ramp = np.linspace(0, 255, side, dtype=np.float32)
    x, y = np.meshgrid(ramp, ramp)
    return np.repeat(np.stack([x, y, np.full_like(x, 100)], -1)[np.newaxis], count, 0)


def crop(seed: int, images: np.ndarray | None = None) -> np.ndarray:
    return crop_and_mirror(pictures() if images is None else images, seed=tf.constant([seed, 7], tf.int64)).numpy()


def test_crops_have_the_images_shape_and_their_seeds_numbers():
    first = crop(1)
    assert first.shape == (64, 24, 24, 3)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(crop(1), first)
    assert np.abs(crop(2) - first).max() > 10
    assert crop(1, np.zeros((2, 5, 9, 3), np.float32)).shape == (2, 5, 9, 3)


def test_a_crop_is_a_rectangle_of_the_image_that_is_large_enough_and_half_are_mirrored():
    crops = np.concatenate([crop(seed) for seed in range(8)])
    np.testing.assert_allclose(crops[..., 2], 100, atol=1e-3)  # nothing from beyond the edge
    assert crops.min() >= 0
    assert crops.max() <= 255.01
    left, right = crops[:, :, 0, 0].mean(1), crops[:, :, -1, 0].mean(1)
    top, bottom = crops[:, 0, :, 1].mean(1), crops[:, -1, :, 1].mean(1)
    mirrored = right < left
    assert 0.4 < mirrored.mean() < 0.6
    assert np.all(bottom > top)  # never upside down
    width, height = np.abs(right - left) / 255, (bottom - top) / 255
    area = width * height
    assert area.min() > 0.4
    assert area.max() > 0.9
    assert len(np.unique(area.round(4))) > 450  # each image has a crop of its own
    aspect = width / height
    assert aspect.min() > 3 / 4 * 0.99
    assert aspect.max() < 4 / 3 * 1.01
    middle = (left + right) / 2
    assert middle.min() < 110 < 145 < middle.max()


def test_a_crop_is_brought_to_full_size_evenly():
    image = pictures(1)
    found = crop(5, image)[0]
    columns, rows = found[0, :, 0], found[:, 0, 1]
    np.testing.assert_allclose(np.diff(columns), np.diff(columns).mean(), atol=0.05)  # straight lines stay straight
    np.testing.assert_allclose(np.diff(rows), np.diff(rows).mean(), atol=0.05)


def test_crops_differ_by_batch_and_epoch_and_the_seed_gives_them_again():
    image = pictures(1)[0]

    def epochs(seed):
        keras.utils.set_random_seed(0)
        batches = make_batches(
            lambda p, v: np.repeat(image[np.newaxis], len(p), 0),
            POSITIONS,
            LABELS,
            batch_size=50,
            order=EpochOrder(seed),
            crop=True,
        )
        return [np.concatenate([images for images, _ in batches.as_numpy_iterator()]) for _ in range(2)]

    first = epochs(1)
    assert first[0].shape == (103, 24, 24, 3)
    assert np.abs(first[0] - first[1]).max() > 10
    assert np.abs(first[0][:50] - first[0][50:100]).max() > 10
    np.testing.assert_array_equal(np.stack(first), np.stack(epochs(1)))


@pytest.mark.parametrize("batch_size", [1, 32, 103, 200])
def test_logits_are_those_of_predict_in_order(batch_size):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((2,))
    scaled = keras.layers.Rescaling([1e-3, 1])(inputs)
    model = keras.Model(inputs, keras.layers.Dense(4)(keras.layers.Dropout(0.5)(scaled)))
    found = predict_logits(model, read, POSITIONS, batch_size=batch_size)
    expected = model.predict(read(POSITIONS, np.zeros(103)), verbose=0)
    assert found.shape == (103, 4)
    np.testing.assert_allclose(found, expected, atol=1e-6)
