"""The embedding store: a cache on disk for the outputs of a frozen trunk, so that each image is computed once.

There is one SQLite file per trunk. Its name is a hash of everything that determines an embedding except the image
(network, weights, cut, size, decoding, precision, engine, versions). Its keys are hashes of the image contents.
SQLite's write-ahead log allows concurrent processes, and keeps the file intact if a process is killed
(https://www.sqlite.org/wal.html).
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tl_keras.errors import UserError
from tl_keras.run import disk_errors, existing_parent

_LOCK_SECONDS = 120.0
_LOCK_PAUSE_SECONDS = 0.02
# the largest page of SQLite: with 16 kB pages, an embedding of 2,048 numbers would waste half of a page
_PAGE_BYTES = 65536
_QUERY_KEYS = 500  # old versions of SQLite allow 999 parameters
_SPARE_BYTES = 200 << 20
_KEPT_BYTES = 128 << 20  # memory for rows of all open stores together; further rows are read from disk each time
_KEPT_ROW_BYTES = 400  # memory of a row beside its values: key, bytes, array, entry
_ROW_BYTES = 64  # key, type, shape, and overhead of SQLite
_KEY_BYTES = 48  # entry in the index, whose pages are two thirds full
# types of network file systems, on which SQLite's write-ahead log does not work
_NETWORK = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "afs",
    "glusterfs",
    "ocfs2",
    "gfs2",
    "9p",
    "orangefs",
    "pvfs2",
    "fuse",
)


class EmbeddingStore:
    """Embeddings of one trunk, by key."""

    def __init__(self, folder: str, address: dict[str, Any]) -> None:
        """Opens the store, and creates it if it does not exist.

        Args:
            folder: folder of all stores.
            address: everything that determines an embedding except the image, as JSON values.

        Raises:
            UserError: the folder can't be written, or the file is damaged.
        """
        text = json.dumps(address, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.path = Path(folder) / f"{address.get('backbone', 'trunk')}-{name}.sqlite"
        self._kept, self._kept_bytes = dict[bytes, np.ndarray](), 0
        _OPEN.add(self)
        make_folder(folder)
        with self._errors():
            # used by threads of tf.data, one at a time
            self._connection = sqlite3.connect(
                self.path, timeout=_LOCK_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._close = weakref.finalize(self, self._connection.close)  # closed with the last reference
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
        _OPEN.discard(self)

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """Finds the positions of keys that are not in the store, ascending."""
        found: set[bytes] = set()
        with self._errors():
            for start in range(0, len(keys), _QUERY_KEYS):
                part = list(keys[start : start + _QUERY_KEYS])
                marks = ",".join("?" * len(part))
                rows = self._connection.execute(f"SELECT key FROM embeddings WHERE key IN ({marks})", part)
                found.update(row[0] for row in rows)
        return [position for position, key in enumerate(keys) if key not in found]

    def write(self, keys: Sequence[bytes], embeddings: np.ndarray) -> None:
        """Stores a batch atomically.

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

    def read(self, keys: Sequence[bytes], *, keeps: bool = True) -> np.ndarray:
        """Reads a batch, in the order of the keys.

        Args:
            keys: b keys that are in the store; duplicates are allowed.
            keeps: whether to keep what is read in memory, up to a limit, because it will be read again.

        Returns:
            `(b, ...)`, in the dtype in which they were written.

        Raises:
            UserError: a key is missing, because the store was cleared in the meantime.
        """
        missing = [key for key in dict.fromkeys(keys) if key not in self._kept]
        found = self._read_rows(missing) if missing else {}
        if len(found) < len(missing):
            raise UserError(f"the embedding store {self.path} was cleared while it was in use. Run again.")
        embeddings = np.stack([self._kept[key] if key in self._kept else found[key] for key in keys])
        if keeps:
            self._keep(found)
        return embeddings

    def _keep(self, rows: Mapping[bytes, np.ndarray]) -> None:
        """Keeps rows in memory, as far as the limit for all stores allows."""
        free = _KEPT_BYTES - sum(store._kept_bytes for store in _OPEN)
        for key, row in rows.items():
            size = row.nbytes + _KEPT_ROW_BYTES
            if size > free:
                return
            self._kept[key] = row
            self._kept_bytes += size
            free -= size

    def _read_rows(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """Reads embeddings from the file; those that it does not have are left out."""
        rows: dict[bytes, np.ndarray] = {}
        with self._errors():
            for start in range(0, len(keys), _QUERY_KEYS):
                part = list(keys[start : start + _QUERY_KEYS])
                marks = ",".join("?" * len(part))
                query = f"SELECT key, dtype, shape, content FROM embeddings WHERE key IN ({marks})"
                for key, dtype, shape, content in self._connection.execute(query, part):
                    rows[key] = np.frombuffer(content, _numpy_dtype(dtype)).reshape(json.loads(shape))
        return rows

    def _start_log(self) -> None:
        """Switches to the write-ahead log; this is the only operation for which SQLite does not wait for locks.

        The log needs memory shared by all processes. On a network disk it would damage the file
        (https://www.sqlite.org/wal.html); SQLite's rollback journal, which only needs locks, is used there.
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


_OPEN: weakref.WeakSet[EmbeddingStore] = weakref.WeakSet()


def make_folder(folder: str) -> None:
    """Creates the folder of all stores if it does not exist.

    Raises:
        UserError: it is not writable.
    """
    with disk_errors(f"the embedding store {folder} (--store_dir)"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def check_space(folder: str, *, needs: Sequence[tuple[int, int]]) -> None:
    """Checks that the embeddings will fit on the disk, before anything is computed.

    Args:
        folder: folder of all stores.
        needs: pairs of number of embeddings and bytes per embedding, one for each store.

    Raises:
        UserError: there is not enough disk space.
    """
    count = sum(number for number, _ in needs)
    need = sum(number * stored_bytes(size) for number, size in needs) + (_SPARE_BYTES if count else 0)
    free = shutil.disk_usage(existing_parent(folder)).free
    if need > free:
        raise UserError(
            f"the embedding store needs {need / 1e9:.1f} GB for {count:,} images, but {folder} has only "
            f"{free / 1e9:.1f} GB free. Give a --store_dir on a larger disk, delete old stores (--mode=doctor lists "
            "them), or train fewer layers of the backbone."
        )


def stored_bytes(size: int) -> int:
    """Disk space of an embedding of `size` bytes, including its share of partly filled pages.

    This follows the file format of SQLite (https://www.sqlite.org/fileformat2.html, "B-tree Pages" and "Cell Payload
    Overflow Pages"): several rows share a page, and rows larger than a page have overflow pages.
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
    """Whether a path is on a network file system, by its type in `/proc/self/mounts`."""
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
    """Lists all stores in a folder with their sizes in bytes, including logs, largest first."""
    files = sorted(Path(folder).glob("*.sqlite")) if os.path.isdir(folder) else []
    sizes = [(path, sum(map(_size, path.parent.glob(path.name + "*")))) for path in files]
    return sorted(sizes, key=lambda item: -item[1])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # a log is deleted when the last process closes it
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
            f"the disk is full: the embedding store {path} can't grow. Complete embeddings are kept: free space and "
            "run again."
        )
    if "locked" in text or "busy" in text:
        return (
            f"the embedding store {path} has been locked by another process for {_LOCK_SECONDS:.0f} s. Try again later."
        )
    if "malformed" in text or "not a database" in text:
        return f"the embedding store {path} is damaged ({text}). Delete the file and run again."
    return f"the embedding store {path} can't be used: {text}. Give another --store_dir."
