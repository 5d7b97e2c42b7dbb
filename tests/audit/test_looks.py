"""Properties of pixels are computed once for each content, and only for the content that was hashed."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from tests.conftest import make_image
from tl_keras.audit.files import look_at
from tl_keras.audit.looks import find_looks
from tl_keras.backbones import store
from tl_keras.errors import UserError


def encode(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(make_image(seed, size=(90, 80))).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture
def contents() -> list[bytes]:
    return [encode(seed) for seed in range(5)]


def digests_of(contents: list[bytes]) -> list[bytes]:
    return [hashlib.sha256(content).digest() for content in contents]


class Reader:
    """Gives the contents, and notes which."""

    def __init__(self, contents: list[bytes]):
        self.contents, self.rows = contents, []

    def __call__(self, rows):
        for row in rows.tolist():
            self.rows.append(row)
            yield row, self.contents[row]


def find(contents, store_dir, *, rows=None, digests=None):
    reader = Reader(contents)
    wanted = np.arange(len(contents)) if rows is None else np.array(rows)
    looks = find_looks(wanted, digests=digests or digests_of(contents), read=reader, store_dir=store_dir)
    return looks, reader.rows


def assert_same(looks, contents):
    for row, look in looks.items():
        expected = look_at(contents[row])
        assert (look.digest, look.blank) == (expected.digest, expected.blank)
        np.testing.assert_array_equal(look.hashes, expected.hashes)
        np.testing.assert_array_equal(look.thumb, expected.thumb)
        assert (look.hashes.dtype, look.thumb.dtype) == (expected.hashes.dtype, expected.thumb.dtype)


def test_only_new_contents_are_read(contents, tmp_path):
    assert find(contents, str(tmp_path), rows=[0, 2])[1] == [0, 2]
    looks, read = find(contents, str(tmp_path))
    assert read == [1, 3, 4]
    assert sorted(looks) == [0, 1, 2, 3, 4]
    assert_same(looks, contents)
    moved = contents[::-1]  # the content counts, not its place
    looks, read = find(moved, str(tmp_path))
    assert read == []
    assert_same(looks, moved)


def test_a_file_that_was_replaced_after_it_was_hashed_is_not_cached(contents, tmp_path):
    digests = digests_of(contents)
    replaced = [encode(9), *contents[1:]]
    assert_same(find(replaced, str(tmp_path), digests=digests)[0], replaced)
    looks, read = find(contents, str(tmp_path))
    assert read == [0]
    assert_same(looks, contents)


def test_what_pillow_cannot_decode_has_no_properties(contents, tmp_path):
    broken = [contents[0], b"no image"]
    for _ in range(2):
        looks, read = find(broken, str(tmp_path))
        assert sorted(looks) == [0]
    assert read == [1]


def test_without_a_store_that_can_be_written_all_are_computed(contents, tmp_path, monkeypatch):
    assert find(contents, None)[1] == [0, 1, 2, 3, 4]
    (tmp_path / "file").write_text("")
    assert find(contents, str(tmp_path / "file"))[1] == [0, 1, 2, 3, 4]

    def fail(self, keys, embeddings):
        raise UserError("the disk is full")

    monkeypatch.setattr(store.EmbeddingStore, "write", fail)
    looks, _ = find(contents, str(tmp_path / "store"))
    assert_same(looks, contents)
    assert find(contents, str(tmp_path / "store"))[1] == [0, 1, 2, 3, 4]
