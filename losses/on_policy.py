"""A loss for the drafter's own draft tokens: one divergence before the first rejection, another from there.

Only `model.on_policy` writes such text (`train.on_policy`); anywhere else the loss is its `accepted` part.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from certdraft.certificates import StrictGreedy, radius
from certdraft.losses.base import Loss, View
from certdraft.losses.imitation import ForwardKL, ReverseKL
from certdraft.losses.target import OnlineTarget, TargetBatch


class OnPolicyKL(Loss):
    """KL(p‖q) where drafts were accepted, decayed KL(q‖p) from the first rejection of a round on, nats.

    At a draft token i places after the first one that the target rejected (i = 0 at that one) the loss is
    `rejected` times decay^i: verification ends there, so later tokens matter less. Everywhere else it is
    `accepted`.

    *Avoidable rejections.* A drafter within the KL radius κ of strict greedy acceptance cannot be rejected.
    Where κ is close to 0 the target itself can hardly decide, and a rejection says little about the drafter.
    `avoidable` multiplies the loss of rejected positions by min(1, κ / avoidable).

    *What it bounds.* At accepted positions what `accepted` bounds; at rejected ones nothing on coverage,
    since KL(q‖p) is not calibrated for top-m.

    *When to use.* With `model.on_policy`, for a drafter that is already trained: a fresh one is rejected at
    once.

    Args:
        accepted: loss of accepted positions and of text that the drafter did not write; KL(p‖q) when not
            given.
        rejected: loss from the first rejection on; KL(q‖p) when not given.
        decay: factor a draft token after the first rejection, in [0, 1].
        avoidable: radius, in nats, from which on a rejection counts fully; None counts all alike.

    Raises:
        ValueError: decay outside [0, 1], or `avoidable` not positive.

    Source: Draft-OPD, arXiv 2605.29343; the weight by radius is ours.
    """

    def __init__(
        self,
        accepted: Loss | None = None,
        rejected: Loss | None = None,
        decay: float = 0.8,
        avoidable: float | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"OnPolicyKL: decay={decay} must be from 0 to 1.")
        if avoidable is not None and not avoidable > 0.0:
            raise ValueError(f"OnPolicyKL: avoidable={avoidable} must be above 0, or null.")
        self.accepted, self.rejected = accepted or ForwardKL(), rejected or ReverseKL()
        self.decay, self.avoidable = decay, avoidable
        self.requires: View = "full" if "full" in (self.accepted.requires, self.rejected.requires) else "head"
        self.min_head = max(self.accepted.min_head, self.rejected.min_head, 2)

    def view(self, target: TargetBatch | OnlineTarget) -> View:
        parts = (self.accepted, self.rejected)
        views = {"full" if part.overrides_forward else part.view(target) for part in parts}
        return "head" if views == {"head"} else "full"

    def check_target(self, target: TargetBatch) -> None:
        super().check_target(target)
        for part in (self.accepted, self.rejected):
            part.check_target(target)

    def on_coarse(self, coarse_logits: Float[Tensor, "N C"], target: TargetBatch) -> Float[Tensor, " N"]:
        accepted = self.accepted.on_coarse(coarse_logits, target)
        if target.rejected is None:
            return accepted
        return self._joined(accepted, self.rejected.on_coarse(coarse_logits, target), target)

    def on_full(self, logits: Float[Tensor, "N V"], target: TargetBatch) -> Float[Tensor, " N"]:
        accepted = self.accepted(logits, target)
        if target.rejected is None:
            return accepted
        return self._joined(accepted, self.rejected(logits, target), target)

    def _joined(self, accepted: Tensor, rejected: Tensor, target: TargetBatch) -> Float[Tensor, " N"]:
        assert target.rejected is not None
        weight = torch.pow(self.decay, target.rejected.clamp(min=0))
        if self.avoidable is not None:
            weight = weight * (radius(target.head, StrictGreedy()) / self.avoidable).clamp(max=1.0)
        return torch.where(target.rejected < 0, accepted, weight.to(rejected.dtype) * rejected)

    def __repr__(self) -> str:
        avoidable = "" if self.avoidable is None else f", avoidable={self.avoidable}"
        return f"OnPolicyKL({self.accepted!r}, {self.rejected!r}, decay={self.decay}{avoidable})"
