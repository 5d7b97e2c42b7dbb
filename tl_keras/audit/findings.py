"""What an audit finds, and the files that say so."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

FINDINGS_HEADER = ("id", "finding", "severity", "evidence", "other_id")
SEVERITIES = ("high", "medium", "low")

# every kind, with what it means for people; in the order in which they are counted on the screen
KINDS = {
    "unreadable": "can't be read, left out",
    "leak": "the same picture, or nearly, in two splits",
    "two_labels": "the same image, or nearly, under two labels",
    "duplicate": "exact copy within a split",
    "blank": "all but one colour",
    "outlier": "unlike all others",
    "label": "the label may be wrong",
    "near_duplicate": "near copy within a split",
    "tiny": "smaller than half the network's size",
    "huge": "more than 50 million pixels",
    "aspect": "so long that a crop shows a quarter or less",
    "animated": "several frames, of which the first is used",
    "cmyk": "CMYK, converted without a colour profile",
    "16-bit": "16 bits a channel, read as 8",
    "suffix": "the name says another format",
    "rotated": "stood upright by its EXIF orientation",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing about one image.

    Attributes:
        id: of the image.
        kind: of `KINDS`.
        severity: of `SEVERITIES`.
        evidence: what was seen, for people.
        other_id: the image that it is about as well, where there is one.
        rank: the higher, the more certain, among findings of its kind.
    """

    id: str
    kind: str
    severity: str
    evidence: str
    other_id: str = ""
    rank: float = 0.0

    def as_row(self) -> tuple[str, ...]:
        """For `audit.csv`."""
        return self.id, self.kind, self.severity, self.evidence, self.other_id


def sort(findings: Sequence[Finding]) -> list[Finding]:
    """The most severe first, of one severity by kind, of one kind the most certain first."""
    kinds = list(KINDS)
    return sorted(
        findings,
        key=lambda one: (SEVERITIES.index(one.severity), kinds.index(one.kind), -one.rank, one.id, one.other_id),
    )


def count(findings: Sequence[Finding]) -> list[str]:
    """A line for each kind that was found: how many images."""
    images = collections.defaultdict(set)
    for one in findings:
        images[one.kind].add(one.id)
    return [f"{kind}: {len(images[kind]):,} ({meaning})" for kind, meaning in KINDS.items() if kind in images]
