"""The network of a block drafter: its sizes, and one of its layers (DFlash, arXiv 2602.06036).

Letters: R rows, A anchors of a row, Q positions of a block, T context tokens, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from certdraft.drafters.dflash.windows import View, views
from certdraft.drafters.features.grouped_attention import grouped_attention
from certdraft.drafters.features.transformer_layer import DecoderLayer, KeysValues, LayerSizes, known
from certdraft.drafters.features.visible_spans import VisibleSpans


@dataclass(frozen=True)
class BlockConfig(LayerSizes):
    """The network of a `BlockDrafter`. What is left open is taken from the target.

    Args:
        num_hidden_layers: layers of the drafter.
        block_size: B: the root and B − 1 drafted positions.
        mask_token_id: row of the target's embedding that stands for "not drafted yet"; one that no text uses.
            None: the first one after the tokenizer's last id is found in training.
        target_layer_ids: target layers whose outputs are read, 0-based and ascending; None: as many as the
            drafter has, evenly spread.
        layer_types: of each layer "full_attention" or "sliding_attention"; None: full attention in all.
        sliding_window: positions that a query of a sliding layer sees, its own included.
        causal: inside the block positions see only earlier ones; None: in sliding layers, not in others.

    Raises:
        ValueError: layer types that do not fit the number of layers, or the window.
    """

    num_hidden_layers: int = 5
    block_size: int = 16
    mask_token_id: int | None = None
    target_layer_ids: tuple[int, ...] | None = None
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = None
    sliding_window: int | None = None
    causal: bool | None = None

    def __post_init__(self) -> None:
        self.views()

    def views(self) -> tuple[View, ...]:
        """What each layer lets a position see."""
        return views(self.num_hidden_layers, self.layer_types, self.sliding_window, self.causal)


class BlockLayer(DecoderLayer):
    """A Qwen3 layer whose keys and values also come from the context, which it does not normalise."""

    def __init__(self, config: BlockConfig, view: View) -> None:
        super().__init__(config, known(config.hidden_size), qk_norm=True)
        self.view = view

    def context(self, fused: Float[Tensor, "R T H"], positions: Int[Tensor, "R T"]) -> KeysValues:
        """Keys and values of the context."""
        return self.self_attn.keys_values(fused, positions)

    def forward(
        self,
        x: Float[Tensor, "R A*Q H"],
        keys: Tensor,
        values: Tensor,
        places: Int[Tensor, "R A*Q"],
        visible: VisibleSpans,
    ) -> Float[Tensor, "R A*Q H"]:
        """One pass over all blocks of a row, for training.

        Args:
            x: residual stream of the blocks, one after the other.
            keys: of `context`.
            values: of `context`.
            places: positions in their documents.
            visible: what the blocks see in this layer; see `View.spans`.
        """
        read, attention = self.input_layernorm(x), self.self_attn
        groups = (-1, x.shape[1] // visible.num_groups)
        own_keys, own_values = (part.unflatten(2, groups) for part in attention.keys_values(read, places))
        queries = attention.queries(read, places).unflatten(2, groups)
        mixed = grouped_attention(queries, (keys, values), (own_keys, own_values), visible, "block")
        return self.finish(x, mixed.flatten(2, 3))
