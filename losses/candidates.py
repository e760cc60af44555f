"""How many candidates a token position has: one number, or one for each draft depth.

A best-first tree offers many candidates near its root and few at its leaves, so the set that has to cover
the greedy token shrinks with depth. `certdraft evaluate` prints the mean of each depth ("candidates").
Axis: N token positions.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from certdraft.losses.target import TargetBatch


class Candidates:
    """Number of candidates m of every token position.

    Args:
        owner: name of the loss, for error messages.
        m: candidates proposed at each position; a list holds those of draft depth 1, 2, ..., and its last
            number is that of all deeper ones.

    Raises:
        ValueError: no number, or one that is not whole or below 1.
    """

    def __init__(self, owner: str, m: int | Sequence[int]) -> None:
        self.owner = owner
        given = tuple(m) if isinstance(m, Iterable) else (m,)
        try:
            sizes = tuple(0 if isinstance(size, bool) else operator.index(size) for size in given)
        except TypeError:  # 2.5, or a string
            sizes = ()
        self.sizes = sizes
        if not sizes or min(sizes) < 1:
            raise ValueError(
                f"{owner}: m={m}; it is the number of draft tokens proposed per token position, a whole "
                "number of at least 1, or a list of them by draft depth."
            )

    @property
    def most(self) -> int:
        """The largest m."""
        return max(self.sizes)

    def index(self, target: TargetBatch) -> Int[Tensor, " N"]:
        """The entry of `sizes` of every position.

        Raises:
            ValueError: m depends on the depth, and the target does not know the depths.
        """
        if len(self.sizes) == 1:
            return torch.zeros(len(target), dtype=torch.long, device=target.greedy.device)
        if target.depths is None:
            raise ValueError(
                f"{self.owner}: m={list(self.sizes)} is a list by draft depth, and these positions have no "
                "depth. Only drafters trained along draft paths (EagleDrafter, BlockDrafter, DSparkDrafter) "
                "have one; give a single m for this drafter."
            )
        return target.depths.clamp(1, len(self.sizes)) - 1

    def at(self, target: TargetBatch) -> Int[Tensor, " N"]:
        """m of every position."""
        return torch.tensor(self.sizes, device=target.greedy.device)[self.index(target)]

    def __repr__(self) -> str:
        return str(self.sizes[0] if len(self.sizes) == 1 else list(self.sizes))
