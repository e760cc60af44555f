"""The KL radius: how far, in nats, a drafter may be from the target before rejection becomes possible.

`kl < radius` guarantees acceptance whatever the drafter is; at the radius nothing is claimed, and the
constant is the best possible. +inf means that nothing can be rejected.

Source: docs/theory.md §2 and §7; forward: arXiv 2606.30265, Thms 4.4 and 5.1.
Axis letters: *step leading axes · V vocabulary · K entries kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from certdraft.certificates.dense import DenseTop
from certdraft.certificates.head import Head
from certdraft.certificates.head_radius import head_radius
from certdraft.certificates.pooling import Direction, Measure, check_direction
from certdraft.certificates.rules import Coverage, Rule


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
