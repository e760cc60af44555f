"""Radii from full probabilities: select the largest entries; take a full pass only for the rows that need it.

Axis letters: *step leading axes · V vocabulary · K entries selected · N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from certdraft.certificates.divergences import entropy
from certdraft.certificates.head import mass_of_others, require_distributions
from certdraft.certificates.pooling import (
    LOG_FLOOR,
    Measure,
    coverage_pool,
    deletion_cost,
    divergence,
    single_token_pool,
)
from certdraft.certificates.rules import Coverage, Rule, SingleTokenRule, StrictGreedy, TopM, Typical
from certdraft.certificates.selection import on_rows, select

_OPEN_ENDED = 32  # entries selected for rules that may accept any number of tokens


@dataclass(frozen=True, eq=False)
class DenseTop:
    """The largest probabilities of each row, and what the rules at hand need beside them.

    Args:
        p: probabilities, float32 or float64.
        values: the K largest, descending.
        ids: where they are.
        lse_gap: −log p(x0), float64.
        entropy: H(p), nats; None when no rule needs it.
        measure: the divergence whose radius is wanted.
    """

    p: Float[Tensor, "*step V"]
    values: Float[Tensor, "*step K"]
    ids: Int[Tensor, "*step K"]
    lse_gap: Float[Tensor, "*step"]
    entropy: Float[Tensor, "*step"] | None
    measure: Measure

    @classmethod
    def of(cls, p: Float[Tensor, "*step V"], rules: Sequence[Rule], measure: Measure) -> DenseTop:
        """Read p once for all these rules."""
        p = p if p.dtype == torch.float64 else p.float()
        vocab_size = p.shape[-1]
        values, ids = select(p, min(vocab_size, max([1, *(_needed(rule, vocab_size) for rule in rules)])))
        require_distributions(p, values)
        lse_gap = -values[..., 0].double().log()
        if measure == "reverse":  # the answer is the log of what is left: 1 − p0 needs its own digits
            lse_gap = (mass_of_others(p, ids[..., :1]).double() / values[..., 0]).log1p()
        h = entropy(p) if any(isinstance(rule, Typical) for rule in rules) else None
        return cls(p, values, ids, lse_gap, h, measure)

    def coverage(self, m: int) -> Float[Tensor, "*step"]:
        """Radius of `Coverage(m)`."""
        if self.p.shape[-1] <= m:
            return torch.full_like(self.lse_gap, torch.inf)
        x = self._coordinate(self.values[..., : m + 1])
        value, _ = coverage_pool(x, self.lse_gap, self.measure)
        if self.measure == "reverse":  # a competitor of probability zero wins only when the greedy token goes
            value = torch.where(self.values[..., m] <= 0, deletion_cost(self.lse_gap), value)
        return value

    def single(self, rule: SingleTokenRule) -> Float[Tensor, "*step"]:
        """Radius of a single-token rule."""
        vocab_size = self.p.shape[-1]
        k = min(_needed(rule, vocab_size), vocab_size)
        values = self.values[..., :k]
        theta = rule.threshold_from(self.values, self.entropy, vocab_size)
        num_accepted = (values > theta.unsqueeze(-1)).sum(-1).clamp_min(1)
        rejected = values.gather(-1, num_accepted.clamp_max(k - 1).unsqueeze(-1)).squeeze(-1)
        endless = theta < 0  # rows of infinite radius
        full = (num_accepted == k) & ~endless
        # a rule of bounded size always leaves a rejected token among the k selected
        bounded = isinstance(rule, (StrictGreedy, TopM))
        beyond = k < vocab_size and not bounded and bool(full.any())
        if beyond:
            rejected = rejected.masked_scatter(full, on_rows(_best_rejected, full, self.p, theta))
            endless = endless | (rejected < 0)
        elif k == vocab_size:
            endless = endless | full
        if self.measure == "reverse":  # no finite divergence lifts a token of probability zero
            endless = endless | (rejected <= 0)
        top = self.values[..., 0]
        x = self._coordinate(values)
        x_rejected = self._coordinate(torch.where(endless, top, rejected).unsqueeze(-1))[0]
        value, level = single_token_pool(x, x_rejected, self.lse_gap, self.measure)
        if beyond:  # accepted tokens that were not selected may still be pooled
            rows = full & ~endless & (x[-1] > level)
            if bool(rows.any()):
                whole = on_rows(self._whole_row, rows, self.p, x_rejected, level, self.lse_gap, top)
                value = value.masked_scatter(rows, whole)
        return torch.where(endless, torch.inf, value)

    def _coordinate(self, values: Tensor) -> Tensor:
        """Pooling coordinate of selected probabilities, float64, entries first: [*step, K] → [K, *step]."""
        x = values.movedim(-1, 0).to(torch.float64, memory_format=torch.contiguous_format)
        return coordinate(x, self.values[..., 0].double(), self.measure)

    def _whole_row(
        self, p: Tensor, x_rejected: Tensor, level: Tensor, lse_gap: Tensor, top: Tensor
    ) -> Tensor:
        """Radius over all tokens of a row, [N, V] → [N], from a level known to be too low.

        Only tokens above that level can be pooled. Each Newton pass moves the level up to the mean of what
        lies above it; at the water level it stays.
        """
        share = level.exp() if self.measure == "reverse" else 1 + level
        row, token = (p > (top * share * (1 - 1e-6)).unsqueeze(-1)).nonzero(as_tuple=True)
        count = torch.bincount(row, minlength=len(p))
        place = torch.arange(len(row), device=p.device) - (count.cumsum(0) - count)[row]
        found = coordinate(p[row, token].double(), top[row].double(), self.measure)
        x = found.new_full((int(count.max()), len(p)), -torch.inf).index_put((place, row), found)
        with torch.no_grad():
            while True:
                pooled = x > level
                mean = (x_rejected + x.masked_fill(~pooled, 0.0).sum(0)) / (1 + pooled.sum(0))
                if not bool((mean > level).any()):
                    break
                level = torch.maximum(level, mean)
        return divergence((x - level).clamp_min(0.0), x_rejected - level, level, lse_gap, self.measure)


def coordinate(p: Tensor, p0: Tensor, measure: Measure) -> Tensor:
    """p/p0 − 1, or log(p/p0) with a floor; float64."""
    if measure != "reverse":
        return (p - p0) / p0
    possible = p > 0
    return torch.where(possible, (torch.where(possible, p, p0) / p0).log().clamp_min(LOG_FLOOR), LOG_FLOOR)


def _best_rejected(p: Tensor, theta: Tensor) -> Tensor:
    """Largest probability not above the threshold, [N, V] → [N]; −1 when there is none."""
    return torch.where(p > theta.unsqueeze(-1), -1.0, p).amax(-1)


def _needed(rule: Rule, vocab_size: int) -> int:
    """How many of the largest probabilities decide the radius, or are worth looking at first."""
    if isinstance(rule, Coverage):
        return rule.m + 1
    if isinstance(rule, StrictGreedy):
        return 2
    if isinstance(rule, TopM):
        return max(rule.m, 2)
    # may accept any number of tokens, and a traced graph cannot go back for more
    return vocab_size if torch.compiler.is_compiling() else _OPEN_ENDED
