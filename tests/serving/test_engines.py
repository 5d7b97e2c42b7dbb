"""What runs a served model by default, what is said of bfloat16, and what becomes of engines that were not chosen."""

from __future__ import annotations

import numpy as np
import pytest

from tl_keras.backbones.engines import has_openvino
from tl_keras.serving import engines
from tl_keras.serving.engines import ServingEngine, build_serving_engine
from tl_keras.serving.graphs import Graph, as_strings

LABELS = ("a", "b")
IMAGES = [bytes([number]) for number in range(3)]


class FakeGraph:
    """Answers as the exported graph, but for a rounding."""

    def __init__(self, *, difference: float = 0.0, seconds: float = 1.0) -> None:
        self.difference, self.seconds, self.closed = difference, seconds, 0

    def run(self, name: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        valid = np.array([len(one) == 1 for one in inputs["image_bytes"]])
        best = np.where(valid, 0.7 - self.difference, 0).astype(np.float32)
        labels = np.array([[b"a"] if one else [b""] for one in valid], object)
        return {"probabilities": np.stack([best, 1 - best], 1), "valid": valid, "labels": labels}

    def close(self) -> None:
        self.closed += 1

    close_own = close

    def keeps(self, graph: object) -> bool:
        return graph is self


@pytest.fixture
def build(monkeypatch):
    """Builds an engine of these, and gives what it was, what was shown and all that were loaded."""

    def run(wanted: ServingEngine, fakes: dict[str, FakeGraph], *, has_openvino: bool = True):
        loaded, shown = {"tensorflow float32": FakeGraph()}, list[str]()

        def load(choice, *_):
            loaded[str(choice)] = fakes[str(choice)]
            return fakes[str(choice)]

        monkeypatch.setattr(engines, "Graph", lambda *_, **__: loaded["tensorflow float32"])
        monkeypatch.setattr(engines, "_load", load)
        monkeypatch.setattr(engines, "has_openvino", lambda: has_openvino)
        monkeypatch.setattr(engines, "time_run", lambda graph, *_, **__: graph.seconds)
        found, choice = build_serving_engine(None, LABELS, wanted=wanted, samples=IMAGES, show=shown.append)
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
    labels = ("blue", "green", "red")
    graph, choice = build_serving_engine(
        path, labels, wanted=ServingEngine("openvino", "float32"), samples=[], show=lambda _: None
    )
    pixels = np.full((2, 16, 16, 3), 200, np.float32)
    pixels[1, 2, 3, 0] = np.nan
    plain = Graph(path, precision="float32")
    answers = [one.run("pixels", {"images": pixels}) for one in (graph, plain)]
    assert str(choice) == "openvino float32"
    assert [one["valid"].tolist() for one in answers] == [[True, False]] * 2
    np.testing.assert_allclose(answers[0]["probabilities"], answers[1]["probabilities"], atol=1e-5)
    assert graph.run("embeddings", {"image_bytes": as_strings([b""])})  # the graph that it keeps
    graph.close()
    plain.close()
