"""Radii from heads: exact when the head holds the active set, and never too large when it does not.

Axis letters: *step leading axes · N steps · K entries kept.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from certdraft.certificates.divergences import kl_divergence_logp
from certdraft.certificates.head import Head, tail_mass
from certdraft.certificates.pooling import (
    LOG_FLOOR,
    Direction,
    Measure,
    check_direction,
    coverage_pool,
    deletion_cost,
    divergence,
    single_token_pool,
)
from certdraft.certificates.rules import HEAD_TIE, Coverage, Rule, SingleTokenRule, StrictGreedy, TopM

_TAIL_SLACK = 2.0**-20  # a tail mass rebuilt from float32 logarithms may be this much too small
_NEAR = 8  # most steps accept fewer tokens: one cache line of the head settles them
_POOL = 4  # nearly every pool has fewer accepted tokens
_BLOCK = 65536  # steps at a time: fewer waste time on calls, more on memory


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
    value, _ = coverage_pool(_coordinate(head.gap[..., : m + 1], measure), lse_gap, measure)
    if measure == "reverse":  # a competitor of probability zero wins only when the greedy token is deleted
        value = torch.where(torch.isinf(head.gap[..., m]), deletion_cost(lse_gap), value)
    return value


def _single(head: Head, rule: SingleTokenRule, measure: Measure) -> Float[Tensor, " N"]:
    """Radius of a single-token rule: most steps accept few tokens, only the others are looked at in full."""
    if torch.compiler.is_compiling() or head.num_kept <= _NEAR:
        return _whole(head, rule, rule.threshold(head), measure)
    near = Head(
        head.ids[:, :_NEAR], head.gap[:, :_NEAR].contiguous(), head.lse_gap, head.vocab_size, head.entropy
    )
    theta = rule.threshold(head if isinstance(rule, TopM) and rule.m > _NEAR else near)
    count = rule.num_accepted(near, theta)
    rejected = near.gap.gather(-1, count.clamp_max(_NEAR - 1).unsqueeze(-1)).squeeze(-1)
    endless = torch.isinf(rejected) if measure == "reverse" else None
    value = _pooled(near.gap, head.lse_gap, rejected, endless, measure)
    rows = (count == _NEAR).nonzero().squeeze(-1)
    if not len(rows):
        return value
    ids = head.ids[:1].expand(len(rows), -1)  # never read, and copying them would cost the most
    far = Head(ids, head.gap.index_select(0, rows), head.lse_gap[rows], head.vocab_size)
    return value.index_put((rows,), _whole(far, rule, theta[rows], measure))


def _whole(
    head: Head, rule: SingleTokenRule, theta: Float[Tensor, " N"], measure: Measure
) -> Float[Tensor, " N"]:
    """Radius from all that the head keeps.

    When every token of the head is accepted the best rejected one is outside it. Its probability is at most
    the last one kept, the tail mass and the threshold. The radius falls as that probability grows, and grows
    with the accepted set, so pooling the virtual token with the accepted tokens kept gives a lower bound
    (docs/theory.md §7).
    """
    gap, lse_gap, k = head.gap, head.lse_gap, head.num_kept
    count = rule.num_accepted(head, theta)
    rejected = gap.gather(-1, count.clamp_max(k - 1).unsqueeze(-1)).squeeze(-1)
    endless = theta < -HEAD_TIE
    unseen = count == k
    if k == head.vocab_size:
        endless = endless | unseen
    elif torch.compiler.is_compiling():
        rejected = torch.where(unseen, _virtual(gap, lse_gap, head.vocab_size, theta), rejected)
    elif len(rows := unseen.nonzero().squeeze(-1)):
        made_up = _virtual(gap[rows], lse_gap[rows], head.vocab_size, theta[rows])
        rejected = rejected.index_put((rows,), made_up)
    if measure == "reverse":  # no finite divergence lifts a token of probability zero
        endless = endless | torch.isinf(rejected)
    return _pooled(gap, lse_gap, rejected, endless, measure)


def _virtual(
    gap: Float[Tensor, "N K"], lse_gap: Float[Tensor, " N"], vocab_size: int, theta: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """Gap of the most probable token there can be outside the head without being accepted."""
    mass = torch.minimum(theta, tail_mass(gap, lse_gap, vocab_size) + _TAIL_SLACK).clamp_min(0.0)
    return torch.maximum(-mass.log() - lse_gap, gap[..., -1])


def _pooled(
    gap: Float[Tensor, "N K"],
    lse_gap: Float[Tensor, " N"],
    rejected: Float[Tensor, " N"],
    endless: Bool[Tensor, " N"] | None,
    measure: Measure,
) -> Float[Tensor, " N"]:
    """Radius from the gap of the best rejected token; +inf on the rows named endless.

    At the radius that token shares its probability with the accepted tokens above their common level. Mostly
    this is the greedy token alone, however many are accepted; only where the next one kept lies above the
    level of the pool so far, the pool is looked for among more of them.
    """
    if endless is not None:
        rejected = rejected.masked_fill(endless, 0.0)
    x_rejected = _coordinate(rejected.unsqueeze(-1), measure)[0]
    lse_gap = lse_gap.double()
    if torch.compiler.is_compiling():
        value, _ = single_token_pool(_coordinate(gap, measure), x_rejected, lse_gap, measure)
    else:
        value, level = _pair(rejected, x_rejected, lse_gap, measure)
        rows, done = None, 1
        for width in (_POOL, gap.shape[-1]):
            if done >= gap.shape[-1]:
                break
            following = gap[:, done] if rows is None else gap[rows, done]
            more = (following < level).nonzero().squeeze(-1)
            if not len(more):
                break
            rows = more if rows is None else rows[more]
            wide = _coordinate(gap[:, :width].index_select(0, rows), measure)
            found, x_level = single_token_pool(wide, x_rejected[rows], lse_gap[rows], measure)
            level = -x_level if measure == "reverse" else -x_level.log1p()
            value = value.index_put((rows,), found)
            done = width
    return value if endless is None else value.masked_fill(endless, torch.inf)


def _pair(
    rejected: Float[Tensor, " N"],
    x_rejected: Float[Tensor, " N"],
    lse_gap: Float[Tensor, " N"],
    measure: Measure,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Radius of the greedy token and a rejected one, and their level as a gap."""
    level = 0.5 * x_rejected
    if measure == "reverse":
        return divergence(level.unsqueeze(0), -level, level, lse_gap, measure), -level.detach()
    log_level, p0 = level.log1p(), (-lse_gap).exp()
    if measure == "tv":
        return p0 * -level, -log_level
    share, gap = 1 + x_rejected, rejected.double().clamp_max(-LOG_FLOOR)
    return -(p0 * ((1 + share) * log_level + share * gap)).clamp_max(0.0), -log_level.detach()


def _coordinate(gap: Tensor, measure: Measure) -> Tensor:
    """Pooling coordinate of each gap, float64, entries first: [N, K] → [K, N]."""
    u = gap.T.to(torch.float64, memory_format=torch.contiguous_format).neg()
    return u.clamp_min(LOG_FLOOR) if measure == "reverse" else u.expm1()


def coarse_kl(
    head: Head, logq: Float[Tensor, "*step V"], direction: Direction = "forward"
) -> Float[Tensor, "*step"]:
    """Divergence between target and drafter with everything outside the head lumped into one bucket.

    Stored gaps may be rounded to float16, and the probabilities then add up to S ≠ 1. The forward value is
    S·KL(p/S‖q), to be compared with the radius of p, which is S times that of p/S; the reverse value is
    KL(q‖p/S). `coarse_radius` follows the same convention.

    Args:
        head: target head.
        logq: natural log-probabilities of the drafter over the whole vocabulary.
        direction: "forward" for KL(p‖q), "reverse" for KL(q‖p).

    Returns:
        Nats, in [0, +inf], differentiable in logq; at most the full divergence, and equal to it when the head
        is the whole vocabulary.

    Source: docs/theory.md §7.

    Examples:
        >>> import torch
        >>> p = torch.tensor([0.7, 0.2, 0.1])
        >>> float(coarse_kl(Head.from_probs(p, 2), p.log())) < 1e-6
        True
    """
    check_direction(direction)
    _check_vocabulary(head, logq)
    lse_gap = _scaled_lse_gap(head)
    drafter = logq.gather(-1, head.ids).double()
    target = -head.gap.double() - lse_gap.unsqueeze(-1)
    excess = lse_gap - head.lse_gap.double()  # log S
    if head.num_kept < head.vocab_size:
        # summed over the tail itself: 1 minus the head would leave only rounding of a small tail
        outside = logq.scatter(-1, head.ids, -torch.inf).logsumexp(-1, keepdim=True)
        drafter = torch.cat([drafter, outside.double()], dim=-1)
        target = torch.cat([target, (head.tail_mass.double().log() - excess).unsqueeze(-1)], dim=-1)
    if direction == "forward":
        return (excess.exp() * kl_divergence_logp(target, drafter)).to(logq.dtype)
    return kl_divergence_logp(drafter, target).to(logq.dtype)


def num_tail_above(head: Head, logq: Float[Tensor, "*step V"]) -> Int[Tensor, "*step"]:
    """Number of tokens outside the head that the drafter ranks level with or above the greedy token.

    Args:
        head: target head.
        logq: scores of the drafter over the whole vocabulary; only their order matters.
    """
    _check_vocabulary(head, logq)
    above = logq >= logq.gather(-1, head.greedy.unsqueeze(-1))
    return above.sum(-1) - above.gather(-1, head.ids).sum(-1)


def coarse_radius(
    head: Head,
    m: int,
    direction: Direction = "forward",
    *,
    tail_above: Int[Tensor, "*step"] | None = None,
) -> Float[Tensor, "*step"]:
    """The least coarse divergence at which the greedy token may be missing from the drafter's top-m.

    `coarse_kl(head, logq) < coarse_radius(head, m)` guarantees coverage, and no larger constant does. Without
    `tail_above` it is smaller than the radius of the full divergence. With `tail_above = num_tail_above(head,
    logq)` the number of rivals in the drafter's tail is known; for none, the usual case, the coarse radius is
    the full one, and since the coarse divergence is the smaller one, this test certifies more than the full
    divergence does.

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

    Source: docs/theory.md §7.
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
        share = head.tail_mass.double().log() + lse_gap - math.log(n)
        u = torch.cat([u, share.unsqueeze(-1).expand(*share.shape, n)], dim=-1)
        # rivals as probable as the greedy token together pool at or above it: nothing is guaranteed
        u = torch.cat([u[..., :1], u[..., 1:].sort(-1, descending=True).values], dim=-1)
    missing, u = torch.isinf(u[..., -1]), u.movedim(-1, 0)
    if direction == "forward":
        value, level = coverage_pool(u.expm1(), lse_gap, direction)
    else:
        lse_gap = _scaled_lse_gap(head)
        value, level = coverage_pool(u.clamp_min(LOG_FLOOR), lse_gap, direction)
        value = torch.where(missing, deletion_cost(lse_gap), value)
    return torch.where(level >= 0, 0.0, value)


def _scaled_lse_gap(head: Head) -> Float[Tensor, "*step"]:
    """−log p(x0), float64, once the probabilities of the head and its tail are scaled to add up to 1."""
    kept = (-head.gap[..., 1:].double()).exp().sum(-1)
    return (kept + head.tail_mass.double() * head.lse_gap.double().exp()).log1p()


def _check_vocabulary(head: Head, logq: Tensor) -> None:
    if logq.shape[-1] != head.vocab_size:
        raise ValueError(
            f"the drafter scores {logq.shape[-1]} tokens and the head was cut from {head.vocab_size}"
        )
