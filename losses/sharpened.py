"""Forward KL from the target sharpened by an exponent, which is fixed or follows the drafter's error.

Axes: N steps · V vocabulary · K head entries · C classes seen (V, or K + 1).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from certdraft.losses.coarse_logits import ABSENT
from certdraft.losses.imitation import Divergence, Vocabulary, kl_nats
from certdraft.losses.target import TargetBatch


class SharpenedKL(Divergence):
    """KL(r‖q) with r = p^a / Σ p^a, nats; 0 iff q = r.

    *Where it comes from.* Any reference with the target's own order may stand in a certificate: r has the
    greedy token and the top-m of p, so KL(r‖q) < κ_m(r) proves coverage as well as KL(p‖q) < κ_m(p) does.
    Sharpening multiplies every log-gap by a, hence widens the radius, while it takes weight off the
    tokens that decide nothing: the reference is chosen to be certified easily.

    *What it bounds.* Top-m miss ⇒ loss ≥ κ_m(r), for every m at once, where r is known on the whole
    vocabulary. On a head the divergence is that of the coarsening, and so is the bound: `coarse_radius` of r,
    which a token of the tail can make 0. At an exact tie of the target it is 0 whatever a is.

    *When to use.* Where the target's near-ties carry information that hard labels lack (little data, a small
    drafter) and decoding is greedy.

    On a head, the tail's sharpened mass is bounded from above: Σ_tail p^a ≤ p_tail · min(p_tail, p_K)^(a−1).

    Args:
        a: exponent, ≥ 1; 1 is `ForwardKL`.
        vocabulary: see `Divergence`.
        stop: exponent at the end of the training, reached linearly from `a`; constant when not given.

    Source: theory notes §3.4 and §6.6 (references other than p), §8.3 (changed teachers).
    """

    def __init__(self, a: float = 2.0, vocabulary: Vocabulary = "auto", stop: float | None = None) -> None:
        super().__init__(vocabulary)
        for name, value in (("a", a), ("stop", a if stop is None else stop)):
            if not 1.0 <= value < math.inf:
                raise ValueError(
                    f"SharpenedKL: {name}={value} must be finite and at least 1; at infinity use HardCE."
                )
        self.a: float | Tensor = a
        self.start, self.stop = a, stop

    def at(self, progress: float) -> None:
        """Move the exponent to where it is at this share of the training."""
        super().at(progress)
        if self.stop is not None:
            self.a = self.start + (self.stop - self.start) * progress

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
        ramp = "" if self.stop is None else f"stop={self.stop}, "
        return f"a={self.start}, {ramp}{super().extra_repr()}"


Noise = Literal["gumbel", "gaussian"]
_LOGISTIC = math.pi / math.sqrt(3.0)  # standard deviation of the difference of two Gumbel variables


def argmax_under_noise(gap: Float[Tensor, "N K"], sigma: float | Float[Tensor, ""]) -> Float[Tensor, "N K"]:
    """Return log P(argmax over the K tokens of z + σ·ε is v), ε independent standard normal, nats.

    The density of the winning value is integrated on a grid; a trapezoid sum converges exponentially here.

    Args:
        gap: z_1 − z_v ≥ 0, log-gaps to the greedy token, nats.
        sigma: σ > 0, nats.
    """
    spread = gap / sigma
    grid = torch.arange(-8.0, 8.01, 0.25, device=gap.device, dtype=gap.dtype)
    value = grid + spread[..., None]  # [N, K, Q], of the noise of v when the greedy token's noise is the grid
    below = torch.special.log_ndtr(value)
    density = below.sum(-2, keepdim=True) - below - 0.5 * value.square()
    return density.logsumexp(-1).log_softmax(-1)


class AdaptiveSharpenedKL(SharpenedKL):
    """KL(r‖q), r the target sharpened as far as the error of the drafter's own logits allows, nats.

    *Where it comes from.* A best-first tree spends its nodes by the drafter's probabilities, so q(v) should
    be the chance that v is the target's greedy token, given what the drafter can know. Suppose it knows the
    target's logits z up to an error: then the right q is the law of argmax(z + σ·noise). With Gumbel noise
    of scale σ that law is softmax(z / σ), the target sharpened by a = 1/σ. The difference of two such noises
    is logistic, with standard deviation s = σ π / √3, so a = π / (√3 s). With Gaussian noise σ = s / √2, and
    the law is a multinomial probit (`argmax_under_noise`).

    s is measured: the root mean square of drafter minus target log-gaps to the greedy token over the head,
    each token weighted by its target probability. A drafter trained on labels sharpened by a has gaps a times
    as wide, so they are divided by the present a first. Labels are soft while the drafter is poor and harden
    as it becomes able; there is no schedule to tune.

    The running mean of s² over optimiser steps is part of checkpoints and does not depend on the chunk size.

    *What it bounds.* As `SharpenedKL` with the present labels: both noises keep the target's order.

    *When to use.* In place of `SharpenedKL` where no exponent was tuned.

    Args:
        most: largest exponent, > 1; the smallest is 1.
        decay: weight of the running mean against one training step, in [0, 1).
        vocabulary: see `Divergence`.
        noise: "gumbel" or "gaussian"; the second sees the K head tokens alone and leaves the tail its mass.

    Source: docs/theory.md, "The greedy event under the drafter's noise"; the argument is ours.
    """

    error: Float[Tensor, " 2"]

    def __init__(
        self, most: float = 8.0, decay: float = 0.98, vocabulary: Vocabulary = "auto", noise: Noise = "gumbel"
    ) -> None:
        if noise == "gaussian":
            if vocabulary == "full":
                raise ValueError(
                    "AdaptiveSharpenedKL: noise=gaussian works on the head; leave vocabulary out."
                )
            vocabulary = "head"
        super().__init__(1.0, vocabulary)
        if not 1.0 < most < math.inf:
            raise ValueError(f"AdaptiveSharpenedKL: most={most} must be finite and above 1.")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"AdaptiveSharpenedKL: decay={decay} must be in [0, 1).")
        if noise not in ("gumbel", "gaussian"):
            raise ValueError(f"AdaptiveSharpenedKL: noise={noise!r}; choose gumbel or gaussian.")
        self.most, self.decay, self.noise = most, decay, noise
        self.register_buffer("error", torch.zeros(2))  # running sums: weighted squared error, weight
        self._measured: Float[Tensor, " 2"] | None = None  # the same of this step; no buffer, ranks differ

    def at(self, progress: float) -> None:
        """Set the exponent to what the steps so far have measured."""
        super().at(progress)
        squared, weight = self.error
        a = _LOGISTIC / (squared / weight).clamp(min=1e-12).sqrt()
        self.a = torch.where(weight > 0, a, 1.0).clamp(1.0, self.most)  # stays on the device: no wait a step

    def take_up(self) -> None:
        """See `Loss.take_up`: the sums of all micro-batches and devices."""
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        measured = torch.zeros_like(self.error) if self._measured is None else self._measured
        if several:
            torch.distributed.all_reduce(measured)
        self.error.mul_(self.decay).add_(measured)
        self._measured = None

    def teacher(self, target: TargetBatch) -> Float[Tensor, "N C"]:
        """log r over the head and one bucket."""
        if self.noise == "gumbel":
            return super().teacher(target)
        logp = target.coarse_logp
        kept = argmax_under_noise(target.head.gap.to(logp.dtype), _LOGISTIC / math.sqrt(2.0) / self.a)
        if logp.shape[-1] == target.num_kept:
            return kept
        return torch.cat([kept + logp[:, :-1].logsumexp(-1, keepdim=True), logp[:, -1:]], -1)

    def on_coarse(self, coarse_logits: Float[Tensor, "N C"], target: TargetBatch) -> Float[Tensor, " N"]:
        self._measure(coarse_logits[:, : target.num_kept], target)
        return super().on_coarse(coarse_logits, target)

    def on_full(self, logits: Float[Tensor, "N V"], target: TargetBatch) -> Float[Tensor, " N"]:
        self._measure(logits.gather(-1, target.top_ids), target)
        return super().on_full(logits, target)

    @torch.no_grad()
    def _measure(self, logits: Float[Tensor, "N K"], target: TargetBatch) -> None:
        if not self.training:
            return
        error = (logits[:, :1] - logits[:, 1:]) / self.a - target.head.gap[:, 1:]
        able = (logits[:, 1:] > ABSENT / 2) & (logits[:, :1] > ABSENT / 2)  # tokens that can be proposed
        weight = (target.top_logp[:, 1:].exp() * able).float()
        squared = weight * error.masked_fill(~able, 0.0).float().square()
        sums = torch.stack([squared.sum(), weight.sum()])
        self._measured = sums if self._measured is None else self._measured + sums

    def extra_repr(self) -> str:
        return f"most={self.most}, decay={self.decay}, noise={self.noise!r}, vocabulary={self.vocabulary!r}"
