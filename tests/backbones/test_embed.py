"""Embedding: what is computed, what comes from the store, and which store it is."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

import keras
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from tests.conftest import make_image
from tl_keras.backbones import embed as embed_module
from tl_keras.backbones.embed import Embedded, embed, embed_tail, hash_weights
from tl_keras.data.images import make_images
from tl_keras.errors import UserError

SIZE = 8


def as_png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


PIXELS = [make_image(number, size=(SIZE, SIZE)) for number in range(80)]
CONTENTS = [as_png(pixels) for pixels in PIXELS]


def build_trunk(seed: int = 0, pooled: bool = True, size: int = SIZE) -> keras.Model:
    keras.utils.set_random_seed(seed)
    images = keras.Input((size, size, 3))
    x = keras.layers.Rescaling(1 / 255)(images)
    x = keras.layers.Conv2D(4, 3, name="conv", activation="relu")(x)
    return keras.Model(images, keras.layers.GlobalAveragePooling2D(name="pool")(x) if pooled else x)


def digests_of(contents: list[bytes]) -> np.ndarray:
    import hashlib

    return np.array([np.void(hashlib.sha256(content).digest()) for content in contents], "V32")


class Job:
    """One call of `embed`, and what it showed."""

    def __init__(self, tmp_path, contents=CONTENTS, size=SIZE, by_tensorflow=False):
        self.folder, self.contents, self.size = str(tmp_path / "store"), contents, size
        self.by_tensorflow, self.hashed = by_tensorflow, None
        self.lines, self.progress, self.read = [], [], []

    def reader(self, positions: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        for position in positions:
            self.read.append(int(position))
            yield int(position), self.contents[position]

    def decode_by_tensorflow(self, positions):
        return make_images(
            self.reader,
            positions,
            image_size=self.size,
            resize="squash",
            batch_size=embed_module.BATCH_SIZE,
            digests=digests_of(self.hashed or self.contents),
        )

    def decode_by_pillow(self, positions):
        """The same stream without broken images, and without the second that it takes to trace it."""
        for start in range(0, len(positions), embed_module.BATCH_SIZE):
            part = np.asarray(positions[start : start + embed_module.BATCH_SIZE], np.int64)
            images = [Image.open(io.BytesIO(content)) for _, content in self.reader(part)]
            yield part, np.stack([np.array(image.resize((self.size, self.size))) for image in images])

    def run(self, trunk, positions=None, *, flip=None, precision="float32", show_progress=None, exact=None) -> Embedded:
        positions = np.arange(len(self.contents)) if positions is None else np.asarray(positions)
        (embedded,) = embed(
            [] if trunk is None else [trunk],
            wanted={0: positions} if flip is None else {0: positions, 1: np.asarray(flip)},
            digests=digests_of(self.hashed or self.contents),
            images=self.decode_by_tensorflow if self.by_tensorflow else self.decode_by_pillow,
            address={"backbone": "Toy", "image_shape": [self.size, self.size, 3], "resize": "squash"},
            engine="tensorflow",
            precision=precision,
            store_dir=self.folder,
            show=self.lines.append,
            show_progress=show_progress or self.progress.append,
            exact=exact,
        )
        return embedded


def keras_embeddings(trunk: keras.Model, pixels: list[np.ndarray]) -> np.ndarray:
    return trunk.predict(np.stack(pixels).astype(np.float32), verbose=0)


@pytest.mark.parametrize("pooled", [True, False], ids=["vectors", "maps"])
def test_the_embeddings_are_those_of_keras_by_position(tmp_path, pooled):
    trunk, job = build_trunk(pooled=pooled), Job(tmp_path, by_tensorflow=True)
    embedded = job.run(trunk)
    assert embedded.computed == 80
    assert embedded.broken == []
    expected = keras_embeddings(trunk, PIXELS)
    np.testing.assert_allclose(embedded.read(np.arange(80)), expected, atol=1e-5)
    order = np.array([79, 0, 33, 33])
    np.testing.assert_allclose(embedded.read(order), expected[order], atol=1e-5)
    assert job.progress[-1].startswith("trunk: 80/80 images, ")
    assert "80 images to compute, 0 cached" in job.lines[0]


def test_a_second_run_computes_nothing_and_a_third_only_what_is_new(tmp_path):
    trunk = build_trunk()
    first = Job(tmp_path, CONTENTS[:50])
    before = first.run(trunk).read(np.arange(50))
    again = Job(tmp_path, CONTENTS[:50])
    embedded = again.run(trunk)
    assert embedded.computed == 0
    assert len(again.read) <= embed_module.BATCH_SIZE  # a first batch, to choose a precision by
    np.testing.assert_array_equal(embedded.read(np.arange(50)), before)
    assert "0 images to compute, 50 cached, 0 MB to write" in again.lines[0]
    order = np.random.default_rng(0).permutation(80)  # new images in between: position is no key
    more = Job(tmp_path, [CONTENTS[number] for number in order])
    embedded = more.run(trunk)
    assert embedded.computed == 30
    np.testing.assert_array_equal(embedded.read(np.flatnonzero(order < 50)), before[order[order < 50]])


def test_one_content_under_two_names_is_computed_once(tmp_path):
    job = Job(tmp_path, [*CONTENTS[:5], CONTENTS[2], CONTENTS[2]])
    embedded = job.run(build_trunk())
    assert embedded.computed == 5
    values = embedded.read(np.array([2, 5, 6]))
    np.testing.assert_array_equal(values[0], values[1])
    np.testing.assert_array_equal(values[0], values[2])


def test_weights_size_and_precision_have_stores_of_their_own(tmp_path):
    jobs = [
        Job(tmp_path).run(build_trunk()),
        Job(tmp_path).run(build_trunk(seed=1)),
        Job(tmp_path).run(build_trunk(pooled=False)),
        Job(tmp_path).run(build_trunk(), precision="bfloat16"),
        Job(tmp_path, size=6).run(build_trunk(size=6)),
    ]
    assert [embedded.computed for embedded in jobs] == [80] * 5
    assert len({embedded.store.path for embedded in jobs}) == 5


def test_one_changed_weight_changes_the_hash():
    trunk = build_trunk()
    before = hash_weights(trunk)
    assert hash_weights(build_trunk()) == before
    kernel = trunk.get_layer("conv").kernel.numpy()
    kernel[2, 2, 2, 3] = np.nextafter(kernel[2, 2, 2, 3], 9, dtype=np.float32)
    trunk.get_layer("conv").kernel.assign(kernel)
    assert hash_weights(trunk) != before


def test_the_mirrored_view_is_that_of_mirrored_pixels(tmp_path):
    trunk = build_trunk(pooled=False)
    embedded = Job(tmp_path, CONTENTS[:40]).run(trunk, flip=np.arange(10))
    assert embedded.computed == 50
    assert embedded.broken == []
    positions = np.arange(10)
    found = embedded.read(positions, np.ones(10, int))
    expected = keras_embeddings(trunk, [np.array(Image.fromarray(one).transpose(0)) for one in PIXELS[:10]])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    mixed = embedded.read(np.array([3, 3]), np.array([0, 1]))
    np.testing.assert_array_equal(mixed[1], found[3])
    np.testing.assert_allclose(mixed[0], keras_embeddings(trunk, PIXELS[3:4])[0], atol=1e-5)


def test_without_a_trunk_the_pixels_are_kept(tmp_path):
    embedded = Job(tmp_path, CONTENTS[:40]).run(None)
    values = embedded.read(np.arange(40))
    assert values.dtype == np.uint8
    np.testing.assert_array_equal(values, np.stack(PIXELS[:40]))
    assert embedded.choice.precision == "float32"
    assert Job(tmp_path, CONTENTS[:40]).run(None).computed == 0


def test_maps_in_bfloat16_take_half_the_disk_and_vectors_stay_float32(tmp_path):
    for pooled, name in ((True, "float32"), (False, "bfloat16")):
        embedded = Job(tmp_path).run(build_trunk(pooled=pooled), precision="bfloat16")
        values = embedded.read(np.arange(80))
        assert values.dtype.name == name
        expected = keras_embeddings(build_trunk(pooled=pooled), PIXELS)
        np.testing.assert_allclose(values.astype(np.float32), expected, atol=0.02)


@pytest.mark.parametrize("first", [False, True])
def test_broken_images_are_told_and_their_neighbours_are_right(tmp_path, first):
    broken = [0, 1, 40, 79] if first else [40, 79]
    contents = list(CONTENTS)
    for position in broken:
        contents[position] = contents[position][:60] + bytes([position])
    trunk = build_trunk()
    embedded = Job(tmp_path, contents, by_tensorflow=True).run(trunk, flip=np.arange(60))
    assert embedded.broken == broken
    good = np.setdiff1d(np.arange(80), broken)
    expected = keras_embeddings(trunk, [PIXELS[position] for position in good])
    np.testing.assert_allclose(embedded.read(good), expected, atol=1e-5)
    again = Job(tmp_path, contents, by_tensorflow=True).run(trunk, flip=np.arange(60))
    assert again.broken == broken
    assert again.computed == 0


def test_nothing_but_broken_images(tmp_path):
    embedded = Job(tmp_path, [b"x", b"y", b"z"], by_tensorflow=True).run(build_trunk(), precision="auto")
    assert embedded.broken == [0, 1, 2]
    assert embedded.computed == 0


def test_interrupted_it_keeps_complete_batches_and_goes_on_there(tmp_path):
    trunk = build_trunk()
    done = []

    def interrupt(text):
        done.append(text)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Job(tmp_path).run(trunk, show_progress=interrupt)
    embedded = Job(tmp_path).run(trunk)
    assert embedded.computed == 80 - 2 * embed_module.BATCH_SIZE
    np.testing.assert_allclose(embedded.read(np.arange(80)), keras_embeddings(trunk, PIXELS), atol=1e-5)


def test_only_wanted_positions_are_read_and_computed(tmp_path):
    job = Job(tmp_path)
    assert job.run(build_trunk(), [3, 70, 41]).computed == 3
    assert set(job.read) == {3, 41, 70}


def build_tail(seed: int = 5) -> keras.Model:
    keras.utils.set_random_seed(seed)
    maps = keras.Input((6, 6, 4))
    x = keras.layers.Conv2D(5, 3)(maps)
    return keras.Model(maps, keras.layers.GlobalAveragePooling2D(name="pool")(x))


def test_the_tails_embeddings_have_a_store_behind_that_of_the_trunk(tmp_path):
    trunk, tail = build_trunk(pooled=False), build_tail()
    wanted = {0: np.arange(80), 1: np.arange(10)}
    maps = Job(tmp_path).run(trunk, flip=np.arange(10))
    vectors = embed_tail(maps, tail, wanted=wanted, show_progress=lambda text: None)
    assert vectors.computed == 90
    assert vectors.store.path != maps.store.path
    expected = tail.predict(keras_embeddings(trunk, PIXELS), verbose=0)
    np.testing.assert_allclose(vectors.read(np.arange(80)), expected, atol=1e-4)
    mirrored = tail.predict(keras_embeddings(trunk, [one[:, ::-1] for one in PIXELS[:10]]), verbose=0)
    np.testing.assert_allclose(vectors.read(np.arange(10), np.ones(10, int)), mirrored, atol=1e-4)
    assert embed_tail(maps, build_tail(), wanted=wanted, show_progress=lambda text: None).computed == 0
    assert embed_tail(maps, build_tail(6), wanted=wanted, show_progress=lambda text: None).computed == 90


def test_a_tail_on_pixels_is_the_whole_network(tmp_path):
    network = build_trunk()
    pixels = Job(tmp_path, CONTENTS[:40]).run(None)
    wanted = {0: np.arange(40)}
    vectors = embed_tail(pixels, network, wanted=wanted, show_progress=lambda text: None)
    np.testing.assert_allclose(vectors.read(np.arange(40)), keras_embeddings(network, PIXELS[:40]), atol=1e-5)


def test_an_image_that_is_replaced_after_it_was_hashed_does_not_poison_the_store(tmp_path):
    trunk, job = build_trunk(), Job(tmp_path, CONTENTS[:10], by_tensorflow=True)
    job.hashed = CONTENTS[:10]
    job.contents = [CONTENTS[9], *CONTENTS[1:10]]  # the file of the first was replaced since
    assert job.run(trunk).broken == [0]
    again = Job(tmp_path, CONTENTS[:10], by_tensorflow=True)
    embedded = again.run(trunk)
    assert (embedded.computed, embedded.broken) == (1, [])
    np.testing.assert_allclose(embedded.read(np.arange(10)), keras_embeddings(trunk, PIXELS[:10]), atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_embeddings_that_are_no_numbers_are_never_kept(tmp_path, value):
    trunk = build_trunk()
    trunk.get_layer("conv").bias.assign([value, 0, 0, 0])
    with pytest.raises(UserError) as error:
        Job(tmp_path).run(trunk)
    assert str(error.value) == (
        "the backbone computed NaN or infinity for an image, in float32. The batch is not stored. Check that "
        "--weights fit the network."
    )


class Rounding:
    """An engine that rounds as bfloat16 does, on machines that have no such instructions as well."""

    batch_size = 32

    def __init__(self, trunk: keras.Model, precision: str):
        self.trunk, self.precision = trunk, precision

    def at(self, precision: str) -> Rounding:
        return Rounding(self.trunk, precision)

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        embeddings = self.trunk(images.astype(np.float32)).numpy()
        return [embeddings if self.precision == "float32" else embeddings.astype(ml_dtypes.bfloat16).astype("f4")]


def test_what_is_evaluated_is_embedded_in_float32(tmp_path, monkeypatch):
    def build(choice, trunk, *, batch_size):
        return Rounding(trunk, choice.precision)

    monkeypatch.setattr(embed_module, "build_engine", build)
    trunk, job = build_trunk(), Job(tmp_path)
    exact = np.arange(30, 80)
    embedded = job.run(trunk, precision="bfloat16", exact=exact)
    assert (embedded.computed, embedded.choice.precision, embedded.evaluated_precision) == (80, "bfloat16", "float32")
    expected = keras_embeddings(trunk, PIXELS)
    rounded = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
    order = np.random.default_rng(0).permutation(80)
    for positions in (order, order[order < 30], order[order >= 30]):
        wanted = np.where((positions >= 30)[:, np.newaxis], expected[positions], rounded[positions])
        np.testing.assert_allclose(embedded.read(positions), wanted, atol=1e-5, rtol=1e-5)
    assert np.abs(embedded.read(np.arange(30)) - expected[:30]).max() > 1e-4
    assert Job(tmp_path).run(trunk, precision="bfloat16", exact=exact).computed == 0
    assert "; val and test in float32)" in job.lines[0]


def test_few_images_give_the_same_bits_as_many(tmp_path):
    trunk = build_trunk(pooled=False)
    many = Job(tmp_path / "many").run(trunk).read(np.arange(3))
    few = Job(tmp_path / "few", CONTENTS[:3]).run(trunk).read(np.arange(3))
    np.testing.assert_array_equal(few, many)
