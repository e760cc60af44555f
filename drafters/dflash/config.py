"""The network of a block drafter: its sizes, and one of its layers (DFlash, arXiv 2602.06036)."""

from __future__ import annotations

from dataclasses import dataclass

from certdraft.drafters.features.transformer_layer import DecoderLayer, LayerSizes, known


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
    """

    num_hidden_layers: int = 5
    block_size: int = 16
    mask_token_id: int | None = None
    target_layer_ids: tuple[int, ...] | None = None


class BlockLayer(DecoderLayer):
    """A Qwen3 layer whose keys and values also come from the context, which it does not normalise."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__(config, known(config.hidden_size), qk_norm=True)
