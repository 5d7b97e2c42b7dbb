"""Embeddings written for others: read back by what they will be read with."""

from __future__ import annotations

import sys
import zipfile

import numpy as np
import pytest

from tl_keras.data.examples import Examples
from tl_keras.data.sources import Source
from tl_keras.errors import UserError
from tl_keras.export import embeddings
from tl_keras.export.embeddings import check_output, write_embeddings

VALUES = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
IDS = ["a/1.jpg", "a/2.jpg", "b/ü.jpg", "b/\udcff.jpg", "b/3.jpg", "c/4.jpg", "c/5.jpg"]


def make_examples(class_names: tuple[str, ...] = ("a", "b", "c")) -> Examples:
    labels = np.array([0, 0, 1, 1, 1, 2, 2], np.int32)
    splits = np.array([0, 2, 1, 0, -1, 0, 2], np.int8)  # the fifth is left out
    source = Source("toy", IDS, labels, class_names, splits, lambda positions: iter(()))
    return Examples(source, splits, np.zeros(7, "V32"), {})


def read(positions: np.ndarray) -> np.ndarray:
    return VALUES[positions]


@pytest.mark.parametrize("rows", [2, 1000])
def test_an_npz_has_a_row_for_each_image_that_is_used(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(embeddings, "_ROWS", rows)
    path = tmp_path / "deep" / "e.npz"
    line = write_embeddings(str(path), make_examples(), read)
    assert line == f"embeddings: 6 images, 5 dimensions · {path}"
    with np.load(path, allow_pickle=False) as file:
        assert set(file) == {"id", "split", "label", "embedding"}
        assert file["id"].tolist() == [one for one in IDS if one != "b/3.jpg"]
        assert file["split"].tolist() == ["train", "test", "val", "train", "train", "test"]
        assert file["label"].tolist() == ["a", "a", "b", "b", "c", "c"]
        assert file["embedding"].dtype == np.float32
        np.testing.assert_array_equal(file["embedding"], np.delete(VALUES, 4, axis=0))
    assert [file.name for file in path.parent.iterdir()] == ["e.npz"]


@pytest.mark.parametrize("rows", [2, 1000])
def test_parquet_has_the_same(tmp_path, monkeypatch, rows):
    import pyarrow.parquet as pq

    monkeypatch.setattr(embeddings, "_ROWS", rows)
    write_embeddings(str(tmp_path / "e.parquet"), make_examples(), read)
    table = pq.read_table(tmp_path / "e.parquet")
    assert table.column_names == ["id", "split", "label", "embedding"]
    assert table["id"].to_pylist() == ["a/1.jpg", "a/2.jpg", "b/ü.jpg", "b/\\xff.jpg", "c/4.jpg", "c/5.jpg"]
    assert table["split"].to_pylist() == ["train", "test", "val", "train", "train", "test"]
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.float32), np.delete(VALUES, 4, axis=0))


def test_without_classes_label_and_split_are_empty(tmp_path):
    write_embeddings(str(tmp_path / "e.npz"), make_examples(()), read)
    with np.load(tmp_path / "e.npz", allow_pickle=False) as file:
        assert set(file["label"]) == set(file["split"]) == {""}


@pytest.mark.parametrize("name", ["e.npz", "e.parquet"])
def test_a_write_that_fails_leaves_the_file_of_before(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_bytes(b"before")
    monkeypatch.setattr(embeddings, "_ROWS", 2)

    def fail(positions: np.ndarray) -> np.ndarray:
        if 5 in positions:
            raise OSError(28, "No space left on device")
        return VALUES[positions]

    with pytest.raises(UserError, match="^the disk is full: .* could not be written"):
        write_embeddings(str(path), make_examples(), fail)
    assert path.read_bytes() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["e.npz", "e.parquet"])
def test_an_interruption_leaves_nothing_half_written(tmp_path, monkeypatch, name):
    monkeypatch.setattr(embeddings, "_ROWS", 2)

    def interrupt(positions: np.ndarray) -> np.ndarray:
        if 5 in positions:
            raise KeyboardInterrupt
        return VALUES[positions]

    with pytest.raises(KeyboardInterrupt):
        write_embeddings(str(tmp_path / name), make_examples(), interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["e.npz", "e.parquet"])
def test_embeddings_are_read_in_pieces_and_in_order(tmp_path, monkeypatch, name):
    monkeypatch.setattr(embeddings, "_ROWS", 4)
    asked: list[list[int]] = []

    def note(positions: np.ndarray) -> np.ndarray:
        asked.append(positions.tolist())
        return VALUES[positions]

    write_embeddings(str(tmp_path / name), make_examples(), note)
    assert asked[-2:] == [[0, 1, 2, 3], [5, 6]]
    assert max(map(len, asked)) == 4


def test_what_can_not_be_written_is_found_before_anything_is_computed(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"is a folder\. Give the name of a file in it\.$"):
        check_output(str(tmp_path))
    with pytest.raises(UserError, match="file/e.npz can't be written"):
        check_output(str(tmp_path / "file" / "e.npz"))
    check_output(str(tmp_path / "new" / "e.parquet"))
    assert not list((tmp_path / "new").iterdir())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError) as error:
        check_output(str(tmp_path / "e.parquet"))
    assert str(error.value) == (
        "--embeddings_output=*.parquet needs pyarrow. Run pip install 'tl_keras[parquet]', or write a .npz file."
    )
    check_output(str(tmp_path / "e.npz"))


def test_arrays_are_stored_as_numpy_stores_them(tmp_path):
    write_embeddings(str(tmp_path / "e.npz"), make_examples(), read)
    with zipfile.ZipFile(tmp_path / "e.npz") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["id.npy", "split.npy", "label.npy", "embedding.npy"]
