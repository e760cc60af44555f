"""Training paths: the positions of a batch that a drafter drafts from, and the target's for each draft token.

A path is one round of drafting along the true text: at depth d of the path that starts at position t, the
drafter has read the text up to token t and drafts token t + d + 1, whose target distribution is at position
t + d. Drafters that draft one token at a time have paths of depth 1.

Letters: R rows, T tokens of a row, P paths, D draft depth, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TokenIds = Int[Tensor, " K"] | Sequence[int]
TokenFeatures = Float[Tensor, "N L H"]  # aux hidden-state layers of tokens


class PackedRows(NamedTuple):
    """Packed rows of a batch as a drafter trains on them; see `Drafter.paths`."""

    input_ids: Int[Tensor, "R T"]
    position_ids: Int[Tensor, "R T"]
    document_ids: Int[Tensor, "R T"]
    loss_mask: Bool[Tensor, "R T"]
    features: Float[Tensor, "R T L H"] | None


class Paths(NamedTuple):
    """Draft tokens of a batch, laid out by round and depth.

    Attributes:
        hidden: last hidden states, for `Drafter.head`.
        steps: index, into the flattened [R·T] positions of the batch, of the target distribution that each
            draft token imitates; 0 where the path has ended.
        mask: true where the draft token counts; a path ends at its first false.
    """

    hidden: Float[Tensor, "P D H"]
    steps: Int[Tensor, "P D"]
    mask: Bool[Tensor, "P D"]

    @property
    def depths(self) -> Int[Tensor, " N"]:
        """Draft depth of every draft token that counts, from 1, in the order of `hidden[mask]`."""
        return self.mask.nonzero()[:, 1] + 1


def steps_from(starts: Int[Tensor, " P"], mask: Bool[Tensor, "P D"]) -> Int[Tensor, "P D"]:
    """Flat positions t, t + 1, … of the paths that start at flat positions `starts`; 0 off the mask."""
    steps = starts[:, None] + torch.arange(mask.shape[1], device=starts.device)
    return torch.where(mask, steps, 0)
