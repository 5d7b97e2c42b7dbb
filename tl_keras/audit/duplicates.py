"""Duplicates: images with the same bytes, the same pixels, or nearly the same pixels."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set

import numpy as np
from scipy.cluster.hierarchy import DisjointSet

from tl_keras.audit.findings import Finding
from tl_keras.audit.hashes import BITS, correlate, distance
from tl_keras.audit.neighbors import Neighbors
from tl_keras.data.splits import SPLITS, evaluated_split

# Planted copies in flowers (resized, recompressed, cropped by 5 %, mirrored) have a correlation of at least 0.996; most
# other pairs with similar hashes less than 0.95; scikit-learn's digits, which look very similar, at most 0.987.
_BITS_AT_MOST = 12
_DISTANCE_AT_MOST = 0.6  # between embeddings of length 1
_CORRELATION_AT_LEAST = 0.99
_COMPARED = 4096  # pairs at a time
_EXACT, _PIXELS, _NEAR = "same bytes", "same pixels", "nearly the same image"
_ORDER = {"test": 0, "val": 1, "train": 2}  # the copy in the first of these splits counts as the original


@dataclasses.dataclass(frozen=True)
class Look:
    """Properties of an image's pixels.

    Attributes:
        digest: SHA-256 of the decoded pixels.
        hashes: see `hash_image`, bool `(6, 63)`.
        thumb: grayscale thumbnail, uint8 `(64, 64)`.
        blank: whether nearly all pixels have the same color.
    """

    digest: bytes
    hashes: np.ndarray
    thumb: np.ndarray
    blank: bool


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two examples that show the same image; `how` names the kind of match, `likeness` is 1 for exact copies."""

    first: int
    second: int
    how: str
    detail: str = ""
    likeness: float = 1.0


@dataclasses.dataclass(frozen=True)
class Images:
    """The audited examples.

    Attributes:
        ids: n ids.
        labels: int `(n,)`.
        names: class names; empty without labels.
        splits: n split names, `train`, `val` or `test`.
    """

    ids: Sequence[str]
    labels: np.ndarray
    names: Sequence[str]
    splits: Sequence[str]

    @property
    def evaluated(self) -> str:
        """The split that is evaluated: test, or val if there is no test split."""
        return evaluated_split(self.splits)


def find_candidates(neighbors: Neighbors, *, at_most: int | None = None) -> np.ndarray:
    """Finds rows with a neighbor that is near enough to be a copy, int64 `(m,)`; their pixels are compared.

    Args:
        neighbors: nearest neighbors of the embeddings.
        at_most: maximum number of rows, those with the nearest neighbors first; None: all.
    """
    pairs = np.argwhere(neighbors.distances <= _DISTANCE_AT_MOST)
    pairs = pairs[np.argsort(neighbors.distances[tuple(pairs.T)], kind="stable")]
    rows = np.stack([pairs[:, 0], neighbors.indices[tuple(pairs.T)]], 1).ravel()
    _, first = np.unique(rows, return_index=True)
    return np.sort(rows[np.sort(first)][:at_most])


def find_pairs(digests: Sequence[bytes], looks: Mapping[int, Look], neighbors: Neighbors) -> list[Pair]:
    """Finds pairs of duplicates, each once, exact ones first.

    Args:
        digests: SHA-256 of each file's bytes, n of them.
        looks: row → properties of its pixels, at least for the candidates.
        neighbors: nearest neighbors of the embeddings.

    Returns:
        The pairs; in a group of equal images each is paired with the first.
    """
    seen: dict[tuple[int, int], Pair] = {}
    pixels = ((row, looks[row].digest) for row in sorted(looks))
    for values, how in ((enumerate(digests), _EXACT), (pixels, _PIXELS)):
        for first, second in _equal(values):
            seen.setdefault((first, second), Pair(first, second, how))
    for pair, bits in _similar(neighbors, looks, seen):
        likeness = correlate(looks[pair[0]].thumb, looks[pair[1]].thumb)
        if likeness >= _CORRELATION_AT_LEAST:
            detail = f"correlation {likeness:.3f}; {bits} of {BITS} hash bits differ"
            seen[pair] = Pair(*pair, _NEAR, detail, likeness)
    return list(seen.values())


def _similar(
    neighbors: Neighbors, looks: Mapping[int, Look], known: Mapping[tuple[int, int], Pair]
) -> Iterator[tuple[tuple[int, int], int]]:
    """Yields pairs of neighbors with similar hashes and their number of different bits, except known pairs.

    Images that can't be decoded have no pixels to compare.
    """
    rows, ranks = np.nonzero(neighbors.distances <= _DISTANCE_AT_MOST)
    both = np.sort(np.stack([rows, neighbors.indices[rows, ranks]], 1), axis=1)
    pairs = [pair for pair in dict.fromkeys(map(tuple, both.tolist())) if pair not in known and looks.keys() >= {*pair}]
    for start in range(0, len(pairs), _COMPARED):
        part = pairs[start : start + _COMPARED]
        first, second = (np.stack([looks[pair[side]].hashes for pair in part]) for side in (0, 1))
        bits = distance(first, second)
        for number in np.flatnonzero(bits <= _BITS_AT_MOST).tolist():
            yield part[number], int(bits[number])


def describe_pairs(pairs: Sequence[Pair], images: Images) -> tuple[list[Finding], np.ndarray]:
    """Makes findings of pairs: `leak` across splits, `two_labels` across labels, otherwise `duplicate`.

    In a group of duplicates one image counts as the original, in the order test, val, train. Each other image gets a
    finding: `leak` or `two_labels` if an earlier image of the group has another split or label, `duplicate` if an
    earlier image without a finding has the same ones.

    Args:
        pairs: result of `find_pairs`.
        images: n images.

    Returns:
        Findings, at most one of each kind per image; and the other splits in which each image has a copy, bool
        `(n, 3)`, columns as in `SPLITS`.
    """
    copies = _CopyGroups(pairs)
    findings, found = list[Finding](), set[int]()
    firsts: dict[int, dict[tuple[str, int], int]] = collections.defaultdict(dict)
    for row in sorted(copies.rows, key=lambda row: (_ORDER[images.splits[row]], row)):
        before = [other for group in copies.groups(row) for other in firsts[group].values()]
        own = list(_describe(row, before, copies, images, found))
        findings += own
        if own:
            found.add(row)
        one_kind = firsts[copies.group(row)]
        key = images.splits[row], int(images.labels[row])
        if one_kind.setdefault(key, row) in found and not own:
            one_kind[key] = row
    return findings, _find_copied(copies, images)


class _CopyGroups:
    """Groups of equal rows, and relations between groups of nearly equal rows."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.rows = {row for pair in pairs for row in (pair.first, pair.second)}
        equal, same_bytes = DisjointSet(self.rows), DisjointSet(self.rows)
        for pair in pairs:
            if pair.how != _NEAR:
                equal.merge(pair.first, pair.second)
            if pair.how == _EXACT:
                same_bytes.merge(pair.first, pair.second)
        self._equal, self._same_bytes = equal, same_bytes
        self._near: dict[int, dict[int, Pair]] = collections.defaultdict(dict)
        for pair in sorted((pair for pair in pairs if pair.how == _NEAR), key=lambda pair: pair.likeness):
            first, second = self.group(pair.first), self.group(pair.second)
            self._near[first][second] = self._near[second][first] = pair

    def group(self, row: int) -> int:
        """The group of rows that equal a row."""
        return int(self._equal[row])

    def groups(self, row: int) -> list[int]:
        """The group of a row, and the groups that are nearly the same."""
        own = self.group(row)
        return [own, *self._near[own]]

    def pair(self, row: int, other: int) -> Pair:
        """The kind of match between two rows."""
        first, second = self.group(row), self.group(other)
        if first != second:
            return self._near[first][second]
        return Pair(row, other, _EXACT if self._same_bytes.connected(row, other) else _PIXELS)


def _describe(
    row: int, before: Sequence[int], copies: _CopyGroups, images: Images, found: Set[int]
) -> Iterator[Finding]:
    """Yields the findings of a row that matches earlier rows, each with the most similar row."""

    def about(others: Sequence[int], kind: str, more: Callable[[int], str] = lambda _: "") -> Iterator[Finding]:
        if others:
            other = max(others, key=lambda other: (copies.pair(row, other).likeness, other not in found, -other))
            pair, name = copies.pair(row, other), images.ids[other]
            evidence = f"{pair.how} as {name}" + (f" ({pair.detail})" if pair.detail else "") + more(other)
            exact = pair.how != _NEAR
            kind = kind if exact or kind != "duplicate" else "near_duplicate"
            severity = {"duplicate": "medium", "near_duplicate": "low"}.get(kind, "high" if exact else "medium")
            yield Finding(images.ids[row], kind, severity, evidence, name, pair.likeness)

    split, label = images.splits[row], images.labels[row]
    across = [other for other in before if images.splits[other] != split]
    relabeled = [other for other in before if images.labels[other] != label]
    yield from about(across, "leak", lambda other: f": in {split} and in {images.splits[other]}")
    yield from about(
        relabeled,
        "two_labels",
        lambda other: f": labeled {images.names[label]} and {images.names[images.labels[other]]}",
    )
    if not across and not relabeled:
        yield from about([other for other in before if other not in found], "duplicate")


def _find_copied(copies: _CopyGroups, images: Images) -> np.ndarray:
    """Finds the other splits in which each row has a copy, bool `(n, 3)`."""
    splits: dict[int, set[str]] = collections.defaultdict(set)
    for row in copies.rows:
        splits[copies.group(row)].add(images.splits[row])
    copied = np.zeros((len(images.ids), len(SPLITS)), bool)
    for row in copies.rows:
        found = set[str]().union(*(splits[group] for group in copies.groups(row))) - {images.splits[row]}
        copied[row] = [split in found for split in SPLITS]
    return copied


def _equal(values: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, int]]:
    groups = collections.defaultdict(list)
    for row, value in values:
        groups[value].append(row)
    for rows in groups.values():
        for row in rows[1:]:
            yield rows[0], row
