"""What each surrogate promises about a top-m miss: never broken, attained where it says so, and useful."""

import json
import math
from pathlib import Path

import oracles.mathematics.losses as oracle
import pytest
import torch
from oracles.mathematics.loss_cases import full_target, head_target, target_probs

from certdraft import losses as L
from certdraft.certificates import Coverage, Head, coarse_radius, radius

VOCAB, K = 12, 7


def failing_drafters(p, m, seed=0):
    """Logits [N, V] close to the target in which m tokens just reach the greedy one: narrow misses."""
    generator = torch.Generator().manual_seed(seed)
    z = p.log() + torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3
    greedy = p.argmax(-1, keepdim=True)
    noise = torch.rand(p.shape, generator=generator, dtype=torch.float64)
    wanted = noise * 2 + p.log() * (noise[:, :1] > 0.5)  # sometimes the strongest tokens, sometimes any
    rivals = wanted.scatter(-1, greedy, -torch.inf).topk(m).indices
    lift = torch.where(noise[:, :m] > 0.5, 0.0, noise[:, m : m + m])
    z = z.scatter(-1, rivals, torch.maximum(z.gather(-1, rivals), z.gather(-1, greedy) + lift))
    return z


@pytest.fixture(scope="module", params=[1, 2, 4])
def failing(request):
    m = request.param
    p = torch.cat([target_probs(100, VOCAB, seed) for seed in range(4)])
    z = failing_drafters(p, m)
    assert all(oracle.missed(a.tolist(), int(g), m) for a, g in zip(z, p.argmax(-1), strict=True))
    return m, p, z


def discounted(m):
    return [
        L.HardCE(),
        L.MarginDiscountedCE(),
        L.MarginDiscountedCE(a=3.0, floor=0.0),
        L.PoolDiscountedCE(m),
        L.PoolDiscountedCE(m, floor=0.0),
        L.PoolDiscountedCE(m + 1),
        L.RunnerUpForgivingCE(m),
    ]


def test_every_miss_costs_at_least_the_miss_floor(failing):
    m, p, z = failing
    target = head_target(p, K)
    for loss in discounted(m):
        floor = loss.miss_floor(target, m)
        assert (loss(z, target) >= floor - 1e-12).all(), loss
        assert (floor <= math.log(m + 1) + 1e-12).all(), loss


def test_the_miss_floor_is_attained(failing):
    """The target's ranks 2..m+1 tie with g and nothing else has mass: no larger constant holds."""
    m, p, _ = failing
    target = head_target(p, K)
    z = torch.full_like(p, -200.0).scatter(-1, target.top_ids[:, : m + 1], 0.0)
    for loss in discounted(m):
        torch.testing.assert_close(loss(z, target), loss.miss_floor(target, m), rtol=1e-9, atol=1e-12)


def test_named_floors(failing):
    m, p, _ = failing
    target = head_target(p, K)
    full = torch.full((len(p),), 1.0, dtype=torch.float64)
    torch.testing.assert_close(L.HardCE().miss_floor(target, m), full * math.log(m + 1))
    torch.testing.assert_close(L.RunnerUpForgivingCE(m).miss_floor(target, m), full * math.log(2))
    # the multipliers of the pool add up to p_g/c − 1
    ranked = p.sort(-1, descending=True).values
    levels = [oracle.pool_level(best, rest) for best, *rest in ranked[:, : m + 1].tolist()]
    level = torch.tensor(levels, dtype=torch.float64)
    torch.testing.assert_close(
        L.PoolDiscountedCE(m, floor=0.0).miss_floor(target, m),
        (ranked[:, 0] / level).log(),
        rtol=1e-6,
        atol=1e-9,
    )
    mean = ranked[:, : m + 1].mean(-1)
    torch.testing.assert_close(
        L.MarginDiscountedCE(floor=0.0).miss_floor(target, m),
        ((m + 1) * (1 - mean / ranked[:, 0])).log1p(),
        rtol=1e-6,
        atol=1e-9,
    )


def test_runner_up_pays_log_two_on_every_miss(failing):
    m, p, z = failing
    assert (L.RunnerUpForgivingCE(m)(z, head_target(p, K)) >= math.log(2) - 1e-12).all()


def test_capped_ce_pays_its_slack_on_every_miss(failing):
    m, p, z = failing
    assert (L.CappedCE(m, slack=0.5)(z, head_target(p, K)) >= 0.5 - 1e-12).all()
    confident = p.log() + 20.0 * torch.nn.functional.one_hot(p.argmax(-1), VOCAB)
    assert (L.CappedCE(m, slack=0.5)(confident, head_target(p, K)) == 0).all()


def test_kl_over_radius_is_at_least_one_on_every_miss(failing):
    m, p, z = failing
    for target in (full_target(p, K), head_target(p, K)):
        kappa = coarse_radius(target.head, m) if target.logp is None else radius(target.head, Coverage(m))
        kl = L.ForwardKL()(z, target)
        assert (kl >= kappa - 1e-9).all()
        certifiable = kappa > 1e-3
        assert int(certifiable.sum()) > 50
        for form in ("ratio", "log1p"):
            assert (L.CertificateHinge(m, form, min_radius=1e-3)(z, target)[certifiable] >= 1 - 1e-6).all()


def test_hinge_is_silent_exactly_where_the_certificate_holds():
    p = torch.cat([target_probs(200, VOCAB, seed) for seed in range(3)])
    generator = torch.Generator().manual_seed(5)
    z = p.log() + 0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    for target in (full_target(p, K), head_target(p, K)):
        leaf = z.clone().requires_grad_()
        value = L.CertificateHinge(2)(leaf, target)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        silent = value == 0
        assert 50 < int(silent.sum()) < 550
        assert (gradient[silent] == 0).all()
        greedy = p.argmax(-1)
        missed = [oracle.missed(a.tolist(), int(g), 2) for a, g in zip(z, greedy, strict=True)]
        assert not (silent & torch.tensor(missed)).any()


def test_coarse_radius_is_its_definition():
    for m in (1, 2, 4, 6):
        p = target_probs(40, VOCAB, 7)
        expected = torch.tensor([oracle.coarse_radius(row.tolist(), K, m) for row in p], dtype=torch.float64)
        torch.testing.assert_close(coarse_radius(head_target(p, K).head, m), expected, rtol=1e-6, atol=1e-9)
    assert torch.isinf(coarse_radius(head_target(p, K).head, VOCAB)).all()


@pytest.mark.parametrize("case", json.loads((Path(__file__).parent / "coarse_vectors.json").read_text()))
def test_coarse_radius_meets_the_convex_solver(case):
    """Expected values come from a conic solver over an explicit enumeration of failing sets."""
    p = torch.tensor(case["p_top"], dtype=torch.float64)
    ranks = p.argsort(descending=True, stable=True)
    if int(ranks[0]) != case["g"] and p[case["g"]] < p.max():
        pytest.skip("designated token is not the greedy one")
    gap = (p.max().log() - p[ranks].log())[None]
    lse_gap = -p.max().log()[None]
    head = Head(ranks[None], gap, lse_gap, len(p) + case["n_tail"])
    value = float(coarse_radius(head, case["m"]))
    expected = float(case["expected"])
    assert value == expected or abs(value - expected) <= case["tol"]


def test_with_the_whole_vocabulary_the_coarse_radius_is_the_radius():
    p = target_probs(80, VOCAB)
    for m in (1, 3):
        exact = radius(Head.from_probs(p, VOCAB), Coverage(m))
        torch.testing.assert_close(coarse_radius(head_target(p, VOCAB).head, m), exact, rtol=1e-9, atol=1e-12)
        assert (coarse_radius(head_target(p, K).head, m) <= exact + 1e-12).all()


def test_full_radius_on_a_coarse_kl_would_be_unsound():
    """Why the hinge on a head has its own radius: a hidden token beats g below the full radius."""
    p = torch.tensor([[0.4, 0.05, 0.05, *[0.05] * 10]], dtype=torch.float64)
    target = head_target(p, 3)
    z = p.log().clone()
    z[0, 3:] = torch.tensor([0.45, *[0.05 / 9] * 9], dtype=torch.float64).log()  # same tail, on one token
    assert oracle.missed(z[0].tolist(), 0, 1)
    kl = L.ForwardKL()(z, target)
    assert kl < radius(target.head, Coverage(1))
    assert kl >= coarse_radius(target.head, 1)
