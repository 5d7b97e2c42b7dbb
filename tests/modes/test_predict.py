"""Predicting: which images are found, and a CSV that is whole or not there."""

from __future__ import annotations

import csv
import errno
import functools
import io
import os
import stat
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import COLOURS, make_image, run_main, write_image
from tl_keras.classifier import LoadedClassifier, load
from tl_keras.modes import predict

HEADER = (
    "id,predicted,probability,label_2,probability_2,label_3,probability_3,label_4,probability_4,label_5,probability_5,"
    "error"
)
load_once = functools.cache(load)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(predict, "load", load_once)


@pytest.fixture
def put(tmp_path):
    """Writes images of one colour each, and gives their paths."""

    def write(*names: str, colour: str = "red") -> list[str]:
        return [str(write_image(tmp_path / name, make_image(1, COLOURS[colour]))) for name in names]

    return write


def run(trained, images, *flags: str) -> int:
    return run_main("--mode=predict", f"--classifier={trained[1]}", f"--images={images}", *flags)


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))


@pytest.fixture
def ids(trained, capsys):
    """Classifies to standard output, and gives the ids."""

    def find(images: object) -> list[str]:
        assert run(trained, images) == 0
        return [row["id"] for row in rows_of(capsys.readouterr().out)]

    return find


# which images


def test_a_folder_gives_the_images_below_it_in_order_of_name(ids, put, tmp_path):
    put("in/b.jpg", "in/a/2.PNG", "in/a/10.jpeg", "in/.hidden.jpg", "in/.cache/x.jpg")
    (tmp_path / "in" / "notes.txt").write_text("x")
    assert ids(tmp_path / "in") == [f"{tmp_path}/in/{name}" for name in ("a/10.jpeg", "a/2.PNG", "b.jpg")]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jpg", ["a.jpg", "b.jpg"]),
        ("*", ["a.jpg", "b.jpg", "c.png"]),
        ("?.p[nx]g", ["c.png"]),
        ("**/*.jpg", ["a.jpg", "b.jpg", "deep/er/d.jpg"]),
        ("*/er/*", ["deep/er/d.jpg"]),
        ("[bc].*", ["b.jpg", "c.png"]),
    ],
)
def test_a_glob_gives_the_files_that_match_in_order_of_name(ids, put, tmp_path, pattern, names):
    put("c.png", "b.jpg", "a.jpg", "deep/er/d.jpg")
    assert ids(tmp_path / pattern) == [f"{tmp_path}/{name}" for name in names]


def test_rows_can_go_into_a_pipe(trained, put, tmp_path):
    put("a.jpg")
    pipe, seen = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: seen.extend(pipe.read_text().splitlines()))
    reader.start()
    flags = (f"--classifier={trained[0]}", f"--images={tmp_path / 'a.jpg'}", f"--output={pipe}")
    assert run_main("--mode=predict", *flags) == 0
    reader.join(60)
    assert len(seen) == 2
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_several_patterns_are_in_the_order_given_and_no_image_is_twice(ids, put, tmp_path):
    a, b, c = put("x/a.jpg", "x/b.jpg", "y/c.jpg")
    assert ids(f"{c},{tmp_path}/x/*.jpg, {a},{tmp_path}/x,{tmp_path}/./y/c.jpg") == [c, a, b]


def test_a_file_is_taken_whatever_its_suffix(ids, put, tmp_path):
    (path,) = put("x.png")
    os.rename(path, tmp_path / "upload")
    assert ids(tmp_path / "upload") == [f"{tmp_path}/upload"]


@pytest.mark.parametrize("name", ["a[1].jpg", "what?.jpg", "*.jpg", "my photo.jpg", "红 色.jpg", "#5.jpg", "it's.jpg"])
def test_a_name_that_exists_is_no_glob(ids, put, name):
    path, _ = put(name, "a1.jpg")
    assert ids(path) == [path]


def test_a_comma_or_quote_in_a_name_is_quoted_as_in_csv(ids, put):
    comma, quote, plain = put("a,b.jpg", 'say "no".jpg', "c.jpg")
    doubled = quote.replace('"', '""')
    assert ids(f'"{comma}","{doubled}",{plain}') == [comma, quote, plain]


def test_a_line_break_in_a_name_breaks_no_row(ids, put, tmp_path):
    put("two\nlines.jpg", "cr\rhere.jpg", "crlf\r\nhere.jpg")
    assert ids(tmp_path) == [f"{tmp_path}/{name}" for name in ("cr\rhere.jpg", "crlf\r\nhere.jpg", "two\nlines.jpg")]


def test_the_home_is_expanded(ids, put, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (path,) = put("a.jpg")
    assert ids("~/*.jpg") == ids("~/a.jpg") == [path]


def test_relative_paths_stay_relative(ids, put, tmp_path, monkeypatch):
    put("in/a.jpg")
    monkeypatch.chdir(tmp_path)
    assert ids("in") == ids("in/*.jpg") == ids("./in/a.jpg") == ["in/a.jpg"]


@pytest.mark.parametrize("missing", ["none.jpg", "*.gif", "empty", "**/*.tif"])
def test_a_pattern_that_finds_nothing_is_named_before_anything_is_written(trained, put, tmp_path, capsys, missing):
    (path,) = put("a.jpg")
    (tmp_path / "empty").mkdir()
    assert run(trained, f"{path},{tmp_path}/{missing}", f"--output={tmp_path}/o.csv") == 1
    assert capsys.readouterr().err == (
        f"tl_keras: error: --images={tmp_path}/{missing} matches no image. Give files, folders or glob patterns, "
        "comma-separated.\n"
    )
    assert not list(tmp_path.glob("o.csv*"))


# rows


def test_rows_are_what_the_classifier_predicts(trained, put, tmp_path):
    paths = [*put("a.jpg"), *put("b.jpg", colour="green"), *put("c.jpg", colour="blue")]
    assert run(trained, ",".join(paths), f"--output={tmp_path}/o.csv") == 0
    rows = rows_of((tmp_path / "o.csv").read_text())
    assert [row["predicted"] for row in rows] == ["red", "green", "blue"]
    for row, prediction in zip(rows, load_once(str(trained[1])).predict(paths), strict=True):
        for rank, (label, score) in enumerate(zip(prediction["labels"], prediction["scores"], strict=True), start=1):
            assert row["predicted" if rank == 1 else f"label_{rank}"] == label
            assert row["probability" if rank == 1 else f"probability_{rank}"] == str(round(score, 6))
        assert row["label_4"] == row["probability_4"] == row["label_5"] == row["probability_5"] == row["error"] == ""


def test_the_csv_is_the_contracts_to_the_byte(trained, put, tmp_path):
    (path,) = put("a.jpg")
    (tmp_path / "b.jpg").write_bytes(b"no image")
    assert run(trained, f"{path},{tmp_path}/b.jpg,{tmp_path}/b.jpg", f"--output={tmp_path}/o.csv") == 0
    lines = (tmp_path / "o.csv").read_bytes().decode().split("\n")
    assert lines[0] == HEADER
    assert lines[1].startswith(f"{path},red,0.")
    assert lines[1].endswith(",,,,,")
    assert lines[2:] == [
        f'{tmp_path}/b.jpg,,,,,,,,,,,"not an image: supported formats are JPEG, PNG, GIF, BMP and WebP"',
        "",
    ]


def test_many_images_are_in_order_over_all_batches_the_broken_ones_among_them(trained, put, tmp_path, capsys):
    names = [f"{number:03d}.jpg" for number in range(75)]
    colours = [list(COLOURS)[number * number % 3] for number in range(75)]
    for name, colour in zip(names, colours, strict=True):
        put(name, colour=colour)
    for number in (0, 31, 32, 74):
        (tmp_path / names[number]).write_bytes(b"")
    assert run(trained, tmp_path, f"--output={tmp_path}/out/o.csv") == 0
    rows = rows_of((tmp_path / "out" / "o.csv").read_text())
    assert [Path(row["id"]).name for row in rows] == names
    for number, row in enumerate(rows):
        is_broken = number in (0, 31, 32, 74)
        assert row["predicted"] == ("" if is_broken else colours[number])
        assert row["error"] == ("empty or unreadable file" if is_broken else "")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1] == (
        f"71 images classified, 4 broken (see the column error) · {tmp_path}/out/o.csv"
    )


def test_a_file_that_is_gone_when_its_turn_comes_is_a_broken_one(trained, put, tmp_path, monkeypatch, capsys):
    paths = put("a.jpg", "b.jpg")
    find = predict.find_images

    def find_and_lose(patterns):
        found = find(patterns)
        os.remove(paths[0])
        return found

    monkeypatch.setattr(predict, "find_images", find_and_lose)
    assert run(trained, tmp_path) == 0
    rows = rows_of(capsys.readouterr().out)
    assert [(row["predicted"], row["error"]) for row in rows] == [("", "empty or unreadable file"), ("red", "")]


def test_without_a_single_classified_image_the_status_is_1(trained, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "in" / name).write_bytes(b"no image")
    assert run(trained, tmp_path / "in") == 1
    told = capsys.readouterr()
    assert [bool(row["error"]) for row in rows_of(told.out)] == [True, True]
    assert told.err == "0 images classified, 2 broken (see the column error)\n"


# where it is written


def test_standard_output_is_the_csv_and_nothing_else(trained, put, capfd):
    (path,) = put("a.jpg")
    assert run(trained, path) == 0
    out, error = capfd.readouterr()
    assert out.splitlines()[0] == HEADER
    assert len(out.splitlines()) == 2
    assert error == "1 image classified\n"


def test_a_name_that_is_no_utf8_is_written_as_it_is(trained, put, tmp_path, capfdbinary):
    (path,) = put("x.jpg")
    name = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    os.rename(path, name)
    assert run(trained, tmp_path) == 0
    assert capfdbinary.readouterr().out.splitlines()[1].startswith(name + b",red,0.")
    assert run(trained, os.fsdecode(name), f"--output={tmp_path}/o.csv") == 0
    assert (tmp_path / "o.csv").read_bytes().splitlines()[1].startswith(name + b",red,0.")


def test_the_folder_of_the_output_is_made(trained, put, tmp_path):
    (path,) = put("a.jpg")
    assert run(trained, path, f"--output={tmp_path}/not/yet/红.csv") == 0
    assert [one.name for one in (tmp_path / "not" / "yet").iterdir()] == ["红.csv"]


def test_an_earlier_output_is_replaced(trained, put, tmp_path):
    (path,) = put("a.jpg")
    (tmp_path / "o.csv").write_text("old\n" * 1000)
    (tmp_path / "o.csv.unfinished").write_text("older\n" * 1000)
    assert run(trained, path, f"--output={tmp_path}/o.csv") == 0
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 2
    assert not (tmp_path / "o.csv.unfinished").exists()


@pytest.mark.parametrize(
    ("output", "text"),
    [
        ("file/o.csv", "{}/file/o.csv can't be written: "),
        ("folder", "--output={}/folder is a folder. Give the name of a file in it: predictions.csv."),
        ("folder/", "--output={}/folder/ is a folder."),
    ],
)
def test_an_output_that_cannot_be_written_is_told_before_anything_is_classified(
    trained, put, tmp_path, capsys, monkeypatch, output, text
):
    (path,) = put("a.jpg")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(LoadedClassifier, "predict_batches", None)
    assert run(trained, path, f"--output={tmp_path}/{output}") == 1
    assert capsys.readouterr().err.startswith("tl_keras: error: " + text.format(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


def interrupt_after(batches: int, error: BaseException):
    original = LoadedClassifier.predict_batches

    def predict_batches(self, contents):
        for number, batch in enumerate(original(self, contents)):
            if number == batches:
                raise error
            yield batch

    return predict_batches


@pytest.mark.parametrize("earlier", [None, "the earlier one"])
def test_an_interrupted_run_never_leaves_half_a_csv_under_its_name(trained, put, tmp_path, monkeypatch, earlier):
    put(*(f"in/{number:02d}.jpg" for number in range(40)))
    output = tmp_path / "o.csv"
    if earlier:
        output.write_text(earlier)
    monkeypatch.setattr(LoadedClassifier, "predict_batches", interrupt_after(1, KeyboardInterrupt()))
    assert run(trained, tmp_path / "in", f"--output={output}") == 130
    assert (output.read_text() if output.exists() else None) == earlier
    kept = (tmp_path / "o.csv.unfinished").read_text()
    assert [Path(row["id"]).name for row in rows_of(kept)] == [f"{number:02d}.jpg" for number in range(32)]


def test_rows_are_out_as_soon_as_their_batch_is_done(trained, put, tmp_path, monkeypatch):
    put(*(f"in/{number:02d}.jpg" for number in range(70)))
    lengths = []
    original = LoadedClassifier.predict_batches

    def predict_batches(self, contents):
        for batch in original(self, contents):
            lengths.append((tmp_path / "o.csv.unfinished").read_text().count("\n"))
            yield batch

    monkeypatch.setattr(LoadedClassifier, "predict_batches", predict_batches)
    assert run(trained, tmp_path / "in", f"--output={tmp_path}/o.csv") == 0
    assert lengths[1:] == [33, 65]


@pytest.mark.parametrize("output", ["--output={}/o.csv", ""])
def test_a_full_disk_is_one_line(trained, put, tmp_path, monkeypatch, capsys, output):
    (path,) = put("a.jpg")

    class Full:
        def writerow(self, row):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(predict, "csv_writer", lambda file: Full())
    assert run(trained, path, *filter(None, [output.format(tmp_path)])) == 1
    what = f"{tmp_path}/o.csv" if output else "standard output"
    assert capsys.readouterr().err == (
        f"tl_keras: error: the disk is full: {what} could not be written. Free some space and run again.\n"
    )
    assert not (tmp_path / "o.csv").exists()


def test_whoever_reads_no_more_ends_the_run_quietly(trained, put, capfd, monkeypatch):
    (path,) = put("a.jpg")

    class Closed:
        def writerow(self, row):
            raise BrokenPipeError

    monkeypatch.setattr(predict, "csv_writer", lambda file: Closed())
    saved = os.dup(1)
    try:
        assert run(trained, path) == 0
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    assert capfd.readouterr().err == ""


def test_a_missing_classifier_is_told_before_an_output_is_made(put, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict, "load", load)
    (path,) = put("a.jpg")
    assert (
        run_main("--mode=predict", f"--classifier={tmp_path}/x", f"--images={path}", f"--output={tmp_path}/o.csv") == 1
    )
    assert "x does not exist" in capsys.readouterr().err
    assert not list(tmp_path.glob("o.csv*"))


def test_probabilities_have_six_digits(trained, put, tmp_path):
    (path,) = put("a.jpg")
    assert run(trained, path, f"--output={tmp_path}/o.csv") == 0
    (row,) = rows_of((tmp_path / "o.csv").read_text())
    values = [float(row[name]) for name in ("probability", "probability_2", "probability_3")]
    assert np.sum(values) == pytest.approx(1, abs=3e-6)
    assert all(len(row[name].split(".")[1]) <= 6 for name in ("probability", "probability_2") if "e" not in row[name])
