"""Certified lengths: how many steps in a row, and how far along a drafted path, acceptance is guaranteed.

Axis letters: *docs leading axes · T steps of a document · D draft depth, the last axis of a path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from certdraft.certificates.head import Head
from certdraft.certificates.pooling import Direction, check_direction
from certdraft.certificates.radius import radius
from certdraft.certificates.rules import Coverage

_HALVINGS = 80


@dataclass(frozen=True, eq=False)
class RunLengths:
    """Lengths of certified stretches, under both readings of arXiv 2606.30265, Tables 5 and 6.

    Args:
        runs: certified steps in a row that begin at each step, at most the cap; 0 at an uncertified step.
        certified_fraction: share of counted steps that are certified, in [0, 1].
        from_random_step: 1 + mean of `runs` over all counted steps: tokens committed when drafting starts
            anywhere, the bonus token included.
        from_certified_step: mean of `runs` over the certified steps only; NaN when there is none.
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


def budget_radius(
    greedy_logp: Float[Tensor, "*path D"], log_threshold: Float[Tensor, "*path"] | float
) -> Float[Tensor, "*path"]:
    """Radius of a best-first tree: the least total Σ_i KL(p_i‖q_i) at which it may drop the greedy path.

    A tree of bounded node budget keeps exactly the paths whose drafter probability exceeds its inclusion
    threshold λ, the probability of the least probable node kept.

    Args:
        greedy_logp: log p_i(x0), nats, ≤ 0, for each depth of the path.
        log_threshold: log λ, nats, ≤ 0.

    Returns:
        Nats, in [0, +inf]; 0 when the target itself gives the path no more than λ. Differentiable in
        greedy_logp.

    Raises:
        ValueError: a logarithm above 0.

    Source: docs/theory.md §6.7. One step: the binary KL between p(x0) and λ.

    Examples:
        >>> import math, torch
        >>> round(float(budget_radius(torch.tensor([math.log(0.5)]), math.log(0.25))), 4)
        0.1438
    """
    logp = greedy_logp.double()
    target = torch.as_tensor(log_threshold, dtype=torch.float64, device=logp.device).expand(logp.shape[:-1])
    if not torch.compiler.is_compiling() and bool((logp > 1e-6).any() | (target > 1e-6).any()):
        raise ValueError("greedy_logp and log_threshold are logarithms of probabilities and cannot exceed 0")
    rest = -logp.clamp_max(0.0).expm1()  # 1 − p
    # Optimum: x_i = 1 − s w_i with w = (1 − p)/max(1 − p), and 1 − s = exp(−y); y keeps its digits as s → 1.
    with torch.no_grad():
        most = rest.amax(-1, keepdim=True)
        weight = torch.where(most > 0, rest / most.clamp_min(1e-300), 1.0)
        low, high = torch.zeros_like(target), -target.clamp_max(0.0)
        for _ in range(_HALVINGS):
            middle = 0.5 * (low + high)
            enough = _log_kept(weight, middle).sum(-1) <= target
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        log_x = _log_kept(weight, high)
        log_rest = (weight * -(-high).expm1().unsqueeze(-1)).log()  # log(1 − x)
    p = logp.exp()
    value = (
        torch.xlogy(p, p) - p * log_x + torch.xlogy(rest, rest) - torch.where(rest > 0, rest * log_rest, 0.0)
    )
    total = value.sum(-1).clamp_min(0.0)
    return torch.where(logp.sum(-1) <= target, 0.0, total).to(greedy_logp.dtype)


def certified_rank(
    head: Head, kl: Float[Tensor, "*step"], direction: Direction = "forward"
) -> Int[Tensor, "*step"]:
    """The least width at which the greedy token is certain to be covered at this divergence.

    With the drafter's own KL: a bound on the rank it gives the greedy token. With a KL budget: the width a
    tree needs at this step.

    Args:
        head: target head.
        kl: divergence of the drafter, nats.
        direction: which divergence `kl` is.

    Returns:
        In 1..K; K where no width the head can vouch for (up to K − 1) is enough.

    Source: docs/theory.md §3.7 and §6.6.
    """
    check_direction(direction)
    enough = torch.stack([kl < radius(head, Coverage(m), direction) for m in range(1, head.num_kept)], dim=-1)
    return (~enough).long().cumprod(-1).sum(-1) + 1


def _log_kept(weight: Tensor, y: Tensor) -> Tensor:
    """log(1 − w (1 − exp(−y)))."""
    return torch.log1p(weight * (-y).expm1().unsqueeze(-1))
