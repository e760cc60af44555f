"""The radius against its definition: solver, 50-digit arithmetic, and what no drafter may break."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.mathematics.certificates import accepted_set, exact_radius, solver_radius, width
from strategies import DIRECTIONS, RULES, directions, dirichlet, distributions, rules, single_token_rules

from certdraft.certificates import (
    Additive,
    Coverage,
    Head,
    Multiplicative,
    StrictGreedy,
    TopM,
    Typical,
    ceiling,
    kl_divergence,
    minimiser,
    radii,
    radius,
    tv_radius,
)


def divergence(p: torch.Tensor, q: torch.Tensor, direction: str) -> torch.Tensor:
    return kl_divergence(p, q) if direction == "forward" else kl_divergence(q, p)


def accepted(rule, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Whether the drafter's best token is accepted, every token level with the best one being tried."""
    if isinstance(rule, Coverage):
        return rule.accepts(p, q)
    best = q >= q.amax(-1, keepdim=True)
    return (rule.accepted_entries(p) | ~best).all(-1)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_solver_agrees(direction: str) -> None:
    cases = [
        ([0.42, 0.3, 0.2, 0.08], StrictGreedy()),
        ([0.42, 0.4, 0.1, 0.08], Additive(0.1)),
        ([0.3, 0.28, 0.22, 0.2], Multiplicative(0.7)),
        ([0.3, 0.3, 0.25, 0.15], TopM(3, t=0.2)),
        ([0.4, 0.3, 0.2, 0.1], Typical(0.15, 0.9)),
        ([0.35, 0.05, 0.3, 0.3], Coverage(2)),
        ([0.5, 0.5, 0.0], Coverage(2)),
        ([0.26, 0.25, 0.25, 0.24], Coverage(3)),
    ]
    for p, rule in cases:
        if direction == "reverse" and 0.0 in p:
            continue
        expected = solver_radius(p, accepted_set(p, rule), width(rule), direction)
        value = float(radius(torch.tensor(p, dtype=torch.float64), rule, direction))
        assert value == pytest.approx(expected, abs=2e-7), (p, rule)


@given(distributions(), rules(), directions())
def test_matches_50_digits(p: torch.Tensor, rule, direction: str) -> None:
    expected = exact_radius(p.tolist(), accepted_set(p.tolist(), rule), width(rule), direction)
    assert float(radius(p, rule, direction)) == pytest.approx(expected, rel=1e-7, abs=1e-15)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_worst_case_attains_the_radius_and_sits_on_the_fence(rule, direction: str) -> None:
    p = torch.cat([dirichlet(c, 12, 60) for c in (0.1, 0.7, 5.0, 200.0)])
    kappa, q = radius(p, rule, direction), minimiser(p, rule, direction)
    finite = torch.isfinite(kappa) & (kappa > 1e-9)
    assert torch.isnan(q[~torch.isfinite(kappa)]).all()
    p, q, kappa = p[finite], q[finite], kappa[finite]
    torch.testing.assert_close(divergence(p, q, direction), kappa, rtol=1e-6, atol=1e-10)
    assert not accepted(rule, p, q).any(), "at the radius the drafter ties, and a tie is a rejection"
    inside = p + (1 - 1e-6) * (q - p)
    assert accepted(rule, p, inside).all(), "just inside the radius everything is accepted"
    rejected = ~rule.accepted_entries(p) if not isinstance(rule, Coverage) else p < p.amax(-1, keepdim=True)
    pushed = q * (1 + 1e-6 * rejected)
    pushed = pushed / pushed.sum(-1, keepdim=True)
    assert not accepted(rule, p, pushed).any(), "just outside it the worst drafter is rejected without a tie"
    assert (divergence(p, pushed, direction) <= kappa + 1e-5).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_brute_force_finds_no_closer_failure_and_one_hardly_further(direction: str) -> None:
    """Every drafter over three tokens on a grid of 1/150."""
    cells = 150
    i, j = torch.meshgrid(*[torch.arange(1.0, cells, dtype=torch.float64)] * 2, indexing="ij")
    grid = torch.stack([i, j, cells - i - j], dim=-1)[i + j < cells] / cells
    for p in ([0.5, 0.3, 0.2], [0.42, 0.4, 0.18], [0.9, 0.07, 0.03], [1 / 3, 1 / 3, 1 / 3]):
        target = torch.tensor(p, dtype=torch.float64)
        for rule in (*RULES, Coverage(2)):
            kappa = float(radius(target, rule, direction))
            failing = ~accepted(rule, target.expand_as(grid), grid)
            if not bool(failing.any()):
                assert math.isinf(kappa), rule
                continue
            least = float(divergence(target, grid[failing], direction).min())
            assert kappa <= least + 1e-12, rule
            assert least <= kappa + 0.03, rule


def search(pairs: int, vocab_size: int = 6) -> tuple[int, int, int]:
    """Random drafters around the target and around the worst case; none within the radius is rejected.

    Returns how many were tried, how many of them were certified with less than a tenth of the radius to
    spare, and how many were rejected.
    """
    tried = close = rejected = 0
    for concentration in (0.2, 1.0, 20.0):
        p = dirichlet(concentration, vocab_size, pairs)
        for rule in RULES:
            for direction in DIRECTIONS:
                kappa = radius(p, rule, direction)
                worst = minimiser(p, rule, direction)
                near = torch.where(torch.isnan(worst), p, worst)
                share = torch.rand(pairs, 1, dtype=torch.float64) * 1.2
                noise = dirichlet(1.0, vocab_size, pairs)
                far = torch.rand(pairs, 1, dtype=torch.float64) ** 4
                q = (1 - far) * (p + share * (near - p)).clamp_min(1e-12) + far * noise
                q = q / q.sum(-1, keepdim=True)
                kl = divergence(p, q, direction)
                good = accepted(rule, p, q)
                assert good[kl < kappa].all(), (rule, direction)
                tried += pairs
                close += int(((kl < kappa) & (kl > 0.9 * kappa)).sum())
                rejected += int((~good).sum())
    return tried, close, rejected


def test_no_drafter_within_the_radius_is_rejected() -> None:
    search(pairs=400)


@pytest.mark.slow
def test_no_drafter_within_the_radius_is_rejected_in_a_long_search() -> None:
    found = []
    for seed in range(20):
        torch.manual_seed(seed)
        found.append(search(pairs=1000))
    tried, close, rejected = (sum(column) for column in zip(*found, strict=True))
    assert tried >= 1_000_000
    assert close >= 10_000, "the search comes close to the radius from inside"
    assert rejected >= 100_000, "and it crosses it"


@given(distributions(min_size=2), rules(), directions())
def test_float_error_stays_in_proportion(p: torch.Tensor, rule, direction: str) -> None:
    """Single precision in, 50 digits as the judge: ten roundings of the radius at most, wherever it lies.

    Near the far end of the reverse direction the radius is the log of a small remainder, which has fewer
    digits; where rounding moves a token across the threshold there is nothing to compare.
    """
    row = p.float()
    exact = row.double().tolist()
    inside = accepted_set(exact, rule)
    if not isinstance(rule, Coverage):
        seen = rule.accepted_entries(row).nonzero().squeeze(-1).tolist()
        if set(seen) != inside:
            return
    expected = exact_radius(exact, inside, width(rule), direction)
    value = float(radius(row, rule, direction))
    if direction == "reverse" and expected > 4:
        assert value == pytest.approx(expected, rel=1e-3)
    else:
        assert value == pytest.approx(expected, rel=2e-6, abs=1e-12)


@given(distributions(min_size=2), directions(), st.data())
def test_grows_with_tolerance(p: torch.Tensor, direction: str, data: st.DataObject) -> None:
    share = st.floats(0.0, 1.0)
    low, high = sorted([data.draw(share), data.draw(share)])
    few, many = sorted([data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))])
    ladders = [
        [StrictGreedy(), Additive(low), Additive(high)],
        [StrictGreedy(), Multiplicative(high), Multiplicative(low)],
        [StrictGreedy(), TopM(few, t=low), TopM(many, t=low), TopM(many, t=high), Additive(high)],
        [StrictGreedy(), TopM(few, alpha=high), TopM(many, alpha=high), Multiplicative(high)],
        [StrictGreedy(), Typical(high, low), Typical(low, low)],
        [StrictGreedy(), Coverage(few), Coverage(many)],
    ]
    for ladder in ladders:
        values = [float(x) for x in radii(p, ladder, direction)]
        for lower, upper, rule in zip(values, values[1:], ladder[1:], strict=False):
            assert lower <= upper * (1 + 1e-9) + 1e-12, (rule, values)


@given(distributions(), rules(), directions(), st.randoms(use_true_random=False))
def test_does_not_depend_on_the_order_of_the_vocabulary(p, rule, direction: str, random) -> None:
    order = list(range(len(p)))
    random.shuffle(order)
    value, shuffled = radius(p, rule, direction), radius(p[order], rule, direction)
    torch.testing.assert_close(shuffled, value, rtol=1e-7, atol=1e-15)


@given(distributions(), rules())
def test_stays_under_its_ceiling(p: torch.Tensor, rule) -> None:
    value = float(radius(p, rule))
    assert 0 <= value
    assert math.isinf(value) or value <= ceiling(rule) + 1e-12
    assert math.isinf(ceiling(rule, "reverse"))


def test_hand_cases() -> None:
    certain = torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert float(radius(certain, StrictGreedy())) == pytest.approx(math.log(2), rel=1e-6)
    for m in (1, 2, 3):
        assert float(radius(certain, Coverage(m))) == pytest.approx(math.log(m + 1), rel=1e-6)
    assert float(radius(certain, Coverage(4))) == math.inf, "four tokens: the top-4 cannot miss one"
    assert float(radius(certain, StrictGreedy(), "reverse")) == math.inf
    assert float(radius(torch.tensor([0.5, 0.5]), StrictGreedy())) == 0.0
    assert float(radius(torch.tensor([0.5, 0.5]), Additive(0.1))) == math.inf, "both tokens pass"
    assert float(radius(torch.tensor([0.6, 0.4]), Additive(0.7))) == math.inf
    assert float(radius(torch.tensor([1.0]), StrictGreedy())) == math.inf, "one token: nothing else to draft"
    # p0 = p_g deleted is the only way past two impossible rivals
    value = radius(torch.tensor([0.75, 0.25, 0.0, 0.0]), Coverage(2), "reverse")
    assert float(value) == pytest.approx(-math.log(0.25), rel=1e-6)
    half = torch.tensor([[0.5, 0.25, 0.25], [0.4, 0.2, 0.4]], dtype=torch.float64)
    assert float(radius(half, Multiplicative(0.5))[0]) == float(radius(half[0], StrictGreedy())), "0.25 ties"


@given(distributions(min_size=2), single_token_rules())
def test_total_variation_radius(p: torch.Tensor, rule) -> None:
    kappa, tv = float(radius(p, rule)), float(tv_radius(p, rule))
    if isinstance(rule, StrictGreedy):
        top = p.sort(descending=True).values
        assert tv == pytest.approx(float(top[0] - top[1]) / 2, abs=1e-12)
    if math.isinf(kappa):
        assert math.isinf(tv)
    else:
        assert kappa >= 2 * tv**2 - 1e-12, "Pinsker"
        assert float((p - minimiser(p, rule)).abs().sum()) / 2 == pytest.approx(tv, abs=1e-9)


def test_one_call_for_many_rules_equals_many_calls() -> None:
    p = dirichlet(0.3, 200, 5).reshape(5, 1, 200)
    together = radii(p, RULES)
    for rule, value in zip(RULES, together, strict=True):
        assert value.shape == (5, 1)
        torch.testing.assert_close(value, radius(p, rule), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("p", "rule", "message"),
    [
        ([0.5, 0.4], StrictGreedy(), r"p: row \[\] does not sum to 1 \(it gives 0.9\)"),
        ([[0.5, 0.5], [1.5, -0.5]], StrictGreedy(), r"row \[1\] holds a negative probability"),
        ([[1.5, -0.2, -0.3]], StrictGreedy(), r"row \[0\] holds a negative probability"),
        ([[1.5, 0.0, -0.5]], StrictGreedy(), r"row \[0\] holds a probability above 1"),
        ([[0.5, float("nan")]], Coverage(1), r"row \[0\] does not sum to 1 \(it gives nan\)"),
    ],
)
def test_rows_that_are_no_distributions_are_named(p: list, rule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        radius(torch.tensor(p), rule)


def test_short_heads_and_unknown_directions_are_refused() -> None:
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    with pytest.raises(ValueError, match=r"coverage\(m=3\) needs the 4 most probable .* K=3"):
        radius(Head.from_probs(p, 3), Coverage(3))
    head = Head.from_probs(p, 3)
    with pytest.raises(ValueError, match=r"typical.* needs the entropy"):
        radius(Head(head.ids, head.gap, head.lse_gap, 4), Typical(0.1, 0.1))
    with pytest.raises(ValueError, match='direction=.*"forward"'):
        radius(p, StrictGreedy(), "backward")
