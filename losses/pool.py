"""The coverage certificate's pool, as losses need it: its level, and its radius when the target is a head.

To push the greedy token g out of the drafter's top-m with the least KL(p‖q), a drafter gives g and the
weakest of the m competitors one common probability c, the level, and leaves everything else alone.
Competitors with p ≥ c are free: they already beat the level. All quantities are relative to p(g), so
near-ties keep their digits; the few entries per step are computed in float64. Source: theory notes §2 (master
theorem), §7 (truncated caches), §10.

Axes: N steps · J competitors, in any order.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from certdraft.losses.target import TargetBatch


def pool_excess(competitors: Float[Tensor, "N J"]) -> Float[Tensor, " N"]:
    """Level of the pool relative to the greedy token, c/p(g) − 1, in [−1, 0].

    Args:
        competitors: p(j)/p(g) − 1 of the m tokens that have to overtake g, any order; positive for tokens
            that are ahead of g already.

    Returns:
        The smallest mean of g (which counts 0) and the k weakest competitors.
    """
    weakest_first = competitors.sort(-1).values.cumsum(-1)
    size = torch.arange(2, competitors.shape[-1] + 2, device=competitors.device)
    return (weakest_first / size).amin(-1).clamp(max=0.0)


def pool_radius(p_greedy: Float[Tensor, " N"], competitors: Float[Tensor, "N J"]) -> Float[Tensor, " N"]:
    """Least KL(p‖q), nats, with which all the competitors can overtake g: c Σ_S φ(p/c − 1)."""
    level = pool_excess(competitors)[:, None]
    everyone = torch.cat([torch.zeros_like(level), competitors], -1)
    pooled = everyone < level
    pooled[:, 0] = True
    d = ((everyone - level) / (1 + level)).clamp(min=-1 + 2.0**-53)
    terms = torch.where(pooled, (1 + d) * d.log1p() - d, 0.0)
    return (p_greedy * (1 + level[:, 0]) * terms.sum(-1)).clamp(min=0.0)


def competitor_excess(target: TargetBatch, m: int) -> Float[Tensor, "N J"]:
    """p(j)/p(g) − 1 in [−1, 0] for the greedy token's m strongest competitors (fewer if V ≤ m), float64."""
    return (-target.head.gap[:, 1 : m + 1].double()).expm1()


def coarse_coverage_radius(target: TargetBatch, m: int) -> Float[Tensor, " N"]:
    """Exact radius of top-m coverage for the KL of the *coarsening* to head and bucket.

    KL between the coarsenings is smaller than KL(p‖q), so it needs its own radius: n of the m tokens that
    overtake g may hide in the bucket, and the cheapest such failure treats the tail as n equal tokens. The
    radius is the least over n. Coarse KL below it means covered, whatever the drafter does inside the tail,
    and no larger number has that property. It is 0 once the tail could hide m tokens as probable as g.

    Args:
        target: a head with K ≥ m + 1, or the whole vocabulary.
        m: draft tokens proposed per step.

    Returns:
        Nats, in [0, +inf]; +inf when V ≤ m: every token is covered.

    Source: theory notes §7, coarse certificate.
    """
    if target.vocab_size <= m:
        return torch.full_like(target.head.lse_gap, torch.inf)
    logp_greedy = -target.head.lse_gap.double()
    kept = competitor_excess(target, m)
    hidden = min(m, target.vocab_size - target.num_kept)
    tail_ratio = (target.head.tail_logp.double() - logp_greedy).exp()  # tail mass / p(g)
    value = pool_radius(logp_greedy.exp(), kept)
    for n in range(1, hidden + 1):
        virtual = (tail_ratio / n - 1)[:, None].expand(-1, n)
        value = torch.minimum(
            value, pool_radius(logp_greedy.exp(), torch.cat([kept[:, : m - n], virtual], -1))
        )
    return value.to(target.head.lse_gap.dtype)
