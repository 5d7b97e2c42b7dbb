"""Pairs of one picture, and what they mean."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tl_keras.audit.duplicates import Images, Look, Pair, describe_pairs, find_candidates, find_pairs
from tl_keras.audit.hashes import hash_image
from tl_keras.audit.neighbors import find_neighbors
from tl_keras.data.splits import SPLITS

NEAR, FAR = np.array([1.0, 0.01, 0.0]), np.array([0.0, 0.0, 1.0])
EMBEDDINGS = np.array([[1.0, 0.0, 0.0], NEAR, [0.0, 1.0, 0.0], FAR, FAR]).astype(np.float32)


def look(seed: int, digest: int) -> Look:
    thumb = np.asarray(
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6)).astype(np.uint8)).resize((64, 64))
    )
    return Look(bytes([digest]), hash_image(thumb), thumb, blank=False)


def looks(seeds: tuple[int, ...], digests: tuple[int, ...] = (0, 1, 2, 3, 4)) -> dict[int, Look]:
    """Of five images; the same seed gives the same picture."""
    return {row: look(seed, digest) for row, (seed, digest) in enumerate(zip(seeds, digests, strict=True))}


DIGESTS = [b"a", b"b", b"c", b"d", b"e"]


def pairs_of(digests=DIGESTS, looks=None) -> list[tuple[int, int, str]]:
    found = find_pairs(digests, looks or {}, find_neighbors(EMBEDDINGS))
    return [(one.first, one.second, one.how) for one in found]


def test_equal_bytes_are_found_without_looking_at_pixels():
    assert pairs_of([b"a", b"b", b"a", b"d", b"a"]) == [(0, 2, "same bytes"), (0, 4, "same bytes")]


def test_equal_pixels_count_once_where_bytes_are_equal():
    found = pairs_of([b"a", b"a", b"c", b"d", b"e"], looks((1, 2, 3, 4, 5), (0, 0, 2, 3, 3)))
    assert found == [(0, 1, "same bytes"), (3, 4, "same pixels")]


def test_near_needs_both_embedding_and_picture():
    near = "nearly the same image"
    assert pairs_of(looks=looks((1, 1, 1, 1, 1))) == [(0, 1, near), (3, 4, near)]  # 2 lies elsewhere
    assert pairs_of(looks=looks((1, 2, 1, 4, 4))) == [(3, 4, near)]


def test_what_could_not_be_decoded_has_no_near_pair():
    some = looks((1, 1, 1, 1, 1))
    del some[3]
    assert pairs_of(looks=some) == [(0, 1, "nearly the same image")]


def test_candidates_are_those_with_a_near_neighbor():
    assert find_candidates(find_neighbors(EMBEDDINGS)).tolist() == [0, 1, 3, 4]
    assert find_candidates(find_neighbors(EMBEDDINGS), at_most=2).tolist() == [3, 4]  # the nearest
    assert find_candidates(find_neighbors(EMBEDDINGS[1:3])).tolist() == []


def test_digits_look_alike_and_are_not_copies():
    digits = load_digits()
    made = {}
    for row, image in enumerate(digits.images[:300]):
        thumb = np.asarray(Image.fromarray((image * 15.9).astype(np.uint8)).resize((64, 64)))
        made[row] = Look(bytes([row % 256, row // 256]), hash_image(thumb), thumb, blank=False)
    embeddings = digits.data[:300].astype(np.float32)
    found = find_pairs([b"%d" % row for row in range(300)], made, find_neighbors(embeddings))
    assert len(found) <= 3


def describe(splits: list[str], labels: list[int], digests: list[bytes]) -> list[tuple[str, str, str]]:
    images = Images(["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"], np.array(labels), ("ant", "bee"), splits)
    findings, _ = describe_pairs(find_pairs(digests, {}, find_neighbors(EMBEDDINGS)), images)
    return [(one.kind, one.id, one.other_id) for one in findings]


SAME = [b"a", b"b", b"c", b"a", b"e"]


def test_groups_have_one_finding_for_each_that_is_not_kept():
    # one kept of test before val before train; each other one is told against it
    assert describe(["val", "train", "test", "test", "train"], [0] * 5, [b"a"] * 5) == [
        ("duplicate", "d.jpg", "c.jpg"),
        ("leak", "a.jpg", "c.jpg"),
        ("leak", "b.jpg", "c.jpg"),
        ("leak", "e.jpg", "c.jpg"),
    ]


def test_of_a_chain_what_is_like_nothing_that_is_kept_stays():
    images = Images(["a", "b", "c"], np.zeros(3, int), ("x",), ["train"] * 3)
    findings, copied = describe_pairs([near(0, 1), near(1, 2)], images)
    assert [(one.id, one.other_id) for one in findings] == [("b", "a")]
    assert not copied.any()


def near(first: int, second: int) -> Pair:
    return Pair(first, second, "nearly the same image", "", 0.99)


def test_every_copy_of_a_training_image_leaks_whichever_is_kept():
    images = Images(["a", "t1", "t2"], np.zeros(3, int), ("x",), ["train", "test", "test"])
    findings, copied = describe_pairs([Pair(0, 1, "same bytes"), Pair(0, 2, "same bytes")], images)
    assert [(one.kind, one.id, one.other_id) for one in findings] == [("duplicate", "t2", "t1"), ("leak", "a", "t1")]
    assert copied.tolist() == [[False, False, True], [True, False, False], [True, False, False]]


def test_a_leak_is_told_though_the_test_image_that_it_is_like_is_itself_a_copy():
    images = Images(["a", "t1", "t2"], np.array([1, 0, 0]), ("x", "y"), ["train", "test", "test"])
    findings, copied = describe_pairs([near(1, 2), near(0, 2)], images)
    assert [(one.kind, one.id, one.other_id) for one in findings] == [
        ("near_duplicate", "t2", "t1"),
        ("leak", "a", "t2"),
        ("two_labels", "a", "t2"),
    ]
    assert copied.any(1).tolist() == [True, False, True]


def test_what_is_nearly_like_one_of_a_group_is_like_all_of_it():
    images = Images([*"abc"], np.zeros(3, int), ("x",), ["test", "train", "train"])
    findings, copied = describe_pairs([Pair(1, 2, "same pixels"), near(0, 2)], images)
    assert [(one.kind, one.id, one.other_id) for one in findings] == [("leak", "b", "a"), ("leak", "c", "a")]
    assert copied.any(1).all()


@pytest.mark.parametrize("seed", range(20))
def test_without_the_images_that_are_named_no_split_and_no_label_shares_a_picture(seed):
    random, count = np.random.default_rng(seed), 30
    splits = random.choice(["train", "val", "test"], count).tolist()
    images = Images([str(row) for row in range(count)], random.integers(0, 2, count), ("x", "y"), splits)
    cells = {tuple(sorted(random.choice(count, 2, replace=False).tolist())) for _ in range(25)}
    kinds = ["same bytes", "same pixels", "nearly the same image"]
    pairs = [Pair(*cell, random.choice(kinds)) for cell in sorted(cells)]
    findings, copied = describe_pairs(pairs, images)
    assert len({(one.id, one.kind) for one in findings}) == len(findings)
    gone = {int(one.id) for one in findings if one.kind in ("leak", "two_labels")}
    for pair in pairs:
        across = splits[pair.first] != splits[pair.second]
        if across:
            assert copied[pair.first, SPLITS.index(splits[pair.second])]
            assert copied[pair.second, SPLITS.index(splits[pair.first])]
        if across or images.labels[pair.first] != images.labels[pair.second]:
            assert gone & {pair.first, pair.second}
    for one in findings:
        assert one.kind != "leak" or copied[[int(one.id), int(one.other_id)]].any(1).all()
    assert not any(copied[row, SPLITS.index(split)] for row, split in enumerate(splits))


@pytest.mark.parametrize(
    ("splits", "labels", "expected"),
    [
        ("train train train train train", [0, 0, 0, 0, 1], [("duplicate", "d.jpg", "a.jpg")]),
        ("train train train test train", [0, 0, 0, 0, 1], [("leak", "a.jpg", "d.jpg")]),
        ("test train train train train", [0, 0, 0, 0, 1], [("leak", "d.jpg", "a.jpg")]),
        ("val train train test train", [0, 0, 0, 0, 1], [("leak", "a.jpg", "d.jpg")]),
        ("train train train train train", [0, 0, 0, 1, 1], [("two_labels", "d.jpg", "a.jpg")]),
        (
            "train train train test train",
            [0, 0, 0, 1, 1],
            [("leak", "a.jpg", "d.jpg"), ("two_labels", "a.jpg", "d.jpg")],
        ),
    ],
)
def test_what_a_pair_means(splits, labels, expected):
    assert describe(splits.split(), labels, SAME) == expected
