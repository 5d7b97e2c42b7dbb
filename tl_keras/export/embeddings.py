"""Files with id, split, label and embedding of every image, written in chunks."""

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
from tl_keras.run import check_writable, count_of, disk_errors

_ROWS = 1000  # rows per chunk


def check_output(path: str) -> None:
    """Checks that the file can be written, before anything is computed.

    Raises:
        UserError: pyarrow is missing, the path is a folder, or its folder is not writable.
    """
    if os.path.isdir(path):
        raise UserError(f"--embeddings_output={path} is a folder. Give the name of a file in it.")
    if path.endswith(".parquet"):
        _import_pyarrow()
    check_writable(Path(path).parent, path)


def write_embeddings(path: str, examples: Examples, read: ReadEmbeddings) -> str:
    """Writes a `.npz` or Parquet file with a row for each image, in the order of the source.

    Its columns (arrays) are `id`, `split` and `label`, as text, empty for images without labels, and `embedding`,
    float32 `(n, dim)`. Only the ids are held in memory.

    Args:
        path: path with the suffix `.npz` or `.parquet`; an existing file is replaced when the new one is complete.
        examples: the images.
        read: positions, int `(b,)` → embeddings, float32 `(b, dim)`.

    Returns:
        A line for the screen.

    Raises:
        UserError: pyarrow is missing, there are no images, or the disk is full.
    """
    positions = np.flatnonzero(examples.splits >= 0)
    if not len(positions):
        raise UserError("no image could be decoded, so there are no embeddings to write. broken.csv has the reasons.")
    write = _write_parquet if path.endswith(".parquet") else _write_npz
    dim = read(positions[:1]).shape[1]
    with disk_errors(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=Path(path).parent) as folder:
            unfinished = Path(folder) / Path(path).name
            write(unfinished, examples, positions, read, dim)
            os.replace(unfinished, path)
    return f"embeddings: {count_of(len(positions), 'image')}, {dim:,} dimensions · {path}"


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
    """Escapes file names that are not UTF-8, as Parquet requires."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _import_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "--embeddings_output=*.parquet needs pyarrow. Run pip install 'tl_keras[parquet]', or write a .npz file."
        ) from error
    return pyarrow, pyarrow.parquet
