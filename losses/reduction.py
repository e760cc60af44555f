"""From per-step losses to the number that is minimised: masks, weights and the only reduction in the project.

Weights multiply steps and never change the scale of the loss: "mean" divides by the sum of the weights, so a
learning rate tuned for one weighting fits the others. Weights carry no gradient. Per-path weights are in
`losses.path_weights`. Axes: N steps · D draft depth.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from certdraft.losses.target import TargetBatch

Reduction = Literal["none", "mean", "sum"]


def step_coefficients(
    mask: Bool[Tensor, "*step"] | None,
    weight: Float[Tensor, "*step"] | None,
    reduction: Reduction,
    like: Float[Tensor, "*step"],
    denominator: float | Tensor | None = None,
) -> Float[Tensor, "*step"]:
    """What each per-step loss is multiplied with, so that the reduced loss is Σ coefficient · loss.

    Args:
        mask: True = the step counts.
        weight: nonnegative step weights.
        reduction: "sum"; "mean" divides by the sum of counted weights; "none" is "sum" before adding up.
        like: gives shape, dtype and device.
        denominator: replaces the sum of weights in "mean", e.g. the total over ranks or accumulated batches.

    Returns:
        Coefficients without gradient, exactly 0 off the mask. No counted step gives all zeros, not NaN.
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: choose none, mean or sum.")
    for name, given in (("mask", mask), ("weight", weight)):
        if given is not None and given.shape != like.shape:
            raise ValueError(f"{name} has shape {list(given.shape)}, the per-step loss {list(like.shape)}.")
    coefficient = torch.ones_like(like) if weight is None else weight.detach().to(like.dtype)
    if mask is not None:
        coefficient = torch.where(mask, coefficient, 0.0)
    if reduction == "mean":
        total = coefficient.sum() if denominator is None else torch.as_tensor(denominator).to(like)
        coefficient = torch.where(total > 0, coefficient / total, 0.0)
    return coefficient.detach()


def reduce(
    per_step: Float[Tensor, "*step"],
    mask: Bool[Tensor, "*step"] | None = None,
    weight: Float[Tensor, "*step"] | None = None,
    reduction: Reduction = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Masked, weighted reduction; see `step_coefficients`. Steps off the mask may hold anything, even NaN.

    Examples:
        >>> loss = torch.tensor([1.0, 2.0, float("nan")])
        >>> mask, weight = torch.tensor([True, True, False]), torch.tensor([1.0, 3.0, 1.0])
        >>> float(reduce(loss, mask, weight))
        1.75
    """
    coefficient = step_coefficients(mask, weight, reduction, per_step, denominator)
    if mask is not None:
        per_step = torch.where(mask, per_step, 0.0)
    weighted = coefficient * per_step
    return weighted if reduction == "none" else weighted.sum()


def depth_decay(depth: int, gamma: float, device: torch.device | str | None = None) -> Float[Tensor, " D"]:
    """exp(−(k − 1)/γ) for draft depths k = 1..D: the fixed decay of block drafters (DFlash: γ = 7).

    Args:
        depth: D.
        gamma: depths until the weight falls to 1/e, > 0.
        device: where the weights are made.
    """
    if not gamma > 0.0:
        raise ValueError(f"depth_decay: gamma={gamma} is not positive.")
    return torch.exp(-torch.arange(depth, device=device) / gamma)


def low_margin_weight(target: TargetBatch, threshold: float = 0.1, boost: float = 2.0) -> Float[Tensor, " N"]:
    """`boost` on steps whose target margin p(x0) − p(x1) is below `threshold`, 1 elsewhere.

    Args:
        target: the target at the steps, K ≥ 2.
        threshold: margin, in [0, 1].
        boost: weight of the low-margin steps, ≥ 0.
    """
    margin = target.margin
    return torch.where(margin < threshold, torch.full_like(margin, boost), torch.ones_like(margin))
