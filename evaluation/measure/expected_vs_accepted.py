"""What trees promise and what they keep: expected accepted draft tokens against realised ones.

A tree expects the sum of its nodes' probabilities under the drafter. Where that is less than what is
accepted, best-first trees spread too wide and cost-aware ones stop too early; where it is more, the other way
round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from certdraft.decoding import Round
from certdraft.evaluation.measure.statistics import pooled_ratio

_BINS = 8


class Promises:
    """Rounds that drafted and know what they expected; the others do not count."""

    def __init__(self) -> None:
        self.prompts: list[tuple[float, int]] = []  # Σ expected, Σ accepted of each prompt that has any
        self.rounds: list[tuple[float, int]] = []

    def add(self, rounds: Sequence[Round]) -> None:
        """One prompt."""
        known = [(r.expected, r.accepted) for r in rounds if r.expected is not None and r.nodes]
        if known:
            self.rounds += known
            self.prompts.append((math.fsum(e for e, _ in known), sum(a for _, a in known)))

    def summary(self, seed: int = 0) -> dict[str, Any] | None:
        """Means over rounds, kept ÷ promised with an interval over prompts, and bins of equal counts by what
        was promised; None when no round knows."""
        if not self.rounds:
            return None
        expected, accepted = (np.array(column, dtype=float) for column in zip(*self.rounds, strict=True))
        order = expected.argsort(kind="stable")
        parts = np.array_split(order, min(_BINS, max(1, len(order) // 10)))
        promised, kept = (np.array(column, dtype=float) for column in zip(*self.prompts, strict=True))
        return {
            "rounds": len(expected),
            "expected": float(expected.mean()),
            "accepted": float(accepted.mean()),
            "kept": vars(pooled_ratio(kept, promised, seed=seed)),
            "bins": [
                {
                    "rounds": len(part),
                    "expected": float(expected[part].mean()),
                    "accepted": float(accepted[part].mean()),
                    "error": float(accepted[part].std() / math.sqrt(len(part))),
                }
                for part in parts
            ],
        }
