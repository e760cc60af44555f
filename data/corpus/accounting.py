"""Accounting: every row read is either used or skipped for a named reason, with one example kept."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Skip:
    """Number of rows skipped for one reason, and the place of the first of them."""

    count: int
    example: str


@dataclass
class Accounting:
    """Counts that always satisfy read = used + skipped; `notes` are events on rows that were used.

    `parts` account for the sources of a mixture, each on its own; `summed` adds them up.

    Examples:
        >>> rows = Accounting("rows", read=3, used=2)
        >>> rows.skip("duplicate", "chats.jsonl:3")
        >>> rows.balanced
        True
    """

    unit: str
    read: int = 0
    used: int = 0
    skipped: dict[str, Skip] = field(default_factory=dict)
    notes: dict[str, Skip] = field(default_factory=dict)
    parts: dict[str, Accounting] = field(default_factory=dict)

    def part(self, name: str) -> Accounting:
        """The accounting of one part; the whole for the name ""."""
        return self.parts.setdefault(name, Accounting(self.unit)) if name else self

    def summed(self) -> Accounting:
        """A copy whose counts include those of its parts; call it once, when all is counted."""
        whole = Accounting(self.unit, parts=self.parts)
        for counted in (self, *self.parts.values()):
            whole.add(counted)
        return whole

    def skip(self, reason: str, example: str, count: int = 1) -> None:
        _add(self.skipped, reason, example, count)

    def note(self, event: str, example: str) -> None:
        _add(self.notes, event, example, 1)

    @property
    def num_skipped(self) -> int:
        return sum(skip.count for skip in self.skipped.values())

    @property
    def balanced(self) -> bool:
        return self.read == self.used + self.num_skipped

    def add(self, other: Accounting) -> None:
        """Add the counts of `other`, keeping the earlier examples."""
        self.read += other.read
        self.used += other.used
        for entries, added in ((self.skipped, other.skipped), (self.notes, other.notes)):
            for reason, skip in added.items():
                _add(entries, reason, skip.example, skip.count)

    def to_dict(self) -> dict[str, Any]:
        """As `trace.json` stores it; without `parts` where there are none."""
        content = asdict(self)
        return content if self.parts else {key: content[key] for key in content if key != "parts"}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Accounting:
        entries = {key: {k: Skip(**s) for k, s in data[key].items()} for key in ("skipped", "notes")}
        parts = {name: cls.from_dict(part) for name, part in data.get("parts", {}).items()}
        return cls(data["unit"], data["read"], data["used"], **entries, parts=parts)

    def __str__(self) -> str:
        lines = [f"{self.read:,} {self.unit} read = {self.used:,} used + {self.num_skipped:,} skipped"]
        for prefix, entries in (("skipped", self.skipped), ("note", self.notes)):
            lines += [
                f"  {prefix}: {s.count:,} × {reason} (e.g. {s.example})" for reason, s in entries.items()
            ]
        for name, part in self.parts.items():
            lines += [f"  {line}" for line in f"{name}: {part}".splitlines()]
        return "\n".join(lines)


def _add(entries: dict[str, Skip], reason: str, example: str, count: int) -> None:
    if reason in entries:
        entries[reason].count += count
    elif count:
        entries[reason] = Skip(count, example)
