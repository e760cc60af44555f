"""A weighted sum of losses, so that a configuration can say 0.5 CE + 0.5 KL by class_path.

```yaml
loss:
  class_path: certdraft.losses.Mixture
  init_args:
    losses:
      - class_path: certdraft.losses.HardCE
      - class_path: certdraft.losses.ForwardKL
    weights: [0.5, 0.5]
```
"""

from __future__ import annotations

import math
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from certdraft.losses.base import Loss, View
from certdraft.losses.target import OnlineTarget, TargetBatch


class Mixture(Loss):
    """Σ w_i loss_i, per step. Parts that all see the head share one pass over the vocabulary.

    Args:
        losses: the parts, at least one.
        weights: one nonnegative number per part; they need not sum to one.

    Raises:
        ValueError: lengths differ, or a weight is negative, infinite or NaN.
    """

    def __init__(self, losses: list[Loss], weights: list[float]) -> None:
        super().__init__()
        if not losses or len(losses) != len(weights):
            raise ValueError(
                f"Mixture: {len(losses)} losses and {len(weights)} weights; give one weight per loss."
            )
        if not all(math.isfinite(w) and w >= 0.0 for w in weights):
            raise ValueError(f"Mixture: weights={list(weights)}; each must be finite and nonnegative.")
        self.losses = nn.ModuleList(losses)
        self.weights = [float(w) for w in weights]
        self.requires: View = "full" if any(part.requires == "full" for part in losses) else "head"
        self.min_head = max(part.min_head for part in losses)

    @property
    def parts(self) -> list[Loss]:
        """The losses, typed."""
        return [cast(Loss, part) for part in self.losses]

    def view(self, target: TargetBatch | OnlineTarget) -> View:
        views = {part.view(target) for _, part in self.terms()}
        return views.pop() if views in ({"head"}, {"token"}) else "full"

    def check_target(self, target: TargetBatch) -> None:
        for part in self.parts:
            part.check_target(target)

    def terms(self) -> list[tuple[float, Loss]]:
        """Weights and parts that are not switched off by a weight of 0; all of them if all are."""
        pairs = list(zip(self.weights, self.parts, strict=True))
        return [pair for pair in pairs if pair[0] > 0.0] or pairs

    def on_coarse(self, coarse_logits: Float[Tensor, "N C"], target: TargetBatch) -> Float[Tensor, " N"]:
        return _add([weight * part.on_coarse(coarse_logits, target) for weight, part in self.terms()])

    def on_full(self, logits: Float[Tensor, "N V"], target: TargetBatch) -> Float[Tensor, " N"]:
        return _add([weight * part(logits, target) for weight, part in self.terms()])

    def __repr__(self) -> str:
        return (
            "Mixture("
            + " + ".join(f"{w:g} {part!r}" for w, part in zip(self.weights, self.parts, strict=True))
            + ")"
        )


def _add(values: list[Tensor]) -> Float[Tensor, " N"]:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total
