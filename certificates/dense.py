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
from certdraft.certificates.pooling import LOG_FLOOR, Measure, coverage_pool, divergence, single_token_pool
from certdraft.certificates.rules import Coverage, Rule, SingleTokenRule, StrictGreedy, TopM, Typical
from certdraft.certificates.selection import largest, on_rows

_OPEN_ENDED = 32  # entries selected for rules that may accept any number of tokens


@dataclass(frozen=True, eq=False)
class DenseTop:
    """The largest probabilities of each row, and what the rules at hand need beside them.

    Args:
        p: probabilities, float32 or float64.
        values: the K largest, descending.
        ids: where they are; the first is the greedy token.
        p0: p(x0) in float64.
        entropy: H(p), nats; None when no rule asks for it.
        measure: the divergence whose radius is wanted.
    """

    p: Float[Tensor, "*step V"]
    values: Float[Tensor, "*step K"]
    ids: Int[Tensor, "*step K"]
    p0: Float[Tensor, "*step"]
    entropy: Float[Tensor, "*step"] | None
    measure: Measure

    @classmethod
    def of(cls, p: Float[Tensor, "*step V"], rules: Sequence[Rule], measure: Measure) -> DenseTop:
        """Read p once for all these rules."""
        p = p if p.dtype == torch.float64 else p.float()
        require_distributions(p)
        vocab_size = p.shape[-1]
        values, ids = largest(p, min(vocab_size, max((_needed(r, vocab_size) for r in rules), default=1)))
        p0 = values[..., 0].double()
        if measure == "reverse":  # 1 − p0 to full relative precision: the answer is the log of what is left
            p0 = 1 / (1 + mass_of_others(p, ids[..., :1]).double() / p0)
        h = entropy(p) if any(isinstance(rule, Typical) for rule in rules) else None
        return cls(p, values, ids, p0, h, measure)

    def coverage(self, m: int) -> Float[Tensor, "*step"]:
        """Radius of `Coverage(m)`."""
        if self.p.shape[-1] <= m:
            return torch.full_like(self.p0, torch.inf)
        value, _ = coverage_pool(self._coordinate(self.values[..., : m + 1]), self.p0, self.measure)
        if self.measure == "reverse":  # a competitor of probability zero wins only when the greedy token goes
            value = torch.where(self.values[..., m] <= 0, -torch.log1p(-self.p0), value)
        return value

    def single(self, rule: SingleTokenRule) -> Float[Tensor, "*step"]:
        """Radius of a single-token rule."""
        vocab_size = self.p.shape[-1]
        k = min(_needed(rule, vocab_size), vocab_size)
        values = self.values[..., :k]
        theta = rule.threshold_from(self.values, self.entropy, vocab_size)
        num_accepted = (values > theta.unsqueeze(-1)).sum(-1).clamp_min(1)
        rejected = values.gather(-1, num_accepted.clamp_max(k - 1).unsqueeze(-1)).squeeze(-1)
        everything = theta < 0
        full = (num_accepted == k) & ~everything
        # a rule of bounded size always leaves a rejected token among the k selected
        bounded = isinstance(rule, (StrictGreedy, TopM))
        beyond = k < vocab_size and not bounded and bool(full.any())
        if beyond:
            best = on_rows(_best_rejected, full, self.p, theta)
            rejected = rejected.masked_scatter(full, best)
            everything = everything | (rejected < 0)
        elif k == vocab_size:
            everything = everything | full
        x = self._coordinate(values)
        x_rejected = self._coordinate(rejected.clamp_min(0.0).unsqueeze(-1))[0]
        value, level = single_token_pool(x, num_accepted, x_rejected, self.p0, self.measure)
        if beyond:  # accepted tokens that were not selected may still be pooled
            rows = full & ~everything & (x[-1] > level)
            if bool(rows.any()):
                args = (theta, x_rejected, level, self.p0)
                value = value.masked_scatter(rows, on_rows(self._whole_row, rows, self.p, *args))
        if self.measure == "reverse":  # no finite divergence lifts a token of probability zero
            value = torch.where(rejected <= 0, torch.inf, value)
        return torch.where(everything, torch.inf, value)

    def _coordinate(self, values: Tensor) -> Tensor:
        """Pooling coordinate of selected probabilities, float64, entries first: [*step, K] → [K, *step]."""
        x = values.movedim(-1, 0).to(torch.float64, memory_format=torch.contiguous_format)
        return coordinate(x, self.values[..., 0].double(), self.measure)

    def _whole_row(self, p: Tensor, theta: Tensor, x_rejected: Tensor, level: Tensor, p0: Tensor) -> Tensor:
        """Radius over all accepted tokens of a row, [N, V] → [N], from a level known to be too low.

        Each Newton pass pools what lies above the level so far and moves it up to the pool's mean; it ends
        when the level stays.
        """
        accepted = (p > theta.unsqueeze(-1)).T
        x = coordinate(p.T.double(), p.amax(-1).double(), self.measure)
        x = torch.where(accepted, x, -torch.inf)
        with torch.no_grad():
            while True:
                pooled = x > level
                mean = (x_rejected + torch.where(pooled, x, 0.0).sum(0)) / (1 + pooled.sum(0))
                if not bool((mean > level).any()):
                    break
                level = torch.maximum(level, mean)
        return divergence((x - level).clamp_min(0.0), x_rejected - level, level, p0, self.measure)


def coordinate(p: Tensor, p0: Tensor, measure: Measure) -> Tensor:
    """p/p0 − 1, or log(p/p0) with a floor; float64."""
    return (p / p0).log().clamp_min(LOG_FLOOR) if measure == "reverse" else (p - p0) / p0


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
