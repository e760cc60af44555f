"""The radius in float32 near ties and on confident rows, and its gradients."""

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.mathematics.certificates import accepted_set, exact_radius, width
from strategies import DIRECTIONS, RULES, dirichlet, rules

from certdraft.certificates import (
    Additive,
    Coverage,
    Head,
    Multiplicative,
    StrictGreedy,
    TopM,
    Typical,
    minimiser,
    radii,
    radius,
)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("gap", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 8.0])
def test_float32_keeps_its_digits_near_ties(gap: float, direction: str) -> None:
    logits = torch.tensor([[0.0, -gap, -2 * gap, -3.0, -4.0]], dtype=torch.float64)
    head = Head.from_logits(logits.float(), 5)  # gaps as stored, log-probabilities recomputed from them
    stored = (-head.gap.double()).exp()[0].tolist()
    p32 = logits.softmax(-1).float()
    for rule in (StrictGreedy(), Coverage(2), TopM(3, alpha=0.0), Multiplicative(0.5)):
        for source, row in ((head, stored), (p32, p32[0].tolist())):
            expected = exact_radius(row, accepted_set(row, rule), width(rule), direction)
            value = radius(source, rule, direction)
            assert value.dtype == torch.float32
            assert float(value) == pytest.approx(expected, rel=3e-6), (rule, type(source))


def test_confident_rows_keep_their_digits_in_the_reverse_direction() -> None:
    for rest in (1e-3, 1e-8, 1e-14, 1e-18, 1e-24, 1e-31, 1e-36):
        row = [1.0 - rest, 0.75 * rest, 0.25 * rest]
        for m in (1, 2):
            expected = exact_radius(row, {0}, m, "reverse")
            for source in (torch.tensor(row), Head.from_probs(torch.tensor(row), 3)):
                assert float(radius(source, Coverage(m), "reverse")) == pytest.approx(expected, rel=1e-6)


@given(st.floats(1.0, 100.0), st.floats(1.0, 100.0), st.floats(1e-3, 1.0), rules())
def test_the_reverse_radius_is_exact_however_little_the_runner_up_has(
    first: float, second: float, share: float, rule
) -> None:
    """1 − lost keeps no digit once the drafter must give up nearly everything: the remainder is added up."""
    rest = [10**-first, 10 ** -max(first, second), share * 10**-first]
    row = [1.0 - sum(rest), *sorted(rest, reverse=True)]
    inside = accepted_set(row, rule)
    with mpmath.workdps(130):
        expected = exact_radius(row, inside, width(rule), "reverse")
    p = torch.tensor(row, dtype=torch.float64)
    if not isinstance(rule, Coverage):
        seen = rule.accepted_entries(p).nonzero().flatten().tolist()
        if set(seen) != inside:
            return
    value = float(radius(p, rule, "reverse"))
    assert value <= expected * (1 + 1e-8) + 1e-12
    if len(inside) == 1:  # otherwise what lies outside the pool is a difference, rounded up
        assert value == pytest.approx(expected, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_match_finite_differences(direction: str) -> None:
    p = torch.tensor([[0.42, 0.31, 0.17, 0.1], [0.7, 0.15, 0.1, 0.05]], dtype=torch.float64)
    logits = p.log().requires_grad_()
    for rule in (StrictGreedy(), Additive(0.2), Multiplicative(0.3), TopM(3, t=0.5), Coverage(2)):
        for of in (lambda z: Head.from_logits(z, 4), lambda z: z.softmax(-1)):
            assert torch.autograd.gradcheck(lambda z, of=of, r=rule: radius(of(z), r, direction), logits)


def test_gradient_is_log_of_target_over_worst_drafter() -> None:
    p = torch.tensor([0.35, 0.3, 0.25, 0.1], dtype=torch.float64, requires_grad=True)
    for rule in (StrictGreedy(), Additive(0.09), Coverage(2)):
        (grad,) = torch.autograd.grad(radius(p, rule), p)
        torch.testing.assert_close(grad, (p / minimiser(p, rule)).log().detach(), rtol=1e-9, atol=1e-12)


def test_gradients_are_finite_on_point_masses_and_beyond_the_selection() -> None:
    p = torch.zeros(2, 2000)
    p[0, 7] = 1.0
    p[1] = 1 / 2000
    p[1, :300] += torch.linspace(0, 1e-4, 300)
    p = (p / p.sum(-1, keepdim=True)).requires_grad_()
    for rule in (*RULES, Multiplicative(0.99), Additive(1e-5)):
        for direction in DIRECTIONS:
            value = radius(p, rule, direction)
            (grad,) = torch.autograd.grad(value[torch.isfinite(value)].sum(), p, allow_unused=True)
            assert torch.isfinite(grad).all(), (rule, direction)


def test_traces_in_one_graph() -> None:
    rules = [
        StrictGreedy(),
        Additive(0.1),
        Multiplicative(0.5),
        TopM(4, t=0.1),
        Typical(0.1, 0.09),
        Coverage(3),
    ]

    def of_probabilities(p: torch.Tensor) -> list[torch.Tensor]:
        return radii(p, rules)

    def of_head(ids, gap, lse_gap, entropy) -> list[torch.Tensor]:
        return radii(Head(ids, gap, lse_gap, 50, entropy), rules, "reverse")

    p = dirichlet(0.2, 50, 20)
    head = Head.from_probs(p, 8)
    compile_ = {"fullgraph": True, "backend": "eager"}
    torch.testing.assert_close(torch.compile(of_probabilities, **compile_)(p), of_probabilities(p))
    parts = (head.ids, head.gap, head.lse_gap, head.entropy)
    torch.testing.assert_close(torch.compile(of_head, **compile_)(*parts), of_head(*parts))
