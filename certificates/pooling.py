"""The water level: pool the rejected tokens with the accepted ones they must overtake.

At the radius the drafter gives one common probability to a pool S of tokens and leaves the rest as it was. In
the coordinate x (p/p0 − 1 for the forward direction, log(p/p0) for the reverse) that level is the mean of x
over S, and S is a prefix of a sorted list with one end added, so a cumulative sum and one max or min find it.

Working with x instead of p means that the greedy token is an exact 0 and near-ties keep their digits; every
sum has terms of one sign. float64 inside, for a handful of entries per step. Entries are the *first* axis, so
that each operation runs over long contiguous rows of steps.

Source: docs/theory.md §2 (power-mean pooling) and §10 (numerics); arXiv 2606.30265, Thms 4.4 and 5.1.
Axis letters: *step leading axes · K entries in descending probability, the first is the greedy token.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Direction = Literal["forward", "reverse"]
Measure = Literal["forward", "reverse", "tv"]

LOG_FLOOR = -600.0  # stands for log 0 inside the pool, where exp(±) of it must stay finite
_TINY = -1 + 2.0**-53  # relative size of probability zero


def check_direction(direction: str) -> None:
    """Raise unless the direction is one of the two."""
    if direction not in ("forward", "reverse"):
        raise ValueError(f'direction={direction!r} must be "forward", KL(p‖q), or "reverse", KL(q‖p)')


def single_token_pool(
    x: Float[Tensor, " K *step"],
    x_rejected: Float[Tensor, "*step"],
    lse_gap: Float[Tensor, "*step"],
    measure: Measure,
) -> tuple[Float[Tensor, "*step"], Float[Tensor, "*step"]]:
    """Radius and level when the best rejected token has to overtake every accepted one.

    The level is the largest mean of the rejected token and k accepted ones, best first. Other rejected tokens
    may stand among x: none is above the best of them, so none can raise a mean or lie above the level.

    Args:
        x: coordinates of the K most probable tokens, float64.
        x_rejected: coordinate of the most probable rejected token.
        lse_gap: −log p(x0), float64.
        measure: the divergence.
    """
    with torch.no_grad():
        count = torch.arange(2, len(x) + 2, device=x.device).reshape(-1, *[1] * lse_gap.ndim)
        level = ((x_rejected + x.cumsum(0)) / count).amax(0)
    return divergence((x - level).clamp_min(0.0), x_rejected - level, level, lse_gap, measure), level


def coverage_pool(
    x: Float[Tensor, " K *step"], lse_gap: Float[Tensor, "*step"], measure: Measure
) -> tuple[Float[Tensor, "*step"], Float[Tensor, "*step"]]:
    """Radius and level when all of x[1:] have to overtake x[0], which is 0; arguments as above."""
    level = coverage_level(x[1:])
    return divergence((x[1:] - level).clamp_max(0.0), x[0] - level, level, lse_gap, measure), level


@torch.no_grad()
def coverage_level(x: Float[Tensor, " K *step"]) -> Float[Tensor, "*step"]:
    """Smallest mean of the greedy token and k of its competitors, weakest first.

    Args:
        x: coordinates of the competitors that must overtake the greedy token, descending.
    """
    count = torch.arange(2, len(x) + 2, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
    return (x.flip(0).cumsum(0) / count).amin(0)


def divergence(
    many: Float[Tensor, " K *step"],
    one: Float[Tensor, "*step"],
    level: Float[Tensor, "*step"],
    lse_gap: Float[Tensor, "*step"],
    measure: Measure,
) -> Float[Tensor, "*step"]:
    """Divergence between p and p with its pool levelled out.

    It is stationary in the level, so the level carries no gradient.

    Args:
        many: signed distance to the level of the tokens on the populous side, 0 outside the pool.
        one: the same for the single token on the other side.
        level: mean of x over the pool.
        lse_gap: −log p(x0), float64.
        measure: the divergence.
    """
    p0 = (-lse_gap).exp()
    if measure == "tv":
        return p0 * one.abs()
    if measure == "forward":
        scale = 1 + level
        return p0 * scale * (phi(many / scale).sum(0) + phi(one / scale))
    lost = p0 * level.exp() * (psi(many).sum(0) + psi(one))
    # What is left is the mass outside the pool and the pool at its level, both in units of p(x0).
    pool = torch.cat([many, one.unsqueeze(0)])
    inside, x = pool != 0, pool + level  # the greedy token's is exactly 0
    mass, below = torch.where(inside, x.exp(), 0.0), x < 0
    competitors = mass.masked_fill(~below, 0.0).sum(0) + (mass.masked_fill(below, 0.0).sum(0) - 1)
    size = inside.sum(0).clamp_min(1)
    common = (level + pool.sum(0) / size).exp()  # the mean is 0 but for rounding, and carries the gradient
    outside = (lse_gap.expm1() - competitors + 2.0**-50 * competitors).clamp_min(0.0)  # rounded up: sound
    return -log_left(lost, p0 * (outside + size * common))


def log_left(lost: Tensor, left: Tensor) -> Tensor:
    """log(1 − lost), from left = 1 − lost where more than half is lost."""
    return torch.where(lost > 0.5, left.log(), torch.log1p(-lost.clamp_max(0.5)))


def deletion_cost(lse_gap: Float[Tensor, "*step"]) -> Float[Tensor, "*step"]:
    """−log(1 − p0), what it costs in reverse to delete the greedy token; lse_gap = −log p0."""
    possible = lse_gap > 0
    rest = -(-torch.where(possible, lse_gap, 1.0)).expm1()
    return torch.where(possible, -rest.log(), torch.inf)


def phi(d: Tensor) -> Tensor:
    """(1 + d) log(1 + d) − d ≥ 0 for d ≥ −1; about d²/2."""
    d = d.clamp_min(_TINY)
    return (1 + d) * d.log1p() - d


def psi(u: Tensor) -> Tensor:
    """exp(u) − 1 − u ≥ 0; about u²/2."""
    return u.expm1() - u
