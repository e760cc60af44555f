"""Mixtures whose weights move while training goes on, e.g. from cross-entropy to a surrogate.

```yaml
loss:
  class_path: certdraft.losses.Ramp
  init_args:
    losses:
      - class_path: certdraft.losses.HardCE
      - class_path: certdraft.losses.MarginDiscountedCE
    start: [1.0, 0.0]
    stop: [0.0, 1.0]
    begin: 0.2
    end: 0.6
```
"""

from __future__ import annotations

from certdraft.losses.base import Loss
from certdraft.losses.mixture import Mixture


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
        """Moves the weights to where they are at this share of the training."""
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
