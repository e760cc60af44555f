"""The KL radius: how far, in nats, a drafter may be from the target before rejection becomes possible.

`kl < radius` guarantees acceptance whatever the drafter is; at the radius nothing is claimed, and the
constant is the best possible. +inf means that nothing can be rejected.

Source: docs/theory.md §2 and §7; forward: arXiv 2606.30265, Thms 4.4 and 5.1.
Axis letters: *step leading axes · V vocabulary · K entries kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from certdraft.certificates.dense import DenseTop, coordinate
from certdraft.certificates.head import Head
from certdraft.certificates.head_radius import head_radius
from certdraft.certificates.pooling import (
    Direction,
    Measure,
    check_direction,
    coverage_pool,
    single_token_pool,
)
from certdraft.certificates.rules import Coverage, Rule
from certdraft.certificates.selection import largest


def radius(
    p: Float[Tensor, "*step V"] | Head, rule: Rule, direction: Direction = "forward"
) -> Float[Tensor, "*step"]:
    """The KL radius: the least divergence from the target at which the drafter's best token may be rejected.

    For `Coverage(m)`: the least divergence at which the greedy token may be missing from the drafter's top-m.

    Args:
        p: target probabilities, each row summing to 1, or a head of them.
        rule: acceptance rule.
        direction: "forward" for KL(p‖q), "reverse" for KL(q‖p); p the target, q the drafter.

    Returns:
        Nats, in [0, +inf]; 0 at a tie for the greedy place, +inf when nothing can be rejected. Exact for
        probabilities, and for a head that holds the accepted tokens and the best rejected one; otherwise a
        head gives a lower bound. Differentiable in p, and in the gaps of a head; the accepted set is held
        fixed.

    Raises:
        ValueError: a row of p is no distribution, a head is too short for `Coverage(m)` (K ≤ m), or a head
            without entropy meets `Typical`.

    Examples:
        >>> import torch
        >>> from certdraft.certificates import Coverage, StrictGreedy
        >>> p = torch.tensor([0.6, 0.3, 0.1])
        >>> round(float(radius(p, StrictGreedy())), 4), round(float(radius(p, Coverage(2))), 4)
        (0.051, 0.2007)
    """
    return radii(p, [rule], direction)[0]


def radii(
    p: Float[Tensor, "*step V"] | Head, rules: Sequence[Rule], direction: Direction = "forward"
) -> list[Float[Tensor, "*step"]]:
    """The radius of several rules at once: p is read once.

    Args:
        p: target probabilities or a head.
        rules: acceptance rules.
        direction: as in `radius`.

    Returns:
        One tensor of nats a rule, in the order given.

    Raises:
        ValueError: as in `radius`.
    """
    check_direction(direction)
    return _all(p, rules, direction)


def tv_radius(p: Float[Tensor, "*step V"] | Head, rule: Rule) -> Float[Tensor, "*step"]:
    """The least total variation at which the rule may reject; for strict greedy, half the margin.

    Args:
        p: target probabilities or a head.
        rule: acceptance rule.

    Returns:
        In [0, 1], or +inf when nothing can be rejected.

    Raises:
        ValueError: as in `radius`.

    Source: docs/theory.md §9: the pool is that of the forward KL radius.
    """
    return _all(p, [rule], "tv")[0]


def _all(p: Tensor | Head, rules: Sequence[Rule], measure: Measure) -> list[Tensor]:
    if isinstance(p, Head):
        return [head_radius(p, rule, measure).to(p.lse_gap.dtype) for rule in rules]
    top = DenseTop.of(p, rules, measure)
    return [
        (top.coverage(rule.m) if isinstance(rule, Coverage) else top.single(rule)).to(top.p.dtype)
        for rule in rules
    ]


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
    x, lse_gap = coordinate(exact, p0.unsqueeze(-1), direction), -p0.log()
    if isinstance(rule, Coverage):
        best = largest(p, min(rule.m + 1, p.shape[-1]))[1]
        _, level = coverage_pool(x.gather(-1, best).movedim(-1, 0), lse_gap, direction)
        rivals = torch.zeros_like(p, dtype=torch.bool).scatter(-1, best[..., 1:], True)
        return (rivals & (x < level.unsqueeze(-1))).scatter(-1, best[..., :1], True)
    accepted = rule.accepted_entries(p)
    rejected = torch.where(accepted, -1.0, p).argmax(-1, keepdim=True)
    ranked = x.sort(-1, descending=True).values.movedim(-1, 0)
    x_rejected = x.gather(-1, rejected).squeeze(-1)
    _, level = single_token_pool(ranked, x_rejected, lse_gap, direction)
    return (accepted & (x > level.unsqueeze(-1))).scatter(-1, rejected, True)
