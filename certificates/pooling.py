"""The water level: pool the rejected tokens with the accepted ones they must overtake.

At the radius the drafter gives one common probability to a pool S of tokens and leaves the rest as it was. In
the coordinate x (p/p0 − 1 for the forward direction, log(p/p0) for the reverse) that level is the mean of x
over S, and both unions of prefixes that can be S are scanned at once by a cumulative sum and one max or min.

Working with x instead of p means the greedy token contributes an exact 0 and near-ties keep their digits; the
sums below have only nonnegative terms. float64 inside: a handful of entries per step.

Source: certificate theory notes §2 (power-mean pooling) and §10 (numerics), generalising arXiv 2606.30265
Thms 4.4, 5.1. Axis letters: *step leading axes · K entries in descending probability, the first is the greedy
token.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Direction = Literal["forward", "reverse"]


def check_direction(direction: str) -> None:
    """Raise unless the direction is one of the two."""
    if direction not in ("forward", "reverse"):
        raise ValueError(f'direction={direction!r} must be "forward", KL(p‖q), or "reverse", KL(q‖p)')


def single_token_level(
    x: Float[Tensor, "*step K"], num_accepted: Int[Tensor, "*step"], x_rejected: Float[Tensor, "*step"]
) -> tuple[Float[Tensor, "*step"], Bool[Tensor, "*step K"]]:
    """Level and accepted part of the pool when one rejected token has to overtake every accepted one.

    The level is the largest mean of the rejected token and k accepted ones, best first.

    Returns:
        Level [*step], and a mask over x of the pooled accepted tokens.
    """
    place = torch.arange(x.shape[-1], device=x.device)
    accepted = place < num_accepted.unsqueeze(-1)
    sums = x_rejected.unsqueeze(-1) + torch.where(accepted, x, 0.0).cumsum(-1)
    means = torch.where(accepted, sums / (place + 2), -torch.inf)
    level = means.amax(-1)
    return level, accepted & (x > level.unsqueeze(-1))


def coverage_level(x: Float[Tensor, "*step K"]) -> tuple[Float[Tensor, "*step"], Bool[Tensor, "*step K"]]:
    """Level and pool when all of x[1:] have to overtake x[0].

    The level is the smallest mean of the greedy token and k competitors, worst first.
    """
    from_below = x[..., 1:].flip(-1).cumsum(-1)
    count = torch.arange(2, x.shape[-1] + 1, device=x.device)
    level = (from_below / count).amin(-1)
    pooled = x < level.unsqueeze(-1)
    return level, pooled | (torch.arange(x.shape[-1], device=x.device) == 0)


def pooled_kl(
    x: Float[Tensor, "*step K"],
    pooled: Bool[Tensor, "*step K"],
    level: Float[Tensor, "*step"],
    p0: Float[Tensor, "*step"],
    direction: Direction,
) -> Float[Tensor, "*step"]:
    """KL between p and p with the pool levelled out, nats.

    The value is stationary in the level, so the level carries no gradient.
    """
    v = level.detach()
    if direction == "forward":
        scale = 1 + v
        d = ((x - v.unsqueeze(-1)) / scale.unsqueeze(-1)).clamp_min(-1 + 2.0**-53)
        return p0 * scale * torch.where(pooled, (1 + d) * d.log1p() - d, 0.0).sum(-1).clamp_min(0.0)
    d = torch.where(pooled, x - v.unsqueeze(-1), 0.0)
    lost = p0 * v.exp() * (d.expm1() - d).sum(-1)
    return -torch.log1p(-lost.clamp(0.0, 1.0))
