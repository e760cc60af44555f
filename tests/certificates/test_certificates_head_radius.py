"""The radius read off a head: exact once the head holds the active set, never more than the exact one."""

import pytest
import torch
from hypothesis import given
from oracles.mathematics.certificates import accepted_set, large_radius, width
from strategies import DIRECTIONS, RULES, directions, dirichlet, distributions, rules

from certdraft.certificates import Additive, Coverage, Head, Multiplicative, StrictGreedy, Typical, radius


@given(distributions(min_size=2), rules(), directions())
def test_head_of_everything_is_exact_and_a_short_one_never_claims_more(p, rule, direction: str) -> None:
    exact = float(radius(p, rule, direction))
    for kept in range(1, len(p) + 1):
        if isinstance(rule, Coverage) and kept <= rule.m < len(p):
            continue
        value = float(radius(Head.from_probs(p, kept), rule, direction))
        assert value <= exact * (1 + 1e-9) + 1e-12, kept
        if isinstance(rule, (StrictGreedy, Coverage)) and kept > width(rule) or kept == len(p):
            # a token within 1e-6 of the threshold counts as rejected in a head; elsewhere the two agree
            edges = (
                []
                if isinstance(rule, Coverage)
                else [abs(x / max(float(rule.threshold(p)), 1e-300) - 1) for x in p]
            )
            if isinstance(rule, (StrictGreedy, Coverage)) or min(edges) > 1e-5:
                assert value == pytest.approx(exact, rel=1e-7, abs=1e-12)


def test_head_is_exact_once_it_holds_the_active_set() -> None:
    p = torch.cat([dirichlet(c, 60, 50) for c in (0.02, 0.1, 0.5)])
    for rule in (*RULES, Typical(0.1, 0.5)):
        exact = {d: radius(p, rule, d) for d in DIRECTIONS}
        held = (
            rule.accepted_entries(p).sum(-1) if not isinstance(rule, Coverage) else torch.tensor(rule.m)
        ) + 1
        for kept in (4, 8, 16):
            head = Head.from_probs(p, kept)
            for direction in DIRECTIONS:
                value = radius(head, rule, direction)
                assert (value <= exact[direction] * (1 + 1e-9) + 1e-12).all()
                whole = (held <= kept).expand_as(value)
                torch.testing.assert_close(value[whole], exact[direction][whole], rtol=1e-9, atol=1e-13)


def test_heads_count_rounding_at_a_threshold_as_a_tie() -> None:
    """Tokens exactly at the threshold, whose probability rebuilt from logarithms may land on either side."""
    top = torch.linspace(0.1, 0.45, 300)
    half = torch.stack([top, top / 2, top / 4, torch.zeros(300), 1 - 1.75 * top], dim=-1)
    half = torch.cat(
        [half[:, :4], (half[:, 4:] / 20).expand(300, 20)], dim=-1
    )  # p(1) is exactly half of p(0)
    for kept in (3, 24):
        head = Head.from_probs(half, kept)
        assert (radius(head, Multiplicative(0.5)) <= radius(half, Multiplicative(0.5)) * (1 + 1e-5)).all()
        for row in range(0, 300, 30):  # p(x0) − t is exactly 0, and the impossible token is rejected
            rule = Additive(float(half[row, 0]))
            exact = radius(half[row], rule)
            assert torch.isfinite(exact)
            assert float(radius(head[row], rule)) <= float(exact) * (1 + 1e-5)


def test_a_head_of_one_token_below_the_threshold_claims_nothing() -> None:
    p = torch.full((20,), 0.05, dtype=torch.float64)
    for direction in DIRECTIONS:
        assert float(radius(Head.from_probs(p, 1), Typical(0.5, 50.0), direction)) == 0.0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_accepted_sets_larger_than_the_selection(direction: str) -> None:
    """Hundreds of accepted tokens, pooled or not: rows that leave the fast path."""
    vocab_size = 3000
    flat = torch.full((vocab_size,), 1.0, dtype=torch.float64)
    flat[:200] = 40 + torch.linspace(0, 1, 200, dtype=torch.float64)  # 200 pooled with token 200
    steep = torch.linspace(1, 30, vocab_size, dtype=torch.float64) ** 3
    noisy = torch.rand(vocab_size, dtype=torch.float64) + 0.05
    p = torch.stack([flat, steep, noisy])[:, torch.randperm(vocab_size)]
    p = p / p.sum(-1, keepdim=True)
    for rule in (
        Multiplicative(0.03),
        Multiplicative(0.4),
        Typical(0.1, 0.5),
        Additive(0.0005),
        Additive(1e-4),
    ):
        for source in (p, p.float()):
            values = radius(source, rule, direction)
            for row, value in zip(source, values, strict=True):
                row = row.tolist()
                expected = large_radius(row, accepted_set(row, rule), direction)
                assert float(value) == pytest.approx(expected, rel=2e-6 if source is not p else 1e-9), rule
