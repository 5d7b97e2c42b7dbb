"""The engine, held against Keras's own `predict`, and how a precision is chosen."""

from __future__ import annotations

import json
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from tl_keras.backbones import engines
from tl_keras.backbones.engines import (
    EngineChoice,
    OpenVinoEngine,
    PixelEngine,
    TensorFlowEngine,
    build_engine,
    choose_engine,
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


ENGINES = ["tensorflow", "openvino"]


@pytest.mark.parametrize("pooled", [True, False], ids=["vectors", "maps"])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 32])
@pytest.mark.parametrize("name", ENGINES)
def test_the_engine_gives_what_predict_gives_also_for_partial_batches(name, batch_size, pooled):
    trunk = build_trunk(pooled)
    engine = build_engine(EngineChoice(name, "float32", ""), trunk, batch_size=batch_size)
    expected = trunk.predict(IMAGES.astype(np.float32), verbose=0)
    for count in range(1, min(batch_size, 7) + 1):
        (embeddings,) = engine.run(IMAGES[:count])
        assert embeddings.dtype == np.float32
        assert embeddings.shape == (count, *trunk.output_shape[1:])
        np.testing.assert_allclose(embeddings, expected[:count], atol=1e-4)


@pytest.mark.parametrize("name", ENGINES)
def test_several_outputs_come_in_their_order(name):
    trunk = build_trunk()
    outputs = [trunk.output, trunk.layers[2].output, trunk.layers[-2].output]
    joined = keras.Model(trunk.input, outputs)
    expected = joined.predict(IMAGES.astype(np.float32), verbose=0)
    found = build_engine(EngineChoice(name, "float32", ""), joined, batch_size=7).run(IMAGES)
    for embeddings, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(embeddings, other, atol=1e-4)


def test_a_network_that_openvino_does_not_take_is_named():
    images = keras.Input((12, 12, 3))
    x = keras.layers.GlobalAveragePooling2D()(images)
    odd = keras.Model(images, keras.layers.Lambda(lambda y: tf.math.igamma(y, y))(x), name="odd")
    with pytest.raises(
        UserError,
        match=r"^OpenVINO does not support odd: No conversion rule found for operations: Igamma\. Use --engine=tens",
    ):
        OpenVinoEngine(odd, batch_size=2, precision="float32")


def test_the_engine_takes_feature_maps():
    maps = keras.Input((4, 4, 2))
    tail = keras.Model(maps, keras.layers.GlobalAveragePooling2D()(maps))
    values = np.random.default_rng(2).normal(size=(5, 4, 4, 2)).astype(np.float32)
    engine = TensorFlowEngine(tail, batch_size=8, precision="float32", dtype=np.float32)
    np.testing.assert_allclose(engine.run(values)[0], values.mean((1, 2)), atol=1e-6)


def test_the_engine_keeps_the_weights_that_it_was_built_with():
    trunk = build_trunk()
    engine = TensorFlowEngine(trunk, batch_size=7, precision="float32")
    before = engine.run(IMAGES)[0]
    trunk.layers[2].kernel.assign_add(tf.ones_like(trunk.layers[2].kernel))
    np.testing.assert_array_equal(engine.run(IMAGES)[0], before)


@pytest.mark.parametrize("name", ENGINES)
def test_bfloat16_is_near_float32_and_stays_inside_its_engine(trunk, name):
    (exact,) = build_engine(EngineChoice(name, "float32", ""), trunk, batch_size=7).run(IMAGES)
    (rough,) = build_engine(EngineChoice(name, "bfloat16", ""), trunk, batch_size=7).run(IMAGES)
    assert rough.dtype == np.float32
    assert mean_cosine(exact, rough) > 0.999
    (again,) = build_engine(EngineChoice(name, "float32", ""), trunk, batch_size=7).run(IMAGES)
    np.testing.assert_array_equal(again, exact)
    if has_bfloat16():
        assert np.abs(rough - exact).max() > 0


@pytest.mark.parametrize("name", ENGINES)
def test_the_same_frozen_graph_at_another_precision(trunk, name):
    exact = build_engine(EngineChoice(name, "float32", ""), trunk, batch_size=4)
    np.testing.assert_array_equal(exact.at("float32").run(IMAGES[:4]), exact.run(IMAGES[:4]))
    direct = build_engine(EngineChoice(name, "bfloat16", ""), trunk, batch_size=4).run(IMAGES[:4])
    np.testing.assert_array_equal(exact.at("bfloat16").run(IMAGES[:4]), direct)


def test_pixels_are_handed_on():
    assert PixelEngine().run(IMAGES)[0] is IMAGES


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

    def __init__(self, choice: EngineChoice, batch_size: int) -> None:
        self.name, self.precision, self.batch_size = choice.engine, choice.precision, batch_size

    def at(self, precision: str) -> Stub:
        return engines.build_engine(EngineChoice(self.name, precision, ""), None, batch_size=self.batch_size)


class Machine:
    """What is installed, and what is measured: seconds for a batch of each engine's float32, and of its bfloat16."""

    def __init__(self, monkeypatch):
        self.built: list[Stub] = []
        self.seconds = {"tensorflow": 1.0, "openvino": 0.5}
        self.faster, self.cosine, self.refused = 2.0, 1.0, ""
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(engines, "has_bfloat16", lambda: True)
        monkeypatch.setattr(engines, "build_engine", self.build)
        monkeypatch.setattr(engines, "_time", self.time)
        monkeypatch.setattr(engines, "mean_cosine", lambda first, second: self.cosine)
        self.install("")

    def install(self, openvino: str) -> None:
        self._monkeypatch.setattr(engines, "openvino_version", lambda: openvino)

    def build(self, choice, trunk, *, batch_size):
        if choice.engine == self.refused:
            raise UserError("OpenVINO does not take it. Use --engine=tensorflow.")
        self.built.append(Stub(choice, batch_size))
        return self.built[-1]

    def time(self, engine, images):
        seconds = self.seconds[engine.name] / (self.faster if engine.precision == "bfloat16" else 1)
        return [IMAGES], seconds


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def choose(tmp_path, precision="auto", engine="auto", count=7000):
    return choose_engine(engine, precision, None, lambda: IMAGES, count=count, notes=[tmp_path / "note.json"])


@pytest.mark.parametrize(
    ("faster", "cosine", "name", "reason"),
    [
        (2.0, 0.9990, "bfloat16", "bfloat16 is 2.00 times as fast, mean cosine similarity to float32 0.9990"),
        (1.3, 0.9950, "bfloat16", "bfloat16 is 1.30 times as fast, mean cosine similarity to float32 0.9950"),
        (
            1.29,
            1.0,
            "float32",
            "bfloat16 is 1.29 times as fast, mean cosine similarity to float32 1.0000; required: 1.3 and 0.995",
        ),
        (
            4.0,
            0.9949,
            "float32",
            "bfloat16 is 4.00 times as fast, mean cosine similarity to float32 0.9949; required: 1.3 and",
        ),
        (
            0.5,
            0.5,
            "float32",
            "bfloat16 is 0.50 times as fast, mean cosine similarity to float32 0.5000; required: 1.3 and 0.995",
        ),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_bfloat16_is_taken_only_where_it_is_faster_and_true(tmp_path, machine, engine, faster, cosine, name, reason):
    machine.install("2026.1")
    machine.faster, machine.cosine = faster, cosine
    choice, built = choose(tmp_path, engine=engine)
    assert (choice.engine, choice.precision) == (engine, name)
    assert choice.reason.startswith(reason)
    batch_size = {"tensorflow": 32, "openvino": 8}[engine]  # whatever the number of images
    assert (built.name, built.precision, built.batch_size) == (engine, name, batch_size)


def test_a_trunk_that_is_soon_done_is_not_compared(tmp_path, machine):
    machine.seconds["tensorflow"] = 0.004
    choice, engine = choose(tmp_path)  # 1,000 batches of 4 ms
    assert choice == EngineChoice("tensorflow", "float32", "bfloat16 not benchmarked: the trunk takes less than 5 s")
    assert [one.precision for one in machine.built] == ["float32"]
    assert engine is machine.built[0]


def test_the_faster_engine_is_taken_and_said(tmp_path, machine):
    machine.install("2026.1")
    choice, engine = choose(tmp_path)
    assert (choice.engine, choice.precision) == ("openvino", "bfloat16")
    assert choice.reason.endswith("openvino is 2.00 times as fast as tensorflow")
    assert engine.name == "openvino"
    machine.seconds["openvino"] = 4.0
    choice, engine = choose(tmp_path / "other", precision="float32")
    assert (choice.engine, choice.precision) == ("tensorflow", "float32")
    assert choice.reason == "tensorflow is 4.00 times as fast as openvino"
    assert engine.name == "tensorflow"


def test_tensorflow_is_not_built_for_a_trunk_that_openvino_has_soon_done(tmp_path, machine):
    machine.install("2026.1")
    machine.seconds["openvino"] = 0.1  # 1,000 batches: 100 s, half of it in bfloat16
    choice, _ = choose(tmp_path)
    assert choice.engine == "openvino"
    assert choice.reason.endswith("tensorflow not benchmarked: the trunk takes less than 60 s")
    assert {one.name for one in machine.built} == {"openvino"}


def test_a_network_that_openvino_does_not_take_falls_back_and_says_so(tmp_path, machine):
    machine.install("2026.1")
    machine.refused = "openvino"
    choice, engine = choose(tmp_path)
    assert choice.engine == engine.name == "tensorflow"
    assert choice.reason.startswith("openvino can't be used: OpenVINO does not take it.")
    with pytest.raises(UserError, match=r"^OpenVINO does not take it\."):
        choose(tmp_path, engine="openvino")


def test_the_answer_is_kept_whatever_the_clock_says_later(tmp_path, machine):
    first, _ = choose(tmp_path)
    assert first.precision == "bfloat16"
    machine.faster = 1.0
    machine.built.clear()
    for count in (1, 7000, 69_999):
        assert choose(tmp_path, count=count) == (first, None)
    assert not machine.built


def test_a_layer_keeps_its_engine_whichever_it_is_read_together_with(tmp_path, machine):
    def read(*layers: str) -> EngineChoice:
        notes = [tmp_path / layer for layer in layers]
        return choose_engine("auto", "auto", None, lambda: IMAGES, count=7000, notes=notes)[0]

    first = read("a")
    machine.faster = 1.0  # now float32 would be taken
    assert read("b", "a") == first
    assert read("b") == first
    assert read("c").precision == "float32"


def test_an_openvino_that_can_not_be_loaded_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(
        UserError, match=r"^OpenVINO does not support .*: import of openvino halted.*Use --engine=tensorflow"
    ):
        OpenVinoEngine(build_trunk(), batch_size=2, precision="float32")


def test_the_question_is_asked_again_for_ten_times_the_images(tmp_path, machine):
    machine.seconds["tensorflow"] = 0.004
    assert choose(tmp_path)[0].precision == "float32"
    assert choose(tmp_path, count=70_000)[0].precision == "bfloat16"
    assert json.loads((tmp_path / "note.json").read_text())["count"] == 70_000


def test_the_question_is_asked_again_for_another_wish_or_another_openvino(tmp_path, machine):
    assert choose(tmp_path)[0].engine == "tensorflow"
    machine.install("2026.1")
    assert choose(tmp_path)[0].engine == "openvino"
    assert choose(tmp_path, engine="tensorflow")[0].engine == "tensorflow"
    assert choose(tmp_path)[0].engine == "openvino"
    assert choose(tmp_path, precision="float32")[0].precision == "float32"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"choice": []}', '{"count": 1, "wanted": ""}'])
def test_a_damaged_note_is_written_anew(tmp_path, machine, text):
    (tmp_path / "note.json").write_text(text)
    assert choose(tmp_path)[0].precision == "bfloat16"
    assert json.loads((tmp_path / "note.json").read_text())["choice"][1] == "bfloat16"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_asked_for_is_taken_unmeasured(tmp_path, engine, precision):
    assert choose(tmp_path, precision, engine) == (EngineChoice(engine, precision, "as requested"), None)
    assert not list(tmp_path.iterdir())


def test_openvino_that_is_not_installed_is_one_line(tmp_path, machine):
    with pytest.raises(
        UserError, match=r"^OpenVINO is not installed\. Install it, or leave --engine out: pip install 'tl_keras\[ope"
    ):
        choose(tmp_path, engine="openvino")


def test_float16_needs_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [])
    with pytest.raises(UserError, match=r"^--precision=float16 needs a GPU, but TensorFlow finds none\."):
        choose(tmp_path, "float16")
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: ["GPU:0"])
    assert choose(tmp_path, "float16")[0].precision == "float16"


def test_a_gpu_computes_in_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: ["GPU:0"])
    choice, engine = choose(tmp_path)
    assert (choice.engine, choice.precision, engine) == ("tensorflow", "float32", None)
    assert "GPU" in choice.reason


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({"sse2", "avx512_bf16"}, True), ({"amx_bf16"}, True), ({"avx512f", "avx512_vnni"}, False), (set(), False)],
)
def test_a_cpu_without_bfloat16_is_told_by_its_flags(tmp_path, monkeypatch, flags, expected):
    monkeypatch.setattr(engines, "read_cpu_flags", lambda: frozenset(flags))
    assert has_bfloat16() is expected
    if not expected:
        reason = "this CPU has no bfloat16 instructions"
        assert choose(tmp_path, engine="tensorflow") == (EngineChoice("tensorflow", "float32", reason), None)


@pytest.mark.parametrize("name", ENGINES)
def test_a_trunk_that_is_too_large_for_a_graph_is_refused_in_one_line(name, trunk, monkeypatch):
    size = sum(int(np.prod(weight.shape)) for weight in trunk.weights) * 4
    monkeypatch.setattr(engines, "_LARGEST_GRAPH_BYTES", size)
    build_engine(EngineChoice(name, "float32", ""), trunk, batch_size=4)
    monkeypatch.setattr(engines, "_LARGEST_GRAPH_BYTES", size - 1)
    with pytest.raises(UserError, match=r"^the frozen part of .+ has 0\.0 GB of weights, .+ smaller --backbone\.$"):
        build_engine(EngineChoice(name, "float32", ""), trunk, batch_size=4)
