"""Scalar closed forms behind the margin bounds, each accurate near zero and at the far end of its range.

All take and return float64 tensors of any common shape, in nats. Differences of nearly equal numbers are
rewritten as sums of nonnegative terms or through log1p, so relative accuracy survives small margins.

Source: docs/theory.md §4 and §5; the forward strict row is arXiv 2606.30265, Thm 4.7, the forward
order-margin row Thm 5.2. The rest is proved by the same argument: drop constraints until the optimum is
symmetric.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from certdraft.certificates.dense import coordinate
from certdraft.certificates.pooling import Direction, coverage_pool, phi, single_token_pool

Nats = Float[Tensor, "*step"]


def even_pair(x: Nats, direction: Direction) -> Nats:
    """Radius of the pair ((1+x)/2, (1−x)/2): f(x) forward, r(x) reverse; about x²/2 for x in [0, 1]."""
    if direction == "reverse":
        return -0.5 * torch.log1p(-x * x)
    return 0.5 * (phi(x) + phi(-x))


def pair(a: Nats, b: Nats, direction: Direction) -> Nats:
    """Radius of two tokens of mass a and b, the second rejected; 0 when b ≥ a."""
    b = torch.minimum(a, b)
    if direction == "reverse":
        root = (a - b) / (a.sqrt() + b.sqrt()).clamp_min(1e-300)
        return -torch.log1p(-root * root)
    mass = (a + b).clamp_min(1e-300)
    return mass * even_pair((a - b) / mass, "forward")


def triple(a: Nats, b: Nats, c: Nats, direction: Direction) -> Nats:
    """Radius of three tokens a ≥ b > c, only the last rejected."""
    a, b, c = torch.broadcast_tensors(a, b, c)
    x = coordinate(torch.stack([a, b, c]), a.clamp_min(1e-300), direction)
    value, _ = single_token_pool(x[:2], x[2], a, direction)
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
    square = (2 * a + a * a - b * b).clamp_min(-1.0)
    return ((m - 1) * a.log1p() - m * square.log1p()) / (m + 1)


def leading_pool(p0: Nats, p1: Nats, m: int, direction: Direction) -> Nats:
    """Least coverage radius for known p(x0) and p(x1): the other competitors as large as they can be."""
    p0, p1 = torch.broadcast_tensors(p0, p1)
    rest = torch.minimum(p1, (1 - p0 - p1).clamp_min(0.0) / max(m - 1, 1))
    x = coordinate(torch.stack([p0, p1] + [rest] * (m - 1)), p0.clamp_min(1e-300), direction)
    value, _ = coverage_pool(x, p0, direction)
    if direction == "reverse":  # a competitor of mass 0 wins only when the greedy token is deleted
        value = torch.where((rest if m > 1 else p1) <= 0, -torch.log1p(-p0), value)
    return value


def leading_set(gap: Nats, k: int, direction: Direction) -> Nats:
    """Least radius of "one of the target's k best" when p(x0) leads token k+1 by `gap`; about (k+1)gap²/4."""
    mass = (2 + (k - 1) * gap) / (k + 1)
    if direction == "forward":
        return mass * even_pair(gap / mass, "forward")
    return -torch.log1p(-(gap**2) / (mass + (mass**2 - gap**2).clamp_min(0.0).sqrt()))


def ratio_pair(margin: Nats, alpha: float, direction: Direction) -> Nats:
    """Least multiplicative radius for a known margin: the pooled mass is at most margin / x."""
    x = margin.clamp_min((1 - alpha) / (1 + alpha)).clamp_min(1e-300)
    if direction == "forward":
        return margin * even_pair(x, "forward") / x
    return -torch.log1p(-margin * x / (1 + (1 - x * x).sqrt()))
