"""Batch: packed documents with the target's top-k logits at every token position.

Axis letters: R rows · T tokens a row · K top-k entries · L target layers · H the target's hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from certdraft.certificates import Head


@dataclass(frozen=True)
class Batch:
    """Training input of a drafter. Position t of a row holds the target's distribution of token t + 1.

    Args:
        input_ids: token ids; 0 at padding.
        position_ids: restart at 0 in every packed document and in the padding.
        document_ids: which piece of a document a token belongs to, -1 at padding. Tokens attend only within
            equal ids; the numbers index `Packing.pieces`.
        loss_mask: true where the next token is to be learned.
        head: the target's top-k logits [R, T], or None when the target is online; uniform at padding.
        features: outputs of some target layers at each token, for drafters that read them; bf16 from a
            trace. 0 at padding. None when the trace holds none.
    """

    input_ids: Int[Tensor, "R T"]
    position_ids: Int[Tensor, "R T"]
    document_ids: Int[Tensor, "R T"]
    loss_mask: Bool[Tensor, "R T"]
    head: Head | None = None
    features: Float[Tensor, "R T L H"] | None = None

    def steps(self) -> Int[Tensor, " N"]:
        """Flat indices, into [R·T], of the token positions in the loss mask."""
        return self.loss_mask.flatten().nonzero().squeeze(-1)

    @property
    def num_tokens(self) -> int:
        """Number of tokens that are not padding."""
        return int((self.document_ids >= 0).sum())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device; Lightning calls this."""
        names = ("input_ids", "position_ids", "document_ids", "loss_mask", "features")
        present = [name for name in names if getattr(self, name) is not None]
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in present}
        return replace(self, **moved, head=None if self.head is None else self.head.to(device))
