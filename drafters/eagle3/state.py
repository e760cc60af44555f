"""Decoding state of an EAGLE head: rows read with the target's features, and tokens still to be read.

The text is 0 … N − 1, the root is N. Rows of tokens 1 … N (the root included) are read with the fused
features of the tokens before them, which the target has computed. `carry` holds the features whose following
token has no row yet, in order; `waiting` the tokens that follow, as far as they are known here. The caller
feeds the rest: pending tokens, then the root.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from certdraft.drafters.lm.tree_cache import TreeCache


class EagleState:
    """Decoding state of one text; see the module.

    Attributes:
        cache: keys and values; `length` rows with true features, then the nodes of this round.
        carry: fused features for the next rows.
        waiting: tokens whose rows come first in the next round.
        blind: nothing has features yet: a text of one token is about to start.
        outputs: what stands in for features below each node of this round.
    """

    carry: Float[Tensor, "C H"]
    outputs: Float[Tensor, "K H"]

    def __init__(self, num_tokens: int) -> None:
        self.cache = TreeCache(1, num_tokens + 256)
        self.waiting: list[int] = []
        self.blind = False
        self._tokens: list[int] = []  # of the round's nodes
        self._front = 0  # nodes at the front of the round that the caller did not feed

    def take(self, tokens: list[int], parents: list[int]) -> Batch:
        """Return the nodes of one call, with the waiting ones in front if it opens the round.

        Raises:
            ValueError: no tokens, lengths that differ, or a round that does not open with the chain of
                committed tokens that ends in the root.
        """
        if not tokens or len(tokens) != len(parents):
            raise ValueError(f"{len(tokens)} tokens and {len(parents)} parents; each token needs a parent.")
        if self.cache.num_nodes == 0:
            self._front = len(self.waiting)
            chain = max(len(self.carry) + self.blind - self._front, 0)
            if parents[:chain] != list(range(-1, chain - 1)) or len(tokens) < chain:
                raise ValueError(
                    f"this round opens with parents {parents}; {chain} committed tokens, the last of them "
                    "the root, must come first, as a chain."
                )
            parents = [*range(-1, self._front - 1), *(p + self._front for p in parents)]
            tokens = [*self.waiting, *tokens]
            self._tokens, given = [], self._front + chain
        else:
            given, parents = 0, [p + self._front for p in parents]
        if any(parent < self._front for parent in parents[given:]):
            raise ValueError("only the first node of a round is a child of the last committed token.")
        self._tokens += tokens
        return Batch(tokens, parents)

    def feature(self, node: int, parent: int) -> Tensor | None:
        """Feature [1, H] that a node reads beside its token, or None until its parent has been read."""
        given = node - self.blind
        if given < 0:
            return torch.zeros_like(self._like())
        if given < len(self.carry):
            return self.carry[given : given + 1]
        return self.outputs[parent : parent + 1] if parent < self.cache.num_nodes else None

    def _like(self) -> Tensor:
        return self.carry.new_empty(1, self.carry.shape[1])

    def commit(self, path: list[int], new: Float[Tensor, "N H"]) -> None:
        """End a round with `new`, the fused features of all tokens it committed."""
        if self.cache.num_nodes:
            path = [*range(self._front), *(node + self._front for node in path)]
            first = int(self.blind and bool(path))  # the first token of a text has no row
            keep = 0 if first else min(len(path), len(self.carry))
            again = [self._tokens[node] for node in path[max(keep, first) :]]
            self.cache.keep(path)  # checks the path
            self.cache.length -= len(path) - keep
            self.cache.layers[0].truncate(self.cache.length)
            self.waiting, self.carry = again, self.carry[keep:]
            self.blind = self.blind and not first
        elif path:
            raise ValueError(f"path {path} of a round in which nothing was drafted.")
        self.carry = torch.cat([self.carry, new])
        self._tokens = []

    def forget(self) -> None:
        """End a round that committed nothing."""
        self.cache.keep([])
        self._tokens = []


@dataclass(frozen=True)
class Batch:
    """Nodes to be read, in order."""

    tokens: list[int]
    parents: list[int]

    def waves(self, state: EagleState) -> Iterator[tuple[list[int], list[int], Tensor]]:
        """Runs of nodes whose features are known by then: (tokens, parents, features)."""
        done = 0
        first = state.cache.num_nodes
        while done < len(self.tokens):
            features = []
            for node in range(done, len(self.tokens)):
                feature = state.feature(first + node, self.parents[node])
                if feature is None:
                    break
                features.append(feature)
            end = done + len(features)
            yield self.tokens[done:end], self.parents[done:end], torch.cat(features)
            done = end
