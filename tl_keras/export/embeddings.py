"""Embeddings as a product: a file with id, split, label and embedding of every image, written piece by piece."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tl_keras.backbones.embed import ReadEmbeddings
from tl_keras.data.examples import Examples
from tl_keras.errors import UserError
from tl_keras.run import check_writable, disk_errors

_ROWS = 1000  # read and written at once


def check_output(path: str) -> None:
    """Finds out before anything is computed whether the file can be written.

    Raises:
        UserError: Parquet without pyarrow, a folder of that name, or a folder that can't be written.
    """
    if os.path.isdir(path):
        raise UserError(f"--embeddings_output={path} is a folder. Give the file a name in it.")
    if path.endswith(".parquet"):
        _import_pyarrow()
    check_writable(Path(path).parent, path)


def write_embeddings(path: str, examples: Examples, read: ReadEmbeddings) -> str:
    """Writes a `.npz` or a Parquet file with a row for each image, in the source's order.

    Its columns (arrays) are `id`, `split` and `label`, text, empty where the images have no labels, and `embedding`,
    float32 `(n, dim)`. Memory does not grow with n but for the ids.

    Args:
        path: ends in `.npz` or `.parquet`; it replaces a file of that name when it is whole.
        examples: which images.
        read: positions, int `(b,)` → embeddings, float32 `(b, dim)`.

    Returns:
        A line that says what was written.

    Raises:
        UserError: Parquet without pyarrow, no image at all, or the disk is full.
    """
    positions = np.flatnonzero(examples.splits >= 0)
    if not len(positions):
        raise UserError("no image could be decoded: there are no embeddings to write. broken.csv says why.")
    write = _write_parquet if path.endswith(".parquet") else _write_npz
    dim = read(positions[:1]).shape[1]
    with disk_errors(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=Path(path).parent) as folder:
            unfinished = Path(folder) / Path(path).name
            write(unfinished, examples, positions, read, dim)
            os.replace(unfinished, path)
    return f"embeddings: {len(positions):,} of {dim:,} numbers · {path}"


def _columns(examples: Examples) -> dict[str, list[str]]:
    return dict(zip(("id", "split", "label"), map(list, zip(*examples.rows(), strict=True)), strict=True))


def _batches(positions: np.ndarray, read: ReadEmbeddings) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(positions), _ROWS):
        yield start, read(positions[start : start + _ROWS]).astype(np.float32, copy=False)


def _write_npz(path: Path, examples: Examples, positions: np.ndarray, read: ReadEmbeddings, dim: int) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, values in _columns(examples).items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, np.array(values, dtype=np.str_), allow_pickle=False)
        with archive.open("embedding.npy", "w", force_zip64=True) as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(positions), dim)}
            np.lib.format.write_array_header_1_0(file, header)
            for _, embeddings in _batches(positions, read):
                file.write(embeddings.astype("<f4", copy=False).tobytes())


def _write_parquet(path: Path, examples: Examples, positions: np.ndarray, read: ReadEmbeddings, dim: int) -> None:
    pa, pq = _import_pyarrow()
    columns = _columns(examples)
    text = [(name, pa.string()) for name in columns]
    schema = pa.schema([*text, ("embedding", pa.list_(pa.float32(), dim))])
    with pq.ParquetWriter(path, schema) as writer:
        for start, values in _batches(positions, read):
            part: dict[str, Any] = {
                name: [_as_text(value) for value in column[start : start + _ROWS]] for name, column in columns.items()
            }
            part["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), dim)
            writer.write_table(pa.table(part, schema=schema))


def _as_text(value: str) -> str:
    """A file's name may be no UTF-8, which Parquet's text must be."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _import_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "--embeddings_output=*.parquet needs pyarrow. Install it: pip install 'tl_keras[parquet]', or give a .npz."
        ) from error
    return pyarrow, pyarrow.parquet
