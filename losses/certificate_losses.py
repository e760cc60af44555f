"""Losses that use a certificate's number itself: KL against its radius, and cross-entropy against log(m + 1).

The forward radius κ_m satisfies KL(p‖q) < κ_m ⇒ covered, with the best constant, so 1[miss] ≤ KL/κ_m at every
margin. As training objectives these are valid but weak: the gradient ends once the certificate holds,
and κ_m → 0 at near-ties. They are here to raise the *certified* fraction. For coverage see
`losses.discounted`. Axes: N steps · V vocabulary · C coarse classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from certdraft.certificates import Coverage, coarse_radius, largest, radius
from certdraft.losses.base import Loss, View
from certdraft.losses.candidates import Candidates
from certdraft.losses.imitation import ForwardKL, HardCE, Vocabulary
from certdraft.losses.target import OnlineTarget, TargetBatch


class CertificateHinge(Loss):
    """Forward KL measured against the radius κ of top-m coverage.

    D is KL(p‖q) and κ its exact radius when the target is full. On a head D is the KL of the coarsening and κ
    the exact radius *of the coarsening* (`coarse_radius`), which is smaller: with the radius of the full KL,
    a token hidden in the tail could beat g unseen. Either way D < κ proves coverage, and:

    | form | value | unit | gradient in z | bound |
    |---|---|---|---|---|
    | "hinge" | (D − κ)₊ | nats | 1[D > κ] (q − p) | 0 wherever certified; > 0 on a miss unless D = κ |
    | "ratio" | D / κ̂ | – | (q − p)/κ̂ | ≥ 1 on every miss |
    | "log1p" | log(1 + D/κ̂)/log 2 | – | (q − p)/((κ̂ + D) log 2) | ≥ 1 on every miss |

    with κ̂ = max(κ, min_radius): near-ties would otherwise get unbounded weight. The two lower bounds
    hold where κ ≥ min_radius. *Proof*: a miss implies D ≥ κ (definition of the radius), and
    log(1+x)/log 2 ≥ 1 for x ≥ 1.

    When to use: to turn covered steps into certified ones, late in training or mixed with a discounted
    cross-entropy. Alone it inherits the forward KL's blindness to ranking (theory notes §8.2: not
    Bayes-consistent).

    Args:
        m: draft tokens proposed per step.
        form: "hinge", "ratio" or "log1p".
        min_radius: clip of κ in the last two forms, nats, > 0.
        vocabulary: "full", "head", or "auto": full when the target has its full distribution.

    Source: theory notes §2, §7 (coarse certificate), §8.2; arXiv:2606.30265, Theorem 5.1.
    """

    def __init__(
        self,
        m: int = 4,
        form: Literal["hinge", "ratio", "log1p"] = "hinge",
        min_radius: float = 1e-3,
        vocabulary: Vocabulary = "auto",
    ) -> None:
        super().__init__()
        if m < 1 or form not in ("hinge", "ratio", "log1p") or not min_radius > 0.0:
            raise ValueError(
                f"CertificateHinge: m={m}, form={form!r}, min_radius={min_radius}; need m >= 1, form "
                "hinge, ratio or log1p, and min_radius > 0 nats."
            )
        self.m, self.form, self.min_radius = m, form, min_radius
        self.divergence = ForwardKL(vocabulary)
        self.requires: View = self.divergence.requires
        self.min_head = m + 1

    def view(self, target: TargetBatch | OnlineTarget) -> View:
        return self.divergence.view(target)

    def on_coarse(self, coarse_logits: Float[Tensor, "N C"], target: TargetBatch) -> Float[Tensor, " N"]:
        kl = self.divergence.on_coarse(coarse_logits, target)
        return self.against(kl, coarse_radius(target.head, self.m))

    def on_full(self, logits: Float[Tensor, "N V"], target: TargetBatch) -> Float[Tensor, " N"]:
        return self.against(self.divergence.on_full(logits, target), radius(target.head, Coverage(self.m)))

    def against(self, kl: Float[Tensor, " N"], kappa: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """The chosen form of KL against its radius."""
        kappa = kappa.to(kl.dtype)
        if self.form == "hinge":
            return torch.relu(kl - kappa)
        ratio = kl / kappa.clamp(min=self.min_radius)
        # KL between near-equal distributions may round to −1e-8.
        return ratio if self.form == "ratio" else ratio.clamp(min=0.0).log1p() / math.log(2.0)

    def extra_repr(self) -> str:
        clip = "" if self.form == "hinge" else f", min_radius={self.min_radius}"
        return f"m={self.m}, form={self.form!r}{clip}, vocabulary={self.divergence.vocabulary!r}"

    def __repr__(self) -> str:
        return f"CertificateHinge({self.extra_repr()})"


class CappedCE(Loss):
    """Hard cross-entropy that stops once its own certificate holds: (CE − log(m + 1) + slack)₊, nats.

    *Where it comes from.* CE < log(m + 1), i.e. q_g > 1/(m + 1), proves coverage whatever the target is: the
    certificate with the one-hot target as reference. Beyond it by `slack`, the step has nothing left to gain.

    *What it bounds.* Top-m miss ⇒ CE ≥ log(m + 1) ⇒ loss ≥ slack. Calibrated for that m.

    *When to use.* To spend a small drafter's capacity on steps that are not yet covered, at some cost in
    top-1.

    Args:
        m: draft tokens proposed per step.
        slack: nats beyond the certificate at which a step is done, in (0, log(m + 1)): done at
            q(g) = exp(slack)/(m + 1).

    Source: theory notes §3.4, §8.4.
    """

    def __init__(self, m: int = 4, slack: float = 1.0) -> None:
        super().__init__()
        if m < 1 or not 0.0 < slack < math.log(m + 1):
            raise ValueError(
                f"CappedCE: m={m}, slack={slack}; need m >= 1 and slack in (0, log(m + 1)) nats, or the "
                "loss never stops: a step is done at q(g) = exp(slack)/(m + 1)."
            )
        self.m, self.slack = m, slack
        self.cross_entropy = HardCE()

    def on_coarse(self, coarse_logits: Float[Tensor, "N C"], target: TargetBatch) -> Float[Tensor, " N"]:
        nll = self.cross_entropy.on_coarse(coarse_logits, target)
        return torch.relu(nll - math.log(self.m + 1) + self.slack)

    def extra_repr(self) -> str:
        return f"m={self.m}, slack={self.slack}"

    def __repr__(self) -> str:
        return f"CappedCE({self.extra_repr()})"


class SparseLoss(Loss):
    """Base of losses of a few logits: a subclass defines `pick` and `on_picked`.

    The gradient is zero at all other logits, so `Chunked` needs one product with the output layer instead of
    three: the gradients of hidden states and output layer are gathered and added, row by row.
    """

    requires: View = "picked"


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
        m: draft tokens proposed per step, or a list of them by draft depth (`Candidates`).
        slack: log-gap asked for beyond the boundary, nats, ≥ 0.
        temperature: width of the hinge, nats, > 0.

    Source: theory notes §8.1, §8.4.
    """

    def __init__(self, m: int | Sequence[int] = 4, slack: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.m = Candidates("CoverageMargin", m)
        if slack < 0.0 or not temperature > 0.0:
            raise ValueError(
                f"CoverageMargin: m={m}, slack={slack}, temperature={temperature}; need slack >= 0 nats and "
                "temperature > 0 nats."
            )
        self.slack, self.temperature = slack, temperature

    def pick(self, logits: Float[Tensor, "N V"], target: TargetBatch) -> Int[Tensor, "N S"]:
        """The greedy token and the m-th strongest of the others (the weakest one when V ≤ m)."""
        vocab = logits.shape[-1]
        ids = largest(logits, min(self.m.most + 1, vocab))[1]
        last = self.m.at(target).clamp(max=vocab - 1)[:, None]  # rank of the m-th other if g is ahead of it
        rank = torch.arange(ids.shape[-1], device=ids.device)
        ahead = ((ids == target.greedy[:, None]) & (rank < last)).any(-1, keepdim=True)
        rival = ids.gather(-1, torch.where(ahead, last, (last - 1).clamp(min=0)))
        return torch.cat([target.greedy[:, None], rival], -1)

    def on_picked(self, picked: Float[Tensor, "N S"], target: TargetBatch) -> Float[Tensor, " N"]:
        lead = picked[:, 1] - picked[:, 0] + self.slack
        return self.temperature * functional.softplus(lead / self.temperature)

    def extra_repr(self) -> str:
        return f"m={self.m}, slack={self.slack}, temperature={self.temperature}"
