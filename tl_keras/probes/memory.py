"""Checks that a probe fits in memory: scikit-learn holds all embeddings in memory."""

from __future__ import annotations

import joblib

from tl_keras.errors import UserError
from tl_keras.run import free_memory_bytes

# Bytes per number of an embedding: float32 as read and as concatenated, then the copies of scaler and solver for each
# fold that is fitted in parallel (liblinear keeps 16, ridge solves in float64).
_BYTES, _BYTES_A_FOLD = 8, {"logistic_regression": 12, "linear_svm": 36, "rbf_svm": 16, "knn": 16, "ridge": 36}
_KERNEL_BYTES = 16  # per pair of examples and fold


def check_probe_memory(probe: str, *, count: int, dim: int) -> None:
    """Checks that a probe will fit in the free memory, before it is fitted.

    Args:
        probe: name of the probe.
        count: number of examples of train and val.
        dim: size of an embedding.

    Raises:
        UserError: there is not enough memory.
    """
    folds = min(joblib.cpu_count(), 5)
    need = count * dim * (_BYTES + folds * _BYTES_A_FOLD[probe]) + folds * (
        count**2 * _KERNEL_BYTES if probe == "rbf_svm" else min(count, dim) ** 2 * 16 if probe == "ridge" else 0
    )
    free = free_memory_bytes()
    if need > free:
        raise UserError(
            f"--probe={probe} on {count:,} embeddings of {dim:,} numbers needs about {need / 1e9:.1f} GB of memory, "
            f"but only {free / 1e9:.1f} GB are free. "
            "Use a smaller layer (--pooling=avg), fewer images, or another probe."
        )
