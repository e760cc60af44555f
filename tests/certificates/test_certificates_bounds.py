"""Margin bounds: below every radius they speak of, and read backwards correctly."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import directions, distributions, rules

from certdraft.certificates import (
    Additive,
    Coverage,
    Head,
    Multiplicative,
    StrictGreedy,
    TopM,
    Typical,
    entropy,
    margin,
    margin_bound,
    order_margin,
    radius,
    safe_margin,
)

RULES = (
    StrictGreedy(),
    Additive(0.1),
    Multiplicative(0.5),
    TopM(4, t=0.2),
    TopM(3, alpha=0.3),
    Typical(0.1, 0.09),
    Coverage(1),
    Coverage(4),
)


@given(distributions(min_size=2), rules(), directions())
def test_no_bound_exceeds_the_radius(p: torch.Tensor, rule, direction: str) -> None:
    exact = float(radius(p, rule, direction))
    top = {"margin": margin(p), "p0": p.amax()}
    knowledge = [{k: top[k] for k in keys} for keys in (["margin"], ["p0"], ["margin", "p0"])]
    j = rule.m if isinstance(rule, Coverage) else rule.m - 1 if isinstance(rule, TopM) else 0
    if 1 <= j < len(p):
        order = {"order_margin": order_margin(p, j)}
        knowledge += [order] if isinstance(rule, Coverage) else []
        knowledge += [known | order for known in knowledge[:3]]
    if isinstance(rule, Typical):
        knowledge += [known | {"entropy": entropy(p)} for known in knowledge[:3]]
    for known in knowledge:
        bound = float(margin_bound(rule, direction=direction, **known))
        assert bound >= 0
        assert bound <= exact * (1 + 1e-9) + 1e-12, known


def test_bounds_are_sharp() -> None:
    """Where a bound is called sharp, the distribution that attains it."""
    d, t, alpha, m = 0.2, 0.3, 0.4, 3
    spread = 10_000  # so thin that it takes no part

    def value(tokens, rule, direction):
        p = torch.tensor(tokens, dtype=torch.float64)
        rest = (1 - p.sum()).clamp_min(0) / spread
        return float(radius(torch.cat([p, rest.expand(spread)]), rule, direction))

    for direction in ("forward", "reverse"):

        def bound(rule, direction=direction, **known):
            return float(margin_bound(rule, direction=direction, **known))

        assert value([0.6, 0.4], StrictGreedy(), direction) == pytest.approx(
            bound(StrictGreedy(), margin=d), rel=1e-5
        )
        three = [(1 + d + t) / 3, (1 - 2 * d + t) / 3, (1 + d - 2 * t) / 3]
        assert value(three, Additive(t), direction) == pytest.approx(bound(Additive(t), margin=d), rel=1e-5)
        x = (1 - alpha) / (1 + alpha)
        pair = [(d / x + d) / 2, (d / x - d) / 2]
        exact = value(pair, Multiplicative(alpha), direction)
        assert exact == pytest.approx(bound(Multiplicative(alpha), margin=d), rel=1e-3)
        flat = [(1 + m * d) / (m + 1)] + [(1 - d) / (m + 1)] * m
        assert value(flat, Coverage(m), direction) == pytest.approx(bound(Coverage(m), margin=d), rel=1e-5)


def test_small_margins_keep_their_digits() -> None:
    for d in (1e-3, 1e-5, 1e-7):
        margin_ = torch.tensor(d, dtype=torch.float64)
        for direction in ("forward", "reverse"):
            strict = float(margin_bound(StrictGreedy(), margin=margin_, direction=direction))
            assert strict == pytest.approx(d * d / 2, rel=2 * d + 1e-6)
            wide = float(margin_bound(Coverage(4), margin=margin_, direction=direction))
            assert wide == pytest.approx(4 * d * d / 2, rel=8 * d + 1e-6)
            order = float(margin_bound(Coverage(4), order_margin=margin_, direction=direction))
            assert order == pytest.approx(5 * d * d / 4, rel=8 * d + 1e-6)


def test_limits_at_certainty() -> None:
    one = torch.tensor(1.0, dtype=torch.float64)
    for m in (1, 4):
        assert float(margin_bound(Coverage(m), margin=one)) == pytest.approx(math.log(m + 1))
        assert float(margin_bound(Coverage(m), order_margin=one)) == pytest.approx(math.log(m + 1), rel=1e-6)
        assert float(margin_bound(Coverage(m), margin=one, direction="reverse")) == math.inf
    assert float(margin_bound(StrictGreedy(), p0=0.5)) == 0.0
    assert float(margin_bound(Additive(0.3), p0=0.2)) == math.inf, "every token passes"


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_safe_margin_is_the_least_safe_one(rule, direction: str) -> None:
    kl = torch.tensor([0.0, 1e-4, 0.01, 0.1, 0.4], dtype=torch.float64)
    for p0 in (None, 0.4, 0.9):
        least = max(0.0, 2 * p0 - 1) if p0 else 0.0  # the runner-up has at most 1 − p0
        grid = torch.linspace(least, p0 or 1.0, 81, dtype=torch.float64)
        known = {} if p0 is None else {"p0": torch.full_like(grid, p0)}
        bounds = margin_bound(rule, margin=grid, direction=direction, **known)
        for epsilon, safe in zip(kl, safe_margin(rule, kl=kl, p0=p0, direction=direction), strict=True):
            above = grid >= safe
            assert (bounds[above] >= epsilon * (1 - 1e-6)).all()
            if p0 is None and 1e-3 < float(safe) < 1:
                just_below = margin_bound(rule, margin=safe * 0.999, direction=direction)
                assert float(just_below) <= float(epsilon) * (1 + 1e-9)
    assert float(safe_margin(rule, kl=50.0, direction="forward")) == math.inf


@given(distributions(min_size=2), rules(), directions(), st.floats(1e-6, 0.6))
def test_what_is_called_safe_is_safe(p: torch.Tensor, rule, direction: str, kl: float) -> None:
    exact = float(radius(p, rule, direction))
    kl_ = torch.tensor(kl, dtype=torch.float64)
    slack = 1e-9
    if float(margin(p)) >= float(safe_margin(rule, kl=kl_, direction=direction)) + slack:
        assert exact > kl * (1 - 1e-6)
    if float(margin(p)) >= float(safe_margin(rule, kl=kl_, p0=p.amax(), direction=direction)) + slack:
        assert exact > kl * (1 - 1e-6)


def test_shapes_and_types_follow_the_input() -> None:
    gap = torch.rand(3, 2)
    assert margin_bound(Coverage(2), margin=gap).shape == (3, 2)
    assert margin_bound(Coverage(2), margin=gap).dtype == torch.float32
    assert margin_bound(Coverage(2), margin=gap, p0=0.9 * gap + 0.1).shape == (3, 2)
    assert safe_margin(Coverage(2), kl=0.1).shape == ()
    head = Head.from_logits(torch.randn(50, 30), 8)
    assert (
        margin_bound(Coverage(3), margin=margin(head), p0=head.p[:, 0]) <= radius(head, Coverage(3)) + 1e-6
    ).all()


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({}, "needs at least one of"),
        ({"margin": 1.5}, r"margin=1.5 is outside \[0, 1\]"),
        ({"margin": float("nan")}, "margin=nan"),
        ({"margin": 0.5, "p0": torch.tensor([0.9, 0.4])}, "p0=0.4 is below margin=0.5"),
        ({"order_margin": 0.5}, "an order margin alone bounds only coverage"),
    ],
)
def test_impossible_knowledge_is_refused(known: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        margin_bound(Multiplicative(0.5), **known)


def test_impossible_budgets_are_refused() -> None:
    with pytest.raises(ValueError, match="kl=-1 must be ≥ 0"):
        safe_margin(StrictGreedy(), kl=-1.0)
