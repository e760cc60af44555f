"""Fixed weights along draft paths: what is drafted late is accepted seldom and counts less.

Axes: R rows · T tokens of a row · D draft depth · *path leading axes.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from certdraft.losses.target import OnlineTarget, TargetBatch
from certdraft.losses.weights.reduction import depth_decay
from certdraft.losses.weights.step_weights import PathWeights


class DepthWeights(PathWeights):
    """exp(−d/γ) at depth d = 0, 1, … of every path.

    *When to use.* Drafters whose training has paths of its own: an EAGLE-3 unroll (0.8^d is γ = 4.48), a
    DFlash block (γ = 7 for 16 positions, 5 for 10, 4 for 8). With a causal drafter every step has one draft
    and the weights are all one.

    Args:
        gamma: depths until the weight falls to 1/e, > 0.

    Source: arXiv 2602.06036 (blocks), 2503.01840 (0.8^d).
    """

    needs_nll = False

    def __init__(self, gamma: float = 7.0) -> None:
        super().__init__(depth=1)
        depth_decay(1, gamma)  # refuses a gamma that is not positive
        self.gamma = gamma

    def on_paths(
        self, nll: Float[Tensor, "*path D"], inside: Bool[Tensor, "*path D"]
    ) -> Float[Tensor, "*path D"]:
        """The decay, 0 outside; `nll` is not read."""
        return depth_decay(inside.shape[-1], self.gamma, inside.device).to(nll.dtype) * inside

    def forward(
        self,
        target: TargetBatch | OnlineTarget,
        loss_mask: Bool[Tensor, "R T"],
        document_ids: Int[Tensor, "R T"],
        nll: Float[Tensor, " N"] | None = None,
    ) -> Float[Tensor, " N"]:
        """One everywhere: the paths of a causal drafter have one draft."""
        return torch.ones(len(target), device=loss_mask.device)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}"
