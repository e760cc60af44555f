"""Certificates from what a trace stores: a head and its tail mass instead of the whole target.

With the tail known only as one number, the divergence between target and drafter is known only from below:
`coarse_kl` ≤ KL. A small coarse divergence is therefore no evidence against the *full* radius; it has a
radius of its own, `coarse_radius`, which is smaller, unless the drafter's tail is looked at as well, which
costs nothing where the drafter is at hand.

Source: docs/theory.md §7.
Axis letters: *step leading axes · V vocabulary · K entries kept.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from certdraft.certificates.head import Head
from certdraft.certificates.pooling import LOG_FLOOR, Direction, check_direction, coverage_pool, deletion_cost


def coarse_kl(
    head: Head, logq: Float[Tensor, "*step V"], direction: Direction = "forward"
) -> Float[Tensor, "*step"]:
    """D_c: divergence between target and drafter with everything outside the head lumped into one bucket.

    Args:
        head: target head.
        logq: natural log-probabilities of the drafter over the whole vocabulary.
        direction: "forward" for KL(p‖q), "reverse" for KL(q‖p).

    Returns:
        Nats, in [0, +inf]; at most the full divergence, and equal to it when the head is the whole
        vocabulary. Differentiable in logq.

    Examples:
        >>> import torch
        >>> p = torch.tensor([0.7, 0.2, 0.1])
        >>> float(coarse_kl(Head.from_probs(p, 2), p.log())) < 1e-6
        True
    """
    check_direction(direction)
    _check_vocabulary(head, logq)
    ours = logq.gather(-1, head.ids)
    theirs, tail = head.logp.to(logq.dtype), head.tail_logp.to(logq.dtype)
    if head.num_kept < head.vocab_size:
        # summed over the tail itself: 1 minus the head would leave only rounding of a small tail
        outside = logq.scatter(-1, head.ids, -torch.inf).logsumexp(-1)
        ours = torch.cat([ours, outside.unsqueeze(-1)], dim=-1)
        theirs = torch.cat([theirs, tail.unsqueeze(-1)], dim=-1)
    logp, logq = (theirs, ours) if direction == "forward" else (ours, theirs)
    held = logp > -torch.inf
    ratio = torch.where(held, logp, 0.0) - torch.where(held, logq, 0.0)
    return (logp.exp() * ratio).sum(-1).clamp_min(0.0)


def num_tail_above(head: Head, logq: Float[Tensor, "*step V"]) -> Int[Tensor, "*step"]:
    """How many tokens outside the head the drafter finds at least as probable as the greedy token.

    Args:
        head: target head.
        logq: scores of the drafter over the whole vocabulary; only their order matters.
    """
    _check_vocabulary(head, logq)
    own = logq.gather(-1, head.greedy.unsqueeze(-1))
    above = logq >= own
    return above.sum(-1) - above.gather(-1, head.ids).sum(-1)


def coarse_radius(
    head: Head,
    m: int,
    direction: Direction = "forward",
    *,
    tail_above: Int[Tensor, "*step"] | None = None,
) -> Float[Tensor, "*step"]:
    """The least coarse divergence at which the greedy token may be missing from the drafter's top-m.

    `coarse_kl(head, logq) < coarse_radius(head, m)` guarantees coverage, and no larger constant does. With
    `tail_above = num_tail_above(head, logq)` the drafter's tail is known to hold that many rivals and no
    more; for none, the usual case, the coarse radius is the full one, and since the coarse divergence is the
    smaller one, this test certifies more than the full divergence does.

    Args:
        head: target head, K ≥ m + 1 unless that is the whole vocabulary.
        m: width, ≥ 1.
        direction: as in `coarse_kl`.
        tail_above: number of tokens outside the head that the drafter ranks level with or above the greedy
            token.

    Returns:
        Nats, in [0, +inf]; 0 where nothing is guaranteed: the tail could hide m tokens as probable as the
        greedy one, or `tail_above` ≥ m.

    Raises:
        ValueError: m < 1, or the head keeps fewer than m + 1 of more than m tokens.
    """
    check_direction(direction)
    if m < 1:
        raise ValueError(f"m={m} must be 1 or more")
    if head.vocab_size <= m:
        return torch.full_like(head.lse_gap, torch.inf)
    if head.num_kept <= m:
        raise ValueError(
            f"coarse_radius(m={m}) needs a head of at least {m + 1}; this one keeps K={head.num_kept}"
        )
    hidden = min(m, head.vocab_size - head.num_kept)
    values = torch.stack([_with_tail_rivals(head, m, n, direction) for n in range(hidden + 1)])
    if tail_above is None:
        return values.amin(0).to(head.lse_gap.dtype)
    chosen = values.gather(0, tail_above.clamp_max(hidden).unsqueeze(0)).squeeze(0)
    return torch.where(tail_above >= m, 0.0, chosen).to(head.lse_gap.dtype)


def _with_tail_rivals(head: Head, m: int, n: int, direction: Direction) -> Tensor:
    """Coverage radius when n of the m rivals share the tail evenly."""
    lse_gap = head.lse_gap.double()
    u = -head.gap[..., : m - n + 1].double()
    if n:
        share = head.tail_mass.double().log() + lse_gap - torch.tensor(float(n), dtype=torch.float64).log()
        u = torch.cat([u, share.unsqueeze(-1).expand(*share.shape, n)], dim=-1)
        # rivals as probable as the greedy token together pool at or above it: nothing is guaranteed
        u = torch.cat([u[..., :1], u[..., 1:].sort(-1, descending=True).values], dim=-1)
    missing = torch.isinf(u[..., -1])
    u = u.movedim(-1, 0)
    x = u.expm1() if direction == "forward" else u.clamp_min(LOG_FLOOR)
    value, level = coverage_pool(x, (-lse_gap).exp(), direction)
    if direction == "reverse":
        value = torch.where(missing, deletion_cost(lse_gap), value)
    return torch.where(level >= 0, 0.0, value)


def _check_vocabulary(head: Head, logq: Tensor) -> None:
    if logq.shape[-1] != head.vocab_size:
        raise ValueError(
            f"the drafter scores {logq.shape[-1]} tokens and the head was cut from {head.vocab_size}"
        )
