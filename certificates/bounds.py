"""Lower bounds on the KL radius from a few numbers of the target, and the ceilings above it.

A margin is one number; the radius needs the whole top of the distribution. `margin_bound` is the least radius
of any distribution that agrees with what is known. It is sharp except where its docstring says otherwise.

Axis letters: *step leading axes.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from certdraft.certificates import closed_forms as forms
from certdraft.certificates.pooling import Direction, check_direction
from certdraft.certificates.rules import Additive, Coverage, Multiplicative, Rule, StrictGreedy, TopM, Typical

Number = Float[Tensor, "*step"] | float
_SLACK = 1e-6  # rounding allowed between two float32 numbers that must be ordered


def ceiling(rule: Rule, direction: Direction = "forward") -> float:
    """The largest finite radius of a rule: no certificate is ever worth more nats than this.

    Forward: log 2 for single-token rules, log(m + 1) for coverage; a one-hot target attains it. Reverse:
    +inf. A step at which nothing can be rejected has radius +inf all the same.

    Source: arXiv 2606.30265, Thm 4.6 and §5.

    Examples:
        >>> round(ceiling(StrictGreedy()), 4), round(ceiling(Coverage(4)), 4)
        (0.6931, 1.6094)
    """
    check_direction(direction)
    if direction == "reverse":
        return math.inf
    return math.log(rule.m + 1) if isinstance(rule, Coverage) else math.log(2)


def margin_bound(
    rule: Rule,
    *,
    margin: Number | None = None,
    p0: Number | None = None,
    order_margin: Number | None = None,
    entropy: Number | None = None,
    direction: Direction = "forward",
) -> Float[Tensor, "*step"]:
    """Lower bound on the KL radius from the target's margin, its greedy probability, or both.

    Any drafter closer than this to the target is accepted, whatever the rest of the distribution.

    Args:
        rule: acceptance rule.
        margin: p(x0) − p(x1), in [0, 1].
        p0: p(x0), in [0, 1].
        order_margin: p(x0) − p(x(j)), in [0, 1], with j = m for `Coverage(m)` and j = m − 1 for `TopM(m)`,
            the best token that fails the rank test; other rules do not use it.
        entropy: H(p) in nats; other rules than `Typical` do not use it. Without it the threshold is taken at
            its highest, ε.
        direction: "forward" for KL(p‖q), "reverse" for KL(q‖p).

    Returns:
        Nats, in [0, +inf]; 0 where nothing can be promised. Sharp for strict, additive and multiplicative
        rules and for coverage from margin, from p0, from both, or from the order margin alone; sound
        otherwise.

    Raises:
        ValueError: nothing is known, a number is outside its range, or p0 < margin.

    Source: docs/theory.md §4 and §5; forward: arXiv 2606.30265, Thms 4.7 to 4.15 and 5.2.

    Examples:
        >>> float(margin_bound(StrictGreedy(), margin=torch.tensor(0.0)))
        0.0
        >>> float(margin_bound(StrictGreedy(), margin=0.5)) > 0.5**2 / 2
        True
    """
    check_direction(direction)
    known = [x for x in (margin, p0, order_margin) if x is not None]
    if not known:
        raise ValueError("margin_bound needs at least one of margin, p0 and order_margin")
    like = next((x for x in known if isinstance(x, Tensor)), torch.zeros(()))
    d = unit_interval("margin", margin, like)
    p = unit_interval("p0", p0, like)
    order = unit_interval("order_margin", order_margin, like)
    h = None if entropy is None else torch.as_tensor(entropy, dtype=torch.float64, device=like.device)
    if d is not None and p is not None:
        _check_order(p, d, "p0", "margin")
        d = torch.minimum(torch.maximum(d, 2 * p - 1), p)  # the runner-up has at most 1 − p(x0)
    if d is not None and order is not None:
        _check_order(order, d, "order_margin", "margin")
    return _bound(rule, d, p, order, h, direction).to(like.dtype)


def _bound(
    rule: Rule,
    d: Tensor | None,
    p: Tensor | None,
    order: Tensor | None,
    h: Tensor | None,
    direction: Direction,
) -> Tensor:
    if isinstance(rule, Coverage):
        return _coverage_bound(rule.m, d, p, order, direction)
    if isinstance(rule, TopM):
        strict = rule.m <= 2
        relaxed = _bound(StrictGreedy() if strict else rule.relaxation, d, p, None, None, direction)
        return relaxed if strict else torch.minimum(relaxed, _rank_bound(rule.m - 1, d, p, order, direction))
    if p is not None:
        theta = _threshold(rule, p, h)
        if d is None:
            worst = torch.minimum(torch.minimum(theta, p), 1 - p).clamp_min(0.0)
            value = forms.pair(p, worst, direction)
        else:
            second = p - d
            rejected = torch.minimum(theta, (1 - p - second)).clamp_min(0.0)
            relaxed = forms.triple(p, second, rejected, direction)
            value = torch.where(second > theta, relaxed, forms.pair(p, second, direction))
        return torch.where(theta < 0, torch.inf, value)
    if d is None:
        raise ValueError(f"an order margin alone bounds only coverage; for {rule} give margin or p0 as well")
    strict_value = forms.even_pair(d, direction)
    if isinstance(rule, Additive):
        # margin exactly d below t: the runner-up is accepted too, and the worst case has three tokens
        a, b, c = (1 + d + rule.t) / 3, (1 - 2 * d + rule.t) / 3, (1 + d - 2 * rule.t) / 3
        relaxed = forms.triple(a, b, c.clamp_min(0.0), direction)
        relaxed = torch.where(c < 0, torch.inf, relaxed)
        return torch.where(d < rule.t, relaxed, strict_value)
    if isinstance(rule, Multiplicative):
        return forms.ratio_pair(d, rule.alpha, direction)
    if isinstance(rule, Typical):
        # p0 is at least the margin, and the bound from p0 grows with it
        worst = torch.minimum(torch.minimum(_threshold(rule, d, h), d), 1 - d)
        return torch.maximum(strict_value, forms.pair(d, worst, direction))
    return strict_value


def _threshold(rule: Rule, p: Tensor, h: Tensor | None) -> Tensor:
    if isinstance(rule, Additive):
        return p - rule.t
    if isinstance(rule, Multiplicative):
        return rule.alpha * p
    if isinstance(rule, Typical):
        ceiling = torch.full_like(p, rule.epsilon)
        return ceiling if h is None else torch.minimum(ceiling, rule.delta * (-h).exp())
    return p


def _coverage_bound(
    m: int, d: Tensor | None, p: Tensor | None, order: Tensor | None, direction: Direction
) -> Tensor:
    bounds = []
    if d is not None and p is not None:
        bounds.append(forms.leading_pool(p, p - d, m, direction))
    elif d is not None:
        bounds.append(forms.even_coverage(d, m, direction))
    elif p is not None:
        least_margin = (((m + 1) * p - 1) / m).clamp_min(0.0)
        bounds.append(forms.even_coverage(least_margin, m, direction))
    if order is not None:
        bounds.append(forms.order_coverage(order, m, direction))
    return torch.stack(torch.broadcast_tensors(*bounds)).amax(0)


def _rank_bound(
    k: int, d: Tensor | None, p: Tensor | None, order: Tensor | None, direction: Direction
) -> Tensor:
    """Bound for "one of the target's k best": token k+1 is rejected."""
    bounds = []
    lead = order if order is not None else d
    if lead is not None:
        bounds.append(forms.leading_set(lead, k, direction))
    if p is not None:
        rejected = (1 - p).clamp_min(0.0) / k
        rejected = rejected if d is None else torch.minimum(rejected, p - d)
        bounds.append(forms.pair(p, torch.minimum(rejected, p), direction))
    return torch.stack(torch.broadcast_tensors(*bounds)).amax(0)


def unit_interval(name: str, value: Number | None, like: Tensor) -> Tensor | None:
    """The value in float64 on the device of `like`; ValueError outside [0, 1] beyond rounding."""
    if value is None:
        return None
    x = torch.as_tensor(value, dtype=torch.float64, device=like.device)
    if not torch.compiler.is_compiling() and bool((~((x >= -_SLACK) & (x <= 1 + _SLACK))).any()):
        bad = x[~((x >= -_SLACK) & (x <= 1 + _SLACK))].reshape(-1)[0]
        raise ValueError(f"{name}={float(bad):g} is outside [0, 1]")
    return x.clamp(0.0, 1.0)


def _check_order(larger: Tensor, smaller: Tensor, larger_name: str, smaller_name: str) -> None:
    if torch.compiler.is_compiling():
        return
    wrong = larger < smaller - _SLACK
    if bool(wrong.any()):
        big, small = torch.broadcast_tensors(larger, smaller)
        i = int(wrong.broadcast_to(big.shape).reshape(-1).nonzero()[0])
        raise ValueError(
            f"{larger_name}={float(big.reshape(-1)[i]):g} is below "
            f"{smaller_name}={float(small.reshape(-1)[i]):g}; it can never be"
        )
