"""Losses, loss(logits [N, V], target) → [N]: baselines, certificate-derived ones, chunked evaluation."""

from certdraft.losses.base import Loss
from certdraft.losses.chunked import Chunked, auto_chunk_tokens
from certdraft.losses.data_token import TokenCE
from certdraft.losses.depth_weights import DepthWeights
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
    estimated_budget_nats,
    fold,
    next_tokens,
    path_mask,
    prefix_weights,
    windows,
)
from certdraft.losses.ranks import CoverageMargin, SparseLoss
from certdraft.losses.schedule import Ramp
from certdraft.losses.sharpened import SharpenedKL
from certdraft.losses.step_weights import (
    BudgetWeights,
    LowMarginWeights,
    PathWeights,
    PrefixWeights,
    StepWeights,
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
