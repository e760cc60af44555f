"""The mathematics of acceptance: rules, KL radii, margins and heads. Pure functions; torch only."""

from certdraft.certificates.bounds import ceiling as ceiling
from certdraft.certificates.bounds import margin_bound as margin_bound
from certdraft.certificates.divergences import entropy as entropy
from certdraft.certificates.divergences import kl_divergence as kl_divergence
from certdraft.certificates.divergences import kl_divergence_logp as kl_divergence_logp
from certdraft.certificates.head import Head as Head
from certdraft.certificates.head import margin as margin
from certdraft.certificates.head import order_margin as order_margin
from certdraft.certificates.head_radius import coarse_kl as coarse_kl
from certdraft.certificates.head_radius import coarse_radius as coarse_radius
from certdraft.certificates.head_radius import num_tail_above as num_tail_above
from certdraft.certificates.inverse import safe_margin as safe_margin
from certdraft.certificates.lengths import RunLengths as RunLengths
from certdraft.certificates.lengths import budget_radius as budget_radius
from certdraft.certificates.lengths import certified_length as certified_length
from certdraft.certificates.lengths import certified_rank as certified_rank
from certdraft.certificates.lengths import certified_run_lengths as certified_run_lengths
from certdraft.certificates.lengths import expected_length_bound as expected_length_bound
from certdraft.certificates.lengths import smooth_certified_length as smooth_certified_length
from certdraft.certificates.lengths import used_budget as used_budget
from certdraft.certificates.pooling import Direction as Direction
from certdraft.certificates.pooling import coverage_level as coverage_level
from certdraft.certificates.radius import minimiser as minimiser
from certdraft.certificates.radius import radii as radii
from certdraft.certificates.radius import radius as radius
from certdraft.certificates.radius import tv_radius as tv_radius
from certdraft.certificates.rules import Additive as Additive
from certdraft.certificates.rules import Coverage as Coverage
from certdraft.certificates.rules import Multiplicative as Multiplicative
from certdraft.certificates.rules import Rule as Rule
from certdraft.certificates.rules import SingleTokenRule as SingleTokenRule
from certdraft.certificates.rules import StrictGreedy as StrictGreedy
from certdraft.certificates.rules import TopM as TopM
from certdraft.certificates.rules import Typical as Typical
from certdraft.certificates.selection import largest as largest

__all__ = [
    "Additive", "Coverage", "Direction", "Head", "Multiplicative", "Rule", "RunLengths", "SingleTokenRule",
    "StrictGreedy", "TopM", "Typical", "budget_radius", "ceiling", "certified_length", "certified_rank",
    "certified_run_lengths", "coarse_kl", "coarse_radius", "coverage_level", "entropy",
    "expected_length_bound", "kl_divergence", "kl_divergence_logp",
    "largest", "margin", "margin_bound", "minimiser", "num_tail_above", "order_margin",
    "radii", "radius", "safe_margin", "smooth_certified_length",
    "tv_radius", "used_budget",
]  # fmt: skip
