"""Several step weights as one: their product, or a weighted sum of them."""

from __future__ import annotations

import functools
import math
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from certdraft.losses.candidates import Candidates
from certdraft.losses.step_weights import StepWeights


class CombinedWeights(StepWeights):
    """Base of weights made of others; those that read the drafter must read the same acceptance.

    Args:
        factors: any step weights, at least one.
    """

    def __init__(self, factors: list[StepWeights]) -> None:
        super().__init__()
        if not factors:
            raise ValueError(f"{type(self).__name__}: factors is empty; give at least one step weight.")
        self.factors = nn.ModuleList(factors)
        reading = [factor for factor in factors if factor.needs_nll]
        if len({_read(factor) for factor in reading}) > 1:
            kinds = ", ".join(
                f"first of {factor.candidates}" if factor.acceptance == "first" else factor.acceptance
                for factor in reading
            )
            raise ValueError(
                f"{type(self).__name__}: factors read different acceptances ({kinds}); set the same "
                "`acceptance` and `candidates` for all of them."
            )
        self.needs_nll = bool(reading)
        if reading:
            self.acceptance, self.candidates = reading[0].acceptance, reading[0].candidates

    def combine(self, weights: list[Tensor]) -> Float[Tensor, " N"]:
        """Return one weight from those of the factors, in their order."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its factors are combined")

    def forward(self, *step: Any, **named: Any) -> Float[Tensor, " N"]:
        return self.combine([factor(*step, **named) for factor in self.factors])

    def on_drafts(self, *drafts: Any, **named: Any) -> Float[Tensor, " N"]:
        parts = [cast(StepWeights, factor) for factor in self.factors]
        return self.combine([part.on_drafts(*drafts, **named) for part in parts])


class ProductWeights(CombinedWeights):
    """Product of several step weights, e.g. low-margin weights times the depth weights of an EAGLE-3 unroll.

    Args:
        factors: any step weights, at least one.
    """

    def combine(self, weights: list[Tensor]) -> Float[Tensor, " N"]:
        """The product."""
        return functools.reduce(torch.mul, weights)

    def __repr__(self) -> str:
        return " * ".join(map(repr, self.factors))


class SumWeights(CombinedWeights):
    """Weighted sum of several step weights: a loss with added terms is one loss with a sum of weights.

    CE + λ · (w · CE) is `HardCE` with `SumWeights([DepthWeights(inf), w], [1, λ])`. L2R's objective is such a
    sum of a plain, a first-error focal and a chain term.

    Args:
        factors: any step weights, at least one.
        shares: one number ≥ 0 for each, not all 0.

    Raises:
        ValueError: no factor, another number of shares, a share that is not finite or below 0, or only zeros.
    """

    def __init__(self, factors: list[StepWeights], shares: list[float]) -> None:
        super().__init__(factors)
        in_range = all(0.0 <= share < math.inf for share in shares) and any(shares)
        if len(shares) != len(factors) or not in_range:
            raise ValueError(
                f"SumWeights: shares={shares}; give a finite number >= 0 for each of the {len(factors)} "
                "factors, one of them above 0."
            )
        self.shares = [float(share) for share in shares]

    def combine(self, weights: list[Tensor]) -> Float[Tensor, " N"]:
        """Σ share · weight."""
        parts = [share * weight for share, weight in zip(self.shares, weights, strict=True)]
        return functools.reduce(torch.add, parts)

    def __repr__(self) -> str:
        shares = zip(self.shares, self.factors, strict=True)
        return "(" + " + ".join(f"{share:g} {factor!r}" for share, factor in shares) + ")"


def _read(factor: StepWeights) -> tuple[str, tuple[int, ...]]:
    """What a step weight reads of the drafter: the acceptance, and of "first" the candidates."""
    first = factor.acceptance == "first"
    return factor.acceptance, Candidates(type(factor).__name__, factor.candidates).sizes if first else ()
