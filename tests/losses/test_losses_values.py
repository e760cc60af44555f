"""Every loss against its definition in float64, and the properties that hold whatever the numbers are."""

import math

import pytest
import torch
from oracles.mathematics.loss_cases import (
    FULL_LOSSES,
    HEAD_LOSSES,
    K,
    M,
    full_target,
    head_target,
    target_probs,
)

from certdraft import losses as L
from certdraft.losses.coarse_logits import coarsen

CASES = [(name, "head", *case) for name, case in HEAD_LOSSES.items()]
CASES += [(name, "full", *case) for name, case in FULL_LOSSES.items()]
each_loss = pytest.mark.parametrize(("name", "view", "loss", "oracle"), CASES, ids=lambda x: str(x)[:24])
DIVERGENCES = ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "lk_alpha", "lk_hybrid"]


def make_target(p, view, k=K):
    return full_target(p, k) if view == "full" else head_target(p, k)


def drafter_logits(num_steps, vocab, scale=3.0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_steps, vocab, generator=generator, dtype=torch.float64) * scale


@each_loss
@pytest.mark.parametrize("vocab", [13, K])
def test_value_is_the_definition(name, view, loss, oracle, vocab):
    p, z = target_probs(16, vocab), drafter_logits(16, vocab)
    expected = torch.tensor([oracle(a.tolist(), b.tolist()) for a, b in zip(z, p, strict=True)])
    expected = expected.to(torch.float64)
    target = make_target(p, view)
    torch.testing.assert_close(loss(z, target), expected, rtol=1e-7, atol=3e-8)
    atol = 3e-3 if "hinge_" in name or (name, view) == ("reverse_kl", "head") else 2e-6
    single = loss(z.float(), make_target(p.float(), view))
    assert single.dtype == torch.float32
    # min_radius = 1e-3 magnifies rounding by a thousand; an fp32 head knows its tail mass to 1e-7 absolute
    torch.testing.assert_close(single.double(), expected, rtol=2e-5, atol=atol)


@each_loss
def test_gradient_is_right(name, view, loss, oracle):
    p, z = target_probs(8, 11), drafter_logits(8, 11).requires_grad_()
    target = make_target(p, view)
    if name in ("lk_hybrid", "hinge", "capped_ce"):  # a detached weight, and kinks: compare away from them
        numeric = torch.zeros_like(z)
        for j in range(11):
            step = torch.zeros_like(z)
            step[:, j] = 1e-6
            numeric[:, j] = (loss(z + step, target) - loss(z - step, target)).detach() / 2e-6
        (analytic,) = torch.autograd.grad(loss(z, target).sum(), z)
        if name == "lk_hybrid":  # with the mixing weight held constant
            mix = torch.exp(-2.0 * (1 - L.TotalVariation()(z, target))).detach()
            parts = mix * L.ForwardKL()(z, target) + (1 - mix) * L.TotalVariation()(z, target)
            (numeric,) = torch.autograd.grad(parts.sum(), z)
        torch.testing.assert_close(analytic, numeric, rtol=1e-5, atol=1e-7)
    else:
        torch.autograd.gradcheck(lambda x: loss(x, target), (z,), fast_mode=False)


def spread(z, ids, classes):
    """Gradient of the K + 1 classes back to tokens: the bucket's share goes by the drafter's proportions."""
    bucket = z.scatter(-1, ids, -torch.inf).softmax(-1) * classes[:, -1:]
    return bucket.scatter(-1, ids, classes[:, :-1])


def test_closed_form_gradients():
    p, z = target_probs(8, 13), drafter_logits(8, 13)
    target = head_target(p)
    ids, one_hot = target.top_ids, torch.nn.functional.one_hot(target.greedy, 13)
    pc, qc = target.coarse_logp.exp(), coarsen(z, ids).softmax(-1)
    # in the bucket, d/dz_j of log σ is (q_j/σ): the coarse gradient is shared out in proportion
    forms = {
        "hard_ce": z.softmax(-1) - one_hot,
        "forward_kl": spread(z, ids, qc - pc),
        "reverse_kl": spread(z, ids, qc * ((qc / pc).log() - (qc * (qc / pc).log()).sum(-1, keepdim=True))),
    }
    sign = (qc - pc).sign()
    forms["total_variation"] = spread(z, ids, 0.5 * qc * (sign - (qc * sign).sum(-1, keepdim=True)))
    for name in ("margin_discounted", "pool_discounted", "runner_up"):
        weight = torch.ones(8, 13, dtype=torch.float64)
        weight.scatter_(-1, ids[:, 1:], HEAD_LOSSES[name][0].discount(target)[:, 1:])
        forms[name] = (z + weight.log()).softmax(-1) - one_hot
    for name, expected in forms.items():
        leaf = z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(HEAD_LOSSES[name][0](leaf, target).sum(), leaf)
        torch.testing.assert_close(
            gradient, expected, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@each_loss
@pytest.mark.parametrize("gap", [50.0, 1e4])
@pytest.mark.parametrize("right", [True, False])
def test_saturated_logits_have_finite_value_and_gradient(name, view, loss, oracle, gap, right):
    p = target_probs(8, 11).float()
    p[::2] = torch.nn.functional.one_hot(p[::2].argmax(-1), 11)  # point masses: the other probabilities are 0
    target = make_target(p, view)
    z = torch.zeros(8, 11)
    z[torch.arange(8), target.greedy if right else target.top_ids[:, -1]] = gap
    z.requires_grad_()
    value = loss(z, target)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()


def test_confident_drafter_keeps_its_small_loss():
    """1 − q(g) = 1e-12 is a loss of 1e-12, not 0: a difference of two log-sum-exps has no digit left."""
    p = target_probs(4, 64).float()
    target = head_target(p)
    z = torch.zeros(4, 64)
    z[torch.arange(4), target.greedy] = 40.0
    expected = torch.full((4,), 63 * float(torch.tensor(-40.0, dtype=torch.float64).exp()))
    torch.testing.assert_close(L.HardCE()(z, target), expected, rtol=1e-5, atol=0.0)
    shares = coarsen(z, target.top_ids)[:, -1].exp()
    torch.testing.assert_close(shares, torch.full((4,), 58.0), rtol=1e-6, atol=0.0)


@each_loss
def test_invariant_to_shifts_and_to_vocabulary_order(name, view, loss, oracle):
    p, z = target_probs(16, 13, seed=3), drafter_logits(16, 13)
    p = p * torch.linspace(1, 1.1, 13)  # no exact ties, whose order is by token id
    p = p / p.sum(-1, keepdim=True)
    value = loss(z, make_target(p, view))
    torch.testing.assert_close(loss(z + 100.0, make_target(p, view)), value, rtol=1e-9, atol=1e-9)
    order = torch.randperm(13)
    torch.testing.assert_close(loss(z[:, order], make_target(p[:, order], view)), value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("view", ["head", "full"])
def test_divergences_are_zero_exactly_at_equality(name, view):
    loss = (FULL_LOSSES if view == "full" else HEAD_LOSSES)[name][0]
    p = target_probs(16, 13, seed=2)
    target = make_target(p, view)
    assert float(loss(p.log(), target).abs().max()) < 1e-7
    bent = p.log() + 0.05 * torch.nn.functional.one_hot(target.greedy, 13)
    assert float(loss(bent, target).min()) > 1e-6


def test_head_divergences_are_blind_to_the_tail_only():
    """Coarsening: equal on the head means 0, however the tail is spread; the full value is no smaller."""
    p = target_probs(16, 13, seed=2)
    z = p.log().clone()
    tail = z.scatter(-1, head_target(p).top_ids, -torch.inf)
    spread_out = torch.where(tail > -torch.inf, tail.logsumexp(-1, keepdim=True) - torch.tensor(7.0).log(), z)
    assert float(L.ForwardKL()(spread_out, head_target(p)).abs().max()) < 1e-7
    assert float(L.ForwardKL()(spread_out, full_target(p)).max()) > 1e-2
    z = drafter_logits(16, 13)
    for name in ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation"):
        coarse, full = HEAD_LOSSES[name][0](z, head_target(p)), FULL_LOSSES[name][0](z, full_target(p))
        assert (coarse <= full + 1e-9).all(), name


def test_special_points_join_the_family():
    p, z = target_probs(16, 13), drafter_logits(16, 13)
    target = head_target(p)
    same = torch.testing.assert_close
    same(L.RunnerUpForgivingCE(1)(z, target), L.HardCE()(z, target))
    same(L.MarginDiscountedCE(floor=1.0)(z, target), L.HardCE()(z, target))
    same(L.SoftTopK(K)(z, target), L.ForwardKL()(z, target))
    same(L.CappedCE(10**9, slack=20.7)(z, target), L.HardCE()(z, target) - math.log(10**9 + 1) + 20.7)
    # the pool of one competitor is the two-token pool: w_2 = (p_1 − p_2)/(p_1 + p_2)
    top = p.topk(2).values
    weight = L.PoolDiscountedCE(1, floor=0.0).discount(target)[:, 1]
    same(weight, (top[:, 0] - top[:, 1]) / top.sum(-1), rtol=1e-6, atol=1e-12)
    # the target's distribution as a point mass turns KL and LK into hard CE
    point = full_target(torch.nn.functional.one_hot(target.greedy, 13).double())
    for loss in (L.ForwardKL(), L.LK("alpha")):
        same(loss(z, point), L.HardCE()(z, target), rtol=1e-6, atol=1e-6)


def test_bfloat16_logits_are_computed_in_fp32_and_answered_in_bfloat16():
    target = head_target(target_probs(8, 13).float())
    z = drafter_logits(8, 13).bfloat16().requires_grad_()
    value = L.MarginDiscountedCE()(z, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, L.MarginDiscountedCE()(z.detach().float(), target))
    value.sum().backward()
    assert z.grad.dtype == torch.bfloat16


def test_impossible_drafter_tokens_do_not_poison_a_step():
    """A drafter with a reduced vocabulary scores −inf outside it."""
    p = target_probs(8, 13).float()
    target = head_target(p)
    z = drafter_logits(8, 13).float()
    z.scatter_(-1, target.top_ids[:, 3:4], -torch.inf)
    tail_gone = z.masked_fill(torch.ones(8, 13).scatter(-1, target.top_ids, 0.0).bool(), -torch.inf)
    for logits in (z, tail_gone):
        for loss in (
            L.HardCE(),
            L.MarginDiscountedCE(),
            L.PoolDiscountedCE(M),
            L.ReverseKL(),
            L.TotalVariation(),
        ):
            leaf = logits.clone().requires_grad_()
            value = loss(leaf, target)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
            assert torch.isfinite(value).all(), loss
            assert torch.isfinite(gradient).all(), loss
