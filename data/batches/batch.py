"""Batch: packed documents with the target's top-k logits at every token position.

Axis letters: R rows · T tokens a row · K top-k entries · L target layers · H the target's hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
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
        """The same batch on another device, its top-k entries widened there; Lightning calls this.

        Page-locked tensors are copied beside the computation whatever `non_blocking` says: Lightning passes
        it for plain tensors only.
        """
        return self._each(
            lambda tensor: tensor.to(device, non_blocking=non_blocking or tensor.is_pinned()), widened
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to CUDA run beside the computation."""
        return self._each(Tensor.pin_memory, lambda head: head)

    def _each(self, act: Callable[[Tensor], Tensor], then: Callable[[Head], Head]) -> Batch:
        names = ("input_ids", "position_ids", "document_ids", "loss_mask", "features")
        done = {name: act(getattr(self, name)) for name in names if getattr(self, name) is not None}
        head = self.head
        if head is not None:
            entropy = None if head.entropy is None else act(head.entropy)
            moved = Head(act(head.ids), act(head.gap), act(head.lse_gap), head.vocab_size, entropy)
            done["head"] = then(moved)  # type: ignore[assignment]
        return replace(self, **done)  # type: ignore[arg-type]


def widened(head: Head) -> Head:
    """A head with int64 ids and fp32 gaps, as losses and certificates read it."""
    return replace(head, ids=head.ids.long(), gap=head.gap.float())
