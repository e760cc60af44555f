"""The KL radius: how far, in nats, a drafter may be from the target before rejection becomes possible.

`kl < radius` guarantees acceptance whatever the drafter is; at the radius nothing is claimed, and the
constant is the best possible. +inf means that nothing can be rejected.

Axis letters: *step leading axes · V vocabulary · K entries kept.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from certdraft.certificates.head import Head
from certdraft.certificates.pooling import (
    Direction,
    check_direction,
    coverage_level,
    pooled_kl,
    single_token_level,
)
from certdraft.certificates.rules import Coverage, Rule, SingleTokenRule


def radius(
    p: Float[Tensor, "*step V"] | Head, rule: Rule, direction: Direction = "forward"
) -> Float[Tensor, "*step"]:
    """The least KL divergence at which the rule can reject the drafter's best token.

    Forward is KL(p‖q), reverse KL(q‖p), p the target and q the drafter.
    """
    check_direction(direction)
    head = p if isinstance(p, Head) else Head.from_probs(p, p.shape[-1])
    value = _coverage(head, rule, direction) if isinstance(rule, Coverage) else _single(head, rule, direction)
    return value.to(head.lse_gap.dtype)


def _coordinate(gap: Tensor, direction: Direction) -> Tensor:
    return (-gap).expm1() if direction == "forward" else -gap


def _coverage(head: Head, rule: Coverage, direction: Direction) -> Tensor:
    m = rule.m
    if head.vocab_size <= m:
        return torch.full_like(head.lse_gap, torch.inf)
    if head.num_kept <= m:
        raise ValueError(
            f"coverage(m={m}) needs the {m + 1} most probable tokens; this head keeps K={head.num_kept}"
        )
    gap = head.gap[..., : m + 1].double()
    p0 = (-head.lse_gap.double()).exp()
    impossible = torch.isinf(gap[..., -1])
    x = _coordinate(gap.clamp_max(1e4) if direction == "reverse" else gap, direction)
    level, pooled = coverage_level(x)
    value = pooled_kl(x, pooled, level, p0, direction)
    if (
        direction == "reverse"
    ):  # a competitor of probability zero can be overtaken only by deleting the greedy token
        value = torch.where(impossible, -(-(-head.lse_gap.double()).expm1()).log(), value)
    return value


def _single(head: Head, rule: SingleTokenRule, direction: Direction) -> Tensor:
    theta = rule.threshold(head)
    accepted = rule.accepted_entries(head)
    num_accepted = accepted.sum(-1)
    k = head.num_kept
    gap = head.gap.double()
    lse_gap = head.lse_gap.double()
    p0 = (-lse_gap).exp()
    rejected = gap.gather(-1, num_accepted.clamp_max(k - 1).unsqueeze(-1)).squeeze(-1)
    everything = theta < 0
    unseen = num_accepted == k
    if k == head.vocab_size:
        everything = everything | unseen
    else:  # some rejected token outside the head, of at most this mass
        mass = torch.minimum(torch.minimum(theta.double(), head.tail_mass.double() + 2.0**-22), p0)
        virtual = (-mass.clamp_min(0.0).log() - lse_gap).clamp_min(0.0)
        rejected = torch.where(unseen, torch.maximum(virtual, gap[..., -1]), rejected)
    impossible = torch.isinf(rejected)
    floor = 1e4 if direction == "reverse" else torch.inf
    x = _coordinate(gap.clamp_max(floor), direction)
    x_rejected = _coordinate(rejected.clamp_max(floor), direction)
    level, pooled = single_token_level(x, num_accepted, x_rejected)
    both = torch.cat([x, x_rejected.unsqueeze(-1)], -1)
    pooled = torch.cat([pooled, torch.ones_like(everything).unsqueeze(-1)], -1)
    value = pooled_kl(both, pooled, level, p0, direction)
    if direction == "reverse":
        value = torch.where(impossible, torch.inf, value)
    return torch.where(everything, torch.inf, value)
