"""What packing left out and why: counted by reason, listed by name, written beside the shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moa_train.data.schema import Sample

REPORT_NAME = "report.json"
NAMES_PER_REASON = 1000
"""Names that a report lists for one reason; all are counted."""
UNTOLD = "left out by the source"


@dataclass(frozen=True)
class Remark:
    """Why something was left out: a reason that is counted, and what is particular to this case."""

    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class LeftOut(Exception):
    """Raised inside a source: this one cannot be used."""

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(reason, detail)
        self.remark = Remark(reason, str(detail))


@dataclass(frozen=True)
class Item:
    """What a source makes of one number, with remarks.

    content: a sample; or its members by suffix as they are to be stored; or None: it is left out, and the first remark
    says why. Remarks beside a content tell of parts of it that were left out or changed.
    """

    key: str
    content: Sample | Mapping[str, bytes] | None
    remarks: tuple[Remark, ...] = ()


@dataclass
class Report:
    """Counts by reason of samples left out and of remarks on samples that were kept, and the first names of each."""

    items: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    remarked: dict[str, int] = field(default_factory=dict)
    names: list[dict[str, str]] = field(default_factory=list)

    def add(self, key: str, kept: bool, remarks: tuple[Remark, ...]) -> None:
        """Count one item of the source."""
        self.items += 1
        if not kept:
            remarks = remarks[:1] or (Remark(UNTOLD),)
        counts = self.remarked if kept else self.left_out
        for remark in remarks:
            counts[remark.reason] = counts.get(remark.reason, 0) + 1
            if counts[remark.reason] <= NAMES_PER_REASON:
                self.names.append({"key": key, "reason": remark.reason, "detail": remark.detail})

    def lines(self) -> list[str]:
        """The counts as a table, the most frequent reason first."""
        rows = [("left out", reason, count) for reason, count in _by_count(self.left_out)]
        rows += [("kept, but", reason, count) for reason, count in _by_count(self.remarked)]
        return [f"  {count:7,d}  {what:9}  {reason}" for what, reason, count in rows]

    def told(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        return {
            "items": self.items,
            "samples": self.items - sum(self.left_out.values()),
            "left_out": dict(_by_count(self.left_out)),
            "remarked": dict(_by_count(self.remarked)),
            "names": self.names,
        }

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Report:
        """The report that `told` wrote."""
        return cls(told["items"], dict(told["left_out"]), dict(told["remarked"]), list(told["names"]))


def _by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda row: (-row[1], row[0]))
