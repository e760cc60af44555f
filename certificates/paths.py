"""Radii of whole draft paths and trees: sequence divergence, node budgets, and widths.

Axis letters: *step, *path leading axes · D draft depth, the last axis of a path · K entries of a head.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from certdraft.certificates.head import Head
from certdraft.certificates.pooling import Direction, check_direction
from certdraft.certificates.radius import radius
from certdraft.certificates.rules import Coverage

_HALVINGS = 80


def path_radius(
    radii: Float[Tensor, "*path D"], greedy_logp: Float[Tensor, "*path D"]
) -> Float[Tensor, "*path"]:
    """The least KL between the two *sequence* distributions at which some step of the greedy path may fail.

    min over depths of (probability of the greedy prefix) × (radius of the step): a divergence of sequences
    controls deep steps only as far as the target goes there at all.

    Args:
        radii: forward KL radius of each depth, nats.
        greedy_logp: log p(x0) at each depth, nats.

    Source: docs/theory.md §6.4.
    """
    before = greedy_logp.cumsum(-1) - greedy_logp
    return (before.exp() * radii).amin(-1)


def budget_radius(
    greedy_logp: Float[Tensor, "*path D"], log_threshold: Float[Tensor, "*path"] | float
) -> Float[Tensor, "*path"]:
    """Radius of a best-first tree: the least total Σ_i KL(p_i‖q_i) at which it may drop the greedy path.

    A tree of bounded node budget keeps exactly the paths whose drafter probability exceeds its inclusion
    threshold λ, the probability of the least probable node kept.

    Args:
        greedy_logp: log p_i(x0), nats, ≤ 0, for each depth of the path.
        log_threshold: log λ, nats, ≤ 0.

    Returns:
        Nats, in [0, +inf]; 0 when the target itself gives the path no more than λ. Differentiable in
        greedy_logp.

    Raises:
        ValueError: a logarithm above 0.

    Source: docs/theory.md §6.7. One step: the binary KL between p(x0) and λ.

    Examples:
        >>> import math, torch
        >>> round(float(budget_radius(torch.tensor([math.log(0.5)]), math.log(0.25))), 4)
        0.1438
    """
    logp = greedy_logp.double()
    target = torch.as_tensor(log_threshold, dtype=torch.float64, device=logp.device).expand(logp.shape[:-1])
    if not torch.compiler.is_compiling() and bool((logp > 1e-6).any() | (target > 1e-6).any()):
        raise ValueError("greedy_logp and log_threshold are logarithms of probabilities and cannot exceed 0")
    rest = -logp.clamp_max(0.0).expm1()  # 1 − p
    # Optimum: x_i = 1 − s w_i with w = (1 − p)/max(1 − p), and 1 − s = exp(−y); y keeps its digits as s → 1.
    with torch.no_grad():
        most = rest.amax(-1, keepdim=True)
        weight = torch.where(most > 0, rest / most.clamp_min(1e-300), 1.0)
        low, high = torch.zeros_like(target), -target.clamp_max(0.0)
        for _ in range(_HALVINGS):
            middle = 0.5 * (low + high)
            enough = _log_kept(weight, middle).sum(-1) <= target
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        log_x = _log_kept(weight, high)
        log_rest = (weight * -(-high).expm1().unsqueeze(-1)).log()  # log(1 − x)
    p = logp.exp()
    value = (
        torch.xlogy(p, p) - p * log_x + torch.xlogy(rest, rest) - torch.where(rest > 0, rest * log_rest, 0.0)
    )
    total = value.sum(-1).clamp_min(0.0)
    return torch.where(logp.sum(-1) <= target, 0.0, total).to(greedy_logp.dtype)


def certified_rank(
    head: Head, kl: Float[Tensor, "*step"], direction: Direction = "forward"
) -> Int[Tensor, "*step"]:
    """The least width at which the greedy token is certain to be covered at this divergence.

    With the drafter's own KL: a bound on the rank it gives the greedy token. With a KL budget: the width a
    tree needs at this step.

    Args:
        head: target head.
        kl: divergence of the drafter, nats.
        direction: which divergence `kl` is.

    Returns:
        In 1..K; K where no width the head can vouch for (up to K − 1) is enough.

    Source: docs/theory.md §3.7 and §6.6.
    """
    check_direction(direction)
    enough = torch.stack([kl < radius(head, Coverage(m), direction) for m in range(1, head.num_kept)], dim=-1)
    return (~enough).long().cumprod(-1).sum(-1) + 1


def _log_kept(weight: Tensor, y: Tensor) -> Tensor:
    """log(1 − w (1 − exp(−y)))."""
    return torch.log1p(weight * (-y).expm1().unsqueeze(-1))
