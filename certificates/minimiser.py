"""The worst drafter: the q at which the radius is attained.

Axis letters: *step leading axes · V vocabulary.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from certdraft.certificates.dense import coordinate
from certdraft.certificates.pooling import Direction, check_direction, coverage_pool, single_token_pool
from certdraft.certificates.radius import radius
from certdraft.certificates.rules import Coverage, Rule
from certdraft.certificates.selection import largest


def minimiser(
    p: Float[Tensor, "*step V"], rule: Rule, direction: Direction = "forward"
) -> Float[Tensor, "*step V"]:
    """q*: the drafter closest to the target whose best token the rule can reject.

    It gives one common probability to a rejected token and to the accepted tokens it has to overtake (for
    `Coverage`, to the greedy token and the competitors that must overtake it) and is proportional to p
    elsewhere. The divergence between p and q* is the radius; a drafter further along the way is rejected.

    Args:
        p: target probabilities, each row summing to 1.
        rule: acceptance rule.
        direction: "forward" minimises KL(p‖q), "reverse" KL(q‖p).

    Returns:
        Probabilities; rows of NaN where nothing can be rejected at any finite divergence (radius +inf).

    Raises:
        ValueError: a row of p is no distribution.

    Source: docs/theory.md §2.

    Examples:
        >>> import torch
        >>> from certdraft.certificates import Coverage
        >>> minimiser(torch.tensor([0.5, 0.25, 0.25]), Coverage(1)).tolist()
        [0.375, 0.375, 0.25]
    """
    check_direction(direction)
    value = radius(p, rule, direction).unsqueeze(-1)
    p = p if p.dtype == torch.float64 else p.float()
    exact = p.double() / p.double().sum(-1, keepdim=True)
    pool = _pool(p, exact, rule, direction)
    size = pool.sum(-1, keepdim=True)
    if direction == "forward":
        common = torch.where(pool, exact, 0.0).sum(-1, keepdim=True) / size
    else:
        common = (torch.where(pool, exact.log(), 0.0).sum(-1, keepdim=True) / size).exp()
    q = torch.where(pool, common, exact)
    return torch.where(torch.isinf(value), torch.nan, q / q.sum(-1, keepdim=True)).to(p.dtype)


def _pool(p: Tensor, exact: Tensor, rule: Rule, direction: Direction) -> Bool[Tensor, "*step V"]:
    """The tokens that share one probability in q*, at the price of a sort for single-token rules."""
    p0 = exact.amax(-1)
    x = coordinate(exact, p0.unsqueeze(-1), direction)
    if isinstance(rule, Coverage):
        best = largest(p, min(rule.m + 1, p.shape[-1]))[1]
        _, level = coverage_pool(x.gather(-1, best).movedim(-1, 0), p0, direction)
        rivals = torch.zeros_like(p, dtype=torch.bool).scatter(-1, best[..., 1:], True)
        return (rivals & (x < level.unsqueeze(-1))).scatter(-1, best[..., :1], True)
    accepted = rule.accepted_entries(p)
    rejected = torch.where(accepted, -1.0, p).argmax(-1, keepdim=True)
    ranked = x.sort(-1, descending=True).values.movedim(-1, 0)
    x_rejected = x.gather(-1, rejected).squeeze(-1)
    _, level = single_token_pool(ranked, x_rejected, p0, direction)
    return (accepted & (x > level.unsqueeze(-1))).scatter(-1, rejected, True)
