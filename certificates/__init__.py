"""The mathematics of acceptance: rules, KL radii, margins and heads. Pure functions; torch only."""

from certdraft.certificates.bounds import ceiling, margin_bound
from certdraft.certificates.coarse import coarse_kl, coarse_radius, num_tail_above
from certdraft.certificates.divergences import (
    entropy,
    js_divergence,
    kl_divergence,
    kl_divergence_logp,
    tv_distance,
)
from certdraft.certificates.head import Head
from certdraft.certificates.inverse import safe_margin, safe_probability
from certdraft.certificates.lengths import (
    RunLengths,
    certified_length,
    certified_run_lengths,
    expected_length_bound,
    smooth_certified_length,
    used_budget,
)
from certdraft.certificates.margins import greedy_token, margin, order_margin
from certdraft.certificates.minimiser import minimiser
from certdraft.certificates.paths import budget_radius, certified_rank, path_radius
from certdraft.certificates.pooling import Direction
from certdraft.certificates.radius import radii, radius, tv_radius
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
    "Additive",
    "Coverage",
    "Direction",
    "Head",
    "Multiplicative",
    "Rule",
    "RunLengths",
    "SingleTokenRule",
    "StrictGreedy",
    "TopM",
    "Typical",
    "budget_radius",
    "ceiling",
    "certified_length",
    "certified_rank",
    "certified_run_lengths",
    "coarse_kl",
    "coarse_radius",
    "entropy",
    "expected_length_bound",
    "greedy_token",
    "js_divergence",
    "kl_divergence",
    "kl_divergence_logp",
    "largest",
    "margin",
    "margin_bound",
    "minimiser",
    "num_tail_above",
    "order_margin",
    "path_radius",
    "radii",
    "radius",
    "safe_margin",
    "safe_probability",
    "smooth_certified_length",
    "tv_distance",
    "tv_radius",
    "used_budget",
]
