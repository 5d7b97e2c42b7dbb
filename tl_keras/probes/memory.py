"""Whether a probe's embeddings fit in memory: scikit-learn holds all of them at once."""

from __future__ import annotations

from tl_keras.errors import UserError

# Copies of the embeddings in bytes a number: float32 as read, scaled, and what the estimator makes of them.
_BYTES = {"logistic_regression": 12, "linear_svm": 24, "rbf_svm": 24, "knn": 20, "ridge": 24}
_KERNEL_BYTES = 32  # a pair of examples: the kernel, and those of two folds of the calibration at once


def check_memory(probe: str, *, count: int, dim: int) -> None:
    """Compares what a probe is going to need with what is free, before it is fitted.

    Args:
        probe: its name.
        count: examples.
        dim: of an embedding.

    Raises:
        UserError: it will not fit.
    """
    need = count * dim * _BYTES[probe] + (count**2 * _KERNEL_BYTES if probe == "rbf_svm" else 0)
    free = _free_bytes()
    if free is not None and need > free:
        raise UserError(
            f"--probe={probe} on {count:,} embeddings of {dim:,} numbers needs some {need / 1e9:.1f} GB of memory, "
            f"{free / 1e9:.1f} GB are free. Read a smaller layer (--pooling=avg), take fewer images, or another probe."
        )


def _free_bytes() -> int | None:
    """Memory that programs can still have, as Linux tells it; None where it does not."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
