"""Radii from heads: exact when the head holds the active set, and never too large when it does not.

Axis letters: *step leading axes · K entries kept.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from certdraft.certificates.head import Head
from certdraft.certificates.pooling import (
    LOG_FLOOR,
    Measure,
    coverage_pool,
    deletion_cost,
    single_token_pool,
)
from certdraft.certificates.rules import HEAD_TIE, SingleTokenRule

_TAIL_SLACK = 2.0**-20  # a tail mass rebuilt from float32 logarithms may be this much too small
_NARROW = 4  # most steps accept fewer tokens than this; only the others look at the whole head


def head_coverage(head: Head, m: int, measure: Measure) -> Float[Tensor, "*step"]:
    """Radius of `Coverage(m)` from the m + 1 most probable tokens, nats, float64."""
    if head.vocab_size <= m:
        return torch.full_like(head.lse_gap, torch.inf)
    if head.num_kept <= m:
        raise ValueError(
            f"coverage(m={m}) needs the {m + 1} most probable tokens of each step and this head keeps "
            f"K={head.num_kept}; store K ≥ {m + 1} or ask for a smaller m"
        )
    lse_gap = head.lse_gap.double()
    x = _coordinate(head.gap[..., : m + 1], measure)
    value, _ = coverage_pool(x, (-lse_gap).exp(), measure)
    if measure == "reverse":  # a competitor of probability zero wins only when the greedy token is deleted
        value = torch.where(torch.isinf(head.gap[..., m]), deletion_cost(lse_gap), value)
    return value


def head_single(head: Head, rule: SingleTokenRule, measure: Measure) -> Float[Tensor, "*step"]:
    """Radius of a single-token rule, nats, float64.

    When every token of the head is accepted the best rejected one lies outside it. Its probability is at most
    the last one kept, the tail mass and the threshold. The radius falls as that probability grows, and grows
    with the accepted set, so pooling the virtual token with the accepted tokens kept gives a lower bound
    (docs/theory.md §7).
    """
    theta = rule.threshold(head)
    num_accepted = rule.num_accepted(head, theta)
    k = head.num_kept
    lse_gap = head.lse_gap.double()
    rejected = head.gap.gather(-1, num_accepted.clamp_max(k - 1).unsqueeze(-1)).squeeze(-1).double()
    endless = theta < -HEAD_TIE  # rows of infinite radius
    unseen = num_accepted == k
    if k == head.vocab_size:
        endless = endless | unseen
    else:
        mass = torch.minimum(theta, head.tail_mass + _TAIL_SLACK).clamp_min(0.0).double()
        virtual = torch.maximum(-mass.log() - lse_gap, head.gap[..., -1].double())
        rejected = torch.where(unseen, virtual, rejected)
    if measure == "reverse":  # no finite divergence lifts a token of probability zero
        endless = endless | torch.isinf(rejected)
    rejected = torch.where(endless, 1.0, rejected)
    x_rejected = _coordinate(rejected.unsqueeze(-1), measure)[0]
    value = _solve(head.gap, num_accepted, x_rejected, (-lse_gap).exp(), measure)
    return torch.where(endless, torch.inf, value)


def _solve(gap: Tensor, num_accepted: Tensor, x_rejected: Tensor, p0: Tensor, measure: Measure) -> Tensor:
    """The pool of each step: four entries for all steps, the whole head for those that accept more."""
    value, _ = single_token_pool(
        _coordinate(gap[..., :_NARROW], measure), num_accepted, x_rejected, p0, measure
    )
    if gap.shape[-1] <= _NARROW:
        return value
    wide = num_accepted > _NARROW
    if torch.compiler.is_compiling() or wide.ndim == 0:
        whole, _ = single_token_pool(_coordinate(gap, measure), num_accepted, x_rejected, p0, measure)
        return torch.where(wide, whole, value)
    rows = wide.nonzero(as_tuple=True)
    x = _coordinate(gap[rows], measure)
    whole, _ = single_token_pool(x, num_accepted[rows], x_rejected[rows], p0[rows], measure)
    return value.index_put(rows, whole)


def _coordinate(gap: Tensor, measure: Measure) -> Tensor:
    """Pooling coordinate of each gap, float64, entries first: [*step, K] → [K, *step]."""
    u = -gap.movedim(-1, 0).to(torch.float64, memory_format=torch.contiguous_format)
    return u.clamp_min(LOG_FLOOR) if measure == "reverse" else u.expm1()
