"""Examples: every file read once, the broken ones named and left out, too many of them refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from tl_keras.data.examples import Examples, draw_shots, scan, split_source
from tl_keras.data.sources import Source
from tl_keras.data.splits import UNUSED
from tl_keras.errors import UserError

GOOD = b"\xff\xd8\xff"  # a JPEG's first bytes; scan looks at no more


class Memory:
    """A source of contents given, which notes what is read."""

    def __init__(self, contents: list[bytes], splits: list[int] | None = None) -> None:
        self.contents, self.asked = contents, []
        count = len(contents)
        self.source = Source(
            "memory",
            [f"{number}.jpg" for number in range(count)],
            np.arange(count, dtype=np.int32) % 2,
            ("even", "odd"),
            np.array(splits or [0] * count, np.int8),
            self.read,
        )

    def read(self, positions: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        for position in sorted(map(int, positions), reverse=True):  # in any order
            self.asked.append(position)
            yield position, self.contents[position]


def look(memory: Memory, splits: np.ndarray, limit: float = 1.0) -> tuple[Examples, list, list[str]]:
    rows, shown = [], []
    examples = scan(
        memory.source, splits, max_broken_fraction=limit, show_progress=shown.append, report=lambda x: rows.append(x)
    )
    return examples, rows, shown


def test_every_used_image_is_read_once_and_known_by_its_bytes():
    memory = Memory([GOOD + bytes([number]) for number in range(6)])
    examples, rows, shown = look(memory, np.array([0, 1, 2, UNUSED, 0, 0], np.int8))
    assert sorted(memory.asked) == [0, 1, 2, 4, 5]
    for position in (0, 1, 2, 4, 5):
        assert examples.digests[position].tobytes() == hashlib.sha256(memory.contents[position]).digest()
    assert examples.digests[3].tobytes() == bytes(32)
    assert (rows, examples.broken) == ([], {})
    assert shown[-1] == "reading images 5/5"
    assert examples.positions("train").tolist() == [0, 4, 5]
    assert examples.ids("val") == ["1.jpg"]
    assert examples.labels("train").tolist() == [0, 0, 1]
    assert examples.class_names == ("even", "odd")


def test_broken_images_are_named_with_their_reason_and_left_out():
    memory = Memory([GOOD, b"", b"no image", GOOD, b"II*\0tiff"])
    examples, rows, _ = look(memory, np.array([0, 0, 1, 2, 2], np.int8))
    assert [(one_id, reason.split(":")[0]) for one_id, reason in rows[0]] == [
        ("1.jpg", "empty or unreadable file"),
        ("2.jpg", "not an image"),
        ("4.jpg", "TIFF is not supported by TensorFlow"),
    ]
    assert examples.splits.tolist() == [0, UNUSED, UNUSED, 2, UNUSED]
    assert examples.broken == {1: rows[0][0][1], 2: rows[0][1][1], 4: rows[0][2][1]}
    for position in (1, 2, 4):
        assert examples.digests[position].tobytes() == bytes(32)


@pytest.mark.parametrize(("broken", "is_refused"), [(0, False), (2, False), (3, True), (20, True)])
def test_more_broken_ones_than_allowed_stop_the_run_after_they_were_reported(broken, is_refused):
    memory = Memory([b""] * broken + [GOOD] * (20 - broken))
    rows = []
    arguments = {"max_broken_fraction": 0.1, "show_progress": lambda text: None, "report": rows.append}
    if not is_refused:
        assert len(scan(memory.source, np.zeros(20, np.int8), **arguments).broken) == broken
        return
    with pytest.raises(UserError) as error:
        scan(memory.source, np.zeros(20, np.int8), **arguments)
    assert str(error.value) == (
        f"{broken} of 20 images are broken, more than --max_broken_fraction=0.1. The first is 0.jpg: empty or "
        "unreadable file. Repair or remove the images that broken.csv in the run folder lists, or allow more with a "
        "larger --max_broken_fraction."
    )
    assert len(rows[0]) == broken


def test_the_share_is_taken_of_those_in_use():
    memory = Memory([b""] + [GOOD] * 99)
    splits = np.full(100, UNUSED, np.int8)
    splits[:5] = 0
    with pytest.raises(UserError, match=r"^1 of 5 images are broken"):
        look(memory, splits, limit=0.1)


def test_a_folder_of_nothing_but_broken_files_is_not_read_to_its_end():
    memory = Memory([b""] * 1000)
    with pytest.raises(UserError, match=r"501 of 1000 images are broken"):
        look(memory, np.zeros(1000, np.int8), limit=0.01)
    assert len(memory.asked) == 501


def test_many_broken_ones_are_allowed_where_all_are_allowed():
    memory = Memory([b""] * 900 + [GOOD] * 100)
    examples, rows, _ = look(memory, np.zeros(1000, np.int8), limit=1.0)
    assert len(examples.positions("train")) == 100
    assert len(rows[0]) == 900


def test_without_leaves_out_more_and_counts_both():
    memory = Memory([b"", GOOD, GOOD, GOOD, GOOD])
    examples, _, _ = look(memory, np.array([0, 0, 0, 1, 2], np.int8))
    rows = []
    left = examples.without({2: "half a JPEG"}, max_broken_fraction=0.4, report=rows.append)
    assert rows == [[("0.jpg", "empty or unreadable file"), ("2.jpg", "half a JPEG")]]
    assert left.splits.tolist() == [UNUSED, 0, UNUSED, 1, 2]
    assert examples.splits.tolist() == [UNUSED, 0, 0, 1, 2]
    assert sorted(left.broken) == [0, 2]
    with pytest.raises(UserError, match=r"^3 of 5 images are broken, more than --max_broken_fraction=0\.4\."):
        left.without({4: "half a JPEG"}, max_broken_fraction=0.4, report=rows.append)


def test_without_any_changes_and_reports_nothing():
    examples, _, _ = look(Memory([GOOD] * 3), np.zeros(3, np.int8))
    rows = []
    same = examples.without({}, max_broken_fraction=0, report=rows.append)
    np.testing.assert_array_equal(same.splits, examples.splits)
    assert rows == []


def test_shots_are_drawn_after_the_split_and_warnings_are_of_all():
    source = Memory([GOOD] * 400).source
    splits, warnings = split_source(source, val_fraction=0.2, test_fraction=0.2, shots=3, seed=1)
    everything, _ = split_source(source, val_fraction=0.2, test_fraction=0.2, shots=None, seed=1)
    assert warnings == []
    assert np.bincount(source.labels[splits == 0]).tolist() == [3, 3]
    np.testing.assert_array_equal(splits[everything > 0], everything[everything > 0])


def test_a_draw_changes_neither_val_nor_test_nor_what_it_is_drawn_from():
    splits = np.array([0, 0, 0, 0, 0, 0, 1, 1, 2, 2], np.int8)
    examples = Examples(Memory([GOOD] * 10).source, splits, np.zeros(10, "V32"), {})
    drawn = draw_shots(examples, shots=1, seed=0)
    assert np.bincount(drawn.labels("train")).tolist() == [1, 1]
    np.testing.assert_array_equal(drawn.splits[6:], splits[6:])
    np.testing.assert_array_equal(examples.splits, [0] * 6 + [1, 1, 2, 2])
    with pytest.raises(UserError, match=r"^--shots=4 is more than the smallest class has in train, which is 3\."):
        draw_shots(examples, shots=4, seed=0)


def test_the_examples_of_several_draws_are_kept_and_each_draw_is_found_in_them():
    memory = Memory([GOOD] * 60)
    split = {"val_fraction": 0.2, "test_fraction": 0.2}
    union, _ = split_source(memory.source, **split, shots=3, seed=5, draws=4)
    examples = Examples(memory.source, union, np.zeros(60, "V32"), {})
    drawn = []
    for seed in range(5, 9):
        alone, _ = split_source(memory.source, **split, shots=3, seed=seed)
        again = draw_shots(examples, shots=3, seed=seed)
        np.testing.assert_array_equal(again.splits, alone)
        drawn.append(set(again.positions("train").tolist()))
        assert len(drawn[-1]) == 6
    assert set(examples.positions("train").tolist()) == set().union(*drawn)
    assert len(set().union(*drawn)) > 6
