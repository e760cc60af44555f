"""Intervals for pooled ratios, resampled by prompt.

Every headline number of a report is a ratio of two sums over prompts: tokens ÷ target passes (τ), covered
steps ÷ steps, seconds ÷ seconds. Steps of one text are dependent, prompts are not, so the *prompt* is the
unit that is resampled: numerator and denominator of a prompt stay together, and the ratio is taken after
summing. The mean of per-prompt ratios is another quantity (it weighs a short prompt like a long one); where
it is reported it is named.

Comparisons are paired: the same resampled prompts enter both methods. With several training seeds the arrays
are `[S, N]` and seeds and prompts are resampled independently of each other (crossed bootstrap; Owen, "The
pigeonhole bootstrap", Annals of Applied Statistics 2007), which counts both sources of spread and, if
anything, overstates them.

Axis letters: N prompts · S seeds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Comparison = Literal["difference", "ratio"]
_CELLS_PER_BATCH = 2_000_000  # resample indices held at once: 16 MB


@dataclass(frozen=True)
class Interval:
    """A point estimate with a bootstrap interval.

    Attributes:
        value: the estimate on the data themselves.
        low: lower end; equal to `value` when nothing can be resampled (one prompt).
        high: upper end.
        confidence: nominal coverage, e.g. 0.95.
        method: "BCa", "percentile", "crossed percentile" or "none".
        prompts: how many prompts the interval stands on.
    """

    value: float
    low: float
    high: float
    confidence: float
    method: str
    prompts: int

    def excludes(self, value: float) -> bool:
        """True when `value` lies outside the interval."""
        return self.prompts > 1 and not self.low <= value <= self.high


def pooled_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Ratio of sums Σ numerator / Σ denominator with an interval over prompts.

    Args:
        numerator: one number per prompt, [N], or [S, N] with one row per seed.
        denominator: same shape, ≥ 0, with a positive sum.
        confidence: nominal coverage in (0, 1).
        n_resamples: bootstrap resamples.
        seed: of the resampling; equal seeds give equal intervals.

    Returns:
        Interval; BCa where it is defined, else percentile (a constant or tiny sample).

    Raises:
        ValueError: shapes differ, no prompt, a non-finite number, or a denominator that sums to 0.

    Examples:
        >>> interval = pooled_ratio([6, 3], [2, 1])
        >>> interval.value, interval.low, interval.high
        (3.0, 3.0, 3.0)
    """
    num, den = _checked(numerator, denominator)
    if np.any(den < 0) or not np.all(den.sum(axis=-1) > 0):
        raise ValueError(
            "pooled_ratio: the denominators must be ≥ 0 with a positive sum (no steps, no rounds?)"
        )
    return _interval(lambda n, d: n.sum(axis=-1) / d.sum(axis=-1), (num, den), confidence, n_resamples, seed)


def compare_ratios(
    first: tuple[ArrayLike, ArrayLike],
    second: tuple[ArrayLike, ArrayLike],
    comparison: Comparison = "difference",
    *,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Paired comparison of two pooled ratios on the same prompts.

    Args:
        first: (numerator, denominator) of the method under test, [N] or [S, N] each.
        second: the same of the baseline, same shape, same prompts in the same order.
        comparison: "difference" first − second, or "ratio" first ÷ second.
        confidence: nominal coverage in (0, 1).
        n_resamples: bootstrap resamples.
        seed: of the resampling.

    Returns:
        Interval of the difference (compare with 0) or of the ratio (compare with 1).

    Raises:
        ValueError: shapes differ, or a sum of denominators is 0.

    Examples:
        >>> compare_ratios(([4, 2], [2, 1]), ([2, 1], [2, 1]), "ratio").value
        2.0
    """
    n1, d1 = _checked(*first)
    n2, d2 = _checked(*second)
    if n1.shape != n2.shape:
        raise ValueError(
            f"compare_ratios: the methods have shapes {n1.shape} and {n2.shape}; pair the prompts first"
        )
    if comparison not in ("difference", "ratio"):
        raise ValueError(f"compare_ratios: comparison {comparison!r} is neither 'difference' nor 'ratio'")

    def statistic(a: Array, b: Array, c: Array, d: Array) -> Array:
        x, y = a.sum(axis=-1) / b.sum(axis=-1), c.sum(axis=-1) / d.sum(axis=-1)
        return x - y if comparison == "difference" else x / y

    return _interval(statistic, (n1, d1, n2, d2), confidence, n_resamples, seed)


def _checked(numerator: ArrayLike, denominator: ArrayLike) -> tuple[Array, Array]:
    num, den = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    if num.shape != den.shape or num.ndim not in (1, 2) or num.size == 0:
        raise ValueError(
            f"expected two equal shapes [N] or [S, N] with N ≥ 1, got {num.shape} and {den.shape}"
        )
    if not (np.isfinite(num).all() and np.isfinite(den).all()):
        raise ValueError("a prompt's numerator or denominator is NaN or infinite")
    return num, den


def _interval(
    statistic: Callable[..., Array], data: tuple[Array, ...], confidence: float, n_resamples: int, seed: int
) -> Interval:
    if data[0].ndim == 2 and data[0].shape[0] == 1:
        data = tuple(x[0] for x in data)
    n = data[0].shape[-1]
    if data[0].ndim == 2:
        value = float(np.mean(statistic(*data)))
        low, high = _crossed(statistic, data, confidence, n_resamples, seed)
        return Interval(value, low, high, confidence, "crossed percentile", n)
    value = float(statistic(*data))
    if n == 1:
        return Interval(value, value, value, confidence, "none", n)
    low, high, method = _by_prompt(statistic, data, confidence, n_resamples, seed)
    return Interval(value, low, high, confidence, method, n)


def _by_prompt(
    statistic: Callable[..., Array], data: tuple[Array, ...], confidence: float, n_resamples: int, seed: int
) -> tuple[float, float, str]:
    """BCa interval over one axis of prompts; percentile where BCa is undefined."""
    from scipy.stats import bootstrap

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # scipy warns on a constant sample; the percentile branch answers it
        result = bootstrap(
            data,
            lambda *sample, axis=-1: statistic(*sample),
            paired=True,
            vectorized=True,
            axis=-1,
            method="BCa",
            confidence_level=confidence,
            n_resamples=n_resamples,
            batch=max(1, _CELLS_PER_BATCH // data[0].shape[-1]),
            rng=np.random.default_rng(seed),
        )
    low, high = (float(x) for x in result.confidence_interval)
    if np.isfinite(low) and np.isfinite(high):
        return low, high, "BCa"
    # A resample may hold no step of a rare bucket (0 ÷ 0): it says nothing about the ratio and is left out.
    draws = result.bootstrap_distribution
    low, high = _percentiles(draws[np.isfinite(draws)], confidence)
    return low, high, "percentile"


def _crossed(
    statistic: Callable[..., Array], data: tuple[Array, ...], confidence: float, n_resamples: int, seed: int
) -> tuple[float, float]:
    """Percentile interval of the seed-averaged statistic; seeds and prompts are resampled independently."""
    rng = np.random.default_rng(seed)
    seeds, prompts = data[0].shape
    draws = np.empty(n_resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        for i in range(n_resamples):
            s, p = rng.integers(seeds, size=seeds), rng.integers(prompts, size=prompts)
            draws[i] = np.mean(statistic(*(x[np.ix_(s, p)] for x in data)))
    return _percentiles(draws[np.isfinite(draws)], confidence)


def _percentiles(draws: Array, confidence: float) -> tuple[float, float]:
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(draws, [tail, 100.0 - tail])
    return float(low), float(high)
