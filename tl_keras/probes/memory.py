"""Whether a probe fits in memory, and into one exported graph: scikit-learn holds all embeddings at once."""

from __future__ import annotations

import joblib

from tl_keras.classifier import GRAPH_LIMIT_BYTES
from tl_keras.errors import UserError
from tl_keras.run import free_memory_bytes

# Bytes a number of an embedding: float32 as read and as joined, then for each fold that is fitted at the same time what
# scaling and solver make of it (liblinear keeps 16, ridge solves in float64).
_BYTES, _BYTES_A_FOLD = 8, {"logistic_regression": 12, "linear_svm": 36, "rbf_svm": 16, "knn": 16, "ridge": 36}
_KERNEL_BYTES = 16  # a pair of examples, for each fold


def check_memory(probe: str, *, count: int, dim: int) -> None:
    """Compares what a probe is going to need with what is free, before it is fitted.

    Args:
        probe: its name.
        count: examples of train and val.
        dim: of an embedding.

    Raises:
        UserError: it will not fit, or can't be exported.
    """
    folds = min(joblib.cpu_count(), 5)
    need = count * dim * (_BYTES + folds * _BYTES_A_FOLD[probe]) + folds * (
        count**2 * _KERNEL_BYTES if probe == "rbf_svm" else min(count, dim) ** 2 * 16 if probe == "ridge" else 0
    )
    free = free_memory_bytes()
    advice = "Read a smaller layer (--pooling=avg), take fewer images, or another probe."
    if need > free:
        raise UserError(
            f"--probe={probe} on {count:,} embeddings of {dim:,} numbers needs some {need / 1e9:.1f} GB of memory, "
            f"{free / 1e9:.1f} GB are free. {advice}"
        )
    if probe == "knn" and 4 * count * dim > GRAPH_LIMIT_BYTES:
        raise UserError(
            f"--probe=knn keeps {count:,} embeddings of {dim:,} numbers in the exported model, "
            f"{4 * count * dim / 1e9:.1f} GB; one graph holds 2 GB. {advice}"
        )
