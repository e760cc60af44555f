"""The mathematics of acceptance: rules, KL radii, margins and heads. Pure functions; torch only."""

from certdraft.certificates.bounds import ceiling, margin_bound
from certdraft.certificates.divergences import js_divergence, kl_divergence, kl_divergence_logp, tv_distance
from certdraft.certificates.head import Head
from certdraft.certificates.inverse import safe_margin, safe_probability
from certdraft.certificates.margins import greedy_token, margin, order_margin
from certdraft.certificates.pooling import Direction
from certdraft.certificates.radius import radius
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

__all__ = [
    "Additive",
    "Coverage",
    "Direction",
    "Head",
    "Multiplicative",
    "Rule",
    "SingleTokenRule",
    "StrictGreedy",
    "TopM",
    "Typical",
    "ceiling",
    "greedy_token",
    "js_divergence",
    "kl_divergence",
    "kl_divergence_logp",
    "margin",
    "margin_bound",
    "order_margin",
    "radius",
    "safe_margin",
    "safe_probability",
    "tv_distance",
]
