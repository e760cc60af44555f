"""Losses, loss(logits [N, V], target) → [N]: baselines, certificate-derived ones, chunked evaluation."""

from certdraft.losses.base import Loss as Loss
from certdraft.losses.certificate_losses import CappedCE as CappedCE
from certdraft.losses.certificate_losses import CertificateHinge as CertificateHinge
from certdraft.losses.certificate_losses import CoverageMargin as CoverageMargin
from certdraft.losses.certificate_losses import SparseLoss as SparseLoss
from certdraft.losses.chunks.chunked import Chunked as Chunked
from certdraft.losses.chunks.chunked import auto_chunk_tokens as auto_chunk_tokens
from certdraft.losses.discounted import DiscountedCE as DiscountedCE
from certdraft.losses.discounted import MarginDiscountedCE as MarginDiscountedCE
from certdraft.losses.discounted import PoolDiscountedCE as PoolDiscountedCE
from certdraft.losses.discounted import RunnerUpForgivingCE as RunnerUpForgivingCE
from certdraft.losses.imitation import LK as LK
from certdraft.losses.imitation import Divergence as Divergence
from certdraft.losses.imitation import ForwardKL as ForwardKL
from certdraft.losses.imitation import HardCE as HardCE
from certdraft.losses.imitation import JensenShannon as JensenShannon
from certdraft.losses.imitation import RenyiHalf as RenyiHalf
from certdraft.losses.imitation import ReverseKL as ReverseKL
from certdraft.losses.imitation import SoftTopK as SoftTopK
from certdraft.losses.imitation import TokenCE as TokenCE
from certdraft.losses.imitation import TopKCE as TopKCE
from certdraft.losses.imitation import TotalVariation as TotalVariation
from certdraft.losses.mixture import Mixture as Mixture
from certdraft.losses.mixture import Ramp as Ramp
from certdraft.losses.on_policy import OnPolicyKL as OnPolicyKL
from certdraft.losses.path_weights import budget_loss as budget_loss
from certdraft.losses.path_weights import budget_weights as budget_weights
from certdraft.losses.path_weights import certain_budget_nats as certain_budget_nats
from certdraft.losses.path_weights import estimated_budget_nats as estimated_budget_nats
from certdraft.losses.path_weights import fold as fold
from certdraft.losses.path_weights import next_tokens as next_tokens
from certdraft.losses.path_weights import path_mask as path_mask
from certdraft.losses.path_weights import prefix_weights as prefix_weights
from certdraft.losses.path_weights import windows as windows
from certdraft.losses.reduction import Reduction as Reduction
from certdraft.losses.reduction import depth_decay as depth_decay
from certdraft.losses.reduction import low_margin_weight as low_margin_weight
from certdraft.losses.reduction import reduce as reduce
from certdraft.losses.reduction import step_coefficients as step_coefficients
from certdraft.losses.sharpened import AdaptiveSharpenedKL as AdaptiveSharpenedKL
from certdraft.losses.sharpened import SharpenedKL as SharpenedKL
from certdraft.losses.step_weights import BudgetWeights as BudgetWeights
from certdraft.losses.step_weights import DepthWeights as DepthWeights
from certdraft.losses.step_weights import LowMarginWeights as LowMarginWeights
from certdraft.losses.step_weights import PathWeights as PathWeights
from certdraft.losses.step_weights import PrefixWeights as PrefixWeights
from certdraft.losses.step_weights import ProductWeights as ProductWeights
from certdraft.losses.step_weights import ReachWeights as ReachWeights
from certdraft.losses.step_weights import StepWeights as StepWeights
from certdraft.losses.target import OnlineTarget as OnlineTarget
from certdraft.losses.target import TargetBatch as TargetBatch

__all__ = [
    "AdaptiveSharpenedKL", "BudgetWeights", "CappedCE", "CertificateHinge", "Chunked", "CoverageMargin",
    "DepthWeights", "DiscountedCE", "Divergence", "ForwardKL", "HardCE", "JensenShannon", "LK", "Loss",
    "LowMarginWeights", "MarginDiscountedCE", "Mixture", "OnPolicyKL", "OnlineTarget", "PathWeights",
    "PoolDiscountedCE", "PrefixWeights", "ProductWeights", "Ramp", "ReachWeights", "Reduction",
    "RenyiHalf", "ReverseKL", "RunnerUpForgivingCE", "SharpenedKL", "SoftTopK", "SparseLoss",
    "StepWeights", "TargetBatch", "TokenCE", "TopKCE", "TotalVariation", "auto_chunk_tokens",
    "budget_loss", "budget_weights", "certain_budget_nats", "depth_decay", "estimated_budget_nats",
    "fold", "low_margin_weight", "next_tokens", "path_mask", "prefix_weights", "reduce",
    "step_coefficients", "windows",
]  # fmt: skip
