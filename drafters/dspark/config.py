"""The network of a DSpark drafter: a block drafter's sizes, and those of its two heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from certdraft.drafters.dflash.config import BlockConfig
from certdraft.drafters.features.transformer_layer import known

_MARKOV_STD = 0.01  # of fresh previous-token embeddings: a fresh drafter starts as a DFlash drafter


@dataclass(frozen=True)
class DSparkConfig(BlockConfig):
    """The network of a `DSparkDrafter`. What is left open is taken from the target.

    The arguments of `BlockConfig`, without windows or an order inside the block, and

    Args:
        block_size: B, the root and B − 1 masks; all B positions draft unless `sample_from_anchor` is false.
        markov_rank: r of the low-rank correction by the previous token.
        enable_confidence_head: estimate the chance that each draft token is accepted.
        confidence_head_with_markov: the confidence head reads the previous token's embedding too.
        sample_from_anchor: position k of a block drafts the token after it (DeepSpec, engines); false: the
            token at it, as in DFlash, so that the root's position drafts nothing.

    Raises:
        ValueError: windows or an order, which no reader of the format has; fewer than two draft tokens in a
            block; a rank below 1.
    """

    block_size: int = 7
    markov_rank: int = 256
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True
    sample_from_anchor: bool = True

    def __post_init__(self) -> None:
        if any(view.window is not None or view.causal for view in self.views()):
            raise ValueError(
                "DSpark blocks are read in both directions and without windows; leave sliding_window and "
                "causal out, and layer_types or full_attention in all. Windows: use a BlockDrafter."
            )
        if self.block_size - (not self.sample_from_anchor) < 2:
            raise ValueError(
                f"a block of {self.block_size} with sample_from_anchor {self.sample_from_anchor} drafts "
                "fewer than two tokens; only from the second on is there a drafted token to correct by."
            )
        if self.markov_rank < 1:
            raise ValueError(
                f"markov_rank is {self.markov_rank}; must be at least 1. Without the correction the drafter "
                "is a BlockDrafter."
            )


class MarkovHead(nn.Module):
    """Low-rank bias of the logits by the previous token: row of `markov_w1`, then `markov_w2`."""

    def __init__(self, vocab_size: int, rank: int) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, vocab_size, bias=False)

    def forward(self, ids: Int[Tensor, "*step"]) -> Float[Tensor, "*step E"]:
        """Embeddings of previous tokens; the bias of the logits is `markov_w2` of them."""
        embeddings: Tensor = self.markov_w1(ids)
        return embeddings


class ConfidenceHead(nn.Module):
    """Logit of the chance that a draft token is accepted."""

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__()
        self.num_inputs = known(config.hidden_size)
        if config.confidence_head_with_markov:
            self.num_inputs += config.markov_rank
        self.proj = nn.Linear(self.num_inputs, 1)

    def forward(self, hidden: Float[Tensor, "*step H+E"]) -> Float[Tensor, "*step"]:
        """From the state of the block, followed by the previous token's embedding, which it may not read."""
        logits: Tensor = self.proj(hidden[..., : self.num_inputs])
        return logits.squeeze(-1)


@torch.no_grad()
def initialise_heads(markov: MarkovHead, confidence: ConfidenceHead | None) -> None:
    """Draw what `initialise` does not: embeddings of previous tokens, and biases, which start at zero."""
    nn.init.normal_(markov.markov_w1.weight, std=_MARKOV_STD)
    if confidence is not None:
        nn.init.zeros_(confidence.proj.bias)
