"""The network of an EAGLE-3 head: its sizes, and its one layer (arXiv 2503.01840).

Letters: R rows, T tokens of a row, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from certdraft.drafters.features.transformer_layer import DecoderLayer, LayerSizes, RMSNorm, known


@dataclass(frozen=True)
class EagleConfig(LayerSizes):
    """The network of an `EagleDrafter`. What is left open is taken from the target.

    Args:
        target_layer_ids: target layers whose outputs are read, 0-based and ascending; None: a low, a middle
            and a high one.
        draft_vocab_size: tokens the head can propose; None: all of the target's.
        qk_norm: normalise queries and keys per head; few engines serve such heads.
    """

    target_layer_ids: tuple[int, ...] | None = None
    draft_vocab_size: int | None = None
    qk_norm: bool = False


class EagleLayer(DecoderLayer):
    """The one layer: attention reads (token, feature) pairs, the residual stream is the feature."""

    def __init__(self, config: EagleConfig) -> None:
        hidden = known(config.hidden_size)
        super().__init__(config, 2 * hidden, config.qk_norm)
        self.hidden_norm = RMSNorm(hidden, known(config.rms_norm_eps))

    def read(
        self, embedded: Float[Tensor, "R T H"], feature: Float[Tensor, "R T H"]
    ) -> Float[Tensor, "R T 2H"]:
        """Input of attention: normed embedding and normed feature, side by side."""
        return torch.cat([self.input_layernorm(embedded), self.hidden_norm(feature)], -1)
