"""Runs, paths, budgets and coarse certificates against brute force."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.mathematics import certificates as oracle
from strategies import directions, distributions

from certdraft.certificates import (
    Coverage,
    Head,
    budget_radius,
    certified_length,
    certified_rank,
    certified_run_lengths,
    coarse_kl,
    coarse_radius,
    expected_length_bound,
    kl_divergence,
    minimiser,
    num_tail_above,
    radius,
    smooth_certified_length,
)

nats = st.one_of(st.sampled_from([0.0, 0.1, math.inf]), st.floats(0.0, 1.0))


@given(st.lists(nats, min_size=1, max_size=30), st.sampled_from([0.0, 0.1, 0.5]), st.integers(1, 8))
def test_run_lengths_step_by_step(radii: list, epsilon: float, cap: int) -> None:
    found = certified_run_lengths(torch.tensor(radii, dtype=torch.float64), epsilon, cap)
    runs = oracle.run_lengths(radii, epsilon, cap)
    certified = [x > epsilon for x in radii]
    assert found.runs.tolist() == runs
    assert found.certified_fraction == pytest.approx(np.mean(certified))
    assert found.from_random_step == pytest.approx(1 + np.mean(runs))
    if any(certified):
        assert found.from_certified_step == pytest.approx(sum(runs) / sum(certified))
    else:
        assert math.isnan(found.from_certified_step)


def test_runs_end_where_a_document_ends() -> None:
    radii = torch.full((2, 4), 0.5)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    found = certified_run_lengths(radii, 0.1, mask=mask)
    assert found.runs.tolist() == [[2, 1, 0, 0], [4, 3, 2, 1]]
    assert found.from_random_step == pytest.approx(1 + 13 / 6)
    assert found.certified_fraction == 1.0
    with pytest.raises(ValueError, match="no step to count"):
        certified_run_lengths(radii, 0.1, mask=torch.zeros_like(mask))
    with pytest.raises(ValueError, match="epsilon=-1"):
        certified_run_lengths(radii, -1)
    with pytest.raises(ValueError, match="cap=0"):
        certified_run_lengths(radii, 0.1, cap=0)


def test_certified_lengths_bound_the_accepted_length() -> None:
    vocab_size, depth, paths = 5, 4, 4000
    alpha = torch.full((vocab_size,), 0.5, dtype=torch.float64)
    p = torch.distributions.Dirichlet(alpha).sample((paths, depth))
    q = 0.9 * p + 0.1 * torch.distributions.Dirichlet(alpha).sample((paths, depth))
    rule = Coverage(2)
    kl, radii = kl_divergence(p, q), radius(p, rule)
    realised = rule.accepts(p, q).long().cumprod(-1).sum(-1)
    whole, smooth = certified_length(kl, radii), smooth_certified_length(kl, radii)
    assert (whole <= realised).all()
    assert (smooth <= whole + 1e-9).all()
    assert float(smooth.mean()) > 0.5, "a bound of nothing proves nothing"
    used = (kl / radii).clamp(max=1).mean(0)
    assert float(expected_length_bound(used)) <= float(realised.double().mean())
    assert float(expected_length_bound(used)) > 0.3


def test_certified_lengths_by_hand() -> None:
    kl, radii = torch.tensor([0.1, 0.1, 0.5, 0.0]), torch.tensor([0.2, 0.4, 0.5, 1.0])
    assert int(certified_length(kl, radii)) == 2, "at the radius nothing is certified"
    assert float(smooth_certified_length(kl, radii)) == pytest.approx(0.5 + 0.5 * 0.75)
    free = torch.tensor([math.inf, 0.0])
    assert float(smooth_certified_length(torch.tensor([3.0, 0.0]), free)) == 1.0
    assert float(expected_length_bound(torch.tensor([0.1, 0.2]))) == pytest.approx(2 - 0.2 - 0.2)
    assert float(expected_length_bound(torch.tensor([1.0, 1.0]))) == 0.0


def test_smooth_length_has_a_gradient_in_the_divergence() -> None:
    kl = torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True)
    radii = torch.tensor([0.4, math.inf], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: smooth_certified_length(x, radii), kl)


@pytest.mark.parametrize(
    ("p", "threshold"),
    [
        ([0.5], 0.25),
        ([0.9], 1e-6),
        ([0.7, 0.6], 0.1),
        ([0.99, 0.3], 0.05),
        ([1.0, 0.8], 0.2),
        ([0.5, 0.5], 0.3),
    ],
)
def test_budget_radius_against_a_scan(p: list, threshold: float) -> None:
    logp = torch.tensor(p, dtype=torch.float64).log()
    value = float(budget_radius(logp, math.log(threshold)))
    expected = oracle.budget_radius([min(x, 1 - 1e-12) for x in p], threshold)
    assert value == pytest.approx(expected, abs=1e-6)
    assert value <= expected + 1e-9, "the least of all"


def test_budget_radius_at_its_ends() -> None:
    certain = torch.zeros(2, 3)  # a path of probability 1
    assert budget_radius(certain, -5.0).tolist() == pytest.approx([5.0, 5.0])
    assert float(budget_radius(torch.tensor([-1.0, -1.0]), -2.0)) == 0.0
    logp = torch.tensor([-0.1, -0.4, -1e-3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: budget_radius(x, -3.0), logp)
    with pytest.raises(ValueError, match="cannot exceed 0"):
        budget_radius(torch.tensor([0.5]), -1.0)


def test_budget_radius_no_closer_drafter_drops_the_path() -> None:
    p = torch.rand(20_000, 3, dtype=torch.float64) * 0.9 + 0.1
    x = (p * torch.rand_like(p) ** 0.5).clamp_max(1 - 1e-9)
    cost = torch.xlogy(p, p / x) + torch.xlogy(1 - p, (1 - p) / (1 - x))
    threshold = math.log(0.1)
    dropped = x.log().sum(-1) <= threshold
    assert dropped.sum() > 1000
    assert (cost.sum(-1) >= budget_radius(p.log(), threshold) - 1e-9)[dropped].all()


@given(distributions(min_size=2), st.floats(0.0, 2.0), directions())
def test_certified_rank_is_the_least_certified_width(p: torch.Tensor, kl: float, direction: str) -> None:
    head = Head.from_probs(p, len(p))
    rank = int(certified_rank(head, torch.tensor(kl), direction))
    widths = [m for m in range(1, len(p)) if kl < float(radius(head, Coverage(m), direction))]
    assert rank == (widths[0] if widths else len(p))


@given(distributions(min_size=3), st.data(), directions(), st.integers(1, 4))
def test_coarse_certificates_hold(p: torch.Tensor, data: st.DataObject, direction: str, m: int) -> None:
    other = data.draw(distributions(min_size=len(p), max_size=len(p)))
    mix = data.draw(st.floats(0.0, 1.0)) ** 2
    q = (1 - mix) * p + mix * (0.9 * other + 0.1 / len(p))
    q = q / q.sum()
    full = kl_divergence(p, q) if direction == "forward" else kl_divergence(q, p)
    for kept in {min(m + 1, len(p)), min(m + 2, len(p)), len(p)}:
        head = Head.from_probs(p, kept)
        coarse = float(coarse_kl(head, q.log(), direction))
        assert coarse <= float(full) * (1 + 1e-9) + 1e-9, "lumping never adds divergence"
        covered = bool(Coverage(m).accepts(p, q))
        plain = float(coarse_radius(head, m, direction))
        above = num_tail_above(head, q)
        checked = float(coarse_radius(head, m, direction, tail_above=above))
        exact = float(radius(head, Coverage(m), direction))
        assert plain <= checked or int(above) >= m
        assert plain <= exact * (1 + 1e-9) + 1e-12
        if coarse < plain - 1e-9 or coarse < checked - 1e-9:
            assert covered
        if kept == len(p):
            assert coarse == pytest.approx(float(full), rel=1e-7, abs=1e-9)
        if int(above) >= m:
            assert checked == 0.0, "the tail alone beats the greedy token"
        if int(above) == 0 and m < len(p):
            assert checked == pytest.approx(exact, rel=1e-9, abs=1e-12)


@given(distributions(min_size=3), directions(), st.integers(1, 4), st.data())
def test_coarse_certificates_hold_for_gaps_rounded_to_float16(
    p: torch.Tensor, direction: str, m: int, data: st.DataObject
) -> None:
    """Stored probabilities add up to 1 only within 1e-3; still, no drafter that fails is certified."""
    kept = data.draw(st.integers(min(m + 1, len(p)), len(p)))
    exact = Head.from_probs(p.float(), kept)
    stored = Head(exact.ids, exact.gap.half(), exact.lse_gap, len(p))
    gap = stored.gap.double()
    tail = float(stored.tail_mass) * float(stored.lse_gap.double().exp())
    outside = [i for i in range(len(p)) if i not in stored.ids.tolist()]
    rounded = torch.zeros_like(p).scatter(0, stored.ids, (-gap).exp())
    if outside:
        rounded[outside] = tail / len(outside)
    if float(rounded.max()) > 1 or m >= len(p):
        return
    worst = minimiser(rounded / rounded.sum(), Coverage(m), direction)
    for q in (worst, 0.999 * worst + 0.001 / len(p)):
        q = q / q.sum()
        if bool(q.isnan().any()) or Coverage(m).accepts(stored, q):
            continue
        above = num_tail_above(stored, q)
        kl = float(coarse_kl(stored, q.log(), direction))
        assert kl >= float(coarse_radius(stored, m, direction, tail_above=above)) * (1 - 1e-6) - 1e-9
        assert kl >= float(coarse_radius(stored, m, direction)) * (1 - 1e-6) - 1e-9


def test_coarse_divergence_sums_a_tiny_tail() -> None:
    logits = torch.tensor([12.0, 11.0, -12.0, -13.0, -14.0])
    target = Head.from_logits(logits, 2)
    drafter = torch.tensor([12.0, 11.0, -16.0, -17.0, -18.0]).log_softmax(-1)
    rho = logits.double().softmax(-1)[2:].sum()
    assert float(coarse_kl(target, drafter)) <= float(rho) * 4 + 1e-7
    with pytest.raises(ValueError, match="scores 4 tokens and the head was cut from 5"):
        coarse_kl(target, drafter[:4])
    with pytest.raises(ValueError, match="needs a head of at least 3"):
        coarse_radius(target, 2)
    with pytest.raises(ValueError, match="m=0"):
        coarse_radius(target, 0)
    assert float(coarse_radius(target, 5)) == math.inf
