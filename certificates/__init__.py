"""The mathematics of acceptance: rules, KL radii, margins and heads. Pure functions on tensors; torch only."""

from certdraft.certificates.divergences import js_divergence, kl_divergence, kl_divergence_logp, tv_distance
from certdraft.certificates.head import Head
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
    "greedy_token",
    "js_divergence",
    "kl_divergence",
    "kl_divergence_logp",
    "margin",
    "order_margin",
    "radius",
    "tv_distance",
]
