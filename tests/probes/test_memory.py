"""What a probe needs is compared with what is free."""

from __future__ import annotations

import math
import re

import pytest

from tl_keras.errors import UserError
from tl_keras.probes import memory
from tl_keras.probes.estimators import PROBES
from tl_keras.probes.memory import check_probe_memory


@pytest.mark.parametrize("probe", PROBES)
def test_what_does_not_fit_is_refused_with_both_figures(monkeypatch, probe):
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 2_000_000_000)
    check_probe_memory(probe, count=1000, dim=512)
    with pytest.raises(UserError) as error:
        check_probe_memory(probe, count=20_000, dim=25_088)
    text = str(error.value)
    assert text.startswith(f"--probe={probe} on 20,000 embeddings of 25,088 numbers needs about ")
    assert "GB of memory, but only 2.0 GB are free. Use a smaller layer (--pooling=avg), " in text


@pytest.mark.parametrize(("cores", "needed"), [(1, "6.4"), (2, "12.8"), (64, "32.0")])
def test_a_kernel_grows_with_the_square_and_with_the_folds_at_once(monkeypatch, cores, needed):
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 2_000_000_000)
    monkeypatch.setattr(memory.joblib, "cpu_count", lambda: cores)
    check_probe_memory("linear_svm", count=20_000, dim=16)
    with pytest.raises(UserError, match=rf"needs about {re.escape(needed)} GB"):
        check_probe_memory("rbf_svm", count=20_000, dim=16)


def test_a_machine_that_does_not_tell_is_trusted(monkeypatch):
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: math.inf)
    check_probe_memory("rbf_svm", count=10**6, dim=10**6)


def test_linux_tells():
    assert 10**8 < memory.free_memory_bytes() < 10**14
