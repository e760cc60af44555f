"""The level of the coverage certificate's pool, as losses need it: a function of the target's competitors.

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


def competitor_excess(target: TargetBatch, m: int) -> Float[Tensor, "N J"]:
    """p(j)/p(g) − 1 in [−1, 0] for the greedy token's m strongest competitors (fewer if V ≤ m), float64."""
    return (-target.head.gap[:, 1 : m + 1].double()).expm1()
