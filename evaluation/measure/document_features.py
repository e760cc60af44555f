"""The target's layers along a text, for drafters that read them: computed by the target, one pass a document.

Axis letters: R documents · T tokens · L tapped layers · H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from certdraft.decoding import TargetRunner

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HasIds(Protocol):
    """A document: anything with `input_ids` [T]."""

    @property
    def input_ids(self) -> Tensor: ...


class TargetFeatures:
    """Outputs of the layers that one drafter reads.

    Args:
        model: the target.
        taps: its layers, see `certdraft.drafters.Drafter.taps`.
    """

    def __init__(self, model: PreTrainedModel, taps: Sequence[int]) -> None:
        self.runner = TargetRunner(model, taps)

    @torch.inference_mode()
    def along(self, ids: Sequence[int]) -> Float[Tensor, "T L H"]:
        """At every token of a text."""
        found = self.runner.features(self.runner.start(ids))
        assert found is not None
        return found

    def padded(self, rows: Sequence[HasIds], length: int) -> Float[Tensor, "R T L H"]:
        """At every token of some documents, zeros behind their ends."""
        each = [self.along(row.input_ids.tolist()) for row in rows]
        batch = each[0].new_zeros(len(each), length, *each[0].shape[1:])
        for index, found in enumerate(each):
            batch[index, : len(found)] = found
        return batch


def features_for(drafter: Any, model: PreTrainedModel | None) -> TargetFeatures | None:
    """What this drafter is to be given: nothing when it reads tokens only.

    Raises:
        ValueError: it reads the target's layers and there is no target.
    """
    taps = tuple(getattr(drafter, "taps", ()))
    if not taps:
        return None
    if model is None:
        raise ValueError(
            f"this drafter reads the target's layers {taps}; give the target too (--target), which computes "
            "them along the texts"
        )
    return TargetFeatures(model, taps)
