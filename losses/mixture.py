"""A weighted sum of losses, configured by class_path.

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
        views = {"full" if part.overrides_forward else part.view(target) for _, part in self.terms()}
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


class Ramp(Mixture):
    """Σ w_i(t) loss_i: weights `start` until `begin`, then linearly to `stop` at `end`; t is the share done.

    The training module reports t before every step (`Loss.at`) from the step number, so a resumed run goes on
    where it was. A part with weight 0 is not computed.

    *When to use.* A surrogate with a weak signal from scratch (`CertificateHinge`, `CoverageMargin`, a budget
    loss) after a warm-up with `HardCE`. Every bound of a part holds for its share of the sum: with
    weights w, a miss that costs part i at least b_i costs the mixture at least Σ w_i b_i.

    Args:
        losses: the parts.
        start: one weight per part at the beginning.
        stop: one weight per part at the end.
        begin: share of the training after which the weights start to move, in [0, 1].
        end: share at which they arrive, in [begin, 1].

    Raises:
        ValueError: lengths differ, a weight is negative or not finite, all are 0 together, or begin > end.
    """

    def __init__(
        self,
        losses: list[Loss],
        start: list[float],
        stop: list[float],
        begin: float = 0.0,
        end: float = 1.0,
    ) -> None:
        super().__init__(losses, start)
        Mixture(losses, stop)  # the same checks
        if not 0.0 <= begin <= end <= 1.0:
            raise ValueError(f"Ramp: begin={begin}, end={end}; need 0 <= begin <= end <= 1.")
        if not any(start) or not any(stop):
            raise ValueError(f"Ramp: start={list(start)}, stop={list(stop)}; one weight must be positive.")
        self.start, self.stop = [float(w) for w in start], [float(w) for w in stop]
        self.begin, self.end = begin, end

    def at(self, progress: float) -> None:
        """Move the weights to where they are at this share of the training."""
        super().at(progress)
        width = self.end - self.begin
        moved = (progress - self.begin) / width if width > 0.0 else float(progress >= self.end)
        moved = min(max(moved, 0.0), 1.0)
        self.weights = [(1 - moved) * a + moved * b for a, b in zip(self.start, self.stop, strict=True)]

    def __repr__(self) -> str:
        parts = (
            f"{a:g}→{b:g} {part!r}" for a, b, part in zip(self.start, self.stop, [*self.parts], strict=True)
        )
        return f"Ramp({' + '.join(parts)}, begin={self.begin:g}, end={self.end:g})"
