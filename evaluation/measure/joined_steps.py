"""Target and drafter distributions at the same steps, from which all acceptance numbers are computed.

The target is either recomputed (full distribution, exact KL) or known by the K recorded tokens of the trace.
Then the divergence of the coarsened distributions (K tokens and the rest) is a lower bound of KL; together
with the drafter's tail, which is known, it certifies soundly, sometimes more than the full KL does.

Axis letters: N steps · V vocabulary · K head entries. All divergences are KL(target‖drafter), nats, float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from certdraft.certificates import Coverage, Head, Rule, coarse_kl, kl_divergence_logp, margin, radius

_ROUNDING = 1 - 1e-9  # float64 does not resolve divergences closer to the radius; these are not certified
_HEAD_ONLINE = 64  # tokens of a recomputed head: certificates are exact for all steps but the flattest


@dataclass(frozen=True)
class JoinedSteps:
    """Both models at N steps.

    Attributes:
        head: the target's most probable tokens.
        logq: the drafter's log-probabilities, [N, V], float64.
        logp: the target's log-probabilities, [N, V], float64; None when only the head is known.
        kl: exact KL when `logp` is given, else the coarsened divergence, ≤ KL.
        token: the drafter's first choice (lowest id at a tie).
        rank: of the target's greedy token under the drafter, 1 = first choice; ties count against it.
    """

    head: Head
    logq: Float[Tensor, "N V"]
    logp: Float[Tensor, "N V"] | None
    kl: Float[Tensor, " N"] = field(init=False)
    token: Int[Tensor, " N"] = field(init=False)
    rank: Int[Tensor, " N"] = field(init=False)
    above_in_tail: Int[Tensor, " N"] = field(init=False)

    def __post_init__(self) -> None:
        own = self.logq.gather(-1, self.head.greedy.unsqueeze(-1))
        above = self.logq >= own
        kl = (
            coarse_kl(self.head, self.logq) if self.logp is None else kl_divergence_logp(self.logp, self.logq)
        )
        values = {
            "kl": kl,
            "token": self.logq.argmax(-1),
            "rank": above.sum(-1),
            "above_in_tail": above.sum(-1) - above.gather(-1, self.head.ids).sum(-1),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_logits(
        cls,
        drafter: Float[Tensor, "N V"],
        target: Float[Tensor, "N V"] | Head,
    ) -> JoinedSteps:
        """Join the drafter's logits with the target's logits (exact) or its head.

        Raises:
            ValueError: vocabularies differ, or the drafter's logits hold NaN; the step is named.
        """
        vocab_size = target.vocab_size if isinstance(target, Head) else target.shape[-1]
        if drafter.shape[-1] != vocab_size:
            raise ValueError(
                f"the drafter has {drafter.shape[-1]} logits a step, the target {vocab_size}: they do not "
                "share a vocabulary, so their tokens cannot be compared; evaluate the drafter on a trace of "
                "its own target"
            )
        bad = torch.isnan(drafter).any(-1)
        if bool(bad.any()):
            raise ValueError(f"the drafter's logits hold NaN at step {int(bad.nonzero()[0])} of {len(bad)}")
        logq = drafter.double().log_softmax(-1)
        if isinstance(target, Head):
            return cls(_in_double(target), logq, None)
        head = Head.from_logits(target.double(), min(_HEAD_ONLINE, vocab_size))
        return cls(head, logq, target.double().log_softmax(-1))

    @property
    def margin(self) -> Float[Tensor, " N"]:
        """p(x0) − p(x1) of the target."""
        return margin(self.head)

    @property
    def confidence(self) -> Float[Tensor, " N"]:
        """The drafter's probability of its own first choice."""
        return self.logq.amax(-1).exp()

    @property
    def target_gap(self) -> Float[Tensor, " N"]:
        """Nats by which the target prefers its greedy token to the drafter's choice; +inf when not known."""
        if self.logp is not None:
            return self.logp.amax(-1) - self.logp.gather(-1, self.token.unsqueeze(-1)).squeeze(-1)
        held = self.head.ids == self.token.unsqueeze(-1)
        return torch.where(held, self.head.gap, torch.inf).amin(-1)

    def certified(self, rule: Rule) -> tuple[Bool[Tensor, " N"], Float[Tensor, " N"]]:
        """Return where the divergence alone guarantees acceptance, and the radius it is compared with.

        Recomputed target: KL < radius. Recorded head: a drafter that fails must rank a rejected token first.
        If its first choice is in the head, only failures within the head remain, and the coarsened divergence
        is compared with their radius. For coverage the number n of tokens outside the head at or above the
        greedy one is known, and the radius is that of failures with exactly those.

        Source: THEORY "Truncated target caches", with the tail maximum observed.
        """
        if self.logp is not None:
            bound = radius(self.head, rule)
            return self.kl < bound * _ROUNDING, bound
        if isinstance(rule, Coverage):
            bound = _tail_checked_radius(self.head, rule, self.above_in_tail)
            return self.kl < bound * _ROUNDING, bound
        bound = radius(self.head, rule)
        seen = (self.head.ids == self.token.unsqueeze(-1)).any(-1)
        return seen & (self.kl < bound * _ROUNDING), bound

    def accepted(self, rule: Rule) -> tuple[Bool[Tensor, " N"], Bool[Tensor, " N"]]:
        """Return where the rule accepts the drafter's choice (False where unknown), and where the recorded
        head is too short to tell."""
        unknown = torch.zeros_like(self.token, dtype=torch.bool)
        if isinstance(rule, Coverage):
            return self.rank <= rule.m, unknown
        if self.logp is not None:
            return rule.accepts(self.logp.exp(), self.token), unknown
        accepted = rule.accepts(self.head, self.token)
        seen = (self.head.ids == self.token.unsqueeze(-1)).any(-1)
        least = self.head.p[..., -1]
        return accepted, ~seen & ~accepted & (least > rule.threshold(self.head))


def _in_double(head: Head) -> Head:
    """The same head in float64, so that divergence and radius are computed from the same numbers."""
    entropy = None if head.entropy is None else head.entropy.double()
    return Head(head.ids, head.gap.double(), head.lse_gap.double(), head.vocab_size, entropy)


def _tail_checked_radius(head: Head, rule: Coverage, unseen: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Coverage radius over drafters that fail with exactly n unseen tokens at or above the greedy one.

    The tail's mass ρ is spread over n virtual tokens, which join the m − n best kept competitors; 0 where the
    rest is no longer below the greedy token, and for n ≥ m, where nothing is left to certify.
    """
    m = rule.m
    bound = torch.zeros(head.shape, dtype=torch.float64, device=head.device)
    clean = unseen == 0
    if bool(clean.any()):
        bound[clean] = radius(head[clean], rule)
    for n in range(1, m):
        rows = unseen == n
        if not bool(rows.any()):
            continue
        part = head[rows]
        virtual = -(part.tail_mass / n).log() - part.lse_gap  # gap of a tail token to x0
        gaps = torch.cat([part.gap[:, : m - n + 1], virtual.clamp_min(0.0).unsqueeze(-1).expand(-1, n)], -1)
        gaps, order = gaps.sort(dim=-1, stable=True)
        made = Head(order, gaps, part.lse_gap, part.vocab_size)
        bound[rows] = torch.where(virtual > 0, radius(made, rule), 0.0)
    return bound
