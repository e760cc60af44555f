"""Step weights as configuration: how much each counted step matters; the training module multiplies.

    weights = step_weights(target, loss_mask, document_ids, nll)          # [N], no gradient

A weight may depend on the target alone, or on how likely the drafter finds the greedy text around the step
(`needs_nll`), which costs one more forward product with the output layer. Steps are those where `loss_mask`
is true, in that order; a path is D consecutive steps of one document. "mean" divides by the sum of the
weights, so a learning rate tuned for one weighting fits the others. Axes: R rows · T tokens of a row ·
N counted steps · D draft depth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from certdraft.losses.base import Loss
from certdraft.losses.candidates import Candidates
from certdraft.losses.certificate_losses import CoverageMargin
from certdraft.losses.coarse_logits import ABSENT
from certdraft.losses.imitation import LK, HardCE
from certdraft.losses.path_weights import (
    Form,
    budget_weights,
    estimated_budget_nats,
    fold,
    path_mask,
    prefix_weights,
    windows,
)
from certdraft.losses.reduction import depth_decay, low_margin_weight
from certdraft.losses.target import OnlineTarget, TargetBatch

Acceptance = Literal["greedy", "overlap", "first"]


class StepWeights(nn.Module):
    """Base of all step weights.

    Attributes:
        needs_nll: the weights depend on the drafter, through `nll`, −log of the chance that the draft of a
            counted step is accepted.
        acceptance: what that chance is: "greedy" q(g), the drafter's probability of the greedy token;
            "overlap" Σ min(p, q), the acceptance rate of speculative sampling; "first" 1 where the greedy
            token is among the drafter's first `candidates` choices and 0 elsewhere.
        candidates: of "first"; one number, or one for each draft depth.
    """

    needs_nll: bool = False
    acceptance: Acceptance = "greedy"
    candidates: int | Sequence[int] = 1

    @property
    def nll_loss(self) -> Loss:
        """The per-step loss whose values the weights read as `nll`."""
        if self.acceptance == "first":
            return _Covered(self.candidates, type(self).__name__)
        return HardCE() if self.acceptance == "greedy" else LK("alpha")

    def forward(
        self,
        target: TargetBatch | OnlineTarget,
        loss_mask: Bool[Tensor, "R T"],
        document_ids: Int[Tensor, "R T"],
        nll: Float[Tensor, " N"] | None = None,
    ) -> Float[Tensor, " N"]:
        """Weights ≥ 0 of the counted steps, without gradient.

        Args:
            target: the target at the counted steps.
            loss_mask: true at the counted steps.
            document_ids: equal within a document; see `Batch`.
            nll: values of `nll_loss` at the counted steps, nats.
        """
        raise NotImplementedError

    def on_drafts(
        self, target: TargetBatch | OnlineTarget, mask: Bool[Tensor, "P D"], nll: Float[Tensor, " N"] | None
    ) -> Float[Tensor, " N"]:
        """Weights of the counted drafts of a drafter whose training has paths: each path is a document.

        Args:
            target: the target at the counted drafts.
            mask: true at the counted drafts of every path.
            nll: values of `nll_loss` at the counted drafts, nats.
        """
        return self(target, mask, torch.zeros_like(mask, dtype=torch.long), nll)


class LowMarginWeights(StepWeights):
    """`low_margin_weight`: more weight where the target itself can hardly decide.

    Args:
        threshold: margin p(x0) − p(x1) below which a step counts as low, in [0, 1].
        boost: weight of the low-margin steps, ≥ 0.
    """

    def __init__(self, threshold: float = 0.1, boost: float = 2.0) -> None:
        super().__init__()
        if not 0.0 <= threshold <= 1.0 or not 0.0 <= boost < math.inf:
            raise ValueError(
                f"LowMarginWeights: threshold={threshold}, boost={boost}; need threshold in [0, 1] and a "
                "finite boost >= 0."
            )
        self.threshold, self.boost = threshold, boost

    def forward(self, target: TargetBatch | OnlineTarget, *_: Any, **__: Any) -> Float[Tensor, " N"]:
        if isinstance(target, OnlineTarget):
            raise ValueError(
                "LowMarginWeights: an online target has no margins before its logits are computed; train on "
                "a recorded trace."
            )
        return low_margin_weight(target, self.threshold, self.boost)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, boost={self.boost}"


class PathWeights(StepWeights):
    """Base of weights that follow a step through all draft paths it lies on.

    Every counted step starts a path of up to D steps, as a round of speculative decoding may. A subclass
    weighs the steps of a path; a step's weight is the sum over the paths that contain it. A drafter whose
    training has draft paths (EAGLE-3, DFlash, DSpark) brings its own, of its own depth (`on_drafts`).

    Args:
        depth: D, draft tokens of a path that starts at a counted step; not read with draft paths.
    """

    needs_nll = True

    def __init__(self, depth: int = 8, acceptance: Acceptance = "greedy") -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"{type(self).__name__}: depth={depth} must be at least 1.")
        if acceptance not in ("greedy", "overlap", "first"):
            raise ValueError(
                f"{type(self).__name__}: acceptance={acceptance!r}; choose greedy, overlap or first."
            )
        self.depth, self.acceptance = depth, acceptance

    def on_paths(self, nll: Float[Tensor, "R T D"], inside: Bool[Tensor, "R T D"]) -> Float[Tensor, "R T D"]:
        """Weights of the steps of every path; 0 outside."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(
        self,
        target: TargetBatch | OnlineTarget,
        loss_mask: Bool[Tensor, "R T"],
        document_ids: Int[Tensor, "R T"],
        nll: Float[Tensor, " N"] | None = None,
    ) -> Float[Tensor, " N"]:
        if nll is None and self.needs_nll:
            raise ValueError(f"{type(self).__name__} needs the nll of every counted step.")
        placed = _placed(nll, loss_mask)
        inside = path_mask(loss_mask, document_ids, self.depth)
        on_paths = self.on_paths(windows(placed, self.depth), inside)
        return fold(on_paths)[loss_mask]

    @torch.no_grad()
    def on_drafts(
        self, target: TargetBatch | OnlineTarget, mask: Bool[Tensor, "P D"], nll: Float[Tensor, " N"] | None
    ) -> Float[Tensor, " N"]:
        return self.on_paths(_placed(nll, mask), mask)[mask]


class PrefixWeights(PathWeights):
    """D-PACE on every path: a step weighs what the accepted length would gain from it (`prefix_weights`).

    With smoothing = 0 the weighted `HardCE` follows the gradient of the expected accepted length of a chain
    whose acceptance chance is q(g).

    With acceptance = "overlap" and `RenyiHalf` they are the weights of D-PARD, which takes D-PACE's
    recurrence over the acceptance of sampling (SpecForge #827, speculators #1078; smoothing = 0.5).

    *When to use.* Chains; peers train block drafters with smoothing = 0.5 (arXiv:2605.18810).

    Args:
        depth: D, draft tokens of a path.
        smoothing: in [0, 1); 0 trusts the drafter's own chances.
        acceptance: see `StepWeights`. "overlap" with smoothing = 0 and `LK("alpha")` follows the gradient of
            the end-to-end total variation, 1 − mean over depths of the product of acceptances.
    """

    def __init__(self, depth: int = 8, smoothing: float = 0.5, acceptance: Acceptance = "greedy") -> None:
        super().__init__(depth, acceptance)
        if not 0.0 <= smoothing < 1.0:
            raise ValueError(f"PrefixWeights: smoothing={smoothing} is not in [0, 1).")
        self.smoothing = smoothing

    def on_paths(self, nll: Float[Tensor, "R T D"], inside: Bool[Tensor, "R T D"]) -> Float[Tensor, "R T D"]:
        return prefix_weights((-nll).exp(), inside, self.smoothing)

    def extra_repr(self) -> str:
        return f"depth={self.depth}, smoothing={self.smoothing}"


class ReachWeights(PathWeights):
    """The chance that verification reaches a draft: Π of the acceptances of the drafts before it on its path.

    With acceptance = "first" and `HardCE` this is Spec-AUF, cross-entropy up to and with the drafter's first
    failure. With the `candidates` of a tree it is the chance that the tree still holds the greedy path.

    Args:
        depth: D, draft tokens of a path.
        acceptance: see `StepWeights`.
        beyond: weight of the drafts that verification does not reach, in [0, 1].
        focal: extra weight of the first rejected draft, finite and ≥ 0. `SumWeights` joins it to others as in
            L2R (docs/losses-schedules.md, "Objectives of others").
        candidates: with acceptance = "first", how many first choices are proposed: one number, or a list by
            draft depth.

    Source: arXiv 2607.01893 (Spec-AUF), 2606.11552 (L2R).
    """

    def __init__(
        self,
        depth: int = 8,
        acceptance: Acceptance = "first",
        beyond: float = 0.0,
        focal: float = 0.0,
        candidates: int | Sequence[int] = 1,
    ) -> None:
        super().__init__(depth, acceptance)
        sizes = Candidates("ReachWeights", candidates).sizes  # the same checks
        if acceptance != "first" and sizes != (1,):
            raise ValueError(
                f"ReachWeights: candidates={candidates} is read with acceptance='first' only; leave it out, "
                f"or change acceptance={acceptance!r}."
            )
        self.candidates = candidates
        if not 0.0 <= beyond <= 1.0 or not 0.0 <= focal < math.inf:
            raise ValueError(
                f"ReachWeights: beyond={beyond}, focal={focal}; need beyond in [0, 1] and a finite "
                "focal >= 0."
            )
        self.beyond, self.focal = beyond, focal

    def on_paths(self, nll: Float[Tensor, "R T D"], inside: Bool[Tensor, "R T D"]) -> Float[Tensor, "R T D"]:
        accept = (-nll).exp()
        reach = functional.pad(accept.cumprod(-1)[..., :-1], (1, 0), value=1.0)
        weight = self.beyond + (1 - self.beyond) * reach + self.focal * reach * (1 - accept)
        return weight * inside

    def extra_repr(self) -> str:
        return (
            f"depth={self.depth}, acceptance={self.acceptance!r}, beyond={self.beyond}, focal={self.focal}, "
            f"candidates={self.candidates}"
        )


class _Covered(CoverageMargin):
    """0 where the greedy token is among the drafter's m first choices, else so much that exp(−value) is 0.

    Args:
        m: candidates, as `CoverageMargin` takes them.
        owner: the step weights that read the values, for error messages.
    """

    def __init__(self, m: int | Sequence[int], owner: str) -> None:
        super().__init__(m)
        self.m = Candidates(owner, m)

    def on_picked(self, picked: Float[Tensor, "N S"], target: TargetBatch) -> Float[Tensor, " N"]:
        return torch.where(picked[:, 1] >= picked[:, 0], -ABSENT, 0.0)


class BudgetWeights(PathWeights):
    """A loss for best-first trees of a node budget: weigh steps by what the tree loses at them.

    *Where it comes from.* A best-first tree keeps the greedy path to depth k iff s_k = Σ_{i≤k} −log q(g_i) is
    below the tree's threshold b = −log λ: a condition on a likelihood, not on a rank. `budget_loss` is a
    smooth count of the tokens lost to it; these are its derivatives, summed over all paths through a step.

    *What it bounds.* With `HardCE` the gradient is that of Σ_paths budget_loss, and budget_loss ≥ the draft
    tokens that a tree with threshold b loses on that path. With `MarginDiscountedCE` the weights stay the
    same, the loss they weigh is smaller: a heuristic, not a bound.

    *When to use.* Best-first trees, as a second phase after a few hundred steps of a cross-entropy: from
    scratch every path is beyond the threshold, where "sigmoid" has no gradient.

    The threshold of a tree is not known while training. `budget_nats` fixes it; by default it is estimated on
    every batch (`estimated_budget_nats`).

    Args:
        node_budget: B, draft tokens verified in one pass.
        depth: D, deepest level of the tree.
        budget_nats: b, nats; estimated from B on every batch when not given.
        temperature: width of the threshold, nats, > 0.
        form: "sigmoid" (bounded) or "softplus" (for a weak drafter).
        base: weight every step gets on top, finite and ≥ 0, so that no step is forgotten entirely.
    """

    def __init__(
        self,
        node_budget: int = 32,
        depth: int = 8,
        budget_nats: float | None = None,
        temperature: float = 1.0,
        form: Form = "sigmoid",
        base: float = 0.1,
    ) -> None:
        super().__init__(depth)
        in_range = node_budget >= 1 and 0.0 < temperature < math.inf and 0.0 <= base < math.inf
        if not in_range or form not in ("sigmoid", "softplus"):
            raise ValueError(
                f"BudgetWeights: node_budget={node_budget}, temperature={temperature}, base={base}, "
                f"form={form!r}; need node_budget >= 1, temperature > 0 nats, base >= 0, both finite, and "
                "sigmoid or softplus."
            )
        self.node_budget, self.budget_nats, self.base = node_budget, budget_nats, base
        self.temperature, self.form = temperature, form

    def on_paths(self, nll: Float[Tensor, "R T D"], inside: Bool[Tensor, "R T D"]) -> Float[Tensor, "R T D"]:
        budget: float | Tensor | None = self.budget_nats
        if budget is None:
            budget = estimated_budget_nats(nll[inside[..., 0]], inside[inside[..., 0]], self.node_budget)
        return budget_weights(nll, budget, inside, self.temperature, self.form)

    def forward(self, *step: Any, **named: Any) -> Float[Tensor, " N"]:
        """See `StepWeights.forward`."""
        return super().forward(*step, **named) + self.base

    def on_drafts(self, *drafts: Any, **named: Any) -> Float[Tensor, " N"]:
        """See `StepWeights.on_drafts`."""
        return super().on_drafts(*drafts, **named) + self.base

    def extra_repr(self) -> str:
        budget = "estimated" if self.budget_nats is None else self.budget_nats
        return (
            f"node_budget={self.node_budget}, depth={self.depth}, budget_nats={budget}, "
            f"temperature={self.temperature}, form={self.form!r}, base={self.base}"
        )


class DepthWeights(PathWeights):
    """exp(−d/γ) at depth d = 0, 1, … of every path.

    *When to use.* Drafters trained along draft paths: an EAGLE-3 unroll (0.8^d is γ = 4.48), a
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

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}"


def _placed(nll: Float[Tensor, " N"] | None, mask: Bool[Tensor, "*step"]) -> Float[Tensor, "*step"]:
    """The values at the true places of a mask, 0 elsewhere and where there are none."""
    placed = torch.zeros(mask.shape, device=mask.device, dtype=None if nll is None else nll.dtype)
    return placed if nll is None else placed.masked_scatter(mask, nll)
