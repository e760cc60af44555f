"""Divergences between target p and drafter q: [*step, V] → [*step], nats.

0·log 0 is 0, and mass where the other has none is +inf. Sums are over the last axis, nothing is averaged.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from certdraft.certificates.selection import over_rows


def entropy(p: Float[Tensor, "*step V"]) -> Float[Tensor, "*step"]:
    """H(p) = −Σ p log p, nats, in [0, log V]."""
    if torch.is_grad_enabled() and p.requires_grad:
        return torch.special.entr(p).sum(-1)
    return over_rows(_negative_entropy, p)[0].neg().clamp_min(0.0)


def _negative_entropy(p: Tensor) -> tuple[Tensor]:
    value = p.log().mul_(p).sum(-1)
    if torch.compiler.is_compiling() or bool(value.isnan().any()):  # 0 · log 0
        value = p.clamp_min(torch.finfo(p.dtype).tiny).log().mul_(p).sum(-1)
    return (value,)


def kl_divergence(p: Float[Tensor, "*step V"], q: Float[Tensor, "*step V"]) -> Float[Tensor, "*step"]:
    """KL(p‖q) = Σ p log(p/q), nats, in [0, +inf]; 0 iff p = q.

    In float32 the sum carries an error of about 1e-7: below that, compare with radii in float64.

    Examples:
        >>> round(float(kl_divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]))), 4)
        0.6931
    """
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1).clamp_min(0.0)


def kl_divergence_logp(
    logp: Float[Tensor, "*step V"], logq: Float[Tensor, "*step V"]
) -> Float[Tensor, "*step"]:
    """KL(p‖q) from natural log-probabilities, nats; −inf in logp contributes nothing."""
    possible = logp > -torch.inf
    ratio = torch.where(possible, logp, 0.0) - torch.where(possible, logq, 0.0)
    return (logp.exp() * ratio).sum(-1).clamp_min(0.0)
