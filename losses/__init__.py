"""Losses, loss(logits [N, V], target) → [N]: baselines, certificate-derived ones, chunked evaluation."""

from certdraft.losses.base import Loss
from certdraft.losses.chunked import Chunked, auto_chunk_tokens
from certdraft.losses.discounted import (
    DiscountedCE,
    MarginDiscountedCE,
    PoolDiscountedCE,
    RunnerUpForgivingCE,
)
from certdraft.losses.imitation import (
    LK,
    Divergence,
    ForwardKL,
    HardCE,
    JensenShannon,
    ReverseKL,
    SoftTopK,
    TotalVariation,
)
from certdraft.losses.mixture import Mixture
from certdraft.losses.paths import (
    budget_loss,
    budget_weights,
    certain_budget_nats,
    fold,
    path_mask,
    prefix_weights,
    windows,
)
from certdraft.losses.surrogates import CappedCE, CertificateHinge
from certdraft.losses.target import OnlineTarget, TargetBatch
from certdraft.losses.weighting import (
    Reduction,
    depth_decay,
    low_margin_weight,
    reduce,
    step_coefficients,
)

__all__ = [
    "LK",
    "CappedCE",
    "CertificateHinge",
    "Chunked",
    "DiscountedCE",
    "Divergence",
    "ForwardKL",
    "HardCE",
    "JensenShannon",
    "Loss",
    "MarginDiscountedCE",
    "Mixture",
    "OnlineTarget",
    "PoolDiscountedCE",
    "Reduction",
    "ReverseKL",
    "RunnerUpForgivingCE",
    "SoftTopK",
    "TargetBatch",
    "TotalVariation",
    "auto_chunk_tokens",
    "budget_loss",
    "budget_weights",
    "certain_budget_nats",
    "depth_decay",
    "fold",
    "low_margin_weight",
    "path_mask",
    "prefix_weights",
    "reduce",
    "step_coefficients",
    "windows",
]
