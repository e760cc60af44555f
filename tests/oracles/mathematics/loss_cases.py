"""Targets and drafters that hurt: ties, near-ties, flat and peaked; every loss with its definition."""

import math

import oracles.mathematics.losses as oracle
import torch

from certdraft import losses as L
from certdraft.certificates import Head

K, M = 6, 3


def target_probs(num_steps: int, vocab: int, seed: int = 0) -> torch.Tensor:
    """Random distributions [N, V] in float64: flat and peaked, every fourth with a tie or near-tie on top."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.3, 1.0, 3.0, 6.0]).repeat(num_steps)[:num_steps, None]
    z = torch.randn(num_steps, vocab, generator=generator, dtype=torch.float64) * scale
    p = z.softmax(-1)
    top = p.topk(2).indices
    for row in range(0, num_steps, 4):
        near = 1.0 if row % 8 == 0 else 1 - 1e-7
        p[row, top[row, 1]] = p[row, top[row, 0]] * near
    return p / p.sum(-1, keepdim=True)


def head_target(p: torch.Tensor, k: int = K) -> L.TargetBatch:
    return L.TargetBatch(Head.from_probs(p, k))


def full_target(p: torch.Tensor, k: int = K) -> L.TargetBatch:
    return L.TargetBatch(Head.from_probs(p, k), p.log())


def _divergence(function, full=False):
    def value(z, p):
        q = oracle.softmax(z)
        ids = range(len(p)) if full else oracle.order(p)[:K]
        return function(oracle.merge(p, ids), oracle.merge(q, ids))

    return value


def _discounted(weights):
    return lambda z, p: oracle.discounted_ce(z, oracle.order(p)[0], weights(p))


def _against(kl, kappa, form, clip):
    ratio = kl / max(kappa, clip)
    return {"hinge": max(kl - kappa, 0.0), "ratio": ratio, "log1p": math.log1p(ratio) / math.log(2)}[form]


def _hinge(form, clip=1e-3):
    kl = _divergence(oracle.kl)
    return lambda z, p: _against(kl(z, p), oracle.coarse_radius(p, K, M), form, clip)


def _topk(k):
    def value(z, p):
        ids = oracle.order(p)[:k]
        return oracle.kl(oracle.merge(p, ids), oracle.merge(oracle.softmax(z), ids))

    return value


def hard_ce(z, p):
    return -math.log(oracle.softmax(z)[oracle.order(p)[0]])


# name: (loss, its definition on head and bucket with K entries)
HEAD_LOSSES = {
    "hard_ce": (L.HardCE(), hard_ce),
    "forward_kl": (L.ForwardKL(), _divergence(oracle.kl)),
    "reverse_kl": (L.ReverseKL(), _divergence(oracle.reverse_kl)),
    "jensen_shannon": (L.JensenShannon(0.3), _divergence(lambda p, q: oracle.jensen_shannon(p, q, 0.3))),
    "total_variation": (L.TotalVariation(), _divergence(oracle.total_variation)),
    "lk_alpha": (L.LK("alpha"), _divergence(oracle.lk_alpha)),
    "lk_hybrid": (L.LK("hybrid", eta=2.0), _divergence(lambda p, q: oracle.lk_hybrid(p, q, 2.0))),
    "renyi_half": (L.RenyiHalf(), _divergence(oracle.renyi_half)),
    "top_k_ce": (L.TopKCE(3), lambda z, p: oracle.top_k_ce(p, oracle.softmax(z), 3)),
    "soft_topk": (L.SoftTopK(4), _topk(4)),
    "soft_topk_renormalised": (
        L.SoftTopK(4, "renormalised"),
        lambda z, p: oracle.renormalised_kl(p, oracle.softmax(z), oracle.order(p)[:4]),
    ),
    "margin_discounted": (
        L.MarginDiscountedCE(),
        _discounted(lambda p: oracle.margin_weights(p, K, 1.0, 0.02)),
    ),
    "margin_discounted_a2": (
        L.MarginDiscountedCE(a=2.0, floor=0.1),
        _discounted(lambda p: oracle.margin_weights(p, K, 2.0, 0.1)),
    ),
    "pool_discounted": (L.PoolDiscountedCE(M), _discounted(lambda p: oracle.pool_weights(p, K, M, 0.02))),
    "runner_up": (L.RunnerUpForgivingCE(M), _discounted(lambda p: oracle.runner_up_weights(p, M))),
    "hinge": (L.CertificateHinge(M), _hinge("hinge")),
    "hinge_ratio": (L.CertificateHinge(M, "ratio"), _hinge("ratio")),
    "hinge_log1p": (L.CertificateHinge(M, "log1p"), _hinge("log1p")),
    "capped_ce": (L.CappedCE(M, 0.5), lambda z, p: max(hard_ce(z, p) - math.log(M + 1) + 0.5, 0.0)),
    "mixture": (
        L.Mixture([L.HardCE(), L.ForwardKL()], [0.5, 0.25]),
        lambda z, p: 0.5 * hard_ce(z, p) + 0.25 * _divergence(oracle.kl)(z, p),
    ),
}

# name: (loss, its definition over the whole vocabulary), used with a target that has its full distribution
FULL_LOSSES = {
    "forward_kl": (L.ForwardKL(), _divergence(oracle.kl, full=True)),
    "reverse_kl": (L.ReverseKL("full"), _divergence(oracle.reverse_kl, full=True)),
    "jensen_shannon": (
        L.JensenShannon(0.3),
        _divergence(lambda p, q: oracle.jensen_shannon(p, q, 0.3), full=True),
    ),
    "total_variation": (L.TotalVariation(), _divergence(oracle.total_variation, full=True)),
    "lk_alpha": (L.LK("alpha"), _divergence(oracle.lk_alpha, full=True)),
    "lk_hybrid": (L.LK("hybrid", eta=2.0), _divergence(lambda p, q: oracle.lk_hybrid(p, q, 2.0), full=True)),
    "renyi_half": (L.RenyiHalf(), _divergence(oracle.renyi_half, full=True)),
    "mixture": (
        L.Mixture([L.MarginDiscountedCE(), L.ForwardKL("full")], [0.5, 0.25]),
        lambda z, p: (
            0.5 * HEAD_LOSSES["margin_discounted"][1](z, p) + 0.25 * _divergence(oracle.kl, full=True)(z, p)
        ),
    ),
    "hinge": (
        L.CertificateHinge(M),
        lambda z, p: max(
            _divergence(oracle.kl, full=True)(z, p)
            - oracle.radius(sorted(p)[-1], sorted(p, reverse=True)[1 : M + 1]),
            0.0,
        ),
    ),
}
