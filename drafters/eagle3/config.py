"""The network of an EAGLE-3 head: its sizes, and its one layer (arXiv 2503.01840).

Letters: R rows, T tokens of a row, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from certdraft.drafters.features.grouped_attention import grouped_attention
from certdraft.drafters.features.transformer_layer import DecoderLayer, LayerSizes, RMSNorm, known
from certdraft.drafters.features.visible_spans import VisibleSpans


@dataclass(frozen=True)
class EagleConfig(LayerSizes):
    """The network of an `EagleDrafter`. What is left open is taken from the target.

    Args:
        target_layer_ids: target layers whose outputs are read, 0-based and ascending; None: a low, a middle
            and a high one.
        draft_vocab_size: tokens the head can propose; None: all of the target's.
        qk_norm: normalise queries and keys per head; few engines serve such heads.
        norm_before_residual: the normed feature, not the feature itself, starts the residual stream.
        norm_before_fc: one norm over the features of all target layers before `fc`.
        fc_norm: a norm over the features of each target layer before `fc`, in place of `norm_before_fc`.
        norm_output: down a round the drafter's output stands in for features after its norm, not before.

    Raises:
        ValueError: `norm_before_fc` and `fc_norm` together.
    """

    target_layer_ids: tuple[int, ...] | None = None
    draft_vocab_size: int | None = None
    qk_norm: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False

    def __post_init__(self) -> None:
        if self.norm_before_fc and self.fc_norm:
            raise ValueError("norm_before_fc and fc_norm norm the same features; choose one of them.")


class EagleLayer(DecoderLayer):
    """The one layer: attention reads (token, feature) pairs, the residual stream starts as the feature."""

    def __init__(self, config: EagleConfig) -> None:
        hidden = known(config.hidden_size)
        super().__init__(config, 2 * hidden, config.qk_norm)
        self.hidden_norm = RMSNorm(hidden, known(config.rms_norm_eps))
        self.norm_before_residual = config.norm_before_residual

    def read(
        self, embedded: Float[Tensor, "R T H"], feature: Float[Tensor, "R T H"]
    ) -> tuple[Float[Tensor, "R T 2H"], Float[Tensor, "R T H"]]:
        """Input of attention (normed embedding and feature side by side), and the start of the residual."""
        normed = self.hidden_norm(feature)
        read = torch.cat([self.input_layernorm(embedded), normed], -1)
        return read, normed if self.norm_before_residual else feature

    def forward(
        self,
        embedded: Float[Tensor, "R T H"],
        state: Float[Tensor, "R T H"],
        positions: Int[Tensor, "R T"],
        visible: VisibleSpans,
        *seen: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One unroll step of training: its output, keys and values.

        Each row attends to the first step's rows up to its own, and in later steps to its own row alone.

        Args:
            embedded: embeddings of the tokens.
            state: features, or the output of the step before.
            positions: of the rows.
            visible: which rows of the first step a row, a group of its own, sees.
            seen: keys and values of the steps before, in turn.
        """
        read, residual = self.read(embedded, state)
        queries = self.self_attn.queries(read, positions)
        keys, values = self.self_attn.keys_values(read, positions)
        context = (seen[0], seen[1]) if seen else (keys, values)
        own = None
        if seen:
            own = torch.stack([*seen[2::2], keys], 3), torch.stack([*seen[3::2], values], 3)
        mixed = grouped_attention(queries[:, :, :, None], context, own, visible, "eagle").squeeze(3)
        return self.finish(residual, mixed), keys, values
