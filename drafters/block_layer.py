"""The network of a block drafter: its sizes, and one of its layers (DFlash, arXiv 2602.06036).

Letters: R rows, T tokens of a row, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from certdraft.drafters.layers import MLP, Attention, LayerSizes, RMSNorm, known


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


class BlockLayer(nn.Module):
    """A Qwen3 layer whose keys and values also come from the context, which no norm of its own touches."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        hidden, eps = known(config.hidden_size), known(config.rms_norm_eps)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.self_attn = Attention(config, hidden, qk_norm=True)
        self.mlp = MLP(hidden, known(config.intermediate_size))

    def finish(self, x: Tensor, mixed: Tensor) -> Float[Tensor, "R T H"]:
        """The layer's output, given what its heads found."""
        x = x + self.self_attn.output(mixed)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out
