"""Findings of an audit, their kinds and severities."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

FINDINGS_HEADER = ("id", "finding", "severity", "evidence", "other_id")
SEVERITIES = ("high", "medium", "low")

# kind → meaning, in the order of the screen and the report
KINDS = {
    "unreadable": "can't be read or decoded; left out",
    "leak": "the same image, or nearly the same, in two splits",
    "two_labels": "the same image, or nearly the same, with two labels",
    "duplicate": "exact copy in the same split",
    "blank": "nearly all pixels have the same color",
    "outlier": "unlike all other images",
    "label": "the label may be wrong",
    "near_duplicate": "nearly the same image in the same split",
    "tiny": "smaller than half the network's input",
    "huge": "more than 50 million pixels",
    "aspect": "more than four times as long as wide; a crop shows a quarter or less",
    "animated": "several frames; the first is used",
    "cmyk": "CMYK, converted without a color profile",
    "16-bit": "16 bits per channel, reduced to 8",
    "suffix": "the file name has the suffix of another format",
    "rotated": "rotated according to its EXIF orientation",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One finding about one image.

    Attributes:
        id: id of the image.
        kind: one of `KINDS`.
        severity: one of `SEVERITIES`.
        evidence: a description for people.
        other_id: id of a second image, for example the other copy; empty if there is none.
        rank: order among findings of the same kind; higher is more certain.
    """

    id: str
    kind: str
    severity: str
    evidence: str
    other_id: str = ""
    rank: float = 0.0

    def as_row(self) -> tuple[str, ...]:
        """The row of `audit.csv`."""
        return self.id, self.kind, self.severity, self.evidence, self.other_id


def sort(findings: Sequence[Finding]) -> list[Finding]:
    """Sorts findings by severity, then by kind, then by certainty."""
    kinds = list(KINDS)
    return sorted(
        findings,
        key=lambda one: (SEVERITIES.index(one.severity), kinds.index(one.kind), -one.rank, one.id, one.other_id),
    )


def count(findings: Sequence[Finding]) -> list[str]:
    """Makes a line for each kind of finding, with its number of images."""
    images = collections.defaultdict(set)
    for one in findings:
        images[one.kind].add(one.id)
    return [f"{kind}: {len(images[kind]):,} ({meaning})" for kind, meaning in KINDS.items() if kind in images]
