"""The embedding store: what a frozen trunk gave for each image, on disk, so that it is computed once.

One SQLite file a trunk. Its name is a hash of everything that determines an embedding but the image (network, weights,
cut, size, decoding, precision, engine, versions); its keys are hashes of the images' content. SQLite's write-ahead log
lets several processes read and write at once and leaves a killed one's file whole (https://www.sqlite.org/wal.html).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sqlite3
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tl_keras.errors import UserError
from tl_keras.run import disk_errors, existing_parent

_LOCK_SECONDS = 120.0
_LOCK_PAUSE_SECONDS = 0.02
_PAGE_BYTES = 16384  # an embedding of 1,280 numbers in one page
_QUERY_KEYS = 500  # SQLite's oldest limit on parameters is 999
_SPARE_BYTES = 200 << 20
_WRITE_OVERHEAD = 1.15  # pages, keys and the write-ahead log


class EmbeddingStore:
    """Embeddings of one trunk, by key."""

    def __init__(self, folder: str, address: dict[str, Any]) -> None:
        """Opens the store, making it where it does not exist.

        Args:
            folder: the folder of all stores.
            address: everything that determines an embedding but the image; JSON.

        Raises:
            UserError: the folder can't be written, or the file is damaged.
        """
        text = json.dumps(address, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.path = Path(folder) / f"{address.get('backbone', 'trunk')}-{name}.sqlite"
        make_folder(folder)
        with self._errors():
            # used from tf.data's threads, one at a time
            self._connection = sqlite3.connect(
                self.path, timeout=_LOCK_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._close = weakref.finalize(self, self._connection.close)  # whoever forgets the store closes it too
            self._connection.execute(f"PRAGMA page_size={_PAGE_BYTES}")
            self._start_log()
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute("CREATE TABLE IF NOT EXISTS address (text TEXT)")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS embeddings (key BLOB PRIMARY KEY, dtype TEXT, shape TEXT, content BLOB)"
            )
            if self._connection.execute("SELECT count(*) FROM address").fetchone()[0] == 0:
                self._connection.execute(
                    "INSERT INTO address SELECT ? WHERE NOT EXISTS (SELECT * FROM address)", (text,)
                )

    def close(self) -> None:
        """Closes the file."""
        self._close()

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """Positions of the keys that are not in the store, ascending."""
        found: set[bytes] = set()
        with self._errors():
            for start in range(0, len(keys), _QUERY_KEYS):
                part = list(keys[start : start + _QUERY_KEYS])
                marks = ",".join("?" * len(part))
                rows = self._connection.execute(f"SELECT key FROM embeddings WHERE key IN ({marks})", part)
                found.update(row[0] for row in rows)
        return [position for position, key in enumerate(keys) if key not in found]

    def write(self, keys: Sequence[bytes], embeddings: np.ndarray) -> None:
        """Keeps a batch, all of it or none.

        Args:
            keys: b keys.
            embeddings: `(b, ...)`, any dtype.

        Raises:
            UserError: the disk is full.
        """
        shape = json.dumps(embeddings.shape[1:])
        dtype = embeddings.dtype.name
        rows = [
            (key, dtype, shape, np.ascontiguousarray(one).tobytes()) for key, one in zip(keys, embeddings, strict=True)
        ]
        with self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._connection.executemany("INSERT OR IGNORE INTO embeddings VALUES (?, ?, ?, ?)", rows)
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def read(self, keys: Sequence[bytes]) -> np.ndarray:
        """Reads a batch, in the order of the keys.

        Args:
            keys: b keys that were written; the same may stand several times.

        Returns:
            `(b, ...)`, in the dtype in which they were written.

        Raises:
            UserError: one is missing: the store was cleared meanwhile.
        """
        found: dict[bytes, tuple[str, str, bytes]] = {}
        with self._errors():
            for start in range(0, len(keys), _QUERY_KEYS):
                part = list(keys[start : start + _QUERY_KEYS])
                marks = ",".join("?" * len(part))
                query = f"SELECT key, dtype, shape, content FROM embeddings WHERE key IN ({marks})"
                found.update((row[0], row[1:]) for row in self._connection.execute(query, part))
        if any(key not in found for key in keys):
            raise UserError(f"the embedding store {self.path} was cleared while it was in use. Run again.")
        dtype, shape, _ = found[keys[0]]
        content = b"".join(found[key][2] for key in keys)
        return np.frombuffer(content, _numpy_dtype(dtype)).reshape(len(keys), *json.loads(shape))

    def _start_log(self) -> None:
        """Switches to the write-ahead log: the one thing for which SQLite itself does not wait where others do it."""
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(_LOCK_PAUSE_SECONDS)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise UserError(_explain(error, self.path)) from error


def make_folder(folder: str) -> None:
    """Makes the folder of all stores where it does not exist.

    Raises:
        UserError: it can't be written.
    """
    with disk_errors(f"the embedding store {folder} (--store_dir)"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def check_space(folder: str, *, count: int, bytes_each: int) -> None:
    """Compares what the store is going to need with what is free, before anything is computed.

    Raises:
        UserError: it will not fit.
    """
    need = int(count * bytes_each * _WRITE_OVERHEAD) + (_SPARE_BYTES if count else 0)
    free = shutil.disk_usage(existing_parent(folder)).free
    if need > free:
        raise UserError(
            f"the embedding store needs {need / 1e9:.1f} GB for {count:,} images, {folder} has {free / 1e9:.1f} GB "
            "free. Give a --store_dir on a larger disk, clear old stores (--mode=doctor lists them), or train less of "
            "the backbone."
        )


def list_stores(folder: str) -> list[tuple[Path, int]]:
    """All stores in a folder with their sizes in bytes, their logs included; the largest first."""
    files = sorted(Path(folder).glob("*.sqlite")) if os.path.isdir(folder) else []
    sizes = [(path, sum(map(_size, path.parent.glob(path.name + "*")))) for path in files]
    return sorted(sizes, key=lambda item: -item[1])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # a log is gone as soon as the last process that used it ends
        return 0


def _numpy_dtype(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes  # comes with TensorFlow

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _explain(error: sqlite3.Error, path: Path) -> str:
    text = str(error)
    if "full" in text:
        return (
            f"the disk is full: the embedding store {path} can't grow. What is complete is kept; free space, run again."
        )
    if "locked" in text or "busy" in text:
        return (
            f"the embedding store {path} is locked by another process for over {_LOCK_SECONDS:.0f} s. Try again later."
        )
    if "malformed" in text or "not a database" in text:
        return f"the embedding store {path} is damaged ({text}). Delete that file and run again."
    return f"the embedding store {path} can't be used: {text}. Give another --store_dir."
