"""The mathematics of acceptance: rules, KL radii, margins and heads. Pure functions; torch only."""

from certdraft.certificates.bounds import ceiling, margin_bound
from certdraft.certificates.divergences import entropy, kl_divergence, kl_divergence_logp
from certdraft.certificates.head import Head, margin, order_margin
from certdraft.certificates.head_radius import coarse_kl, coarse_radius, num_tail_above
from certdraft.certificates.inverse import safe_margin
from certdraft.certificates.lengths import (
    RunLengths,
    budget_radius,
    certified_length,
    certified_rank,
    certified_run_lengths,
    expected_length_bound,
    smooth_certified_length,
    used_budget,
)
from certdraft.certificates.pooling import Direction, coverage_level
from certdraft.certificates.radius import minimiser, radii, radius, tv_radius
from certdraft.certificates.rules import (
    Additive,
    Coverage,
    Multiplicative,
    Rule,
    SingleTokenRule,
    StrictGreedy,
    TopM,
    Typical,
)
from certdraft.certificates.selection import largest

__all__ = [
    "Additive", "Coverage", "Direction", "Head", "Multiplicative", "Rule", "RunLengths", "SingleTokenRule",
    "StrictGreedy", "TopM", "Typical", "budget_radius", "ceiling", "certified_length", "certified_rank",
    "certified_run_lengths", "coarse_kl", "coarse_radius", "coverage_level", "entropy",
    "expected_length_bound", "kl_divergence", "kl_divergence_logp", "largest", "margin", "margin_bound",
    "minimiser", "num_tail_above", "order_margin", "radii", "radius", "safe_margin",
    "smooth_certified_length", "tv_radius", "used_budget",
]  # fmt: skip
