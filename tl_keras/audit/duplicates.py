"""The same picture twice: to the byte, to the pixel, or nearly."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set

import numpy as np
from scipy.cluster.hierarchy import DisjointSet

from tl_keras.audit.findings import Finding
from tl_keras.audit.hashes import BITS, correlate, distance
from tl_keras.audit.neighbours import Neighbours
from tl_keras.data.splits import SPLITS, evaluated_split

# Planted copies in flowers (resized, recompressed, cropped by 5 %, mirrored) correlate by 0.996 at least; most other
# pairs with such hashes by less than 0.95; scikit-learn's digits, which look much alike, by 0.987 at most.
_BITS_AT_MOST = 12
_DISTANCE_AT_MOST = 0.6  # between embeddings of length 1
_CORRELATION_AT_LEAST = 0.99
_EXACT, _PIXELS, _NEAR = "the same bytes", "the same pixels", "nearly the same picture"
_ORDER = {"test": 0, "val": 1, "train": 2}  # whose copy is kept


@dataclasses.dataclass(frozen=True)
class Look:
    """What is known of an image's pixels.

    Attributes:
        digest: of what it is decoded to.
        hashes: see `hash_image`, bool `(6, 63)`.
        thumb: grey, uint8 `(64, 64)`.
        blank: whether it is all but one colour.
    """

    digest: bytes
    hashes: np.ndarray
    thumb: np.ndarray
    blank: bool


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two examples that show the same picture; `how` says how alike they are, `likeness` orders, 1 is exact."""

    first: int
    second: int
    how: str
    detail: str = ""
    likeness: float = 1.0


@dataclasses.dataclass(frozen=True)
class Images:
    """What is known of the examples in use, row by row.

    Attributes:
        ids: n of them.
        labels: int `(n,)`.
        names: of the classes; none without labels.
        splits: `train`, `val` or `test` of each.
    """

    ids: Sequence[str]
    labels: np.ndarray
    names: Sequence[str]
    splits: Sequence[str]

    @property
    def evaluated(self) -> str:
        """The split that figures are of: test, or val where there is no test."""
        return evaluated_split(self.splits)


def find_candidates(neighbours: Neighbours, *, at_most: int | None = None) -> np.ndarray:
    """Rows that have a neighbour near enough to be a copy, int64 `(m,)`: their pixels are worth a look.

    Args:
        neighbours: of the embeddings.
        at_most: rows, those with the nearest neighbours first; None: all of them.
    """
    pairs = np.argwhere(neighbours.distances <= _DISTANCE_AT_MOST)
    pairs = pairs[np.argsort(neighbours.distances[tuple(pairs.T)], kind="stable")]
    rows = np.stack([pairs[:, 0], neighbours.indices[tuple(pairs.T)]], 1).ravel()
    _, first = np.unique(rows, return_index=True)
    return np.sort(rows[np.sort(first)][:at_most])


def find_pairs(digests: Sequence[bytes], looks: Mapping[int, Look], neighbours: Neighbours) -> list[Pair]:
    """Finds pairs, each once, exact ones first.

    Args:
        digests: of each file's bytes, n of them.
        looks: row → what is known of its pixels, of the candidates at least.
        neighbours: of the embeddings.

    Returns:
        Of a group of equal ones each is paired with the first.
    """
    seen: dict[tuple[int, int], Pair] = {}
    pixels = ((row, looks[row].digest) for row in sorted(looks))
    for values, how in ((enumerate(digests), _EXACT), (pixels, _PIXELS)):
        for first, second in _equal(values):
            seen.setdefault((first, second), Pair(first, second, how))
    for row, rank in np.argwhere(neighbours.distances <= _DISTANCE_AT_MOST).tolist():
        pair = min(row, int(neighbours.indices[row, rank])), max(row, int(neighbours.indices[row, rank]))
        if pair in seen or pair[0] not in looks or pair[1] not in looks:
            continue  # what could not be decoded was not looked at
        one, other = looks[pair[0]], looks[pair[1]]
        bits = distance(one.hashes, other.hashes)
        if bits <= _BITS_AT_MOST and (likeness := correlate(one.thumb, other.thumb)) >= _CORRELATION_AT_LEAST:
            detail = f"correlation {likeness:.3f}, {bits} of {BITS} bits of their hashes differ"
            seen[pair] = Pair(*pair, _NEAR, detail, likeness)
    return list(seen.values())


def describe_pairs(pairs: Sequence[Pair], images: Images) -> tuple[list[Finding], np.ndarray]:
    """What the pairs mean: across splits a leak, under two labels a mistake, else a copy.

    Of pictures that are alike one is kept, of test before val before train. Each of the others gets a finding: what is
    like a picture of another split or label that stands before it, of whatever findings; what is like one that is kept.

    Args:
        pairs: of `find_pairs`.
        images: n of them.

    Returns:
        Findings, at most one of a kind for each image; and in which other splits each image has a copy, bool `(n, 3)`,
        columns as `SPLITS`.
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
    """Which rows are alike: groups of equal ones, and groups that nearly are."""

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
        """The group of rows that are equal to a row."""
        return int(self._equal[row])

    def groups(self, row: int) -> list[int]:
        """A row's own group, and those that are nearly the same."""
        own = self.group(row)
        return [own, *self._near[own]]

    def pair(self, row: int, other: int) -> Pair:
        """How alike two rows are."""
        first, second = self.group(row), self.group(other)
        if first != second:
            return self._near[first][second]
        return Pair(row, other, _EXACT if self._same_bytes.connected(row, other) else _PIXELS)


def _describe(
    row: int, before: Sequence[int], copies: _CopyGroups, images: Images, found: Set[int]
) -> Iterator[Finding]:
    """The findings of a row that is like some before it, each against the one that it is most like."""

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
    relabelled = [other for other in before if images.labels[other] != label]
    yield from about(across, "leak", lambda other: f": in {split} and in {images.splits[other]}")
    yield from about(
        relabelled,
        "two_labels",
        lambda other: f": labelled {images.names[label]} and {images.names[images.labels[other]]}",
    )
    if not across and not relabelled:
        yield from about([other for other in before if other not in found], "duplicate")


def _find_copied(copies: _CopyGroups, images: Images) -> np.ndarray:
    """In which other splits rows have a copy, bool `(n, 3)`."""
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
