"""Baselines: make the drafter's distribution q look like the target's p. What others train with.

The divergences are computed over the full vocabulary when the target brings it along, else between the two
*coarsenings* (K head tokens and one bucket for the rest of the vocabulary). Merging tokens never increases
a divergence of these families (data processing), so the coarse value is a lower bound of the full one: it is
0 iff q agrees with p on the K tokens, and the tail of q is free. The tail is never dropped or
renormalised away, except in `SoftTopK(form="renormalised")`, which peers use and which is here to compare.

Gradients with respect to the logits (p, q over the classes that are seen; D = value):

| loss | gradient |
|---|---|
| HardCE | q − e_g |
| ForwardKL | q − p |
| ReverseKL | q (log q/p − D) |
| JensenShannon | (1 − β) q (log q/m − KL(q‖m)), m = β p + (1 − β) q |
| TotalVariation | q (s − Σ q s)/2, s = sign(q − p) |
| LK alpha | gradient of TotalVariation / overlap |

Axes: N steps · V vocabulary · K head entries · C classes seen (V, or K + 1).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from certdraft.losses.base import Loss, View
from certdraft.losses.coarse_logits import NEVER, lump
from certdraft.losses.discounted import DiscountedCE
from certdraft.losses.target import OnlineTarget, TargetBatch

Vocabulary = Literal["auto", "head", "full"]


def kl_nats(logp: Float[Tensor, "N C"], logq: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
    """KL(p‖q) in nats, 0·log 0 = 0; log 0 counts as −1e30, so values and gradients stay finite."""
    return (logp.exp() * (logp.clamp(min=NEVER) - logq.clamp(min=NEVER))).sum(-1)


class HardCE(DiscountedCE):
    """Cross-entropy on the target's greedy token g: −log q(g), nats.

    The label is what the verifier will compare with, not a token sampled from the target or read from data.
    It is the discounted cross-entropy without a discount, hence ≥ log(m + 1) on every top-m miss: q(g) >
    1/(m + 1) leaves no room for m others. That certificate does not depend on the margin.

    When to use: the baseline to beat, and the safe start for a drafter from scratch.

    Source: theory notes §3.4, §8.4 (calibrated for every m at once).
    """

    def discount(self, target: TargetBatch) -> Float[Tensor, "N K"]:
        """No token is discounted."""
        return torch.ones_like(target.head.gap)


class Divergence(Loss):
    """A loss that is 0 iff drafter and target agree on the classes it sees.

    Args:
        vocabulary: "full" over all V tokens, and a head-only target is refused; "head" over the K head tokens
            and one bucket; "auto" is full when the target has its full distribution and head otherwise.
    """

    def __init__(self, vocabulary: Vocabulary = "auto") -> None:
        super().__init__()
        if vocabulary not in ("auto", "head", "full"):
            raise ValueError(f"vocabulary={vocabulary!r}: choose auto, head or full.")
        self.vocabulary = vocabulary
        self.requires: View = "full" if vocabulary == "full" else "head"

    def view(self, target: TargetBatch | OnlineTarget) -> View:
        if self.vocabulary == "auto":
            return "full" if target.has_full else "head"
        return "full" if self.vocabulary == "full" else "head"

    def on_coarse(self, coarse_logits: Float[Tensor, "N C"], target: TargetBatch) -> Float[Tensor, " N"]:
        return self.between(target.coarse_logp, coarse_logits.log_softmax(-1))

    def on_full(self, logits: Float[Tensor, "N V"], target: TargetBatch) -> Float[Tensor, " N"]:
        assert target.logp is not None
        return self.between(target.logp, logits.log_softmax(-1))

    def between(self, logp: Float[Tensor, "N C"], logq: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
        """The divergence of q from p, both as normalised log-probabilities."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"vocabulary={self.vocabulary!r}"


class ForwardKL(Divergence):
    """KL(p‖q), nats; 0 iff equal, unlike the soft cross-entropy others call KL.

    This is the quantity the acceptance certificates bound: KL(p‖q) < radius(p, rule) means accepted.
    On a head: Σ_K p log(p/q) + p_tail log(p_tail/q_tail), the KL of the coarsening.

    When to use: to raise the *certified* fraction, alone or mixed with a coverage loss. Its minimiser under
    limited capacity need not rank the greedy token first (theory notes §8.2).
    """

    def between(self, logp: Float[Tensor, "N C"], logq: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
        return kl_nats(logp, logq)


class ReverseKL(Divergence):
    """KL(q‖p), nats; 0 iff equal. Mode-seeking: the drafter may drop what it cannot match.

    On a head it needs the log of the tail mass, which a stored fp32 head has only to about 1e-7/mass:
    a nearly empty tail makes the value imprecise by that much, and expensive for a drafter with a full one.
    """

    def between(self, logp: Float[Tensor, "N C"], logq: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
        return kl_nats(logq, logp)


class JensenShannon(Divergence):
    """β KL(p‖m) + (1 − β) KL(q‖m) with m = β p + (1 − β) q, nats, in [0, h(β)], h the binary entropy.

    The generalised divergence of GKD (arXiv:2306.13649) as trl computes it. β → 0 and β → 1 turn into a
    vanishing multiple of the forward and reverse KL: use those losses instead.

    Args:
        beta: weight of the target in the mixture, in (0, 1).
        vocabulary: see `Divergence`.
    """

    def __init__(self, beta: float = 0.5, vocabulary: Vocabulary = "auto") -> None:
        super().__init__(vocabulary)
        if not 0.0 < beta < 1.0:
            raise ValueError(
                f"JensenShannon: beta={beta} is not inside (0, 1); 0 is ForwardKL, 1 is ReverseKL."
            )
        self.beta = beta

    def between(self, logp: Float[Tensor, "N C"], logq: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
        mixture = torch.logaddexp(logp + math.log(self.beta), logq + math.log1p(-self.beta))
        return self.beta * kl_nats(logp, mixture) + (1.0 - self.beta) * kl_nats(logq, mixture)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, {super().extra_repr()}"


def total_variation(logp: Float[Tensor, "N C"], logq: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
    """½ Σ |p − q|, in [0, 1]."""
    return 0.5 * (logp.exp() - logq.exp()).abs().sum(-1)


class TotalVariation(Divergence):
    """½ Σ |p − q| = 1 − Σ min(p, q), in [0, 1]: the rejection rate of speculative *sampling*.

    Its gradient vanishes where p and q do not overlap: from scratch, mix it with a cross-entropy.
    """

    def between(self, logp: Float[Tensor, "N C"], logq: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
        return total_variation(logp, logq)


class LK(Divergence):
    """The LK losses of arXiv:2602.23881 on the overlap α = Σ min(p, q), the sampling acceptance rate.

    form="alpha": −log α, nats. form="hybrid": λ KL(p‖q) + (1 − λ) TV with λ = exp(−η α), α of that step and
    without a gradient: KL while the overlap is poor, total variation once it is good.

    Args:
        form: "alpha" or "hybrid".
        eta: η of the hybrid, ≥ 0.
        vocabulary: see `Divergence`.
    """

    def __init__(
        self, form: Literal["alpha", "hybrid"] = "hybrid", eta: float = 3.0, vocabulary: Vocabulary = "auto"
    ) -> None:
        super().__init__(vocabulary)
        if form not in ("alpha", "hybrid"):
            raise ValueError(f"LK: form={form!r}; choose alpha or hybrid.")
        if not 0.0 <= eta < math.inf:
            raise ValueError(f"LK: eta={eta} must be finite and at least 0.")
        self.form, self.eta = form, eta

    def between(self, logp: Float[Tensor, "N C"], logq: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
        if self.form == "alpha":
            # In log space: the overlap of two confident, disagreeing distributions underflows.
            return -torch.minimum(logp, logq).logsumexp(-1)
        distance = total_variation(logp, logq)
        mix = torch.exp(-self.eta * (1.0 - distance.detach()))
        return mix * kl_nats(logp, logq) + (1.0 - mix) * distance

    def extra_repr(self) -> str:
        eta = "" if self.form == "alpha" else f"eta={self.eta}, "
        return f"form={self.form!r}, {eta}{super().extra_repr()}"


class RenyiHalf(Divergence):
    """Renyi divergence of order 1/2, −2 log Σ √(p q), nats; 0 iff equal, symmetric, finite on any overlap.

    D-PARD trains parallel drafters with it, each step weighted by D-PACE's recurrence over the detached
    overlap of both distributions: `PrefixWeights(smoothing=0.5, acceptance="overlap")` (SpecForge #827).
    """

    def between(self, logp: Float[Tensor, "N C"], logq: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
        return -2.0 * (0.5 * (logp + logq)).clamp(min=NEVER).logsumexp(-1)


class SoftTopK(Loss):
    """KL restricted to the target's k most probable tokens, nats.

    form="bucketed": the KL of the coarsening to k tokens and one bucket, i.e. `ForwardKL` on a shorter head.
    form="renormalised": both sides renormalised on the k tokens, as peers do; blind to the mass q puts
    outside them, so 0 does not mean covered.

    Args:
        k: tokens kept; at most the K of the target.
        form: "bucketed" or "renormalised".
    """

    def __init__(self, k: int = 10, form: Literal["bucketed", "renormalised"] = "bucketed") -> None:
        super().__init__()
        if k < 1 or form not in ("bucketed", "renormalised"):
            raise ValueError(
                f"SoftTopK: k={k}, form={form!r}; need k >= 1 and form bucketed or renormalised."
            )
        self.k, self.form, self.min_head = k, form, k

    def on_coarse(self, coarse_logits: Float[Tensor, "N C"], target: TargetBatch) -> Float[Tensor, " N"]:
        logp = target.coarse_logp
        if self.form == "renormalised":
            return kl_nats(logp[:, : self.k].log_softmax(-1), coarse_logits[:, : self.k].log_softmax(-1))
        return kl_nats(lump(logp, self.k), lump(coarse_logits, self.k).log_softmax(-1))

    def extra_repr(self) -> str:
        return f"k={self.k}, form={self.form!r}"


class TopKCE(Loss):
    """Soft cross-entropy on the target's k most probable tokens, −Σ_{i ≤ k} p_i log q_i, nats: HASS.

    q is normalised over the whole vocabulary and p is not renormalised, so the minimiser spreads the target's
    mass outside the k tokens over them.

    Args:
        k: tokens of the target that count; HASS takes 10.

    Source: arXiv 2408.15766, the harmonised objective distillation.
    """

    def __init__(self, k: int = 10) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"TopKCE: k={k} must be at least 1.")
        self.k = self.min_head = k

    def on_coarse(self, coarse_logits: Float[Tensor, "N C"], target: TargetBatch) -> Float[Tensor, " N"]:
        logq = coarse_logits.log_softmax(-1)[:, : min(self.k, target.num_kept)]
        return -(target.top_logp[:, : self.k].exp() * logq.clamp(min=NEVER)).sum(-1)

    def extra_repr(self) -> str:
        return f"k={self.k}"


class TokenCE(Loss):
    """−log q(y), y the next token in the data; 0 where the data end (`next_ids` = −1), nats.

    What SpecForge and DeepSpec call hard CE for DFlash and DSpark. `HardCE` has the target's argmax as its
    label instead, which is what a greedy verifier checks; on a trace of the target's own greedy text the
    two are the same loss.

    *What it bounds.* y is outside the drafter's top-m ⇒ loss ≥ log(m + 1). It bounds
    acceptance only where y is the greedy token.

    *When to use.* To reproduce peers' numbers, or when no target was ever run over the data.
    """

    requires: View = "token"

    def on_coarse(self, coarse_logits: Float[Tensor, "N C"], target: TargetBatch) -> Float[Tensor, " N"]:
        assert target.next_ids is not None
        rivals = (coarse_logits[:, 1:] - coarse_logits[:, :1]).logsumexp(-1)
        return torch.where(target.next_ids >= 0, torch.logaddexp(rivals, rivals.new_zeros(())), 0.0)
