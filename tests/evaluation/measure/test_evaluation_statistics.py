"""Intervals over prompts: pooled ratios, pairs, crossed seeds; and distributions in fixed memory."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from certdraft.evaluation.measure import statistics
from certdraft.evaluation.measure.distributions import StepDistribution
from certdraft.evaluation.measure.statistics import compare_ratios, pooled_ratio


def test_a_pooled_ratio_is_the_ratio_of_sums_not_the_mean_of_ratios() -> None:
    interval = pooled_ratio([10, 1], [2, 1])
    assert interval.value == pytest.approx(11 / 3)  # the mean of ratios would be 3
    assert interval.low <= interval.value <= interval.high


def test_equal_seeds_give_equal_intervals_and_other_seeds_others() -> None:
    rng = np.random.default_rng(0)
    num, den = rng.integers(1, 9, 30), rng.integers(1, 4, 30)
    assert pooled_ratio(num, den, seed=3) == pooled_ratio(num, den, seed=3)
    assert pooled_ratio(num, den, seed=3) != pooled_ratio(num, den, seed=4)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        den = rng.integers(5, 20, 40)
        num = rng.poisson(2.5 * den * rng.gamma(16, 1 / 16, 40))
        interval = pooled_ratio(num, den, n_resamples=400, seed=0)
        hits += interval.low <= 2.5 <= interval.high
    assert 0.89 <= hits / 200 <= 0.985


def test_the_interval_is_scipys_bca_up_to_the_draw() -> None:
    from scipy.stats import bootstrap

    rng = np.random.default_rng(5)
    den = rng.integers(3, 30, 25).astype(float)
    num = den * rng.gamma(3, 1, 25)
    ours = pooled_ratio(num, den, n_resamples=20_000)
    theirs = bootstrap(
        (num, den),
        lambda n, d, axis=-1: n.sum(axis) / d.sum(axis),
        paired=True,
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.method == "BCa"
    assert ours.low == pytest.approx(theirs.low, abs=0.04 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.04 * width)
    assert abs(ours.high - ours.value) > 1.1 * abs(ours.value - ours.low)  # skewed, as it should be


def test_large_samples_are_resampled_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    num, den = rng.gamma(2, 1, 50), np.ones(50)
    whole = pooled_ratio(num, den)
    monkeypatch.setattr(statistics, "_CELLS", 5000)
    blocks = pooled_ratio(num, den)
    assert blocks.low == pytest.approx(whole.low, abs=0.05)
    assert blocks.high == pytest.approx(whole.high, abs=0.05)


def test_pairing_shrinks_the_interval_of_a_difference() -> None:
    rng = np.random.default_rng(2)
    den = np.full(50, 10.0)
    base = rng.gamma(4, 1, 50) * 10
    better = base + 3 + rng.normal(0, 0.5, 50)
    paired = compare_ratios((better, den), (base, den))
    assert paired.value == pytest.approx((better - base).sum() / 500)
    assert paired.excludes(0.0)
    alone = pooled_ratio(base, den)
    assert paired.high - paired.low < 0.2 * (alone.high - alone.low)
    assert compare_ratios((base, den), (base, den), "ratio").value == 1.0


def test_a_constant_sample_and_a_single_prompt_have_a_point_for_an_interval() -> None:
    assert pooled_ratio([3.0] * 8, [1.0] * 8).low == 3.0
    one = pooled_ratio([3.0], [2.0])
    assert (one.low, one.high, one.method) == (1.5, 1.5, "none")
    assert not one.excludes(0.0)  # nothing is claimed from one prompt


def test_rare_buckets_leave_empty_resamples_out() -> None:
    interval = pooled_ratio([2, 0, 0, 1], [3, 0, 0, 1], seed=0)
    assert interval.value == pytest.approx(0.75)
    assert math.isfinite(interval.low)
    assert math.isfinite(interval.high)


def test_seeds_and_prompts_are_crossed() -> None:
    rng = np.random.default_rng(3)
    seed_effect = np.array([-1.0, 0.0, 1.0])[:, None]
    prompts = 5 + rng.normal(0, 0.1, (3, 40)) + seed_effect
    den = np.ones((3, 40))
    crossed = pooled_ratio(prompts, den)
    assert crossed.method == "crossed percentile"
    assert crossed.value == pytest.approx(prompts.mean())
    assert crossed.high - crossed.low > 1.0  # the spread between seeds is in the interval
    assert pooled_ratio(prompts[:1], den[:1]).method == "BCa"


@pytest.mark.parametrize(
    ("num", "den", "message"),
    [
        ([1, 2], [1], "equal shapes"),
        ([], [], "N ≥ 1"),
        ([1.0, float("nan")], [1, 1], "NaN"),
        ([1, 1], [0, 0], "positive sum"),
    ],
)
def test_bad_samples_are_refused(num: list[float], den: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pooled_ratio(num, den)


@given(
    st.lists(st.one_of(st.floats(0, math.log(2)), st.just(0.0), st.just(math.inf)), min_size=1, max_size=60),
    st.floats(0, 1),
)
def test_the_streamed_distribution_agrees_with_numpy(values: list[float], q: float) -> None:
    cuts = [0.0, 0.01, 0.3, 0.69]
    gathered = StepDistribution(math.log(2), cuts)
    for i in range(0, len(values), 7):
        gathered.add(np.array(values[i : i + 7]))
    x = np.sort(np.array(values))
    low, high = x[int(np.floor(q * (len(x) - 1)))], x[int(np.ceil(q * (len(x) - 1)))]
    share = q * (len(x) - 1) % 1.0
    expected = (
        low if low == high or share == 0 else (math.inf if math.isinf(high) else low + (high - low) * share)
    )
    assert gathered.quantile(q) == pytest.approx(expected, abs=1.2e-5)
    assert gathered.survival() == pytest.approx([(x > c).mean() for c in cuts], abs=0)
    finite = x[np.isfinite(x)]
    if len(finite):
        assert gathered.mean() == pytest.approx(finite.mean(), abs=1e-12)
    assert gathered.mean_capped() == pytest.approx(np.minimum(x, math.log(2)).mean(), abs=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), -0.01, 0.8])
def test_impossible_certificates_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        StepDistribution(math.log(2)).add(np.array([0.1, bad]))
