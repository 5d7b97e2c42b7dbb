"""The engine, held against Keras's own `predict`, and how a precision is chosen."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from tl_keras.backbones import engines
from tl_keras.backbones.engines import (
    PixelEngine,
    Precision,
    TensorFlowEngine,
    choose_precision,
    has_bfloat16,
    mean_cosine,
)
from tl_keras.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 12, 12, 3)).astype(np.uint8)


def build_trunk(pooled: bool = True) -> keras.Model:
    """Convolution, BatchNormalization with statistics of its own, Dropout: what differs between modes."""
    keras.utils.set_random_seed(1)
    layers = keras.layers
    images = keras.Input((12, 12, 3))
    x = layers.Rescaling(1 / 127.5, offset=-1)(images)
    x = layers.Conv2D(8, 3, padding="same")(x)
    norm = layers.BatchNormalization()
    x = layers.Dropout(0.5)(layers.ReLU()(norm(x)))
    x = layers.GlobalAveragePooling2D()(x) if pooled else layers.MaxPooling2D()(x)
    model = keras.Model(images, x)
    norm.set_weights(np.random.default_rng(1).uniform(0.5, 2, (4, 8)))
    return model


@pytest.fixture(scope="module")
def trunk():
    return build_trunk()


@pytest.mark.parametrize("pooled", [True, False], ids=["vectors", "maps"])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 32])
def test_the_engine_gives_what_predict_gives_also_for_partial_batches(batch_size, pooled):
    trunk = build_trunk(pooled)
    engine = TensorFlowEngine(trunk, batch_size=batch_size, precision="float32")
    expected = trunk.predict(IMAGES.astype(np.float32), verbose=0)
    for count in range(1, min(batch_size, 7) + 1):
        embeddings = engine.run(IMAGES[:count])
        assert embeddings.dtype == np.float32
        assert embeddings.shape == (count, *trunk.output_shape[1:])
        np.testing.assert_allclose(embeddings, expected[:count], atol=1e-4)


def test_the_engine_takes_feature_maps():
    maps = keras.Input((4, 4, 2))
    tail = keras.Model(maps, keras.layers.GlobalAveragePooling2D()(maps))
    values = np.random.default_rng(2).normal(size=(5, 4, 4, 2)).astype(np.float32)
    engine = TensorFlowEngine(tail, batch_size=8, precision="float32", dtype=np.float32)
    np.testing.assert_allclose(engine.run(values), values.mean((1, 2)), atol=1e-6)


def test_the_engine_keeps_the_weights_that_it_was_built_with():
    trunk = build_trunk()
    engine = TensorFlowEngine(trunk, batch_size=7, precision="float32")
    before = engine.run(IMAGES)
    trunk.layers[2].kernel.assign_add(tf.ones_like(trunk.layers[2].kernel))
    np.testing.assert_array_equal(engine.run(IMAGES), before)


def test_bfloat16_is_near_float32_and_stays_inside_its_engine(trunk):
    exact = TensorFlowEngine(trunk, batch_size=7, precision="float32").run(IMAGES)
    rough = TensorFlowEngine(trunk, batch_size=7, precision="bfloat16").run(IMAGES)
    assert rough.dtype == np.float32
    assert mean_cosine(exact, rough) > 0.999
    again = TensorFlowEngine(trunk, batch_size=7, precision="float32").run(IMAGES)
    np.testing.assert_array_equal(again, exact)
    if has_bfloat16():
        assert np.abs(rough - exact).max() > 0


def test_the_same_frozen_graph_at_another_precision(trunk):
    exact = TensorFlowEngine(trunk, batch_size=4, precision="float32")
    np.testing.assert_array_equal(exact.at("float32").run(IMAGES[:4]), exact.run(IMAGES[:4]))
    direct = TensorFlowEngine(trunk, batch_size=4, precision="bfloat16").run(IMAGES[:4])
    np.testing.assert_array_equal(exact.at("bfloat16").run(IMAGES[:4]), direct)


def test_pixels_are_handed_on():
    assert PixelEngine().run(IMAGES) is IMAGES


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([[1, 0]], [[2, 0]], 1),
        ([[1, 0]], [[0, 3]], 0),
        ([[1, 0]], [[-1, 0]], -1),
        ([[1, 0], [1, 0]], [[1, 1], [1, 0]], (1 + 1 / np.sqrt(2)) / 2),
        ([[0, 0]], [[0, 0]], 1),
        ([[[3, 0], [0, 4]]], [[[3, 0], [0, -4]]], (9 - 16) / 25),
    ],
)
def test_the_cosine(first, second, expected):
    assert mean_cosine(np.float32(first), np.float32(second)) == pytest.approx(expected)


class Stub:
    """An engine of known speed and truth."""

    def __init__(self, trunk, *, batch_size, precision):
        self.batch_size, self.precision = batch_size, precision

    def at(self, precision):
        return engines.TensorFlowEngine(None, batch_size=self.batch_size, precision=precision)


@pytest.fixture
def measured(monkeypatch):
    """Sets what is measured: seconds for a batch of float32, how many times faster bfloat16 is, and its cosine."""
    built = []

    def build(trunk, **kwargs):
        built.append(Stub(trunk, **kwargs))
        return built[-1]

    def measure(seconds: float, faster: float, cosine: float) -> list[Stub]:
        monkeypatch.setattr(engines, "has_bfloat16", lambda: True)
        monkeypatch.setattr(engines, "TensorFlowEngine", build)
        times = {"float32": seconds, "bfloat16": seconds / faster}
        monkeypatch.setattr(engines, "_time", lambda engine, images: (IMAGES, times[engine.precision]))
        monkeypatch.setattr(engines, "mean_cosine", lambda first, second: cosine)
        return built

    return measure


def choose(tmp_path, wanted="auto", count=7000):
    return choose_precision(wanted, None, IMAGES, count=count, note=tmp_path / "note.json")


@pytest.mark.parametrize(
    ("faster", "cosine", "name", "reason"),
    [
        (2.0, 0.9990, "bfloat16", "bfloat16 is 2.00 times as fast, mean cosine to float32 0.9990"),
        (1.3, 0.9950, "bfloat16", "bfloat16 is 1.30 times as fast, mean cosine to float32 0.9950"),
        (1.29, 1.0, "float32", "bfloat16 is 1.29 times as fast, mean cosine to float32 1.0000; needed: 1.3 and 0.995"),
        (4.0, 0.9949, "float32", "bfloat16 is 4.00 times as fast, mean cosine to float32 0.9949; needed: 1.3 and"),
        (0.5, 0.5, "float32", "bfloat16 is 0.50 times as fast, mean cosine to float32 0.5000; needed: 1.3 and 0.995"),
    ],
)
def test_bfloat16_is_taken_only_where_it_is_faster_and_true(tmp_path, measured, faster, cosine, name, reason):
    measured(1.0, faster, cosine)
    precision, engine = choose(tmp_path)
    assert precision.name == name
    assert precision.reason.startswith(reason)
    assert (engine.precision, engine.batch_size) == (name, 7)


def test_a_trunk_that_is_soon_done_is_not_compared(tmp_path, measured):
    built = measured(0.004, 9.0, 1.0)
    precision, engine = choose(tmp_path)  # 1,000 batches of 4 ms
    assert precision == Precision("float32", "the trunk takes less than 5 s")
    assert [one.precision for one in built] == ["float32"]
    assert engine is built[0]


def test_the_answer_is_kept_whatever_the_clock_says_later(tmp_path, measured):
    measured(1.0, 2.0, 1.0)
    first, _ = choose(tmp_path)
    built = measured(1.0, 1.0, 1.0)
    built.clear()
    for count in (1, 7000, 69_999):
        assert choose(tmp_path, count=count) == (first, None)
    assert not built


def test_the_question_is_asked_again_for_ten_times_the_images(tmp_path, measured):
    measured(0.004, 2.0, 1.0)
    assert choose(tmp_path)[0].name == "float32"
    assert choose(tmp_path, count=70_000)[0].name == "bfloat16"
    assert json.loads((tmp_path / "note.json").read_text())["count"] == 70_000


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"precision": "bfloat16"}', '{"count": 1, "reason": ""}'])
def test_a_damaged_note_is_written_anew(tmp_path, measured, text):
    measured(1.0, 2.0, 1.0)
    (tmp_path / "note.json").write_text(text)
    assert choose(tmp_path)[0].name == "bfloat16"
    assert json.loads((tmp_path / "note.json").read_text())["precision"] == "bfloat16"


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_what_is_asked_for_is_taken_unmeasured(tmp_path, wanted):
    assert choose(tmp_path, wanted) == (Precision(wanted, "asked for"), None)
    assert not list(tmp_path.iterdir())


def test_float16_needs_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [])
    with pytest.raises(UserError, match=r"^--precision=float16 needs a GPU, and TensorFlow sees none\."):
        choose(tmp_path, "float16")
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: ["GPU:0"])
    assert choose(tmp_path, "float16")[0].name == "float16"


def test_a_gpu_computes_in_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: ["GPU:0"])
    precision, engine = choose(tmp_path)
    assert (precision.name, engine) == ("float32", None)
    assert "GPU" in precision.reason


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({"sse2", "avx512_bf16"}, True), ({"amx_bf16"}, True), ({"avx512f", "avx512_vnni"}, False), (set(), False)],
)
def test_a_cpu_without_bfloat16_is_told_by_its_flags(tmp_path, monkeypatch, flags, expected):
    monkeypatch.setattr(engines, "read_cpu_flags", lambda: frozenset(flags))
    assert has_bfloat16() is expected
    if not expected:
        assert choose(tmp_path) == (Precision("float32", "this CPU has no bfloat16 instructions"), None)
