"""What a probe needs is compared with what is free."""

from __future__ import annotations

import pytest

from tl_keras.errors import UserError
from tl_keras.probes import memory
from tl_keras.probes.estimators import PROBES
from tl_keras.probes.memory import check_memory


@pytest.mark.parametrize("probe", PROBES)
def test_what_does_not_fit_is_refused_with_both_figures(monkeypatch, probe):
    monkeypatch.setattr(memory, "_free_bytes", lambda: 2_000_000_000)
    check_memory(probe, count=1000, dim=2048)
    with pytest.raises(UserError) as error:
        check_memory(probe, count=20_000, dim=25_088)
    text = str(error.value)
    assert text.startswith(f"--probe={probe} on 20,000 embeddings of 25,088 numbers needs some ")
    assert "GB of memory, 2.0 GB are free. Read a smaller layer (--pooling=avg), " in text


def test_a_kernel_grows_with_the_square(monkeypatch):
    monkeypatch.setattr(memory, "_free_bytes", lambda: 2_000_000_000)
    check_memory("linear_svm", count=20_000, dim=16)
    with pytest.raises(UserError, match=r"needs some 12\.8 GB"):
        check_memory("rbf_svm", count=20_000, dim=16)


def test_a_machine_that_does_not_tell_is_trusted(monkeypatch):
    monkeypatch.setattr(memory, "_free_bytes", lambda: None)
    check_memory("rbf_svm", count=10**6, dim=10**6)


def test_linux_tells():
    assert 10**8 < (memory._free_bytes() or 10**9) < 10**14
