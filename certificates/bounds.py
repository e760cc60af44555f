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

from certdraft.certificates.dense import coordinate
from certdraft.certificates.pooling import (
    Direction,
    check_direction,
    coverage_pool,
    log_left,
    phi,
    single_token_pool,
)
from certdraft.certificates.rules import Additive, Coverage, Multiplicative, Rule, StrictGreedy, TopM, Typical

Nats = Float[Tensor, "*step"]
Number = Nats | float
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
        Nats, in [0, +inf]; 0 where nothing is guaranteed. Sharp for strict, additive and multiplicative
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
            value = pair(p, worst, direction)
        else:
            second = p - d
            rejected = torch.minimum(theta, (1 - p - second)).clamp_min(0.0)
            relaxed = triple(p, second, rejected, direction)
            value = torch.where(second > theta, relaxed, pair(p, second, direction))
        return torch.where(theta < 0, torch.inf, value)
    if d is None:
        raise ValueError(f"an order margin alone bounds only coverage; for {rule} give margin or p0 as well")
    strict_value = even_pair(d, direction)
    if isinstance(rule, Additive):
        # margin exactly d below t: the runner-up is accepted too, and the worst case has three tokens
        a, b, c = (1 + d + rule.t) / 3, (1 - 2 * d + rule.t) / 3, (1 + d - 2 * rule.t) / 3
        relaxed = triple(a, b, c.clamp_min(0.0), direction)
        relaxed = torch.where(c < 0, torch.inf, relaxed)
        return torch.where(d < rule.t, relaxed, strict_value)
    if isinstance(rule, Multiplicative):
        return ratio_pair(d, rule.alpha, direction)
    if isinstance(rule, Typical):
        # p0 is at least the margin, and the bound from p0 grows with it
        worst = torch.minimum(torch.minimum(_threshold(rule, d, h), d), 1 - d)
        return torch.maximum(strict_value, pair(d, worst, direction))
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
        bounds.append(leading_pool(p, p - d, m, direction))
    elif d is not None:
        bounds.append(even_coverage(d, m, direction))
    elif p is not None:
        least_margin = (((m + 1) * p - 1) / m).clamp_min(0.0)
        bounds.append(even_coverage(least_margin, m, direction))
    if order is not None:
        bounds.append(order_coverage(order, m, direction))
    return torch.stack(torch.broadcast_tensors(*bounds)).amax(0)


def _rank_bound(
    k: int, d: Tensor | None, p: Tensor | None, order: Tensor | None, direction: Direction
) -> Tensor:
    """Bound for "one of the target's k best": token k+1 is rejected."""
    bounds = []
    lead = order if order is not None else d
    if lead is not None:
        bounds.append(leading_set(lead, k, direction))
    if p is not None:
        rejected = (1 - p).clamp_min(0.0) / k
        rejected = rejected if d is None else torch.minimum(rejected, p - d)
        bounds.append(pair(p, torch.minimum(rejected, p), direction))
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


# Scalar closed forms, float64. Differences of nearly equal numbers are rewritten as sums of nonnegative terms
# or through log1p, so that small margins keep their digits. Source: docs/theory.md §4 and §5; forward strict:
# arXiv 2606.30265, Thm 4.7, forward order margin: Thm 5.2.


def even_pair(x: Nats, direction: Direction) -> Nats:
    """Radius of the pair ((1+x)/2, (1−x)/2): f(x) forward, r(x) reverse; about x²/2 for x in [0, 1]."""
    if direction == "reverse":
        return -0.5 * log_left(x * x, (1 - x) * (1 + x))
    return 0.5 * (phi(x) + phi(-x))


def pair(a: Nats, b: Nats, direction: Direction) -> Nats:
    """Radius of two tokens of mass a and b, the second rejected; 0 when b ≥ a."""
    b = torch.minimum(a, b)
    if direction == "reverse":
        root = (a - b) / (a.sqrt() + b.sqrt()).clamp_min(1e-300)
        return -log_left(root * root, (1 - a - b).clamp_min(0.0) + 2 * (a * b).sqrt())
    mass = (a + b).clamp_min(1e-300)
    return mass * even_pair((a - b) / mass, "forward")


def triple(a: Nats, b: Nats, c: Nats, direction: Direction) -> Nats:
    """Radius of three tokens a ≥ b > c, only the last rejected."""
    a, b, c = torch.broadcast_tensors(a, b, c)
    x = coordinate(torch.stack([a, b, c]), a.clamp_min(1e-300), direction)
    value, _ = single_token_pool(x[:2], x[2], -a.clamp_min(1e-300).log(), direction)
    return torch.where(c <= 0, torch.inf, value) if direction == "reverse" else value


def even_coverage(margin: Nats, m: int, direction: Direction) -> Nats:
    """Coverage radius of ((1+mD)/(m+1), (1−D)/(m+1), …): F_m forward, R_m reverse; about mD²/2."""
    up, down = m * margin, -margin
    if direction == "forward":
        return (phi(up) + m * phi(down)) / (m + 1)
    return ((up - up.log1p()) + m * (down - down.log1p())) / (m + 1)


def order_coverage(gap: Nats, m: int, direction: Direction) -> Nats:
    """Least coverage radius when the lead over the m-th competitor is `gap`; about (m+1)gap²/4."""
    if direction == "forward":
        gap = gap.clamp_max(1 - 2.0**-52)
        root = ((m - 1) ** 2 * gap**2 + 4 * (1 - gap**2)).sqrt()
        excess = ((m + 1) * gap + ((m - 1) ** 2 - 4) * gap**2 / (root + 2)) / (2 * (1 - gap))  # y − 1
        return gap * excess.log1p() - (excess**2 / (1 + excess) / (m + 1)).log1p()
    root = (1 + (m * m - 1) * gap**2).sqrt()
    a = (m * m - 1) * gap**2 / (2 * (root + 1))
    b = (m + 1) * gap / 2
    left = 0.5 * (1 - gap) * (1 + (1 + gap) / (root + m * gap)) * (1 + a + b)
    return ((m - 1) * a.log1p() - m * log_left(b * b - 2 * a - a * a, left)) / (m + 1)


def leading_pool(p0: Nats, p1: Nats, m: int, direction: Direction) -> Nats:
    """Least coverage radius for known p(x0) and p(x1): the other competitors as large as they can be."""
    p0, p1 = torch.broadcast_tensors(p0, p1)
    rest = torch.minimum(p1, (1 - p0 - p1).clamp_min(0.0) / max(m - 1, 1))
    x = coordinate(torch.stack([p0, p1] + [rest] * (m - 1)), p0.clamp_min(1e-300), direction)
    value, _ = coverage_pool(x, -p0.clamp_min(1e-300).log(), direction)
    if direction == "reverse":  # a competitor of mass 0 wins only when the greedy token is deleted
        value = torch.where((rest if m > 1 else p1) <= 0, -torch.log1p(-p0), value)
    return value


def leading_set(gap: Nats, k: int, direction: Direction) -> Nats:
    """Least radius of "one of the target's k best" when p(x0) leads token k+1 by `gap`; about (k+1)gap²/4."""
    mass = (2 + (k - 1) * gap) / (k + 1)
    if direction == "forward":
        return mass * even_pair(gap / mass, "forward")
    root = (2 * (1 - gap) / (k + 1) * (mass + gap)).sqrt()  # of mass² − gap²
    return -log_left(gap**2 / (mass + root), (k - 1) * (1 - gap) / (k + 1) + root)


def ratio_pair(margin: Nats, alpha: float, direction: Direction) -> Nats:
    """Least multiplicative radius for a known margin: the pooled mass is at most margin / x."""
    x = margin.clamp_min((1 - alpha) / (1 + alpha)).clamp_min(1e-300)
    if direction == "forward":
        return margin * even_pair(x, "forward") / x
    root = ((1 - x) * (1 + x)).sqrt()
    return -log_left(margin * x / (1 + root), (x - margin + margin * root) / x)
