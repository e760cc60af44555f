"""Calibration: when the drafter says 80 %, is its token the target's greedy one in 80 % of the steps?

Best-first trees spend their node budget by the drafter's probabilities; where those are wrong the budget goes
to the wrong branch even if the ranking of tokens is right.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray


class Calibration:
    """Reliability of a probability in equal-width bins.

    Args:
        bins: how many bins [0, 1] is cut into.
    """

    def __init__(self, bins: int = 10) -> None:
        self.bins = bins
        self.steps = np.zeros(bins, dtype=np.int64)
        self.confidence = np.zeros(bins)
        self.hits = np.zeros(bins, dtype=np.int64)

    def add(self, confidence: Float[ndarray, " N"], hit: Bool[ndarray, " N"]) -> None:
        """Count some steps.

        Args:
            confidence: probability the drafter gave its token, in [0, 1].
            hit: whether that token was the target's greedy one.
        """
        place = np.clip((confidence * self.bins).astype(np.int64), 0, self.bins - 1)
        self.steps += np.bincount(place, minlength=self.bins)
        self.confidence += np.bincount(place, weights=confidence, minlength=self.bins)
        self.hits += np.bincount(place[hit], minlength=self.bins)

    def expected_error(self) -> float:
        """Expected calibration error: mean |frequency − confidence| over bins, weighted by their steps, in
        [0, 1].

        Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eq. 3.
        """
        total = self.steps.sum()
        return float(np.abs(self.hits - self.confidence).sum() / total) if total else float("nan")

    def summary(self) -> dict[str, Any]:
        """Bins with their mean confidence and frequency (None where a bin is empty), and the error."""
        return {
            "edges": [i / self.bins for i in range(self.bins + 1)],
            "steps": self.steps.tolist(),
            "confidence": [
                c / n if n else None
                for c, n in zip(self.confidence.tolist(), self.steps.tolist(), strict=True)
            ],
            "frequency": [
                h / n if n else None for h, n in zip(self.hits.tolist(), self.steps.tolist(), strict=True)
            ],
            "ece": self.expected_error(),
        }
