"""Weights along draft paths: what a step is worth given the steps before and after it in the same round.

A round of speculative decoding that starts at step r can accept steps r, r+1, …, and gets nothing from a step
unless all steps before it were accepted. `windows` lays a trace out as such paths, one per possible start;
block drafters already have their paths. A weight computed on paths goes back to steps with `fold`, or
multiplies a per-path loss directly. Weights carry no gradient.

Axes: R rows · T tokens of a row · D draft depth · *path leading axes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from certdraft.support import path_mask as path_mask

Form = Literal["sigmoid", "softplus"]


def windows(values: Float[Tensor, "R T"], depth: int) -> Float[Tensor, "R T D"]:
    """values[r, t + d] for d = 0..D−1: the path of every start t; 0 beyond the end of the row."""
    return functional.pad(values, (0, depth - 1)).unfold(1, depth, 1)


def next_tokens(input_ids: Int[Tensor, "R T"], document_ids: Int[Tensor, "R T"]) -> Int[Tensor, "R T"]:
    """The token after each token of a document, −1 after its last: the label of `TokenCE`."""
    follows = functional.pad(document_ids[:, 1:] == document_ids[:, :-1], (0, 1), value=False)
    return torch.where(follows, input_ids.roll(-1, 1), -1)


def fold(weights: Float[Tensor, "R T D"]) -> Float[Tensor, "R T"]:
    """Add up, for every step, its weight in all the paths that contain it: the adjoint of `windows`."""
    steps, depth = weights.shape[1:]
    total = torch.zeros_like(weights[:, :, 0])
    for d in range(min(depth, steps)):
        total[:, d:] += weights[:, : steps - d, d]
    return total


def prefix_weights(
    accept: Float[Tensor, "*path D"], mask: Bool[Tensor, "*path D"] | None = None, smoothing: float = 0.0
) -> Float[Tensor, "*path D"]:
    """W_i = Σ_{l ≥ i} Π_{j ≤ l} s_j with s = (1 − smoothing) · accept + smoothing: D-PACE weights.

    With smoothing = 0 and s_j the chance that step j is accepted, Σ_l Π_{j ≤ l} s_j is the expected number of
    accepted draft tokens and W_i its derivative in log s_i: minimising Σ W_i · (−log s_i) follows its
    gradient.

    Args:
        accept: s in [0, 1]: q(g) for a chain, a smooth coverage for a tree.
        mask: True where the path goes on; a path ends at its first False.
        smoothing: 0.5 is what peers train block drafters with (arXiv:2605.18810).

    Returns:
        Weights ≥ 0, nonincreasing along the path; 0 off the mask.
    """
    smooth = (1.0 - smoothing) * accept.detach() + smoothing
    if mask is not None:
        smooth = torch.where(mask, smooth, 0.0)
    return smooth.cumprod(-1).flip(-1).cumsum(-1).flip(-1)


def certain_budget_nats(node_budget: int, depth: int) -> float:
    """log(B/D): a greedy path this likely is in *every* best-first tree of B nodes and depth D.

    *Proof.* Paths of one depth exclude each other, so at most ⌊1/Q⌋ of them have probability ≥ Q; at D depths
    that is D⌊1/Q⌋ ≤ B nodes if Q ≥ D/B, all of which fit. Real trees have a lower threshold; see
    `budget_loss`.

    Args:
        node_budget: B, drafted tokens verified in one pass.
        depth: D, the deepest level of the tree.

    Returns:
        Nats; negative when B < D, where nothing is certain.
    """
    if node_budget < 1 or depth < 1:
        raise ValueError(f"node_budget={node_budget} and depth={depth} must be at least 1.")
    return math.log(node_budget / depth)


def estimated_budget_nats(
    nll: Float[Tensor, "P D"], mask: Bool[Tensor, "P D"] | None, node_budget: int
) -> Float[Tensor, ""]:
    """−log of the inclusion threshold λ of an average best-first tree of B nodes, from greedy paths only.

    *Why no tree has to be built.* If a path is drawn from the drafter, a node of probability Q is met with
    probability Q, so each node met stands for 1/Q nodes of that level:

        E_{path ~ q} Σ_k 1[s_k ≤ b] e^{s_k}   =   number of nodes with −log Q ≤ b,   s_k = −log Q of the k-th.

    The greedy paths of a batch stand in for draws from the drafter, which is right as far as the drafter is
    calibrated for them (what cross-entropy trains). b is where the average number of nodes reaches B.

    Args:
        nll: −log q(g) along P paths, nats.
        mask: True where a path goes on; shorter paths count as far as they go.
        node_budget: B.

    Returns:
        Nats, ≥ log B − log D (what is certain, `certain_budget_nats`).
    """
    inside = torch.ones_like(nll, dtype=torch.bool) if mask is None else mask
    path_nll = torch.where(inside, nll, 0.0).double().cumsum(-1)
    # a level that only some paths reach is averaged over those
    reached = inside.double().sum(0).clamp(min=1.0)
    nodes = torch.where(inside, path_nll.clamp(max=50.0).exp() / reached, 0.0)
    order = path_nll.flatten().sort()
    total = nodes.flatten()[order.indices].cumsum(0)
    within = (total <= node_budget).sum()
    certain = certain_budget_nats(node_budget, nll.shape[-1])
    padded = torch.cat([order.values.new_tensor([certain]), order.values])
    return padded[within].clamp(min=certain).to(nll.dtype)


def _over_budget(
    nll: Tensor, budget_nats: float | Tensor, mask: Tensor | None, temperature: float, form: str
) -> Tensor:
    """(s_k − b)/temperature of every depth."""
    if not temperature > 0.0 or form not in ("sigmoid", "softplus"):
        raise ValueError(f"temperature={temperature}, form={form!r}; need > 0 nats and sigmoid or softplus.")
    path_nll = (nll if mask is None else torch.where(mask, nll, 0.0)).cumsum(-1)
    budget = torch.as_tensor(budget_nats, dtype=nll.dtype, device=nll.device)
    return (path_nll - budget[..., None]) / temperature


def budget_loss(
    nll: Float[Tensor, "*path D"],
    budget_nats: float | Float[Tensor, "*path"],
    mask: Bool[Tensor, "*path D"] | None = None,
    temperature: float = 1.0,
    form: Form = "sigmoid",
) -> Float[Tensor, "*path"]:
    """Smooth count of the draft tokens a best-first tree loses on the greedy path, ≥ the true count.

    A best-first tree keeps exactly the nodes whose path probability exceeds its inclusion threshold λ, so the
    greedy path survives to depth k iff s_k = Σ_{i ≤ k} −log q_i(g_i) < b = −log λ: a threshold on a
    likelihood, not on a rank. The s_k never decrease, hence

        lost tokens = Σ_k 1[s_k ≥ b] ≤ Σ_k ψ((s_k − b)/temperature),

    with ψ = 2σ ("sigmoid": bounded, concentrates on paths near the threshold, vanishes far beyond it) or
    ψ(u) = log(1 + e^u)/log 2 ("softplus": grows with the nll, for a weak drafter): both are > 0, and ≥ 1
    for u ≥ 0.

    Args:
        nll: −log q(g) per step, nats: the per-step loss of `HardCE`.
        budget_nats: b, nats. `certain_budget_nats` is the provable end; the realistic value is −log of the
            smallest kept path probability of the drafter's own trees.
        mask: True where the path goes on.
        temperature: width of the threshold, nats, > 0.
        form: "sigmoid" or "softplus".

    Source: theory notes §6.5 and §6.7 (budget certificate for best-first trees).
    """
    u = _over_budget(nll, budget_nats, mask, temperature, form)
    smooth = 2.0 * u.sigmoid() if form == "sigmoid" else functional.softplus(u) / math.log(2.0)
    return (smooth if mask is None else torch.where(mask, smooth, 0.0)).sum(-1)


def budget_weights(
    nll: Float[Tensor, "*path D"],
    budget_nats: float | Float[Tensor, "*path"],
    mask: Bool[Tensor, "*path D"] | None = None,
    temperature: float = 1.0,
    form: Form = "sigmoid",
) -> Float[Tensor, "*path D"]:
    """∂ budget_loss / ∂ nll: the step weights with which a cross-entropy follows the budget loss.

    W_i = Σ_{k ≥ i} ψ'((s_k − b)/temperature)/temperature. They can weigh any per-step loss, e.g. a discounted
    cross-entropy; with `HardCE` the gradient is exactly that of `budget_loss`.
    """
    u = _over_budget(nll.detach(), budget_nats, mask, temperature, form)
    slope = 2.0 * u.sigmoid() * (-u).sigmoid() if form == "sigmoid" else u.sigmoid() / math.log(2.0)
    slope = slope / temperature
    if mask is not None:
        slope = torch.where(mask, slope, 0.0)
    return slope.flip(-1).cumsum(-1).flip(-1)
