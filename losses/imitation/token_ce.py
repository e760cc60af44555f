"""Cross-entropy on the token that stands in the data: the label most peers train block drafters with.

Its label is not what a greedy verifier compares with, unless the data are the target's own greedy text.
Axes: N steps · C coarse classes.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from certdraft.losses.base import Loss, View
from certdraft.losses.target import TargetBatch


class TokenCE(Loss):
    """−log q(y), y the next token in the data; 0 where the data end (`next_ids` = −1), nats.

    What SpecForge and DeepSpec call hard CE for DFlash and DSpark. `HardCE` has the target's argmax as its
    label instead, which is what a greedy verifier asks for; on a trace of the target's own greedy text the
    two are the same loss.

    *What it bounds.* y is outside the drafter's top-m ⇒ loss ≥ log(m + 1). That says something about
    acceptance only where y is the greedy token.

    *When to use.* To reproduce peers' numbers, or when no target was ever run over the data.
    """

    requires: View = "token"

    def on_coarse(self, coarse_logits: Float[Tensor, "N C"], target: TargetBatch) -> Float[Tensor, " N"]:
        assert target.next_ids is not None
        rivals = (coarse_logits[:, 1:] - coarse_logits[:, :1]).logsumexp(-1)
        return torch.where(target.next_ids >= 0, torch.logaddexp(rivals, rivals.new_zeros(())), 0.0)
