"""Validation metrics of your own: a value for each token position, averaged over batches and ranks.

Axis letters: N token positions · V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Bool, Float
from torch import Tensor

from certdraft.losses import TargetBatch


class ValidationMetric(ABC):
    """One number a validation, the mean of a value that every token position has.

    A subclass goes into `validation.extra` of `DrafterModule`, in Python or by `class_path` in YAML. It is
    logged as `val/NAME` (`test/NAME`), so `checkpoint.monitor` can follow it, and is printed on model cards.

    Attributes:
        name: what it is logged as; letters, digits and `_@.-` only.
    """

    name: str

    @abstractmethod
    def __call__(
        self, logits: Float[Tensor, "N V"], target: TargetBatch
    ) -> Float[Tensor, " N"] | Bool[Tensor, " N"]:
        """Return the value at each token position; NaN leaves a position out of the mean.

        Args:
            logits: the drafter's, fp32, at the first draft position.
            target: the target there: top-k logits in `head`, and `logp` over the vocabulary when it is run.
        """
