"""Losses, loss(logits [N, V], target) → [N]: baselines, certificate-derived ones, chunked evaluation."""

from certdraft.losses.base import Loss
from certdraft.losses.certificate_losses import CappedCE, CertificateHinge, CoverageMargin, SparseLoss
from certdraft.losses.chunks.chunked import Chunked, auto_chunk_tokens
from certdraft.losses.combined_weights import ProductWeights, SumWeights
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
    RenyiHalf,
    ReverseKL,
    SoftTopK,
    TokenCE,
    TopKCE,
    TotalVariation,
)
from certdraft.losses.mixture import Mixture, Ramp
from certdraft.losses.on_policy import OnPolicyKL
from certdraft.losses.path_weights import (
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
from certdraft.losses.reduction import Reduction, depth_decay, low_margin_weight, reduce, step_coefficients
from certdraft.losses.sharpened import AdaptiveSharpenedKL, SharpenedKL, argmax_under_noise
from certdraft.losses.step_weights import (
    BudgetWeights,
    DepthWeights,
    LowMarginWeights,
    PathWeights,
    PrefixWeights,
    ReachWeights,
    StepWeights,
)
from certdraft.losses.target import OnlineTarget, TargetBatch

__all__ = [
    "AdaptiveSharpenedKL", "BudgetWeights", "CappedCE", "CertificateHinge", "Chunked", "CoverageMargin",
    "DepthWeights", "DiscountedCE", "Divergence", "ForwardKL", "HardCE", "JensenShannon", "LK", "Loss",
    "LowMarginWeights", "MarginDiscountedCE", "Mixture", "OnPolicyKL", "OnlineTarget", "PathWeights",
    "PoolDiscountedCE", "PrefixWeights", "ProductWeights", "Ramp", "ReachWeights", "Reduction",
    "RenyiHalf", "ReverseKL", "RunnerUpForgivingCE", "SharpenedKL", "SoftTopK", "SparseLoss",
    "StepWeights", "SumWeights", "TargetBatch", "TokenCE", "TopKCE", "TotalVariation",
    "argmax_under_noise", "auto_chunk_tokens", "budget_loss", "budget_weights", "certain_budget_nats",
    "depth_decay", "estimated_budget_nats", "fold", "low_margin_weight", "next_tokens", "path_mask",
    "prefix_weights", "reduce", "step_coefficients", "windows",
]  # fmt: skip
