"""Decoding state of a DSpark drafter: the context's keys and values, and the block of the round.

The block is drafted once, when the root is fed. Nodes fed after it cost a row of the correction each: a node
at depth d below the root takes position d of the block.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from certdraft.drafters.lm.tree_cache import TreeCache


class DSparkState(TreeCache):
    """Decoding state of one text; see the module.

    Attributes:
        hidden: states at the drafting positions of the round's block; None: the round is not open.
        base: fp32 logits there, without a correction.
        confidence: chance that the draft token after each node of the latest call is accepted, as the
            confidence head estimates it; None without one.
    """

    hidden: Float[Tensor, "D H"] | None = None
    base: Float[Tensor, "D V"] | None = None
    confidence: Float[Tensor, " K"] | None = None
    _front = 0  # committed tokens in front of the round's root

    def open(self, num: int, hidden: Float[Tensor, "D H"], base: Float[Tensor, "D V"]) -> list[int]:
        """Begin a round with a chain of `num` tokens that ends in its root; returns what `place` does."""
        self.hidden, self.base, self._front = hidden, base, num - 1
        self.append(range(-1, num - 1))
        return [depth - self._front for depth in self.depths]

    def place(self, parents: Sequence[int]) -> list[int]:
        """Depth below the root of new nodes.

        Raises:
            ValueError: a child of a token before the root, or a node below the last position of the block.
        """
        assert self.hidden is not None
        if min(parents) < self._front:
            raise ValueError("only the first node of a round is a child of the last committed token.")
        old, limit = self.num_nodes, len(self.hidden)
        self.append(parents)
        depths = [depth - self._front for depth in self.depths[old:]]
        if max(depths) >= limit:
            raise ValueError(
                f"this block drafts {limit} tokens; a node {max(depths)} below the root has no position in "
                "it. Build trees of max_depth at most the drafter's max_draft_length."
            )
        return depths

    def close(self) -> None:
        """End the round: its nodes and its block are forgotten."""
        self.keep([])
        self.hidden = self.base = self.confidence = None
        self._front = 0
