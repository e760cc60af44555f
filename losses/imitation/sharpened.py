"""Imitation of a sharpened target: the teacher r ∝ p^a keeps the target's order and multiplies its log-gaps.

Between two losses that everybody knows: a = 1 is the forward KL, which spends capacity on tails that greedy
decoding never reads; a → ∞ is hard cross-entropy, which throws away how near the runner-up was. In between
the teacher still says who the near-ties are, and hardly anything else.
Axes: N steps · K head entries · C classes seen (V, or K + 1).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from certdraft.losses.imitation.divergence_losses import Divergence, Vocabulary, kl_nats
from certdraft.losses.target import TargetBatch


class SharpenedKL(Divergence):
    """KL(r‖q) with r = p^a / Σ p^a, nats; 0 iff q = r.

    *Where it comes from.* Any reference with the target's own order may stand in a certificate: r has the
    greedy token and the top-m of p, so KL(r‖q) < κ_m(r) proves coverage as well as KL(p‖q) < κ_m(p) does.
    Sharpening multiplies every log-gap by a, hence widens the radius, while it takes weight off the
    tokens that decide nothing: the reference is chosen to be certified easily.

    *What it bounds.* Top-m miss ⇒ loss ≥ κ_m(r), for every m at once. At an exact tie of the target κ_m(r) is
    0 whatever a is; there is nothing to be certified.

    *When to use.* Where the target's near-ties carry information that hard labels lack (little data, a small
    drafter) and decoding is greedy.

    On a head, the tail's sharpened mass is bounded from above: Σ_tail p^a ≤ p_tail · min(p_tail, p_K)^(a−1).

    Args:
        a: exponent, ≥ 1; 1 is `ForwardKL`.
        vocabulary: see `Divergence`.

    Source: theory notes §3.4 and §6.6 (references other than p), §8.3 (changed teachers).
    """

    def __init__(self, a: float = 2.0, vocabulary: Vocabulary = "auto") -> None:
        super().__init__(vocabulary)
        if not 1.0 <= a < math.inf:
            raise ValueError(f"SharpenedKL: a={a} must be finite and at least 1; at infinity use HardCE.")
        self.a = a

    def teacher(self, target: TargetBatch) -> Float[Tensor, "N C"]:
        """log r over the head and one bucket."""
        logp = target.coarse_logp
        if logp.shape[-1] > target.num_kept:
            kept, tail = logp[:, :-1], logp[:, -1:]
            bound = torch.minimum(tail, kept[:, -1:])  # no tail token exceeds the last kept one
            return torch.cat([self.a * kept, tail + (self.a - 1.0) * bound], -1).log_softmax(-1)
        return (self.a * logp).log_softmax(-1)

    def on_coarse(self, coarse_logits: Float[Tensor, "N C"], target: TargetBatch) -> Float[Tensor, " N"]:
        return kl_nats(self.teacher(target), coarse_logits.log_softmax(-1))

    def between(self, logp: Float[Tensor, "N C"], logq: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
        return kl_nats((self.a * logp).log_softmax(-1), logq)

    def extra_repr(self) -> str:
        return f"a={self.a}, {super().extra_repr()}"
