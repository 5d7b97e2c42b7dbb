"""Sources on disk: folders and manifests as people really have them, and the digits."""

from __future__ import annotations

import os
import threading
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits

from tl_keras.data import sources
from tl_keras.data.sources import Source, list_image_files, load_source, read_files
from tl_keras.errors import UserError


def put(root: Path, *names: str) -> Path:
    """Files whose content is their own name: what is read can be told from it."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode("utf-8", "surrogateescape"))
    return root


def load(dataset: object, *classes: str) -> Source:
    return load_source(str(dataset), data_dir=None, classes=classes)


def table(source: Source) -> dict[str, tuple[str, int]]:
    """Id → class and split, after every file was read and is the one that its id names."""
    return {
        one_id: (source.class_names[label], int(split))
        for one_id, label, split in zip(source.ids, source.labels, source.splits, strict=True)
    }


def error_of(dataset: object, *classes: str) -> str:
    with pytest.raises(UserError) as error:
        load(dataset, *classes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_class_folders_are_all_train_and_are_read_by_position(tmp_path):
    names = ["b/2.jpg", "b/1.jpg", "a/1.png", "c/deep/er/1.webp"]
    source = load(f"folder:{put(tmp_path, *names)}")
    assert source.class_names == ("a", "b", "c")
    assert source.ids == sorted(names)
    assert table(source) == {name: (name[0], 0) for name in names}
    assert source.labels.dtype == np.int32
    assert source.splits.dtype == np.int8
    assert dict(source.read([3, 0, 2])) == {number: source.ids[number].encode() for number in (0, 2, 3)}
    assert [position for position, _ in source.read(np.array([3, 0, 2]))] == [3, 0, 2]


@pytest.mark.parametrize("val", ["val", "valid", "validation", "VAL", "Validation"])
def test_splits_are_told_by_the_folders_names(tmp_path, val):
    source = load(f"folder:{put(tmp_path, 'train/b/1.jpg', 'Test/a/2.jpg', f'{val}/b/3.jpg', 'train/a/4.jpg')}")
    assert table(source) == {
        "train/b/1.jpg": ("b", 0),
        "Test/a/2.jpg": ("a", 2),
        f"{val}/b/3.jpg": ("b", 1),
        "train/a/4.jpg": ("a", 0),
    }


def test_classes_are_numbered_by_name_over_all_splits_together(tmp_path):
    names = ["train/b/1.jpg", "train/d/1.jpg", "val/a/1.jpg", "val/d/1.jpg", "test/c/1.jpg", "test/B/1.jpg"]
    source = load(f"folder:{put(tmp_path, *names)}")
    assert source.class_names == ("B", "a", "b", "c", "d")
    assert [source.class_names[label] for label in source.labels] == [name.split("/")[1] for name in source.ids]


def test_a_class_that_is_called_train(tmp_path):
    source = load(f"folder:{put(tmp_path, 'train/1.jpg', 'plane/1.jpg', 'val/1.jpg')}")
    assert source.class_names == ("plane", "train", "val")
    assert set(source.splits) == {0}


def test_images_are_told_by_their_suffix_in_any_case_and_hidden_ones_are_left_out(tmp_path):
    images = ["a/1.JPG", "a/2.Jpeg", "a/3.jpe", "a/4.JFIF", "a/5.png", "a/6.GIF", "a/7.bmp", "a/8.WebP", "a/9.tiff"]
    others = ["a/.hidden.jpg", "a/.cache/1.jpg", ".git/1.jpg", "a/Thumbs.db", "a/readme.txt", "a/jpg", "1.jpg"]
    images += ["a/10.heic", "a/x.tar.jpg"]
    assert set(load(f"folder:{put(tmp_path, *images, *others)}").ids) == set(images)


def test_names_in_any_script_and_with_spaces(tmp_path):
    names = ["红 色/一 张.jpg", "grün/ä ö,ü;.jpg", '🐶/it\'s "it".jpg', "%20/#?&=.jpg"]
    source = load(f"folder:{put(tmp_path / '我的 照片', *names)}")
    assert sorted(source.ids) == sorted(names)
    assert source.class_names == tuple(sorted(name.split("/")[0] for name in names))
    assert [content.decode() for _, content in source.read(range(4))] == list(source.ids)
    assert source.name == "我的_照片"


def test_a_name_that_macos_wrote_apart_has_the_id_that_others_write(tmp_path):
    apart, together = (unicodedata.normalize(form, "Café/Éclair.jpg") for form in ("NFD", "NFC"))
    assert apart != together
    source = load(f"folder:{put(tmp_path, apart)}")
    assert source.ids == [together]
    assert source.class_names == ("Café",)
    assert [content for _, content in source.read([0])] == [apart.encode()]


def test_one_class_in_two_spellings_is_one_class(tmp_path):
    apart, together = (unicodedata.normalize(form, "é") for form in ("NFD", "NFC"))
    source = load(f"folder:{put(tmp_path, f'train/{apart}/1.jpg', f'val/{together}/2.jpg')}")
    assert source.class_names == (together,)


@pytest.mark.parametrize("space", ["\u3000", "\u00a0", "\u200b", "\u200d"])
def test_a_class_name_may_hold_any_space_that_unicode_has(tmp_path, space):
    source = load(f"folder:{put(tmp_path, f'红{space}色/1.jpg')}")
    assert source.class_names == (f"红{space}色",)


@pytest.mark.parametrize("letter", ["\n", "\r", "\t", "\x00", "\u2028", "\x85", "\x1b"])
def test_a_class_name_with_a_control_character_is_refused(tmp_path, letter):
    put(tmp_path, "1.jpg")
    (tmp_path / "m.csv").write_text(f'path,label\n1.jpg,"x{letter}y"\n', encoding="utf-8", newline="")
    assert "has a line break or control character. Rename it." in error_of(f"csv:{tmp_path / 'm.csv'}")


def test_links_are_followed_and_circles_end(tmp_path):
    put(tmp_path / "elsewhere", "cats/1.jpg", "2.jpg")
    put(tmp_path / "data", "dogs/1.jpg", "dogs/in/3.jpg")
    (tmp_path / "data" / "cats").symlink_to(tmp_path / "elsewhere" / "cats")
    (tmp_path / "data" / "dogs" / "2.jpg").symlink_to(tmp_path / "elsewhere" / "2.jpg")
    (tmp_path / "data" / "dogs" / "in" / "up").symlink_to(tmp_path / "data" / "dogs")
    (tmp_path / "data" / "dogs" / "self").symlink_to(tmp_path / "data" / "dogs" / "self")
    assert load(f"folder:{tmp_path / 'data'}").ids == ["cats/1.jpg", "dogs/1.jpg", "dogs/2.jpg", "dogs/in/3.jpg"]


def test_a_link_to_nowhere_is_an_unreadable_image(tmp_path):
    put(tmp_path, "a/1.jpg")
    (tmp_path / "a" / "2.jpg").symlink_to(tmp_path / "gone.jpg")
    source = load(f"folder:{tmp_path}")
    assert dict(source.read([0, 1])) == {0: b"a/1.jpg", 1: b""}


def test_image_files_are_in_order_of_name(tmp_path):
    put(tmp_path, "b.jpg", "a/z.jpg", "a.jpg", "C.jpg", "10.jpg", "9.jpg")
    assert [path.relative_to(tmp_path).as_posix() for path in list_image_files(tmp_path)] == [
        *("10.jpg", "9.jpg", "C.jpg", "a/z.jpg", "a.jpg", "b.jpg"),
    ]


def test_only_some_classes(tmp_path):
    names = ["train/b/1.jpg", "val/a/2.jpg", "train/c/3.jpg", "test/c/4.jpg", "train/a/5.jpg"]
    source = load(f"folder:{put(tmp_path, *names)}", "c", " a")
    assert source.class_names == ("a", "c")
    wanted = [name for name in names if name.split("/")[1] != "b"]
    assert table(source) == {
        name: (name.split("/")[1], ["train", "val", "test"].index(name.split("/")[0])) for name in wanted
    }
    positions = [3, 1]
    assert list(source.read(positions)) == [(number, source.ids[number].encode()) for number in positions]
    assert dict(source.read(range(4))) == {number: one_id.encode() for number, one_id in enumerate(source.ids)}


def test_a_class_that_is_not_there_is_answered_with_the_nearest(tmp_path):
    put(tmp_path, *(f"class{number:02d}/1.jpg" for number in range(12)))
    text = error_of(f"folder:{tmp_path}", "clas01")
    assert text.startswith("--classes: the data has no class 'clas01'. Did you mean: class01")
    assert text.endswith("class08, class09, ....")


def manifest(root: Path, text: str, encoding: str = "utf-8") -> str:
    put(root, "img/1.jpg", "img/2.jpg", "3.jpg", "img/ä, 红.jpg")
    (root / "m.csv").write_bytes(text.encode(encoding))
    return f"csv:{root / 'm.csv'}"


PLAIN = "path,label,split\nimg/1.jpg,b,train\nimg/2.jpg,a,val\n3.jpg,b,test\n"
EXPECTED = {"img/1.jpg": ("b", 0), "img/2.jpg": ("a", 1), "3.jpg": ("b", 2)}


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        pytest.param(PLAIN, "utf-8", id="plain"),
        pytest.param(PLAIN, "utf-8-sig", id="byte order mark"),
        pytest.param(PLAIN.replace("\n", "\r\n"), "utf-8-sig", id="made on Windows"),
        pytest.param(PLAIN.replace("\n", "\r\n").replace(",", "\t"), "utf-16", id="Excel's Unicode text"),
        pytest.param(PLAIN.replace(",", ";"), "utf-8", id="semicolons"),
        pytest.param(PLAIN.replace("/", "\\"), "utf-8", id="backslashes"),
        pytest.param(PLAIN.replace(",", " , "), "utf-8", id="spaces around"),
        pytest.param(PLAIN.replace("path,label,split", "Path,LABEL,Split"), "utf-8", id="header in capitals"),
        pytest.param(PLAIN.replace(",train", ",TRAIN").replace(",val", ",validation"), "utf-8", id="split synonyms"),
        pytest.param(PLAIN.replace(",val", ",valid").replace(",train", ","), "utf-8", id="no split is train"),
        pytest.param(PLAIN.replace("img/", "./img/../img//"), "utf-8", id="roundabout paths"),
        pytest.param(PLAIN.replace("\n", "\n\n"), "utf-8", id="empty lines"),
        pytest.param(PLAIN.rstrip("\n"), "utf-8", id="no last line break"),
        pytest.param("".join(f"{line},x\n" for line in PLAIN.splitlines()), "utf-8", id="more columns"),
        pytest.param(
            "split,note,label,path\ntrain,,b,img/1.jpg\nval,,a,img/2.jpg\ntest,,b,3.jpg\n", "utf-8", id="another order"
        ),
    ],
)
def test_a_manifest_in_every_dress_is_the_same_data(tmp_path, text, encoding):
    source = load(manifest(tmp_path, text, encoding))
    assert table(source) == EXPECTED
    assert source.class_names == ("a", "b")
    assert [content.decode() for _, content in source.read(range(3))] == list(source.ids)


def test_paths_are_taken_from_the_manifests_folder_wherever_one_stands(tmp_path, monkeypatch):
    dataset = manifest(tmp_path / "there", PLAIN)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for one in (dataset, "csv:../there/m.csv"):
        assert dict(load(one).read([0])) == {0: b"img/1.jpg"}


def test_paths_may_be_absolute_and_quoted(tmp_path):
    dataset = manifest(tmp_path, f'path,label\n{tmp_path}/3.jpg,a\n"img/ä, 红.jpg","b, c"\n')
    source = load(dataset)
    assert source.ids == [f"{tmp_path}/3.jpg", "img/ä, 红.jpg"]
    assert source.class_names == ("a", "b, c")
    assert dict(source.read([0, 1])) == {0: b"3.jpg", 1: "img/ä, 红.jpg".encode()}


def test_a_missing_file_is_an_unreadable_image(tmp_path):
    source = load(manifest(tmp_path, PLAIN.replace("3.jpg", "gone.jpg")))
    assert source.ids[2] == "gone.jpg"
    assert dict(source.read([2])) == {2: b""}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path,label\n3.jpg,a\nimg/../3.jpg,b\n", "lines 2 and 3 name 3.jpg, with the labels a and b."),
        ("path,label\nimg/1.jpg,a\nimg\\1.jpg,a\n", "lines 2 and 3 name img/1.jpg. Delete one of them."),
        ("path,label\n3.jpg,a\n,b\n", "m.csv line 3 has no path. Fill it in or delete it."),
        ("path,label\n\n3.jpg,a\n\nimg/1.jpg,\n", "m.csv line 5 has no label."),
        ('path,label,note\n3.jpg,a,"two\nlines"\nimg/1.jpg,,x\n', "m.csv line 4 has no label."),
        ("path,label,split\n3.jpg,a,holdout\n", "line 2: split 'holdout' is not known. Allowed: train, val, test."),
        ("3.jpg,a\nimg/1.jpg,b\n", "m.csv begins with '3.jpg,a'. Expected the columns path,label[,split]."),
        ("", "m.csv begins with ''. Expected the columns path,label[,split]."),
    ],
)
def test_a_line_that_says_too_little_is_named(tmp_path, text, expected):
    assert expected in error_of(manifest(tmp_path, text))


def test_a_file_that_vanished_or_may_not_be_read_gives_no_bytes(tmp_path):
    put(tmp_path, "1.jpg")
    (tmp_path / "folder.jpg").mkdir()
    paths = [str(tmp_path / name) for name in ("1.jpg", "gone.jpg", "folder.jpg")]
    assert list(read_files(paths, [2, 0, 1])) == [(2, b""), (0, b"1.jpg"), (1, b"")]


def test_files_are_read_a_little_ahead_and_no_further(tmp_path, monkeypatch):
    started, lock = [], threading.Lock()

    def note(path: str) -> bytes:
        with lock:
            started.append(path)
        return path.encode()

    monkeypatch.setattr(sources, "_read_file", note)
    paths = [str(number) for number in range(10_000)]
    asked = []

    def positions():
        for number in range(10_000):
            asked.append(number)
            yield number

    reader = read_files(paths, positions())
    assert not started
    for number in range(500):
        assert next(reader) == (number, str(number).encode())
        assert len(asked) <= number + 64
        assert len(started) <= number + 64
    reader.close()
    assert len(started) < 600


def test_the_digits_are_those_of_scikit_learn():
    source, digits = load("digits"), load_digits()
    assert len(source.ids) == len(set(source.ids)) == 1797
    assert source.class_names == tuple("0123456789")
    np.testing.assert_array_equal(source.labels, digits.target)
    assert not source.splits.any()
    positions = [1796, 0, 7]
    for position, (found, content) in zip(positions, source.read(positions), strict=True):
        assert found == position
        pixels = tf.io.decode_png(content).numpy()[..., 0]
        np.testing.assert_array_equal(pixels, np.round(digits.images[position] / 16 * 255))


def test_only_some_digits():
    source = load("digits", "3", "8")
    assert source.class_names == ("3", "8")
    counts = np.bincount(load_digits().target)
    assert np.bincount(source.labels).tolist() == [counts[3], counts[8]]


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    put(tmp_path, "a/1.jpg")

    def refuse(self):
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(Path, "iterdir", refuse)  # root reads everything
    assert error_of(f"folder:{tmp_path}").endswith("can't be read: Permission denied. Check its permissions.")


def test_a_flat_folder_is_read_without_labels_where_that_will_do(tmp_path):
    put(tmp_path, "b.jpg", "a.png", ".hidden.jpg", "notes.txt")
    source = load_source(f"folder:{tmp_path}", data_dir=None, allow_unlabeled=True)
    assert (source.ids, source.class_names) == (["a.png", "b.jpg"], ())
    assert source.labels.tolist() == source.splits.tolist() == [0, 0]
    assert dict(source.read([0, 1])) == {0: b"a.png", 1: b"b.jpg"}
    assert "no images in" in error_of(f"folder:{tmp_path}")


def test_class_folders_stay_classes_where_labels_are_not_needed(tmp_path):
    put(tmp_path, "x/1.jpg", "y/1.jpg")
    source = load_source(f"folder:{tmp_path}", data_dir=None, allow_unlabeled=True)
    assert source.class_names == ("x", "y")


def test_a_manifest_without_labels_will_do_where_none_are_needed(tmp_path):
    put(tmp_path, "1.jpg", "2.jpg")
    (tmp_path / "m.csv").write_text("path,split\n2.jpg,test\n1.jpg,train\n")
    source = load_source(f"csv:{tmp_path / 'm.csv'}", data_dir=None, allow_unlabeled=True)
    assert (source.ids, source.class_names, source.splits.tolist()) == (["2.jpg", "1.jpg"], (), [2, 0])
    assert "Expected the columns path,label[,split]" in error_of(f"csv:{tmp_path / 'm.csv'}")


def test_classes_are_asked_of_images_that_have_none(tmp_path):
    put(tmp_path, "1.jpg")
    with pytest.raises(UserError, match=r"^--classes: the data has no ") as error:
        load_source(f"folder:{tmp_path}", data_dir=None, classes=("red",), allow_unlabeled=True)
    assert "Classes: ." not in str(error.value)


def test_an_image_beside_class_folders_is_no_class(tmp_path):
    put(tmp_path, "1.jpg", "x/2.jpg", "y/3.jpg")
    source = load_source(f"folder:{tmp_path}", data_dir=None, allow_unlabeled=True)
    assert source.ids == ["x/2.jpg", "y/3.jpg"]


def test_a_folder_without_any_image_is_refused_with_labels_or_without(tmp_path):
    put(tmp_path, "notes.txt")
    with pytest.raises(UserError, match=r"^no images in "):
        load_source(f"folder:{tmp_path}", data_dir=None, allow_unlabeled=True)


def test_a_label_that_is_missing_in_one_line_is_missed_all_the_same(tmp_path):
    put(tmp_path, "1.jpg", "2.jpg")
    (tmp_path / "m.csv").write_text("path,label\n1.jpg,x\n2.jpg,\n")
    with pytest.raises(UserError, match="line 3 has no label"):
        load_source(f"csv:{tmp_path / 'm.csv'}", data_dir=None, allow_unlabeled=True)
