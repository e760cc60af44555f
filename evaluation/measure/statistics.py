"""Bootstrap intervals for pooled ratios, resampled by prompt.

The numbers of a report are ratios of two sums over prompts: tokens ÷ target passes (τ), covered steps ÷
steps, seconds ÷ seconds. Steps of one text are dependent, prompts are not, so prompts are resampled:
numerator and denominator of a prompt stay together, and the ratio is taken after summing. Comparisons are
paired: the same resampled prompts enter both methods. With several training seeds the arrays are `[S, N]`,
and seeds and prompts are resampled independently (crossed bootstrap; Owen, "The pigeonhole bootstrap",
Annals of Applied Statistics 2007), which if anything overstates the spread.

The BCa levels are computed here and not by `scipy.stats.bootstrap`, which a test compares them with: the
jackknife of a ratio of sums takes O(N), scipy's generic one O(N²), and equal resamples are drawn once.

Axis letters: N prompts · S seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Statistic = Callable[..., Array]  # of the column sums, elementwise over resamples
Comparison = Literal["difference", "ratio"]
_CELLS = 2_000_000  # resampling weights held at once: 16 MB


@dataclass(frozen=True)
class Interval:
    """A point estimate with a bootstrap interval.

    Attributes:
        value: the estimate on the data themselves.
        low: lower end; equal to `value` when nothing can be resampled (one prompt).
        high: upper end.
        confidence: nominal coverage, e.g. 0.95.
        method: "BCa", "percentile", "crossed percentile" or "none".
        prompts: number of prompts behind the interval.
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
    """Return Σ numerator / Σ denominator with an interval over prompts.

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
    return _interval(lambda n, d: n / d, (num, den), confidence, n_resamples, seed)


def compare_ratios(
    first: tuple[ArrayLike, ArrayLike],
    second: tuple[ArrayLike, ArrayLike],
    comparison: Comparison = "difference",
    *,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Compare two pooled ratios on the same prompts, paired.

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
        return a / b - c / d if comparison == "difference" else (a / b) / (c / d)

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
    statistic: Statistic, data: tuple[Array, ...], confidence: float, n_resamples: int, seed: int
) -> Interval:
    if data[0].ndim == 2 and data[0].shape[0] == 1:
        data = tuple(x[0] for x in data)
    n = data[0].shape[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        if data[0].ndim == 2:
            value = float(np.mean(statistic(*(x.sum(axis=-1) for x in data))))
            low, high = _crossed(statistic, data, confidence, n_resamples, seed)
            return Interval(value, low, high, confidence, "crossed percentile", n)
        value = float(statistic(*(x.sum() for x in data)))
        if n == 1:
            return Interval(value, value, value, confidence, "none", n)
        draws = np.concatenate([statistic(*(w @ x for x in data)) for w in _weights(n, n_resamples, seed)])
        # a resample without a step of a rare bucket (0 ÷ 0) is left out
        draws = draws[np.isfinite(draws)]
        left_out = statistic(*(x.sum() - x for x in data))  # [N], each without one prompt
    levels = _bca_levels(value, draws, left_out, confidence)
    method = "percentile" if levels is None else "BCa"
    low, high = np.quantile(draws, levels or ((1 - confidence) / 2, (1 + confidence) / 2))
    return Interval(value, float(low), float(high), confidence, method, n)


def _weights(n: int, n_resamples: int, seed: int) -> Iterable[Array]:
    """Counts of each of n prompts in each resample, in blocks of [B, N]."""
    if n_resamples * n <= _CELLS:
        return (_cached_weights(n, n_resamples, seed),)
    size = max(1, _CELLS // n)
    blocks = range(0, n_resamples, size)
    return (_draw_weights(n, min(size, n_resamples - b), np.random.default_rng((seed, b))) for b in blocks)


def _draw_weights(n: int, count: int, rng: np.random.Generator) -> Array:
    drawn = rng.integers(n, size=(count, n)) + n * np.arange(count)[:, None]
    return np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n).astype(np.float64)


@lru_cache(maxsize=4)
def _cached_weights(n: int, n_resamples: int, seed: int) -> Array:
    return _draw_weights(n, n_resamples, np.random.default_rng((seed, 0)))


def _bca_levels(value: float, draws: Array, left_out: Array, confidence: float) -> tuple[float, float] | None:
    """Quantile levels of the bias-corrected and accelerated interval; None where it is not defined.

    Source: Efron, "Better Bootstrap Confidence Intervals", JASA 1987; acceleration from the jackknife.
    """
    below = (np.mean(draws < value) + np.mean(draws <= value)) / 2
    if not 0 < below < 1 or not np.isfinite(left_out).all():
        return None
    influence = left_out.mean() - left_out
    scale = float((influence**2).sum()) ** 1.5
    if scale == 0:
        return None
    normal = NormalDist()
    bias, acceleration = normal.inv_cdf(float(below)), float((influence**3).sum()) / (6 * scale)
    ends = (bias + normal.inv_cdf((1 - confidence) / 2), bias + normal.inv_cdf((1 + confidence) / 2))
    low, high = (normal.cdf(bias + z / (1 - acceleration * z)) for z in ends)
    return low, high


def _crossed(
    statistic: Statistic, data: tuple[Array, ...], confidence: float, n_resamples: int, seed: int
) -> tuple[float, float]:
    """Percentile interval of the seed-averaged statistic; seeds and prompts are resampled independently."""
    seeds, prompts = data[0].shape
    rng = np.random.default_rng((seed, 1))
    draws = []
    for weights in _weights(prompts, n_resamples, seed):
        each = statistic(*(weights @ x.T for x in data))  # [B, S]
        draws.append((each * _draw_weights(seeds, len(each), rng)).sum(axis=1) / seeds)
    kept = np.concatenate(draws)
    low, high = np.quantile(kept[np.isfinite(kept)], ((1 - confidence) / 2, (1 + confidence) / 2))
    return float(low), float(high)
