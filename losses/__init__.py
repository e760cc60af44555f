"""Losses, loss(logits [N, V], target) → [N]: baselines, certificate-derived ones, chunked evaluation."""

from certdraft.losses.base import Loss
from certdraft.losses.chunks.chunked import Chunked, auto_chunk_tokens
from certdraft.losses.imitation.divergence_losses import (
    LK,
    Divergence,
    ForwardKL,
    HardCE,
    JensenShannon,
    ReverseKL,
    SoftTopK,
    TotalVariation,
)
from certdraft.losses.imitation.sharpened import SharpenedKL
from certdraft.losses.imitation.token_ce import TokenCE
from certdraft.losses.mixture import Mixture
from certdraft.losses.schedule import Ramp
from certdraft.losses.surrogates.certificate_losses import CappedCE, CertificateHinge
from certdraft.losses.surrogates.discounted import (
    DiscountedCE,
    MarginDiscountedCE,
    PoolDiscountedCE,
    RunnerUpForgivingCE,
)
from certdraft.losses.surrogates.ranks import CoverageMargin, SparseLoss
from certdraft.losses.target import OnlineTarget, TargetBatch
from certdraft.losses.weights.depth_weights import DepthWeights
from certdraft.losses.weights.path_weights import (
    budget_loss,
    budget_weights,
    certain_budget_nats,
    estimated_budget_nats,
    fold,
    next_tokens,
    path_mask,
    prefix_weights,
    windows,
)
from certdraft.losses.weights.reduction import (
    Reduction,
    depth_decay,
    low_margin_weight,
    reduce,
    step_coefficients,
)
from certdraft.losses.weights.step_weights import (
    BudgetWeights,
    LowMarginWeights,
    PathWeights,
    PrefixWeights,
    StepWeights,
)

__all__ = [
    "LK",
    "BudgetWeights",
    "CappedCE",
    "CertificateHinge",
    "Chunked",
    "DepthWeights",
    "DiscountedCE",
    "CoverageMargin",
    "Divergence",
    "ForwardKL",
    "HardCE",
    "JensenShannon",
    "Loss",
    "LowMarginWeights",
    "MarginDiscountedCE",
    "Mixture",
    "OnlineTarget",
    "PathWeights",
    "PoolDiscountedCE",
    "PrefixWeights",
    "Ramp",
    "Reduction",
    "ReverseKL",
    "RunnerUpForgivingCE",
    "SharpenedKL",
    "SoftTopK",
    "SparseLoss",
    "StepWeights",
    "TargetBatch",
    "TokenCE",
    "TotalVariation",
    "auto_chunk_tokens",
    "budget_loss",
    "budget_weights",
    "certain_budget_nats",
    "depth_decay",
    "estimated_budget_nats",
    "fold",
    "low_margin_weight",
    "next_tokens",
    "path_mask",
    "prefix_weights",
    "reduce",
    "step_coefficients",
    "windows",
]
