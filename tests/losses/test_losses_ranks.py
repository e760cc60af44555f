"""Losses of a few logits, and the row work of chunked evaluation that has a path of its own."""

import math

import oracles.mathematics.losses as oracle
import pytest
import torch
from oracles.mathematics.loss_cases import K, head_target, target_probs

from certdraft import losses as L
from certdraft.certificates import Head
from certdraft.losses.chunks.chunk_backward import TargetRows

N, H = 21, 5


def problem(vocab, steps=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(steps, H, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(vocab, H, generator=generator, dtype=torch.float64).requires_grad_()
    t_hidden = hidden.detach() + 0.5 * torch.randn(steps, H, generator=generator, dtype=torch.float64)
    return hidden, weight, t_hidden, weight.detach().clone()


def close(loss, reduction, hidden, weight, target, whole, chunk_tokens=8):
    expected = L.reduce(loss(hidden @ weight.t(), whole), reduction=reduction)
    value = L.Chunked(loss, reduction, chunk_tokens)(hidden, weight, target)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    incoming = torch.linspace(-1, 2, N).to(value) if value.dim() else torch.ones_like(value)
    got = torch.autograd.grad(value, (hidden, weight), incoming)
    want = torch.autograd.grad(expected, (hidden, weight), incoming)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


# ---- the rank of the greedy token


def competitor(z, g, m):
    return sorted((x for j, x in enumerate(z) if j != g), reverse=True)[m - 1]


@pytest.mark.parametrize("m", [1, 3, 6])
@pytest.mark.parametrize("slack", [0.0, 1.0])
def test_the_margin_is_to_the_mth_strongest_other_token(m, slack):
    p = target_probs(60, 13)
    generator = torch.Generator().manual_seed(m)
    z = 0.3 * p.log() + 3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    z[::5, 0] = z[::5].amax(-1)  # ties
    loss, target = L.CoverageMargin(m, slack, 0.5), head_target(p)
    gaps = [
        competitor(row.tolist(), int(g), m) - float(row[g]) for row, g in zip(z, target.greedy, strict=True)
    ]
    expected = 0.5 * torch.nn.functional.softplus((torch.tensor(gaps, dtype=torch.float64) + slack) / 0.5)
    torch.testing.assert_close(loss(z, target), expected)
    missed = torch.tensor(
        [oracle.missed(a.tolist(), int(g), m) for a, g in zip(z, target.greedy, strict=True)]
    )
    floor = 0.5 * math.log1p(math.exp(slack / 0.5))
    assert 0 < int(missed.sum()) < len(z)
    assert (loss(z, target)[missed] >= floor - 1e-12).all()
    assert (loss(z, target)[~missed] < floor).all()


def test_two_logits_have_a_gradient():
    p = target_probs(12, 13)
    generator = torch.Generator().manual_seed(0)
    z = (p.log() + torch.randn(p.shape, generator=generator, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: L.CoverageMargin(2)(x, head_target(p)), (z,))
    (gradient,) = torch.autograd.grad(L.CoverageMargin(2)(z, head_target(p)).sum(), z)
    assert ((gradient != 0).sum(-1) == 2).all()
    for vocab in (1, 2, 3):  # V <= m: a value and a gradient all the same
        q = target_probs(4, vocab) if vocab > 1 else torch.ones(4, 1, dtype=torch.float64)
        leaf = torch.randn(4, vocab, generator=generator, dtype=torch.float64).requires_grad_()
        value = L.CoverageMargin(4)(leaf, L.TargetBatch(Head.from_probs(q, vocab)))
        assert torch.isfinite(torch.autograd.grad(value.sum(), leaf)[0]).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("vocab", [13, 211, 4099])
def test_sparse_gradients_are_the_dense_ones(reduction, vocab):
    hidden, weight, t_hidden, t_weight = problem(vocab)
    target = L.TargetBatch.from_logits(t_hidden @ t_weight.t(), K, full=False)
    close(L.CoverageMargin(3), reduction, hidden, weight, target, target)
    close(L.Mixture([L.CoverageMargin(3), L.HardCE()], [0.5, 1.0]), reduction, hidden, weight, target, target)


def test_a_sparse_loss_never_multiplies_the_gradient_with_the_output_layer(monkeypatch):
    from certdraft.losses.chunks import chunked

    monkeypatch.setattr(chunked, "accumulate_", None)
    hidden, weight, t_hidden, t_weight = problem(211)
    target = L.TargetBatch.from_logits(t_hidden @ t_weight.t(), K, full=False)
    L.Chunked(L.CoverageMargin(3), chunk_tokens=8)(hidden, weight, target).backward()
    with pytest.raises(TypeError):
        L.Chunked(L.HardCE(), chunk_tokens=8)(hidden, weight, target)


@pytest.mark.parametrize("arguments", [(0,), (4, -1.0), (4, 1.0, 0.0)])
def test_coverage_margin_refuses_nonsense(arguments):
    with pytest.raises(ValueError, match="CoverageMargin: m="):
        L.CoverageMargin(*arguments)


# ---- online targets and mixed views


LOSSES = [
    L.ForwardKL(),
    L.ReverseKL(),
    L.MarginDiscountedCE(),
    L.CoverageMargin(2),
    L.Mixture([L.HardCE(), L.ForwardKL()], [0.5, 0.5]),
    L.Mixture(
        [L.ForwardKL(), L.PoolDiscountedCE(3), L.TotalVariation(), L.ForwardKL("head")], [1.0, 0.5, 2.0, 0.1]
    ),
    L.Mixture(
        [L.Mixture([L.ForwardKL(), L.HardCE()], [1.0, 1.0]), L.ForwardKL(), L.TokenCE()], [1.0, 0.5, 0.3]
    ),
]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_an_online_target_gives_what_its_logits_would(loss, reduction):
    hidden, weight, t_hidden, t_weight = problem(211)
    labels = torch.arange(N) % 211
    online = L.OnlineTarget(t_hidden, t_weight, K, next_ids=labels)
    whole = L.TargetBatch.from_logits(t_hidden @ t_weight.t(), K, next_ids=labels)
    close(loss, reduction, hidden, weight, online, whole)
    close(loss, reduction, hidden, weight, whole, whole)


def test_a_target_that_is_not_full_is_seen_through_its_head():
    hidden, weight, t_hidden, t_weight = problem(211)
    whole = L.TargetBatch.from_logits(t_hidden @ t_weight.t(), K, full=False)
    close(L.ForwardKL(), "mean", hidden, weight, L.OnlineTarget(t_hidden, t_weight, K, full=False), whole)
    with pytest.raises(ValueError, match="ForwardKL.*full distribution"):
        L.Chunked(L.ForwardKL("full"))(hidden, weight, L.OnlineTarget(t_hidden, t_weight, K, full=False))
    with pytest.raises(ValueError, match="211 tokens in its vocabulary, the target 200"):
        L.Chunked(L.ForwardKL())(hidden, weight, L.OnlineTarget(t_hidden, t_weight[:200], K))


def test_impossible_tokens_of_a_full_target_count_nothing():
    hidden, weight, t_hidden, t_weight = problem(211)
    scores = t_hidden @ t_weight.t()
    scores[:, 7] = -torch.inf
    whole = L.TargetBatch.from_logits(scores, K)
    close(L.ForwardKL(), "mean", hidden, weight, whole, whole)


def test_the_head_of_a_chunk_is_the_head_of_its_logits():
    _, _, t_hidden, t_weight = problem(4099)
    scores = 8 * t_hidden @ t_weight.t()
    expected = Head.from_logits(scores, K)
    rows = TargetRows(L.OnlineTarget(8 * t_hidden, t_weight, K), 8)
    for full in (False, True):
        rows.move_to(slice(8, 16))
        head = rows.batch(full=full).head
        assert (head.ids == expected.ids[8:16]).all()
        torch.testing.assert_close(head.gap, expected.gap[8:16])
        torch.testing.assert_close(head.lse_gap, expected.lse_gap[8:16])
        torch.testing.assert_close(rows.logits(), scores[8:16])
    broken = t_hidden.clone()
    broken[12] = torch.nan
    rows = TargetRows(L.OnlineTarget(broken, t_weight, K), 8)
    rows.move_to(slice(8, 16))
    with pytest.raises(ValueError, match="NaN or infinity at step 12"):
        rows.batch(full=False)


@pytest.mark.parametrize("vocab", [151_936, 151_669, 131_101])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_large_and_odd_vocabularies(vocab, reduction):
    """Qwen3's padded and true vocabulary, and a prime beyond 2^17."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 4, generator=generator).requires_grad_()
    weight = torch.randn(vocab, 4, generator=generator).requires_grad_()
    online = L.OnlineTarget(hidden.detach() + 0.3, weight.detach(), 8)
    whole = online[:]
    for loss in (L.ForwardKL(), L.MarginDiscountedCE(), L.CoverageMargin(4)):
        expected = L.reduce(loss(hidden @ weight.t(), whole), reduction=reduction)
        value = L.Chunked(loss, reduction, 2)(hidden, weight, online)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
        incoming = torch.ones_like(value)
        got = torch.autograd.grad(value, (hidden, weight), incoming)
        want = torch.autograd.grad(expected, (hidden, weight), incoming)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-6)
