"""A network that does not fit in memory is refused in one line, before the kernel ends the process."""

from __future__ import annotations

import pytest

from tests.conftest import run_main
from tl_keras.backbones import capacity
from tl_keras.backbones.zoo import build_backbone, find_preset
from tl_keras.errors import UserError


def test_a_network_that_is_widened_beyond_all_memory_is_refused_before_it_is_built(monkeypatch):
    with pytest.raises(UserError) as error:
        build_backbone(find_preset("MobileNetV2"), weights="none", image_size=224, kwargs={"alpha": 300})
    assert str(error.value).startswith("MobileNetV2 with alpha=300 has about 1,188 GB of weights, but only ")
    assert str(error.value).endswith(" GB of memory are free. Give smaller --backbone_kwargs.")


@pytest.mark.parametrize(("engine", "fits"), [("auto", False), ("tensorflow", False), ("openvino", True)])
def test_weights_and_maps_are_compared_with_what_is_free(monkeypatch, engine, fits):
    backbone = build_backbone(find_preset("SmallConvNet"), weights="none", image_size=64)
    monkeypatch.setattr(capacity, "free_memory_bytes", lambda: 65_000_000.0)
    if fits:
        capacity.check_network(backbone, batch_size=32, engine=engine)
        return
    with pytest.raises(UserError) as error:
        capacity.check_network(backbone, batch_size=32, engine=engine)
    assert "SmallConvNet needs about 0.1 GB of memory here (0.0 GB of weights in several copies, and" in str(
        error.value
    )
    assert str(error.value).endswith("Choose a smaller --backbone or --image_size, or give --engine=openvino.")


def test_training_takes_the_maps_of_all_layers(monkeypatch):
    backbone = build_backbone(find_preset("SmallConvNet"), weights="none", image_size=64)
    monkeypatch.setattr(capacity, "free_memory_bytes", lambda: 400_000_000.0)
    capacity.check_network(backbone, batch_size=64)
    with pytest.raises(UserError, match="or a smaller --batch_size"):
        capacity.check_network(backbone, batch_size=64, trained=backbone, training_batch=512)


def test_nothing_is_computed_for_a_network_that_does_not_fit(colour_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(capacity, "free_memory_bytes", lambda: 1e6)
    arguments = (f"--dataset=folder:{colour_folder}", "--backbone=SmallConvNet", "--weights=none", "--image_size=16")
    for mode in ("finetune", "extract", "audit"):
        assert run_main(f"--mode={mode}", *arguments, f"--run_dir={tmp_path / mode}") == 1
        assert capsys.readouterr().err.startswith("tl_keras: error: SmallConvNet needs about 0.0 GB of memory here (")
        assert not (tmp_path / mode).exists()
