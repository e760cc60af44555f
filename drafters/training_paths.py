"""Training paths: from which places of a batch a drafter drafts, and which target step each draft answers.

A path is one round of drafting along the true text: at depth d of the path that starts at step t, the drafter
has read the text up to token t and drafts token t + d + 1, which is the target's step t + d. Drafters that
draft one token at a time have paths of depth 1.

Letters: R rows, T tokens of a row, P paths, D draft depth, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional


class Paths(NamedTuple):
    """Drafts of a batch, laid out by round and depth.

    Attributes:
        hidden: last hidden states, what `Drafter.head` takes.
        steps: index, into the flattened [R·T] steps of the batch, of the target distribution that each draft
            imitates; 0 where the path has ended.
        mask: true where the draft counts; a path ends at its first false.
    """

    hidden: Float[Tensor, "P D H"]
    steps: Int[Tensor, "P D"]
    mask: Bool[Tensor, "P D"]


def reach(
    loss_mask: Bool[Tensor, "R T"], document_ids: Int[Tensor, "R T"], depth: int
) -> Bool[Tensor, "R T D"]:
    """True at depth d of the path from t where steps t to t + d all count and lie in one document."""
    padded = functional.pad(document_ids.masked_fill(~loss_mask, -1), (0, depth - 1), value=-1)
    same = padded.unfold(1, depth, 1) == document_ids[..., None]
    return (same & (document_ids >= 0)[..., None]).cumprod(-1).bool()


def steps_from(starts: Int[Tensor, " P"], mask: Bool[Tensor, "P D"]) -> Int[Tensor, "P D"]:
    """Flat steps t, t + 1, … of the paths that start at flat steps `starts`; 0 off the mask."""
    steps = starts[:, None] + torch.arange(mask.shape[1], device=starts.device)
    return torch.where(mask, steps, 0)
