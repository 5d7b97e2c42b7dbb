"""Parallel requests: order, padding, and what an error leaves behind."""

from __future__ import annotations

import numpy as np
import pytest

from tl_keras.backbones.openvino_requests import Requests


class FakeRequest:
    """Doubles its input; fails for negative numbers."""

    def __init__(self) -> None:
        self.is_running = False

    def start_async(self, inputs: dict[int, np.ndarray]) -> None:
        assert not self.is_running
        self.is_running, self._part = True, inputs[0]

    def wait(self) -> None:
        self.is_running = False
        if (self._part < 0).any():
            raise RuntimeError("negative")

    def get_output_tensor(self, place: int) -> FakeTensor:
        return FakeTensor((place + 2) * self._part)


class FakeTensor:
    def __init__(self, data: np.ndarray) -> None:
        self.data = data


class FakeCompiled:
    def get_property(self, name: str) -> int:
        assert name == "OPTIMAL_NUMBER_OF_INFER_REQUESTS"
        return 2

    def create_infer_request(self) -> FakeRequest:
        return FakeRequest()


def run(requests: Requests, values: list[float]) -> list[list[float]]:
    images = np.array(values, np.float32)[:, np.newaxis]
    outputs = [np.zeros_like(images), np.zeros_like(images)]
    requests.run(images, size=2, outputs=outputs, places=[1, 0])
    return [output[:, 0].tolist() for output in outputs]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9])
def test_outputs_are_in_order_and_padding_is_cut(count):
    values = [float(number) for number in range(count)]
    assert run(Requests(FakeCompiled()), values) == [[3 * one for one in values], [2 * one for one in values]]


@pytest.mark.parametrize("bad", range(9))
def test_after_an_error_every_request_can_be_used_again(bad):
    requests = Requests(FakeCompiled())
    values = [float(number + 1) for number in range(9)]
    with pytest.raises(RuntimeError, match="negative"):
        run(requests, [-one if number >= bad else one for number, one in enumerate(values)])
    assert run(requests, values)[1] == [2 * one for one in values]
