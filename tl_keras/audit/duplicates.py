"""The same picture twice: to the byte, to the pixel, or nearly."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from tl_keras.audit.findings import Finding
from tl_keras.audit.hashes import BITS, correlate, distance
from tl_keras.audit.neighbours import Neighbours
from tl_keras.data.splits import evaluated_split

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


def describe_pairs(pairs: Sequence[Pair], images: Images) -> list[Finding]:
    """What the pairs mean: across splits a leak, under two labels a mistake, else a copy.

    Of pictures that are alike one is kept, of test before val before train; each of the others gets its finding, about
    one that is kept and like it.
    """
    exact = {pair.second: pair for pair in pairs if pair.how != _NEAR}  # each with the first of its group
    alike: dict[int, dict[int, Pair]] = collections.defaultdict(dict)
    for pair in pairs:
        alike[pair.first][pair.second] = alike[pair.second][pair.first] = pair
    findings, kept, kept_of = list[Finding](), set[int](), dict[int, int]()
    for row in sorted(alike, key=lambda row: (_ORDER[images.splits[row]], row)):
        group = exact[row].first if row in exact else row
        near = [other for other in alike[row] if other in kept]
        if group in kept_of:
            other = kept_of[group]
            both = [exact[one].how for one in (row, other) if one in exact]
            findings += _describe(row, other, Pair(row, other, _PIXELS if _PIXELS in both else _EXACT), images)
        elif near:
            best = max(near, key=lambda other: (alike[row][other].likeness, -other))
            findings += _describe(row, best, alike[row][best], images)
        else:
            kept.add(row)
            kept_of[group] = row
    return findings


def _describe(row: int, other: int, pair: Pair, images: Images) -> Iterator[Finding]:
    name, exact = images.ids[other], pair.how != _NEAR
    evidence = f"{pair.how} as {name}" + (f" ({pair.detail})" if pair.detail else "")
    severity = "high" if exact else "medium"
    across = images.splits[row] != images.splits[other]
    same_label = images.labels[row] == images.labels[other]
    if across:
        told = f"{evidence}: in {images.splits[row]} and in {images.splits[other]}"
        yield Finding(images.ids[row], "leak", severity, told, name, pair.likeness)
    if not same_label:
        told = f"{evidence}: labelled {images.names[images.labels[row]]} and {images.names[images.labels[other]]}"
        yield Finding(images.ids[row], "two_labels", severity, told, name, pair.likeness)
    if same_label and not across:
        kind, severity = ("duplicate", "medium") if exact else ("near_duplicate", "low")
        yield Finding(images.ids[row], kind, severity, evidence, name, pair.likeness)


def _equal(values: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, int]]:
    groups = collections.defaultdict(list)
    for row, value in values:
        groups[value].append(row)
    for rows in groups.values():
        for row in rows[1:]:
            yield rows[0], row
