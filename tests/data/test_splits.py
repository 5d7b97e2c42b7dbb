"""Splits by hash: who is carved, that nobody ever moves, and what is said of classes that lack examples."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from tl_keras.data.splits import SPLITS, UNUSED, carve, check_classes, choose_shots, evaluated_split, hash_fraction
from tl_keras.errors import UserError

IDS = [f"class/{number}.jpg" for number in range(10_000)]
TRAIN, VAL, TEST = range(3)


def given(*, train: int, val: int = 0, test: int = 0) -> np.ndarray:
    return np.repeat(np.arange(3, dtype=np.int8), [train, val, test])


def one_line(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "digest"),  # `printf TEXT | sha256sum | head -c 16`
    [
        ("", "e3b0c44298fc1c14"),
        ("abc", "ba7816bf8f01cfea"),
        ("红/一.jpg", "e2cfe3a4b074d478"),
    ],
)
def test_the_hash_is_the_start_of_sha256(text, digest):
    assert hash_fraction(text) == int(digest, 16) / 2**64


def test_the_figure_quoted_is_tests_where_there_is_a_test():
    assert evaluated_split(["val", "test"]) == evaluated_split({"test": 1}) == "test"
    assert evaluated_split(iter(["train", "val"])) == "val"


def test_a_name_that_is_no_utf8_has_a_hash():
    expected = hashlib.sha256(b"caf\xe9.jpg").digest()[:8]
    assert hash_fraction("caf\udce9.jpg") == int.from_bytes(expected, "big") / 2**64


@pytest.mark.parametrize(
    ("shape", "test_fraction", "expected"),
    [
        pytest.param({"train": 10_000}, None, (0.7, 0.1, 0.2), id="train alone"),
        pytest.param({"train": 10_000}, 0.4, (0.5, 0.1, 0.4), id="train alone, more test"),
        pytest.param({"train": 10_000}, 0.0, (0.9, 0.1, 0.0), id="train alone, no test"),
        pytest.param({"train": 8000, "test": 2000}, None, (0.72, 0.08, 0.2), id="train and test"),
        pytest.param({"train": 8000, "test": 2000}, 0.5, (0.72, 0.08, 0.2), id="train and test, which stays"),
        pytest.param({"train": 8000, "val": 2000}, None, (0.8, 0.2, 0.0), id="train and val"),
        pytest.param({"train": 8000, "val": 2000}, 0.25, (0.6, 0.2, 0.2), id="train and val, test asked for"),
        pytest.param({"train": 6000, "val": 1000, "test": 3000}, None, (0.6, 0.1, 0.3), id="all three"),
        pytest.param({"train": 6000, "val": 1000, "test": 3000}, 0.5, (0.6, 0.1, 0.3), id="all three stay"),
    ],
)
def test_each_shape_of_source_is_carved_as_asked(shape, test_fraction, expected):
    before = given(**shape)
    kept = before.copy()
    splits = carve(IDS, before, val_fraction=0.1, test_fraction=test_fraction)
    np.testing.assert_array_equal(before, kept)
    np.testing.assert_array_equal(splits[before != TRAIN], before[before != TRAIN])
    assert splits.dtype == np.int8
    shares = np.bincount(splits, minlength=3) / len(splits)
    np.testing.assert_allclose(shares, expected, atol=3 * np.sqrt(0.25 / len(IDS)))
    for share, wanted in zip(shares, expected, strict=True):
        assert share == 0 if wanted == 0 else share > 0


def test_the_split_of_an_example_is_read_off_its_hash():
    splits = carve(IDS, given(train=len(IDS)), val_fraction=0.1, test_fraction=0.2)
    for name, split in zip(IDS, splits, strict=True):
        fraction = int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 2**64
        assert SPLITS[split] == ("test" if fraction < 0.2 else "val" if fraction < 0.2 + 0.1 else "train")


def test_new_images_move_no_other_and_their_order_is_no_matter():
    few = [f"{number}.jpg" for number in range(0, 300, 3)]
    many = [f"{number}.jpg" for number in reversed(range(300))]
    options = {"val_fraction": 0.1, "test_fraction": None}
    first = dict(zip(few, carve(few, given(train=100), **options), strict=True))
    second = dict(zip(many, carve(many, given(train=300), **options), strict=True))
    assert first.items() <= second.items()
    assert set(first.values()) == {TRAIN, VAL, TEST}


def test_more_val_takes_from_train_alone():
    small = carve(IDS, given(train=len(IDS)), val_fraction=0.1, test_fraction=0.2)
    large = carve(IDS, given(train=len(IDS)), val_fraction=0.3, test_fraction=0.2)
    np.testing.assert_array_equal(small == TEST, large == TEST)
    assert np.all(large[small == VAL] == VAL)


def test_a_source_without_train_is_told():
    text = one_line(carve, IDS[:3], given(train=0, val=1, test=2), val_fraction=0.1, test_fraction=None)
    assert text.startswith("the data has no train split. Add one")


def draw(shots: int, seed: int = 0) -> np.ndarray:
    labels = np.arange(300) % 3
    splits = given(train=240, val=30, test=30)
    return choose_shots(IDS[:300], labels, splits, shots=shots, seed=seed)


def test_shots_are_so_many_of_each_class_and_leave_val_and_test_alone():
    kept = draw(7)
    labels = np.arange(300) % 3
    assert np.bincount(labels[kept == TRAIN]).tolist() == [7, 7, 7]
    np.testing.assert_array_equal(kept[240:], given(train=0, val=30, test=30))
    assert np.all((kept == TRAIN) | (kept == UNUSED) | (np.arange(300) >= 240))


def test_more_shots_contain_fewer():
    chosen = [set(np.flatnonzero(draw(shots) == TRAIN)) for shots in (1, 2, 5, 20, 80)]
    for fewer, more in zip(chosen, chosen[1:], strict=False):
        assert fewer < more


def test_another_seed_draws_others_and_the_same_seed_the_same():
    np.testing.assert_array_equal(draw(5, seed=1), draw(5, seed=1))
    assert (draw(5, seed=1) != draw(5, seed=2)).any()


def test_a_shot_stays_when_images_are_added_unless_one_with_a_smaller_hash_comes():
    labels = np.zeros(300, int)
    few = choose_shots(IDS[:200], labels[:200], given(train=200), shots=20, seed=3)
    many = choose_shots(IDS[:300], labels, given(train=300), shots=20, seed=3)
    order = sorted(range(300), key=lambda number: hash_fraction(f"3:{IDS[number]}"))
    assert set(np.flatnonzero(many == TRAIN)) == set(order[:20])
    assert set(np.flatnonzero(many[:200] == TRAIN)) <= set(np.flatnonzero(few == TRAIN))


def test_more_shots_than_a_class_has_are_refused_with_the_number_it_has():
    labels = np.array([0] * 5 + [1] * 3)
    text = one_line(choose_shots, IDS[:8], labels, given(train=8), shots=4, seed=0)
    assert text == "--shots=4 is more than the smallest class has in train, which is 3. Give a smaller number."


NAMES = [f"c{number}" for number in range(8)]


def classes(**labels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and splits, from the labels of each split."""
    splits = [np.full(len(values), SPLITS.index(name), np.int8) for name, values in labels.items()]
    return np.array(sum(labels.values(), [])), np.concatenate(splits)


def test_complete_classes_are_passed_in_silence():
    assert check_classes(*classes(train=[0, 1], val=[0, 1], test=[1, 0]), NAMES[:2]) == []
    assert (
        check_classes(*classes(train=[0, 1], val=[0, 1]), NAMES[:2]) == []
    )  # no test at all: nothing is measured on it


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (
            {"train": [0, 1, 2], "val": [0, 2], "test": [0, 1, 2]},
            "warning: val has no example of c1, so it can't be evaluated there. Add images, or increase --val_fraction",
        ),
        (
            {"train": [0, 1, 2], "val": [0, 1, 2], "test": [1]},
            "warning: test has no example of c0, c2, so it can't be evaluated there. Add images, or increase "
            "--test_fraction",
        ),
    ],
)
def test_a_class_without_val_or_test_is_named(labels, text):
    assert check_classes(*classes(**labels), NAMES[:3]) == [text]


def test_of_many_classes_five_are_named():
    lines = check_classes(*classes(train=list(range(8)), val=[0], test=[0]), NAMES)
    assert [line.split(" so it ")[0] for line in lines] == [
        f"warning: {split} has no example of c1, c2, c3, c4, c5 and 2 more classes," for split in ("val", "test")
    ]


@pytest.mark.parametrize(
    ("labels", "names", "text"),
    [
        ({"train": [0, 0], "val": [0]}, ["cat"], "only one class: cat. A classifier needs at least two."),
        ({"train": [0, 1], "test": [0]}, NAMES[:2], "val has no examples, but it is needed for selection."),
        ({"train": [0, 2], "val": [1]}, NAMES[:3], "train has no example of c1, but val or test does."),
    ],
)
def test_what_can_be_neither_learnt_nor_chosen_is_refused(labels, names, text):
    assert one_line(check_classes, *classes(**labels), names).startswith(text)


def test_unused_examples_do_not_count():
    labels, splits = classes(train=[0, 1], val=[0, 1])
    splits[1] = UNUSED
    assert "train has no example of c1" in one_line(check_classes, labels, splits, NAMES[:2])
