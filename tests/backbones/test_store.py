"""The embedding store: what goes in comes out, whoever writes beside it, is killed, or fills the disk."""

from __future__ import annotations

import hashlib
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tl_keras.backbones import store as store_module
from tl_keras.backbones.store import EmbeddingStore, check_space, list_stores, make_folder, stored_bytes
from tl_keras.errors import UserError

ROOT = Path(__file__).parent.parent.parent
ADDRESS = {"backbone": "Toy", "cut": "pool"}


def keys(*numbers: int) -> list[bytes]:
    return [number.to_bytes(33, "big") for number in numbers]


def vectors(*numbers: int) -> np.ndarray:
    """Embeddings from which their key can be told."""
    return np.array([[number, number + 0.5, -number] for number in numbers], np.float32)


@pytest.fixture
def store(tmp_path):
    store = EmbeddingStore(str(tmp_path / "store"), ADDRESS)
    yield store
    store.close()


def error_of(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8, ml_dtypes.bfloat16], ids=lambda x: x.__name__)
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 4), (5, 5, 2048)], ids=str)
def test_what_is_written_is_read_in_its_dtype_and_shape(store, dtype, shape):
    values = np.random.default_rng(0).uniform(0, 200, (3, *shape)).astype(dtype)
    store.write(keys(1, 2, 3), values)
    found = store.read(keys(3, 1, 2))
    assert found.dtype == np.dtype(dtype)
    assert found.shape == (3, *shape)
    np.testing.assert_array_equal(found.view(np.uint8), values[[2, 0, 1]].view(np.uint8))


def test_arrays_that_lie_otherwise_in_memory_are_written_as_they_read(store):
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(0, 2, 1)[:, ::-1]
    store.write(keys(1, 2), values)
    np.testing.assert_array_equal(store.read(keys(1, 2)), values)


def test_missing_keys_are_found_among_many(store):
    store.write(keys(*range(0, 3000, 2)), vectors(*range(0, 3000, 2)))
    assert store.missing(keys(*range(3000))) == list(range(1, 3000, 2))
    assert store.missing([]) == []
    assert store.missing(keys(1, 2, 1, 4)) == [0, 2]


def test_more_than_sqlite_takes_at_once_is_read_in_the_order_asked_for(store):
    store.write(keys(*range(2500)), vectors(*range(2500)))
    order = np.random.default_rng(1).integers(0, 2500, 4000).tolist()
    np.testing.assert_array_equal(store.read(keys(*order)), vectors(*order))


def test_the_same_key_may_be_read_several_times(store):
    store.write(keys(1, 2), vectors(1, 2))
    np.testing.assert_array_equal(store.read(keys(2, 1, 2, 2)), vectors(2, 1, 2, 2))


def test_each_embedding_is_read_from_disk_once_as_long_as_all_fit_in_memory(store, monkeypatch):
    read, from_disk = store._read_rows, []
    monkeypatch.setattr(store, "_read_rows", lambda wanted: from_disk.extend(wanted) or read(wanted))
    store.write(keys(*range(8)), vectors(*range(8)))
    for _ in range(3):
        np.testing.assert_array_equal(store.read(keys(3, 1, 3, 0)), vectors(3, 1, 3, 0))
    assert sorted(from_disk) == keys(0, 1, 3)
    monkeypatch.setattr(store_module, "_OPEN", {store})  # without those of other tests
    monkeypatch.setattr(store_module, "_KEPT_BYTES", 5 * 412)
    for _ in range(2):
        np.testing.assert_array_equal(store.read(keys(*range(7, -1, -1))), vectors(*range(7, -1, -1)))
    assert len(from_disk) == 3 + 5 + 3  # two more are kept, three are beyond the limit
    assert store._kept_bytes == 5 * 412


def test_the_first_that_was_written_stays(store):
    store.write(keys(1, 1), vectors(1, 9))
    store.write(keys(1, 2), vectors(8, 2))
    np.testing.assert_array_equal(store.read(keys(1, 2)), vectors(1, 2))


def test_another_address_is_another_file_and_the_order_of_its_words_is_no_matter(tmp_path):
    folder = str(tmp_path)
    first = EmbeddingStore(folder, ADDRESS)
    first.write(keys(1), vectors(1))
    assert EmbeddingStore(folder, dict(reversed(ADDRESS.items()))).missing(keys(1)) == []
    for other in ({**ADDRESS, "cut": "conv5"}, {**ADDRESS, "size": 1}, {**ADDRESS, "backbone": "Toys"}):
        store = EmbeddingStore(folder, other)
        assert store.path != first.path
        assert store.missing(keys(1)) == [0]
    assert first.path.name.startswith("Toy-")


def test_a_file_says_what_it_holds(store):
    store.write(keys(1), vectors(1))
    rows = sqlite3.connect(store.path).execute("SELECT text FROM address").fetchall()
    assert rows == [('{"backbone": "Toy", "cut": "pool"}',)]


def test_a_batch_is_written_whole_or_not_at_all(store, monkeypatch):
    class Interrupted:
        """A connection on which Ctrl-C comes after two of three rows."""

        def __init__(self, connection):
            self.connection = connection

        def __getattr__(self, name):
            return getattr(self.connection, name)

        def executemany(self, query, values):
            self.connection.executemany(query, values[:2])
            raise KeyboardInterrupt

    connection = store._connection
    monkeypatch.setattr(store, "_connection", Interrupted(connection))
    with pytest.raises(KeyboardInterrupt):
        store.write(keys(1, 2, 3), vectors(1, 2, 3))
    monkeypatch.setattr(store, "_connection", connection)
    assert store.missing(keys(1, 2, 3)) == [0, 1, 2]
    store.write(keys(1, 2, 3), vectors(1, 2, 3))  # no transaction is left open
    assert store.missing(keys(1, 2, 3)) == []


WRITER = """
import sys, time
import numpy as np
from tl_keras.backbones import store as store_module
from tl_keras.backbones.store import EmbeddingStore
folder, first, count, wait = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
print("ready", flush=True)
sys.stdin.readline()
store = EmbeddingStore(folder, {"backbone": "Toy", "cut": "pool"})
for start in range(first, first + count, 8):
    numbers = range(start, start + 8)
    values = np.repeat(np.array(numbers, np.float32)[:, None], 2000, 1)
    store.write([n.to_bytes(33, "big") for n in numbers], values)
    print(start, flush=True)
    time.sleep(wait)
"""


def writers(folder: Path, *arguments: tuple[int, int, float]) -> list[subprocess.Popen]:
    """Processes that open one new store at the same moment and write."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), *map(str, one)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for one in arguments
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    return processes


def test_several_processes_write_into_one_new_store_at_once(tmp_path):
    for round_number in range(5):
        folder = tmp_path / str(round_number)
        processes = writers(folder, (0, 160, 0.0), (80, 160, 0.0), (1000, 160, 0.0), (0, 160, 0.001))
        for process in processes:
            _, error = process.communicate(timeout=60)
            assert process.returncode == 0, error
        store = EmbeddingStore(str(folder), ADDRESS)
        written = [*range(240), *range(1000, 1160)]
        assert store.missing(keys(*written)) == []
        np.testing.assert_array_equal(store.read(keys(*written))[:, 1999], np.array(written, np.float32))
        assert store._connection.execute("SELECT count(*) FROM embeddings").fetchone() == (400,)
        assert store._connection.execute("SELECT count(*) FROM address").fetchone() == (1,)


def test_a_killed_process_leaves_complete_batches_and_a_store_that_goes_on(tmp_path):
    (process,) = writers(tmp_path, (0, 8_000_000, 0.0))
    for _ in range(30):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    told = [int(line) for line in process.communicate(timeout=60)[0].split()]
    store = EmbeddingStore(str(tmp_path), ADDRESS)
    count = store._connection.execute("SELECT count(*) FROM embeddings").fetchone()[0]
    assert count % 8 == 0
    assert count >= 240 + 8 * len(told)
    assert store.missing(keys(*range(count))) == []
    np.testing.assert_array_equal(store.read(keys(*range(count)))[:, 5], np.arange(count, dtype=np.float32))
    assert store._connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    store.write(keys(count), np.zeros((1, 2000), np.float32))


def test_readers_are_not_held_up_by_a_writer(tmp_path):
    writer, reader = (EmbeddingStore(str(tmp_path), ADDRESS) for _ in range(2))
    writer.write(keys(1), vectors(1))
    writer._connection.execute("BEGIN IMMEDIATE")
    start = time.perf_counter()
    np.testing.assert_array_equal(reader.read(keys(1)), vectors(1))
    assert reader.missing(keys(1, 2)) == [1]
    assert time.perf_counter() - start < 60  # a lock would be waited for twice as long
    writer._connection.execute("ROLLBACK")


def test_a_full_disk_is_one_line_and_what_is_complete_stays(store):
    store.write(keys(1, 2), vectors(1, 2))
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count={pages + 20}")
    large = np.zeros((1000, 5000), np.float32)
    text = error_of(store.write, keys(*range(100, 1100)), large)
    assert text == (
        f"the disk is full: the embedding store {store.path} can't grow. Complete embeddings are kept: free space "
        "and run again."
    )
    assert store.missing(keys(1, 2, *range(100, 1100))) == list(range(2, 1002))
    np.testing.assert_array_equal(store.read(keys(1, 2)), vectors(1, 2))
    store._connection.execute("PRAGMA max_page_count=1000000")
    store.write(keys(*range(100, 1100)), large)
    assert store.missing(keys(*range(100, 1100))) == []


def test_a_file_that_is_no_store_is_named(store):
    store.close()
    store.path.write_bytes(b"no SQLite file" * 1000)
    text = error_of(EmbeddingStore, str(store.path.parent), ADDRESS)
    assert text == (
        f"the embedding store {store.path} is damaged (file is not a database). Delete the file and run again."
    )


def test_a_store_that_was_damaged_inside_is_named(store):
    store.write(keys(*range(200)), np.zeros((200, 5000), np.float32))
    store._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()
    content = bytearray(store.path.read_bytes())
    content[3 * 65536 :] = b"\xff" * (len(content) - 3 * 65536)
    store.path.write_bytes(content)
    damaged = EmbeddingStore(str(store.path.parent), ADDRESS)
    text = error_of(damaged.read, keys(*range(200)))
    assert text.startswith(f"the embedding store {store.path} is damaged (")
    assert text.endswith("Delete the file and run again.")


def test_a_store_that_was_cleared_while_in_use_is_named(store):
    store.write(keys(1), vectors(1))
    sqlite3.connect(store.path, isolation_level=None).execute("DELETE FROM embeddings")
    assert error_of(store.read, keys(1)) == (
        f"the embedding store {store.path} was cleared while it was in use. Run again."
    )


def test_a_store_that_another_process_holds_is_named(store, monkeypatch):
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store._connection.execute("PRAGMA busy_timeout=50")
    assert f"the embedding store {store.path} has been locked by another process for" in error_of(
        store.write, keys(1), vectors(1)
    )
    other.execute("ROLLBACK")
    store.write(keys(1), vectors(1))


@pytest.mark.parametrize(("free", "fits"), [(425, False), (427, True)])
def test_space_is_compared_before_anything_is_computed(tmp_path, monkeypatch, free, fits):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(free * 1e6)))
    # 31 rows of 2,000 bytes share a page of 64 KiB; with keys, and 200 MiB to spare, 100,000 of them need 425.9 MB
    arguments = {"needs": [(60_000, 2000), (40_000, 2000)]}
    if fits:
        check_space(str(tmp_path / "not" / "yet"), **arguments)
        return
    text = error_of(check_space, str(tmp_path / "not" / "yet"), **arguments)
    assert text.startswith(
        f"the embedding store needs 0.4 GB for 100,000 images, but {tmp_path}/not/yet has only 0.4 GB "
    )
    assert "--store_dir" in text


@pytest.mark.parametrize("dim", [128, 1280, 2048, 4096, 14 * 14 * 1024])
def test_the_need_is_what_the_file_takes(store, dim):
    """Vectors of every row of the zoo, and feature maps."""
    count = 60_000_000 // (4 * dim)
    for start in range(0, count, 500):
        digests = [hashlib.sha256(str(one).encode()).digest() for one in range(start, min(start + 500, count))]
        store.write([digest + b"\0" for digest in digests], np.ones((len(digests), dim), np.float32))
    store._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    taken = store.path.stat().st_size
    need = count * stored_bytes(4 * dim)
    assert taken - 10 * 65536 <= need <= 1.12 * taken  # the file has some pages of its own
    assert taken < 1.35 * count * 4 * dim  # half of a file with pages of 16 kB was empty at 2,048 numbers


def test_a_store_on_a_network_disk_does_without_the_write_ahead_log(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "is_on_network", lambda path: True)
    store = EmbeddingStore(str(tmp_path), ADDRESS)
    store.write(keys(1, 2), vectors(1, 2))
    assert store._connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert not list(tmp_path.glob("*-wal"))
    np.testing.assert_array_equal(EmbeddingStore(str(tmp_path), ADDRESS).read(keys(2)), vectors(2))


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/home/me/cache", True), ("/home/me/local/x", False), ("/", False), ("/mnt/a b/x", False), ("/s3/x", True)],
)
def test_a_network_disk_is_told_by_the_type_of_its_file_system(monkeypatch, path, expected):
    mounts = "dev / ext4 rw 0 0\nhost:/home /home nfs4 rw 0 0\ndev2 /home/me/local xfs rw 0 0\nx /s3 fuse.s3fs rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **options: mounts)
    assert store_module.is_on_network(Path(path)) is expected


def test_a_full_disk_is_no_matter_where_nothing_is_computed(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    check_space(str(tmp_path), needs=[(0, 2000)])


def test_stores_are_listed_with_their_logs_the_largest_first(tmp_path):
    assert list_stores(str(tmp_path / "none")) == []
    stores = {}
    for cut, count in (("a", 1), ("b", 500)):
        stores[cut] = EmbeddingStore(str(tmp_path), {"cut": cut})  # kept: closing one takes its log away
        stores[cut].write(keys(*range(count)), np.zeros((count, 5000), np.float32))
    listed = list_stores(str(tmp_path))
    assert listed[0][0] == stores["b"].path
    for path, size in listed:
        parts = list(tmp_path.glob(f"{path.name}*"))
        assert len(parts) > 1
        assert size == sum(part.stat().st_size for part in parts)
    assert listed[0][1] > 500 * 5000 * 4
    for store in stores.values():
        store.close()


def test_a_log_that_goes_while_stores_are_listed_counts_nothing(tmp_path, monkeypatch):
    (tmp_path / "a.sqlite").write_bytes(b"x" * 10)
    found = Path.glob
    gone = tmp_path / "a.sqlite-wal"
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [*found(self, pattern), *[gone] * (pattern != "*.sqlite")])
    assert list_stores(str(tmp_path)) == [(tmp_path / "a.sqlite", 10)]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    text = error_of(make_folder, str(tmp_path / "file" / "store"))
    assert text.startswith(f"the embedding store {tmp_path}/file/store (--store_dir) can't be written: Not a directory")
