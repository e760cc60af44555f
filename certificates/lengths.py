"""Certified lengths: how many steps in a row, and how far along a drafted path, acceptance is guaranteed.

Axis letters: *docs leading axes · T steps of a document · D draft depth, the last axis of a path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RunLengths:
    """How long certified stretches are, under both readings of arXiv 2606.30265, Tables 5 and 6.

    Args:
        runs: certified steps in a row that begin at each step, at most the cap; 0 at an uncertified step.
        certified_fraction: share of counted steps that are certified, in [0, 1].
        from_random_step: 1 + mean of `runs` over all counted steps: tokens committed when drafting starts
            anywhere, the bonus token included.
        from_certified_step: mean of `runs` over the certified steps alone; NaN when there is none.
    """

    runs: Int[Tensor, "*docs T"]
    certified_fraction: float
    from_random_step: float
    from_certified_step: float


def certified_run_lengths(
    radii: Float[Tensor, "*docs T"],
    epsilon: float,
    cap: int = 100,
    mask: Bool[Tensor, "*docs T"] | None = None,
) -> RunLengths:
    """Lengths of the runs of consecutive steps whose radius exceeds a KL budget.

    A drafter within ε nats of the target at every step is accepted at least this far.

    Args:
        radii: KL radius of each step, nats; the last axis is time.
        epsilon: KL budget of the drafter, nats, ≥ 0; certified means radius > ε.
        cap: longest run counted (the paper: 100).
        mask: which steps exist; a run ends where it is False. None counts all.

    Returns:
        The runs and both means of the paper's tables, whose text and caption differ.

    Raises:
        ValueError: ε negative, cap < 1, or no step to count.

    Examples:
        >>> import torch
        >>> run = certified_run_lengths(torch.tensor([0.3, 0.2, 0.01, 0.4]), epsilon=0.1)
        >>> run.runs.tolist(), run.from_random_step, round(run.from_certified_step, 2)
        ([2, 1, 0, 1], 2.0, 1.33)
    """
    if not epsilon >= 0:
        raise ValueError(f"epsilon={epsilon!r} must be a KL budget of 0 nats or more")
    if cap < 1:
        raise ValueError(f"cap={cap} must be 1 or more")
    certified = radii > epsilon
    counted = torch.ones_like(certified) if mask is None else mask
    certified = certified & counted
    if not bool(counted.any()):
        raise ValueError("no step to count: the trace is empty or its mask is False throughout")
    length = radii.shape[-1]
    time = torch.arange(length, device=radii.device)
    # the next step that is not certified, looking from the end
    stop = torch.where(certified, length, time).flip(-1).cummin(-1).values.flip(-1)
    runs = (stop - time).clamp_max(cap)
    total = runs.sum().double()
    num_certified, num_counted = int(certified.sum()), int(counted.sum())
    return RunLengths(
        runs,
        num_certified / num_counted,
        1 + float(total / num_counted),
        float(total / num_certified) if num_certified else float("nan"),
    )


def certified_length(kl: Float[Tensor, "*docs D"], radii: Float[Tensor, "*docs D"]) -> Int[Tensor, "*docs"]:
    """Draft tokens certain to be accepted along a path: the leading steps with kl < radius.

    Args:
        kl: divergence of the drafter from the target at each depth, nats.
        radii: radius at each depth, nats.

    Returns:
        In 0..D; the bonus token is not counted.

    Source: docs/theory.md §6.1.
    """
    return (kl < radii).long().cumprod(-1).sum(-1)


def smooth_certified_length(
    kl: Float[Tensor, "*docs D"], radii: Float[Tensor, "*docs D"]
) -> Float[Tensor, "*docs"]:
    """Σ_ℓ Π_{i≤ℓ} (1 − kl_i/radius_i)₊: a lower bound on accepted draft tokens that falls smoothly with the
    KL.

    Args:
        kl: divergence at each depth, nats.
        radii: radius at each depth, nats; 0 counts as uncertified, +inf as certain.

    Returns:
        In [0, D]; at most `certified_length`. Differentiable in kl.

    Source: docs/theory.md §6.1, from 1[covered] ≥ (1 − x)₊.
    """
    return (1 - used_budget(kl, radii)).cumprod(-1).sum(-1)


def expected_length_bound(used: Float[Tensor, "*docs D"]) -> Float[Tensor, "*docs"]:
    """Lower bound on the mean number of accepted draft tokens, linear in the mean used budgets.

    D − Σ_i (D − i + 1) E min(1, kl_i/radius_i), by the union bound over depths.

    Args:
        used: mean of `used_budget` at each depth, in [0, 1].

    Returns:
        In [0, D], clipped at 0.

    Source: docs/theory.md §6.2.
    """
    depth = used.shape[-1]
    weight = torch.arange(depth, 0, -1, device=used.device, dtype=used.dtype)
    return (depth - (weight * used).sum(-1)).clamp_min(0.0)


def used_budget(kl: Float[Tensor, "*step"], radii: Float[Tensor, "*step"]) -> Float[Tensor, "*step"]:
    """min(1, kl/radius), in [0, 1]: the share of the certificate that the drafter has used; 1 bounds a
    failure.

    Args:
        kl: divergence, nats.
        radii: radius, nats; at 0 the budget is used up, at +inf never.
    """
    free = torch.isinf(radii)
    share = kl / torch.where((radii > 0) & ~free, radii, 1.0)
    return torch.where(free, 0.0, torch.where(radii > 0, share, 1.0)).clamp(0.0, 1.0)
