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
# SQLite's largest: what does not share its page wastes the rest of it, half of a 16 kB page at 2,048 numbers
_PAGE_BYTES = 65536
_QUERY_KEYS = 500  # SQLite's oldest limit on parameters is 999
_SPARE_BYTES = 200 << 20
_ROW_BYTES = 64  # key, type, shape, and what SQLite keeps of each
_KEY_BYTES = 48  # once more in the index, whose pages are two thirds full
# types of file systems that other machines write to as well: SQLite's write-ahead log does not work there
_NETWORK = (
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "afs", "glusterfs", "ocfs2", "gfs2"),
    *("9p", "orangefs", "pvfs2", "fuse"),
)


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
        """Switches to the write-ahead log: the one thing for which SQLite itself does not wait where others do it.

        That log needs memory which all processes share. On a network disk it would damage the file
        (https://www.sqlite.org/wal.html); SQLite's older journal, which relies on locks alone, takes its place there.
        """
        if is_on_network(self.path.parent):
            self._connection.execute("PRAGMA journal_mode=DELETE")
            self._connection.execute("PRAGMA synchronous=FULL")
            return
        self._connection.execute("PRAGMA synchronous=NORMAL")
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


def check_space(folder: str, *, needs: Sequence[tuple[int, int]]) -> None:
    """Compares what the store is going to need with what is free, before anything is computed.

    Args:
        folder: the folder of all stores.
        needs: number of embeddings, and bytes of each, of one store or several.

    Raises:
        UserError: it will not fit.
    """
    count = sum(number for number, _ in needs)
    need = sum(number * stored_bytes(size) for number, size in needs) + (_SPARE_BYTES if count else 0)
    free = shutil.disk_usage(existing_parent(folder)).free
    if need > free:
        raise UserError(
            f"the embedding store needs {need / 1e9:.1f} GB for {count:,} images, {folder} has {free / 1e9:.1f} GB "
            "free. Give a --store_dir on a larger disk, clear old stores (--mode=doctor lists them), or train less of "
            "the backbone."
        )


def stored_bytes(size: int) -> int:
    """What an embedding of `size` bytes takes in the file, its share of pages that are not full included.

    As SQLite lays rows out (https://www.sqlite.org/fileformat2.html, "B-tree Pages" and "Cell Payload Overflow Pages"):
    several rows share a page, and the end of a row that is larger than a page has pages of its own.
    """
    payload, usable = size + _ROW_BYTES, _PAGE_BYTES
    if payload <= usable - 35:
        return _PAGE_BYTES // ((usable - 8) // payload) + _KEY_BYTES
    least = (usable - 12) * 32 // 255 - 23
    inside = least + (payload - least) % (usable - 4)
    inside = inside if inside <= usable - 35 else least
    overflow = -(-(payload - inside) // (usable - 4))
    return _PAGE_BYTES * overflow + _PAGE_BYTES // max(1, (usable - 8) // (inside + _ROW_BYTES)) + _KEY_BYTES


def is_on_network(path: Path) -> bool:
    """Whether a path is on a file system that other machines may write to, as Linux names its type."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    mounts = [line.split(" ")[1:3] for line in lines]
    real = os.path.realpath(path)
    own = [(place, kind) for place, kind in mounts if os.path.commonpath([place, real]) == place]
    kind = max(own, key=lambda mount: len(mount[0]), default=("", ""))[1]
    return kind.partition(".")[0] in _NETWORK


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
