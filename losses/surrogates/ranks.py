"""Losses of a few logits: the greedy token against the competitor that decides its rank.

Their gradient is zero everywhere else, so `Chunked` needs one product with the output layer instead of three:
the gradients of hidden states and output layer are gathered and added, row by row.
Axes: N steps · V vocabulary · S logits that matter.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from certdraft.certificates import largest
from certdraft.losses.base import Loss, View
from certdraft.losses.coarse_logits import work_dtype
from certdraft.losses.target import TargetBatch


class SparseLoss(Loss):
    """Base: a subclass says which logits matter, and what the loss is given those."""

    requires: View = "picked"

    def forward(self, logits: Float[Tensor, "N V"], target: TargetBatch) -> Float[Tensor, " N"]:
        self.check(logits, target)
        picked = logits.gather(-1, self.pick(logits.detach(), target))
        return self.on_picked(picked.to(work_dtype(logits.dtype)), target)

    def pick(self, logits: Float[Tensor, "N V"], target: TargetBatch) -> Int[Tensor, "N S"]:
        """The tokens whose logits matter, given all of them; no gradient flows through the choice."""
        raise NotImplementedError

    def on_picked(self, picked: Float[Tensor, "N S"], target: TargetBatch) -> Float[Tensor, " N"]:
        """Per-step loss from the picked logits."""
        raise NotImplementedError


class CoverageMargin(SparseLoss):
    """How far the greedy token g is from leaving, or entering, the drafter's top-m.

    loss = temperature · log(1 + e^{(z_(m) − z_g + slack)/temperature}), z_(m) the m-th largest logit of the
    other tokens; its gradient moves z_g and that one competitor.

    *Where it comes from.* g is covered iff z_g > z_(m): the log-gap is the signed distance to the
    boundary of the coverage set, free of the mass there (the KL distance of theory notes §8.1 fades with it).

    *What it bounds.* A top-m miss is z_(m) ≥ z_g, hence loss ≥ temperature · log(1 + e^{slack/temperature}) ≥
    max(slack, temperature · log 2), whatever the target (sharp).

    *When to use.* To finish a drafter that is already good, where the output layer is the cost: one product
    instead of three. Not from scratch: one competitor at a time gets a signal, and its minimiser need not
    rank by probability (theory notes §8.4, not calibrated).

    Args:
        m: draft tokens proposed per step.
        slack: log-gap asked for beyond the boundary, nats, ≥ 0.
        temperature: width of the hinge, nats, > 0.

    Source: theory notes §8.1, §8.4.
    """

    def __init__(self, m: int = 4, slack: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        if m < 1 or slack < 0.0 or not temperature > 0.0:
            raise ValueError(
                f"CoverageMargin: m={m}, slack={slack}, temperature={temperature}; need m >= 1, slack >= 0 "
                "nats and temperature > 0 nats."
            )
        self.m, self.slack, self.temperature = m, slack, temperature

    def pick(self, logits: Float[Tensor, "N V"], target: TargetBatch) -> Int[Tensor, "N S"]:
        """The greedy token and the m-th strongest of the others (the weakest one when V ≤ m)."""
        kept = min(self.m + 1, logits.shape[-1])
        ids = largest(logits, kept)[1]
        ahead = (ids[:, : kept - 1] == target.greedy[:, None]).any(-1)
        rival = torch.where(ahead, ids[:, kept - 1], ids[:, max(kept - 2, 0)])
        return torch.stack([target.greedy, rival], -1)

    def on_picked(self, picked: Float[Tensor, "N S"], target: TargetBatch) -> Float[Tensor, " N"]:
        lead = picked[:, 1] - picked[:, 0] + self.slack
        return self.temperature * functional.softplus(lead / self.temperature)

    def extra_repr(self) -> str:
        return f"m={self.m}, slack={self.slack}, temperature={self.temperature}"
