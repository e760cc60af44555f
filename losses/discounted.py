"""Discounted cross-entropies: the greedy token g must beat every competitor, some of them less than others.

    loss = log(1 + Σ_{j≠g} w_j e^{z_j − z_g}),    w_j in [0, 1],    gradient = softmax(z + log w) − e_g

At near-ties of the target, hard cross-entropy spends the capacity of a small drafter on pushing g over a
runner-up that the target can hardly tell from g. A discount w_j < 1 requires less, at a known price:

**What every member bounds.** If g is not in the drafter's top-m (ties count against it), m competitors have
z_j ≥ z_g, hence loss ≥ log(1 + Σ of the m smallest weights) =: `miss_floor`. So loss < miss_floor means
covered, and 1[miss] ≤ loss / miss_floor, whatever the target's margin. The floor is attained (m tokens tie
with g, no others), so no larger constant is true. The weights below grow with rank, so the m smallest are
those of the target's ranks 2..m+1.

Only the K head tokens are discounted; the rest of the vocabulary has weight 1.
Axes: N steps · K head entries · C coarse classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from certdraft.certificates import coverage_level
from certdraft.losses.base import Loss
from certdraft.losses.candidates import Candidates
from certdraft.losses.coarse_logits import NEVER
from certdraft.losses.target import TargetBatch


class DiscountedCE(Loss):
    """Base: a subclass defines the weight of each top-k token as a competitor."""

    def discount(self, target: TargetBatch) -> Float[Tensor, "N K"]:
        """Weights in [0, 1] of the head tokens, nondecreasing over columns 1..; column 0 (g) is not used."""
        raise NotImplementedError

    def on_coarse(self, coarse_logits: Float[Tensor, "N C"], target: TargetBatch) -> Float[Tensor, " N"]:
        kept = target.num_kept
        weight = self.discount(target)[:, 1:].to(coarse_logits.dtype)
        rivals = coarse_logits - coarse_logits[:, :1]
        # Weight 0 becomes a finite logit: with −inf, a step whose rivals are all forgiven has gradient nan.
        discounted = rivals[:, 1:kept] + weight.log().clamp(min=NEVER)
        pressure = torch.cat([discounted, rivals[:, kept:]], -1).logsumexp(-1)
        return torch.logaddexp(pressure, pressure.new_zeros(()))

    def miss_floor(self, target: TargetBatch, m: int) -> Float[Tensor, " N"]:
        """The smallest loss a step can have when g is outside the drafter's top-m.

        Args:
            target: the target at the steps.
            m: draft tokens proposed per step; need not be the m of the loss.

        Returns:
            Nats, in [0, log(m + 1)]; +inf when V ≤ m. Loss below it is a proof of coverage.
        """
        if target.vocab_size <= m:
            return torch.full_like(target.head.lse_gap, torch.inf)
        self.check_target(target)
        weight = self.discount(target)[:, 1 : m + 1]
        unseen = m - weight.shape[-1]
        return torch.log1p(weight.sum(-1) + unseen)


def _check_floor(name: str, floor: float) -> float:
    if not 0.0 <= floor <= 1.0:
        raise ValueError(f"{name}: floor={floor} is not in [0, 1]; it is the least weight of a competitor.")
    return floor


class MarginDiscountedCE(DiscountedCE):
    """Cross-entropy that forgives each competitor by how close the target puts it to g, nats.

    w_j = max(floor, 1 − (p_j/p_g)^a). A tie is forgiven down to the floor, a clear loser not at all; no m.

    *Where it comes from.* The multiplicative rule accepts j iff p_j > α p_g. With a = 1, w_j is the share of
    all α in (0, 1) that reject j: a competitor counts for as many rules as would refuse it. a > 1 leans to
    strict rules (forgives only near-ties), a < 1 to lax ones.

    *What it bounds.* Top-m miss ⇒ loss ≥ log(1 + Σ_{i=2..m+1} w_i), for every m; with a = 1 and no floor
    that is log(1 + (m+1)(1 − c̄/p_g)), c̄ the mean of the m + 1 largest probabilities.

    *When to use.* Chains and best-first trees, where the drafter must stay calibrated for "this is the greedy
    token".

    Args:
        a: exponent, > 0.
        floor: least weight, so that exact ties still count.

    Source: theory notes §1 (multiplicative rule).
    """

    min_head = 2

    def __init__(self, a: float = 1.0, floor: float = 0.02) -> None:
        super().__init__()
        if not a > 0.0:
            raise ValueError(f"MarginDiscountedCE: a={a} is not positive.")
        self.a, self.floor = a, _check_floor("MarginDiscountedCE", floor)

    def discount(self, target: TargetBatch) -> Float[Tensor, "N K"]:
        """1 − (p_j/p_g)^a, floored."""
        return (-(-self.a * target.head.gap).expm1()).clamp(min=self.floor)

    def extra_repr(self) -> str:
        return f"a={self.a}, floor={self.floor}"


class PoolDiscountedCE(DiscountedCE):
    """Cross-entropy with the weights of the top-m coverage certificate, nats.

    w_j = max(floor, 1 − p_j/c), c the level of the certificate's pool for this m. The at most m − 1
    competitors with p_j ≥ c are the ones the certificate leaves free, and weigh only the floor.

    *Where it comes from.* The radius is min KL(p‖q) subject to q_j ≥ q_g for the m strongest competitors. Its
    optimum has q = c on the pool, and the multiplier (shadow price) of constraint j is 1 − p_j/c inside the
    pool and 0 for the free competitors: each competitor weighs what it costs the certificate.

    *What it bounds.* The multipliers of the pool add up to p_g/c − 1, so with floor = 0 a top-m miss ⇒
    loss ≥ log(p_g/c): the log-factor by which the cheapest failing drafter has to lower g. A positive floor
    only raises this (`miss_floor` gives the exact number).

    *When to use.* Fixed m-wide draft sets and m-ary trees. For chains and best-first trees prefer
    `MarginDiscountedCE`: with a fixed m this loss stops ordering the free competitors.

    Args:
        m: draft tokens proposed per step, or a list of them by draft depth (`Candidates`).
        floor: least weight.

    Source: theory notes §2 (KKT multipliers of the master theorem), §5.
    """

    def __init__(self, m: int | Sequence[int] = 4, floor: float = 0.02) -> None:
        super().__init__()
        self.m, self.floor = Candidates("PoolDiscountedCE", m), _check_floor("PoolDiscountedCE", floor)
        self.min_head = self.m.most + 1

    def discount(self, target: TargetBatch) -> Float[Tensor, "N K"]:
        """1 − p_j/c, floored; (c − p_j)/c in units of p_g, without cancellation."""
        excess = (-target.head.gap.double()).expm1()
        levels = torch.stack([coverage_level(excess[:, 1 : m + 1].T) for m in self.m.sizes], -1)
        level = levels.clamp(max=0.0).gather(-1, self.m.index(target)[:, None])
        return ((level - excess) / (1 + level)).clamp(min=self.floor).to(target.head.gap.dtype)

    def extra_repr(self) -> str:
        return f"m={self.m}, floor={self.floor}"


class RunnerUpForgivingCE(DiscountedCE):
    """Cross-entropy without the target's own ranks 2..m: −log q_g + log(1 − Σ_{ranks 2..m} q_j), nats.

    *Where it comes from.* If g beats everything outside the target's top-m, then g is in the drafter's top-m:
    only m − 1 tokens are left that could be ahead. Those may be ordered as they like.

    *What it bounds.* A top-m miss puts some token from outside the target's top-m level with g or above it,
    so loss ≥ log 2 on every top-m miss, at any margin (sharp). Convex in the logits; needs only m target ids.

    *When to use.* When only coverage by a fixed m-wide set counts: it gives up the order inside the set,
    hence top-1 and chain acceptance. `PoolDiscountedCE` gives up less for the same coverage.

    Args:
        m: draft tokens proposed per step, or a list of them by draft depth (`Candidates`); m = 1 is `HardCE`.

    Source: this project; the event is that of theory notes §5.
    """

    def __init__(self, m: int | Sequence[int] = 4) -> None:
        super().__init__()
        self.m = Candidates("RunnerUpForgivingCE", m)
        self.min_head = self.m.most

    def discount(self, target: TargetBatch) -> Float[Tensor, "N K"]:
        """0 for the target's ranks 2..m, 1 below."""
        rank = torch.arange(target.num_kept, device=target.head.gap.device)
        return (rank >= self.m.at(target)[:, None]).to(target.head.gap.dtype)

    def extra_repr(self) -> str:
        return f"m={self.m}"
