"""What runs a served model by default, what is said of bfloat16, and what becomes of engines that were not chosen."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import tensorflow as tf

from tl_keras.backbones.engines import has_openvino
from tl_keras.classifier import NETWORK_FUNCTION
from tl_keras.serving import engines
from tl_keras.serving.engines import ServingEngine, build_serving_engine
from tl_keras.serving.graphs import Graph, as_strings
from tl_keras.serving.openvino_graph import OpenVinoGraph

IMAGES = [bytes([number]) for number in range(3)]


class FakeGraph:
    """Answers as the exported graph, but for a rounding."""

    def __init__(self, *, difference: float = 0.0, seconds: float = 1.0) -> None:
        self.difference, self.seconds, self.closed, self.runs = difference, seconds, 0, 0

    def run(self, name: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.runs += 1
        valid = np.array([len(one) == 1 for one in inputs["image_bytes"]])
        best = np.where(valid, 0.7 - self.difference, 0).astype(np.float32)
        labels = np.array([[b"a"] if one else [b""] for one in valid], object)
        return {"probabilities": np.stack([best, 1 - best], 1), "valid": valid, "labels": labels}

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Choices are remembered in a folder of each test."""
    monkeypatch.setattr(engines, "default_store_dir", lambda: str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def build(monkeypatch, tmp_path, cache):
    """Builds an engine of these, and gives what it was, what was shown and all that were loaded."""

    def run(wanted: ServingEngine, fakes: dict[str, FakeGraph], *, has_openvino: bool = True, again: bool = False):
        if not again:
            shutil.rmtree(cache, ignore_errors=True)
        (tmp_path / "model").mkdir(exist_ok=True)
        loaded, shown = {"tensorflow float32": FakeGraph()}, list[str]()

        def load(choice, *_):
            loaded[str(choice)] = fakes[str(choice)]
            return fakes[str(choice)]

        monkeypatch.setattr(engines, "Graph", lambda *_, **__: loaded["tensorflow float32"])
        monkeypatch.setattr(engines, "_load", load)
        monkeypatch.setattr(engines, "has_openvino", lambda: has_openvino)
        monkeypatch.setattr(engines, "time_run", lambda graph, *_, **__: graph.seconds)
        found, choice = build_serving_engine(tmp_path / "model", wanted=wanted, samples=IMAGES, show=shown.append)
        return found, str(choice), shown, loaded

    return run


def test_by_default_the_precision_is_that_of_the_evaluation(build):
    """bfloat16 moved probabilities of MobileNetV2 by 0.09; the export allows 0.001."""
    fast = FakeGraph(seconds=0.5)
    found, choice, _, loaded = build(ServingEngine("auto", "auto"), {"openvino float32": fast})
    assert (found, choice) == (fast, "openvino float32")
    assert sorted(loaded) == ["openvino float32", "tensorflow float32"]  # bfloat16 is not even tried
    assert build(ServingEngine("auto", "auto"), {}, has_openvino=False)[1] == "tensorflow float32"


def test_an_engine_that_rounds_is_not_taken(build):
    off = FakeGraph(difference=0.002, seconds=0.1)
    _, choice, shown, _ = build(ServingEngine("auto", "auto"), {"openvino float32": off})
    assert (choice, off.closed) == ("tensorflow float32", 1)
    assert "its probabilities differ from the graph's by 2.0e-03" in shown[0]
    with pytest.raises(RuntimeError, match="differ from the graph's"):
        build(ServingEngine("openvino", "float32"), {"openvino float32": FakeGraph(difference=0.002)})


@pytest.mark.parametrize("difference", [0.092, 0.15])
def test_who_asks_for_bfloat16_gets_it_and_is_told_what_it_costs(build, difference):
    rounded = FakeGraph(difference=difference)
    found, choice, shown, loaded = build(ServingEngine("openvino", "bfloat16"), {"openvino bfloat16": rounded})
    assert (found, choice) == (rounded, "openvino bfloat16")
    assert f"differ from the exported model's by up to {difference:.4f} on 7 images" in shown[0]
    assert loaded["tensorflow float32"].closed == 1
    with pytest.raises(RuntimeError):
        build(ServingEngine("openvino", "bfloat16"), {"openvino bfloat16": FakeGraph(difference=float("nan"))})


def test_engines_that_lost_are_closed(build):
    slow = FakeGraph(seconds=2.0)
    found, _, _, loaded = build(ServingEngine("auto", "float32"), {"openvino float32": slow})
    assert (found, slow.closed, found.closed) == (loaded["tensorflow float32"], 1, 0)


@pytest.mark.skipif(not has_openvino(), reason="OpenVINO is not installed")
def test_pixels_that_are_not_finite_are_invalid_in_openvino(trained):
    path = trained[1]
    graph, choice = build_serving_engine(
        path, wanted=ServingEngine("openvino", "float32"), samples=[], show=lambda _: None
    )
    pixels = np.full((2, 16, 16, 3), 200, np.float32)
    pixels[1, 2, 3, 0] = np.nan
    plain = Graph(path, precision="float32")
    answers = [one.run("pixels", {"images": pixels}) for one in (graph, plain)]
    assert str(choice) == "openvino float32"
    assert [one["valid"].tolist() for one in answers] == [[True, False]] * 2
    np.testing.assert_allclose(answers[0]["probabilities"], answers[1]["probabilities"], atol=1e-5)
    assert not graph.run("embeddings", {"image_bytes": as_strings([b""])})["embeddings"].any()
    graph.close()
    plain.close()


@pytest.mark.skipif(not has_openvino(), reason="OpenVINO is not installed")
def test_openvino_answers_every_signature_without_the_graph(trained, colour_folder):
    path, content = trained[1], (colour_folder / "red" / "000.jpg").read_bytes()
    images = as_strings([content, b"no image", b"", *[content] * 5])
    example = tf.train.Example()
    example.features.feature["image_bytes"].bytes_list.value.append(content)
    requests = {
        "serving_default": {"image_bytes": images},
        "embeddings": {"image_bytes": images},
        "pixels": {"images": np.random.default_rng(0).uniform(0, 255, (6, 16, 16, 3)).astype(np.float32)},
        "classify": {"inputs": as_strings([example.SerializeToString(), b"junk"])},
    }
    openvino, plain = OpenVinoGraph(path, precision="float32"), Graph(path, precision="float32")
    assert openvino.signatures == plain.signatures
    for name, inputs in requests.items():
        found, expected = openvino.run(name, inputs), plain.run(name, inputs)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if value.dtype.kind == "f":
                np.testing.assert_allclose(found[key], value, atol=1e-5)
            else:
                assert found[key].tolist() == value.tolist(), (name, key)
    openvino.close()
    plain.close()


def test_the_choice_is_remembered_with_its_lines_and_made_again_for_another_model(build, tmp_path, monkeypatch):
    wanted, rounded = ServingEngine("openvino", "bfloat16"), FakeGraph(difference=0.01)
    _, choice, shown, loaded = build(wanted, {"openvino bfloat16": rounded})
    assert len(shown) == 1
    assert loaded["tensorflow float32"].closed == 1
    again = build(wanted, {"openvino bfloat16": rounded}, again=True)
    assert again[:3] == (rounded, choice, shown)
    assert not again[3]["tensorflow float32"].runs  # nothing was compared
    (tmp_path / "model" / "saved_model.pb").write_bytes(b"another")
    assert build(wanted, {"openvino bfloat16": rounded}, again=True)[3]["tensorflow float32"].runs
    monkeypatch.setattr(engines, "openvino_version", lambda: "another")
    assert build(wanted, {"openvino bfloat16": rounded}, again=True)[3]["tensorflow float32"].runs


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"choice": 1, "lines": []}'])
def test_a_damaged_note_is_written_again(build, cache, damage):
    wanted, fast = ServingEngine("auto", "auto"), FakeGraph(seconds=0.5)
    build(wanted, {"openvino float32": fast})
    (note,) = (cache / "serving").iterdir()
    content = note.read_text()
    note.write_text(damage)
    assert build(wanted, {"openvino float32": fast}, again=True)[1] == "openvino float32"
    assert note.read_text() == content


def test_a_remembered_engine_that_fails_is_replaced_and_tried_again(build):
    wanted, fast = ServingEngine("auto", "auto"), FakeGraph(seconds=0.5)
    build(wanted, {"openvino float32": fast})
    _, choice, shown, _ = build(wanted, {}, again=True)
    assert choice == "tensorflow float32"
    assert shown[0].endswith("; the engines are compared again")


def test_an_engine_that_fails_once_is_tried_at_the_next_start(build, cache):
    wanted, fast = ServingEngine("auto", "auto"), FakeGraph(seconds=0.5)
    assert build(wanted, {})[1] == "tensorflow float32"
    assert not list(cache.rglob("*.json"))
    assert build(wanted, {"openvino float32": fast}, again=True)[1] == "openvino float32"


@pytest.mark.skipif(not has_openvino(), reason="OpenVINO is not installed")
def test_a_model_of_an_earlier_version_is_refused_by_openvino_and_served_by_tensorflow(trained, tmp_path):
    """Its network is no function of its own."""
    path, shown = tmp_path / "1", list[str]()
    shutil.copytree(trained[1], path)
    content = (path / "saved_model.pb").read_bytes()
    (path / "saved_model.pb").write_bytes(content.replace(NETWORK_FUNCTION.encode(), b"x" * len(NETWORK_FUNCTION)))
    graph, choice = build_serving_engine(path, wanted=ServingEngine("auto", "auto"), samples=[], show=shown.append)
    graph.close()
    assert str(choice) == "tensorflow float32"
    assert len(shown) == 1
    assert shown[0].endswith("it was not exported by this version of tl_keras; export it again")


def test_without_a_cache_the_choice_is_made_each_time(build, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(engines, "default_store_dir", lambda: str(tmp_path / "file" / "cache"))
    assert build(ServingEngine("auto", "auto"), {"openvino float32": FakeGraph(seconds=0.5)})[1] == "openvino float32"
