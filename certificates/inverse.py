"""The margin bounds read backwards: which margin, or which greedy probability, is safe at a given KL.

Each bound grows with its argument once it is read as "at least this much is known", so a bisection inverts
it; sixty halvings of [0, 1] leave nothing to round.

Axis letters: *step leading axes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from certdraft.certificates.bounds import (
    Number,
    even_coverage,
    even_pair,
    leading_pool,
    leading_set,
    pair,
    ratio_pair,
    unit_interval,
)
from certdraft.certificates.pooling import Direction, check_direction
from certdraft.certificates.rules import Additive, Coverage, Multiplicative, Rule, TopM, Typical


def safe_margin(
    rule: Rule, *, kl: Number, p0: Number | None = None, direction: Direction = "forward"
) -> Float[Tensor, "*step"]:
    """The least margin at which a drafter this close to the target cannot be rejected.

    Every target with at least this margin p(x0) − p(x1), and with greedy probability p0 if that is given, has
    a radius above `kl`.

    Args:
        rule: acceptance rule.
        kl: divergence between target and drafter, nats, ≥ 0.
        p0: p(x0), if known; a smaller margin may then do.
        direction: which divergence `kl` is.

    Returns:
        A margin in [0, 1]; 0 when every margin is safe, +inf when none is.

    Raises:
        ValueError: kl < 0 or not a number, or p0 outside [0, 1].

    Examples:
        >>> from certdraft.certificates import StrictGreedy
        >>> kl = 0.005
        >>> abs(float(safe_margin(StrictGreedy(), kl=kl)) - (2 * kl) ** 0.5) < 1e-3
        True
        >>> float(safe_margin(StrictGreedy(), kl=0.7))
        inf
    """
    check_direction(direction)
    kl = torch.as_tensor(kl)
    p = unit_interval("p0", p0, kl)
    top = kl.new_ones((), dtype=torch.float64) if p is None else p
    return _invert(lambda d: _with_margin(rule, torch.minimum(d, top), p, direction), kl, top)


def _with_margin(rule: Rule, d: Tensor, p: Tensor | None, direction: Direction) -> Tensor:
    """A bound that holds for every margin of at least d; grows with d."""
    if isinstance(rule, Coverage):
        if p is None:
            return even_coverage(d, rule.m, direction)
        # among margins of at least d, equal rivals are the worst
        return leading_pool(p, torch.minimum(p - d, (1 - p) / rule.m), rule.m, direction)
    if isinstance(rule, TopM) and rule.m > 2:
        relaxed = _with_margin(rule.relaxation, d, p, direction)
        k = rule.m - 1
        if p is None:
            return torch.minimum(relaxed, leading_set(d, k, direction))
        return torch.minimum(relaxed, pair(p, torch.minimum(p - d, (1 - p) / k), direction))
    if p is not None:
        worst = torch.minimum(p - d, 1 - p)
        if isinstance(rule, Additive):
            value = pair(p, torch.minimum(worst, p - rule.t).clamp_min(0.0), direction)
            return torch.where(p < rule.t, torch.inf, value)
        if isinstance(rule, Multiplicative):
            worst = torch.minimum(worst, rule.alpha * p)
        if isinstance(rule, Typical):
            worst = worst.clamp_max(rule.epsilon)
        return pair(p, worst.clamp_min(0.0), direction)
    if isinstance(rule, Additive):
        return even_pair(d.clamp_min(rule.t), direction)
    if isinstance(rule, Multiplicative):
        return ratio_pair(d, rule.alpha, direction)
    strict = even_pair(d, direction)
    if isinstance(rule, Typical):
        worst = torch.minimum(d, 1 - d).clamp_max(rule.epsilon)
        return torch.maximum(strict, pair(d, worst, direction))
    return strict


def _invert(bound: Callable[[Tensor], Tensor], kl: Tensor, top: Tensor) -> Tensor:
    """The least x in [0, top] with bound(x) > kl; +inf when there is none."""
    dtype = kl.dtype if kl.is_floating_point() else torch.float32
    target, top = torch.broadcast_tensors(kl.double(), top)
    if bool((~(target >= 0)).any()):
        raise ValueError(f"kl={float(target[~(target >= 0)].reshape(-1)[0]):g} must be ≥ 0")
    low, high = torch.zeros_like(target), top.clone()
    for _ in range(60):
        middle = 0.5 * (low + high)
        safe = bound(middle) > target
        low, high = torch.where(safe, low, middle), torch.where(safe, middle, high)
    high = torch.where(bound(torch.zeros_like(target)) > target, 0.0, high)
    high = torch.where(bound(top) > target, high, torch.inf)
    rounded = high.to(dtype)
    return torch.where(
        rounded.double() < high, torch.nextafter(rounded, torch.full_like(rounded, 2.0)), rounded
    )
