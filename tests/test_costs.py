"""How often a default run does what takes long: bounds that do not depend on the machine."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from tests.conftest import SMALL_NETWORK, run_main
from tl_keras.backbones import engines
from tl_keras.backbones.store import EmbeddingStore
from tl_keras.data import images, sources


@pytest.fixture
def counted(monkeypatch) -> Callable[[Any, str], collections.Counter[Any]]:
    """Counts the calls of a function, by its last argument if it is a path."""

    def count(owner: Any, name: str) -> collections.Counter[Any]:
        function, calls = getattr(owner, name), collections.Counter[Any]()

        @functools.wraps(function)
        def called(*arguments: Any, **named: Any) -> Any:
            calls[arguments[-1] if arguments and isinstance(arguments[-1], (str, Path)) else ""] += 1
            return function(*arguments, **named)

        monkeypatch.setattr(owner, name, called)
        return calls

    return count


def test_a_default_run_decodes_reads_and_traces_no_more_often_than_it_needs(
    counted, colour_folder, tmp_path, monkeypatch
):
    images._compile_decoder.cache_clear()
    images._open_session.cache_clear()
    read = counted(sources, "_read_file")
    decoders, networks = counted(images, "_decode_pixels"), counted(keras.Model, "stateless_call")
    frozen = counted(engines, "freeze")
    from_disk, rows = collections.Counter[bytes](), collections.Counter[bytes]()
    take, take_rows = EmbeddingStore.read, EmbeddingStore._read_rows

    def take_counted(self: EmbeddingStore, keys: Any, **options: Any) -> np.ndarray:
        rows.update(keys)
        return take(self, keys, **options)

    def take_rows_counted(self: EmbeddingStore, keys: Any) -> dict[bytes, np.ndarray]:
        from_disk.update(keys)
        return take_rows(self, keys)

    monkeypatch.setattr(EmbeddingStore, "read", take_counted)
    monkeypatch.setattr(EmbeddingStore, "_read_rows", take_rows_counted)
    places = [f"--{name}_dir={tmp_path / name}" for name in ("run", "store", "export")]
    flags = (f"--dataset=folder:{colour_folder}", *SMALL_NETWORK, "--engine=tensorflow", "--precision=float32")
    assert run_main("--mode=finetune", *flags, *places, "--epochs=3") == 0
    assert sum(decoders.values()) == 1  # of the trunk, the report, and the exported graph
    assert sum(networks.values()) == 1  # for all signatures
    assert sum(frozen.values()) == 1
    assert max(read.values()) <= 5  # hashed, embedded, audited, shown in the report, compared with the export
    assert np.mean(list(read.values())) < 4
    assert max(rows.values()) <= 6 + 3  # three epochs
    assert max(from_disk.values()) == 1
