"""Radii from heads: exact when the head holds the active set, and never too large when it does not.

Axis letters: *step leading axes · N steps · K entries kept.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from certdraft.certificates.head import Head, tail_mass
from certdraft.certificates.pooling import (
    LOG_FLOOR,
    Measure,
    coverage_pool,
    deletion_cost,
    single_token_pool,
)
from certdraft.certificates.rules import HEAD_TIE, Coverage, Rule, SingleTokenRule, StrictGreedy, TopM

_TAIL_SLACK = 2.0**-20  # a tail mass rebuilt from float32 logarithms may be this much too small
_WIDTHS = (4, 12)  # most steps accept few tokens: only the others look further into the head
_BLOCK = 16384  # steps whose work space stays in the cache of a CPU


def head_radius(head: Head, rule: Rule, measure: Measure) -> Float[Tensor, "*step"]:
    """Radius of one rule, nats, float64."""
    if isinstance(rule, Coverage) and rule.m < head.vocab_size and rule.m >= head.num_kept:
        raise ValueError(
            f"{rule} needs the {rule.m + 1} most probable tokens of each step and this head keeps "
            f"K={head.num_kept}; store K ≥ {rule.m + 1} or ask for a smaller m"
        )
    if isinstance(rule, StrictGreedy) and (head.num_kept > 1 or head.vocab_size == 1):
        rule = Coverage(1)
    if isinstance(rule, TopM) and rule.m <= head.num_kept:  # the m-th token fails: nothing below it matters
        head = head.truncate(max(rule.m, min(2, head.num_kept)))
    flat = head.flatten()
    size = len(flat.lse_gap)
    if head.device.type != "cpu" or torch.compiler.is_compiling() or size <= _BLOCK:
        return _block(flat, rule, measure).reshape(head.shape)
    starts = range(0, size, _BLOCK)
    return torch.cat([_block(flat[i : i + _BLOCK], rule, measure) for i in starts]).reshape(head.shape)


def _block(head: Head, rule: Rule, measure: Measure) -> Float[Tensor, " N"]:
    return _coverage(head, rule.m, measure) if isinstance(rule, Coverage) else _single(head, rule, measure)


def _coverage(head: Head, m: int, measure: Measure) -> Float[Tensor, " N"]:
    """Radius of `Coverage(m)` from the m + 1 most probable tokens."""
    lse_gap = head.lse_gap.double()
    if head.vocab_size <= m:
        return torch.full_like(lse_gap, torch.inf)
    value, _ = coverage_pool(_coordinate(head.gap[..., : m + 1], measure), (-lse_gap).exp(), measure)
    if measure == "reverse":  # a competitor of probability zero wins only when the greedy token is deleted
        value = torch.where(torch.isinf(head.gap[..., m]), deletion_cost(lse_gap), value)
    return value


def _single(head: Head, rule: SingleTokenRule, measure: Measure) -> Float[Tensor, " N"]:
    """Radius of a single-token rule: two entries for most steps, more for those that accept more."""
    theta = rule.threshold(head)
    count = rule.num_accepted(head, theta)
    gap, lse_gap, vocab_size = head.gap, head.lse_gap, head.vocab_size
    if torch.compiler.is_compiling() or head.num_kept == 1:
        return _relaxed(gap, lse_gap, vocab_size, theta, count, measure)
    value = _coverage(head, 1, measure)
    rows = (count > 1).nonzero().squeeze(-1)
    lse_gap, theta, count = lse_gap[rows], theta[rows], count[rows]
    done = 1
    for width in (*(width for width in _WIDTHS if width < head.num_kept), head.num_kept):
        part = ((count > done) & (count <= width)).nonzero().squeeze(-1)
        if len(part):
            wide = gap[:, : width + 1].index_select(0, rows[part])
            found = _relaxed(wide, lse_gap[part], vocab_size, theta[part], count[part], measure)
            value = value.index_put((rows[part],), found)
        done = width
    return value


def _relaxed(
    gap: Float[Tensor, "N K"],
    lse_gap: Float[Tensor, " N"],
    vocab_size: int,
    theta: Float[Tensor, " N"],
    num_accepted: Int[Tensor, " N"],
    measure: Measure,
) -> Float[Tensor, " N"]:
    """Radius from the accepted entries of a head and the first rejected one.

    When every token of the head is accepted the best rejected one lies outside it. Its probability is at most
    the last one kept, the tail mass and the threshold. The radius falls as that probability grows, and grows
    with the accepted set, so pooling the virtual token with the accepted tokens kept gives a lower bound
    (docs/theory.md §7).
    """
    k = gap.shape[-1]
    rejected = gap.gather(-1, num_accepted.clamp_max(k - 1).unsqueeze(-1)).squeeze(-1)
    endless = theta < -HEAD_TIE  # rows of infinite radius
    unseen = num_accepted == k
    if k == vocab_size:
        endless = endless | unseen
    elif torch.compiler.is_compiling() or bool(unseen.any()):
        mass = torch.minimum(theta, tail_mass(gap, lse_gap, vocab_size) + _TAIL_SLACK).clamp_min(0.0)
        rejected = torch.where(unseen, torch.maximum(-mass.log() - lse_gap, gap[..., -1]), rejected)
    if measure == "reverse":  # no finite divergence lifts a token of probability zero
        endless = endless | torch.isinf(rejected)
    rejected = torch.where(endless, 1.0, rejected)
    x_rejected = _coordinate(rejected.unsqueeze(-1), measure)[0]
    value, _ = single_token_pool(_coordinate(gap, measure), x_rejected, (-lse_gap.double()).exp(), measure)
    return torch.where(endless, torch.inf, value)


def _coordinate(gap: Tensor, measure: Measure) -> Tensor:
    """Pooling coordinate of each gap, float64, entries first: [N, K] → [K, N]."""
    u = gap.T.to(torch.float64, memory_format=torch.contiguous_format).neg()
    return u.clamp_min(LOG_FLOOR) if measure == "reverse" else u.expm1()
