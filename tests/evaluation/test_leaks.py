"""Images that a run was made of, among those that are evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tl_keras.data.examples import Examples
from tl_keras.data.sources import Source
from tl_keras.errors import UserError
from tl_keras.evaluation.leaks import (
    EarlierImages,
    RunImages,
    compare_without,
    measure_seen,
    read_digests,
    read_earlier_images,
    read_leaked,
    read_run_images,
    read_trained_on,
    write_earlier_images,
)


def digest(name: str) -> bytes:
    return name.encode().ljust(32, b".")


def write_run(folder: Path, rows: list[tuple[str, str]], leaks: object = None) -> Path:
    """A run of these ids and splits; the content is told by the id's first letter."""
    folder.mkdir()
    (folder / "splits.csv").write_text("id,split,label\n" + "".join(f"{name},{split},x\n" for name, split in rows))
    digests = [np.frombuffer(digest(name[0]), np.uint8) for name, _ in rows]
    np.save(folder / "digests.npy", np.array(digests))
    (folder / "metrics.json").write_text(json.dumps({"audit": {"leaks": leaks}}))
    return folder


def make_examples(*names: str) -> Examples:
    """All test, labelled 0."""
    count = len(names)
    source = Source(
        "s", names, np.zeros(count, np.int32), ("x", "y"), np.full(count, 2, np.int8), lambda positions: iter(())
    )
    digests = np.frombuffer(b"".join(digest(name[0]) for name in names), "V32")
    return Examples(source, np.full(count, 2, np.int8), digests, {})


RIGHT = np.array([[0.9, 0.1]])


@pytest.mark.parametrize(
    ("fitted", "seen", "chosen"), [({"train"}, 2, 1), ({"train", "val"}, 3, 0)], ids=["train", "both"]
)
def test_training_images_and_copies_of_them_are_seen_and_val_was_chosen_on(tmp_path, fitted, seen, chosen):
    rows = [("a1", "train"), ("v1", "val"), ("t1", "test"), ("w1", "test")]
    copies = {"train": ["t1"], "val": ["w1"], "test": []}  # w1 has a copy in val alone
    run = write_run(tmp_path / "run", rows, {"copies_in": copies})
    trained = read_trained_on(run, fitted, [])
    examples = make_examples("a9", "t9", "w9", "n9")
    assert trained.seen(examples, "test").tolist() == [True, True, "val" in fitted, False]
    assert trained.chosen_on(examples, "test").sum() == chosen
    leaks, told = measure_seen(trained, examples, {"test": np.repeat(RIGHT, 4, axis=0)})
    assert leaks["test"]["leaked"] == seen
    assert told[0].startswith(
        f"warning: the classifier was trained on {seen} of the 4 test images, or on copies of them;"
    )
    assert len(told) == 1 + chosen


def test_an_earlier_run_counts_by_content_and_not_by_its_ids(tmp_path):
    run = write_run(tmp_path / "run", [("a1", "train")])
    earlier = write_run(tmp_path / "earlier", [("b1", "train"), ("c1", "val"), ("d1", "train")])
    trained = read_trained_on(run, {"train"}, [read_run_images(earlier)])
    examples = make_examples("b2", "c2", "x1")
    assert trained.seen(examples, "test").tolist() == [True, False, False]
    _, told = measure_seen(trained, make_examples("x2", "a1", "d1"), {"test": np.repeat(RIGHT, 3, axis=0)})
    assert len(told) == 1  # d1 is no id of this run


def test_images_of_earlier_runs_are_recorded(tmp_path):
    first = RunImages("runs/a", {digest("a"), digest("b")}, {digest("c")})
    earlier = EarlierImages([first, RunImages("runs/红", {digest("a")}, set())], ["runs/gone is gone"], "imagenet")
    assert read_earlier_images(tmp_path) is None
    for one in (earlier, EarlierImages([], [], "a.weights.h5")):
        write_earlier_images(tmp_path, one)
        assert read_earlier_images(tmp_path) == one
    (tmp_path / "earlier_images.npz").write_bytes(b"PK half")
    with pytest.raises(UserError, match="earlier_images.npz is damaged. Train again"):
        read_earlier_images(tmp_path)


def test_another_image_under_the_id_of_a_trained_one_is_told(tmp_path):
    run = write_run(tmp_path / "run", [("a1", "train")])
    examples = make_examples("a1")
    examples = Examples(examples.source, examples.splits, np.frombuffer(digest("z"), "V32"), {})
    leaks, told = measure_seen(read_trained_on(run, {"train"}, []), examples, {"test": RIGHT})
    assert leaks == {}
    assert told[0].startswith(
        "warning: the classifier was trained on images with the ids of 1 evaluated image, but with different content;"
    )


def test_what_is_not_known_is_not_measured():
    assert measure_seen(None, make_examples("a1"), {"test": RIGHT}) == (None, [])


def test_where_all_leaked_there_is_nothing_without_them():
    found, told = compare_without(np.ones(3, bool), np.array([True, True, False]))
    assert (found["leaked"], found["accuracy_with"]) == (3, 2 / 3)
    assert "accuracy_without" not in found
    assert told == "0.667 [0.208, 0.939] with them"


def test_old_and_odd_folders(tmp_path):
    assert read_leaked(tmp_path, "test") == 0
    for content in ("[]", '{"audit": []}', '{"audit": {"leaks": null}, "leaks": {"test": 3}}', "{"):
        (tmp_path / "metrics.json").write_text(content)
        assert read_leaked(tmp_path, "test") == 0
    (tmp_path / "metrics.json").write_text('{"audit": {"leaks": {"split": "val", "leaked": 2}}}')
    assert (read_leaked(tmp_path, "val"), read_leaked(tmp_path, "test")) == (2, 0)
    with pytest.raises(UserError, match="does not record which images it was trained on"):
        read_digests(tmp_path)
