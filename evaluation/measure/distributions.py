"""Distributions of per-step quantities over a trace of any length, in fixed memory.

A certificate lies in [0, log(m+1)] or is +inf, a probability in [0, 1]: a fixed fine histogram holds what a
table or a survival curve needs. Each bin also keeps the sum of its values, so a quantile is the mean of a bin
1/65536 of the range wide: at most 1.1e-5 nats off for log 2, exact when a bin holds one value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from numpy.typing import NDArray

_BINS = 65_536


class StepDistribution:
    """The distribution of one per-step quantity in [0, `upper`] ∪ {+inf}.

    Args:
        upper: largest finite value possible; larger ones are a mistake and raise.
        thresholds: values for which `survival` is counted exactly (strictly greater).
    """

    def __init__(self, upper: float, thresholds: Sequence[float] = ()) -> None:
        self.upper = float(upper)
        self.thresholds = np.asarray(sorted(thresholds), dtype=np.float64)
        self.count = 0
        self.infinite = 0
        self.total = 0.0
        self._above = np.zeros(len(self.thresholds), dtype=np.int64)
        self._counts = np.zeros(_BINS, dtype=np.int64)
        self._sums = np.zeros(_BINS, dtype=np.float64)

    def add(self, values: NDArray[np.floating]) -> None:
        """Count N steps; raise ValueError for NaN, a negative number, or a finite one above `upper`."""
        x = np.asarray(values, dtype=np.float64)
        finite = x[np.isfinite(x)]
        slack = 1e-5 * max(self.upper, 1.0)  # fp32 rounding of a value at the ceiling
        if np.isnan(x).any() or (x < -slack).any() or (finite > self.upper + slack).any():
            worst = x[np.isnan(x) | (x < -slack) | (np.isfinite(x) & (x > self.upper + slack))][0]
            raise ValueError(f"a per-step value of {worst} lies outside [0, {self.upper:.6g}] ∪ {{inf}}")
        self.count += len(x)
        self.infinite += len(x) - len(finite)
        self.total += float(finite.sum())
        bins = np.clip((finite / self.upper * _BINS).astype(np.int64), 0, _BINS - 1)
        self._counts += np.bincount(bins, minlength=_BINS)
        self._sums += np.bincount(bins, weights=finite, minlength=_BINS)
        self._above += len(x) - np.searchsorted(np.sort(x), self.thresholds, side="right")

    def mean(self) -> float:
        """Mean over the steps with a finite value; NaN when there is none."""
        finite = self.count - self.infinite
        return self.total / finite if finite else float("nan")

    def mean_capped(self) -> float:
        """Mean over all steps with +inf counted as `upper`."""
        return (self.total + self.upper * self.infinite) / self.count if self.count else float("nan")

    def quantile(self, q: float) -> float:
        """The q-quantile over all steps, +inf the largest; linear between order statistics."""
        if not self.count:
            return float("nan")
        position = q * (self.count - 1)
        low, high = self._ordered(int(np.floor(position))), self._ordered(int(np.ceil(position)))
        share = position - np.floor(position)
        return low if share == 0.0 or low == high else float(low + (high - low) * share)

    def _ordered(self, index: int) -> float:
        if index >= self.count - self.infinite:
            return float("inf")
        cumulative = np.cumsum(self._counts)
        bin_ = int(np.searchsorted(cumulative, index, side="right"))
        return float(self._sums[bin_] / self._counts[bin_])

    def survival(self) -> NDArray[np.float64]:
        """Fraction of steps strictly above each of `thresholds`, exact."""
        return self._above / max(self.count, 1)

    def histogram(self, edges: Sequence[float]) -> NDArray[np.int64]:
        """Steps per bin between `edges` (rounded to upper/65536), the last bin closed; +inf left out."""
        cuts = np.clip(np.rint(np.asarray(edges) / self.upper * _BINS).astype(np.int64), 0, _BINS)
        cumulative = np.concatenate([[0], np.cumsum(self._counts)])
        return np.diff(cumulative[cuts])


class Calibration:
    """Reliability of the drafter's confidence: how often its first choice is the greedy token, in equal bins.

    Best-first trees spend their node budget by these probabilities; where they are wrong the budget goes to
    the wrong branch even if the ranking of tokens is right.

    """

    def __init__(self, bins: int = 10) -> None:
        self.bins = bins
        self.steps = np.zeros(bins, dtype=np.int64)
        self.confidence = np.zeros(bins)
        self.hits = np.zeros(bins, dtype=np.int64)

    def add(self, confidence: Float[ndarray, " N"], hit: Bool[ndarray, " N"]) -> None:
        """Count N steps: the drafter's probability of its token, and whether that was the greedy token."""
        place = np.clip((confidence * self.bins).astype(np.int64), 0, self.bins - 1)
        self.steps += np.bincount(place, minlength=self.bins)
        self.confidence += np.bincount(place, weights=confidence, minlength=self.bins)
        self.hits += np.bincount(place[hit], minlength=self.bins)

    def expected_error(self) -> float:
        """Expected calibration error: mean |frequency − confidence| over bins, weighted by their steps.

        Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eq. 3.
        """
        total = self.steps.sum()
        return float(np.abs(self.hits - self.confidence).sum() / total) if total else float("nan")

    def summary(self) -> dict[str, Any]:
        """Bins with their mean confidence and frequency (None where a bin is empty), and the error."""
        return {
            "edges": [i / self.bins for i in range(self.bins + 1)],
            "steps": self.steps.tolist(),
            "confidence": self._per_step(self.confidence),
            "frequency": self._per_step(self.hits),
            "ece": self.expected_error(),
        }

    def _per_step(self, sums: ndarray) -> list[float | None]:
        return [s / n if n else None for s, n in zip(sums.tolist(), self.steps.tolist(), strict=True)]
