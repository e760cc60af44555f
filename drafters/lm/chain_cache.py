"""The state of cached decoding for models with linear attention: chains, taken back by a snapshot.

A layer of linear attention keeps a state of fixed size, from which no token can be cut. So the state is
copied when a round begins, and a round that keeps less than it read returns to the copy; the kept tokens
*wait* and are read again in front of the next round, in the same pass.

Letters: N committed tokens, K nodes of one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from certdraft.support import GrowingLayer, growing_cache

_STATES = ("conv_states", "recurrent_states")
_FLAGS = (
    "is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size"
)  # fmt: skip
_MOST_WAITING = 32  # tokens read again with a round; more of them are read once, by a pass of their own


class ChainCache:
    """`TreeCache` for models that read tokens in order; the same members, and no trees.

    Attributes:
        length: committed tokens, the waiting ones included.
        depths: depth of each node of the round.
        features: [K, L, H] (prefill: [N, L, H]) aux hidden-state layers in the latest pass, or None.
        waiting: committed tokens that the state has not read.
    """

    def __init__(self, config: PretrainedConfig, room: int, name: str) -> None:
        self.past = growing_cache(config, room)
        self.name, self.length = name, 0
        self.depths: list[int] = []
        self.features: Tensor | None = None
        self.waiting: list[int] = []
        self._tokens: list[int] = []  # of the round's nodes
        self._snapshot: list[dict[str, Any] | None] = []
        self._read = 0  # tokens in the snapshot

    @property
    def num_nodes(self) -> int:
        """Nodes appended since the last `keep`."""
        return len(self.depths)

    @property
    def overdue(self) -> bool:
        """Whether so many tokens wait that they should be read now, for good."""
        return not self.num_nodes and len(self.waiting) > _MOST_WAITING

    def append(self, parents: Sequence[int]) -> None:
        """Record new nodes; the first ones of a round take the snapshot."""
        old = self.num_nodes
        if list(parents) != list(range(old - 1, old + len(parents) - 1)):
            raise ValueError(
                f"{self.name} has linear_attention layers, which read tokens in order, so it decodes chains "
                f"and no token trees; this round has parents {list(parents)}. Use the builder Chain."
            )
        if not old:
            self._snapshot = [_copied(layer) for layer in self.past.layers]
            self._read = self.length - len(self.waiting)
        self.depths += range(old, old + len(parents))

    def remember(self, tokens: Sequence[int]) -> None:
        """Record which tokens the nodes are, once they have been read."""
        self._tokens += tokens

    def keep(self, path: Sequence[int]) -> None:
        """Commit the first nodes of the round and drop the others; see `TreeCache.keep`."""
        path = list(path)
        if path != list(range(len(path))) or len(path) > self.num_nodes:
            raise ValueError(
                f"path {path} does not lead down from the root of this chain of {self.num_nodes} nodes."
            )
        if len(path) == self.num_nodes:
            self.waiting = self.waiting if not path else []
        else:
            for layer, states in zip(self.past.layers, self._snapshot, strict=True):
                _restore(layer, states, self._read)
            self.waiting = self.waiting + self._tokens[: len(path)]
        self.length += len(path)
        self.depths, self._tokens, self._snapshot = [], [], []

    def mask(self, num_new: int, dtype: torch.dtype, device: torch.device) -> None:
        """No mask: a chain is plain causal attention."""
        return None


def _copied(layer: Any) -> dict[str, Any] | None:
    """States of a layer of linear attention, which later passes write in place; None for keys and values."""
    if isinstance(layer, GrowingLayer):
        return None
    states = {
        name: {key: None if x is None else x.clone() for key, x in getattr(layer, name).items()}
        for name in _STATES
    }
    return states | {name: dict(getattr(layer, name)) for name in _FLAGS}


def _restore(layer: Any, states: dict[str, Any] | None, length: int) -> None:
    if states is None:
        layer.truncate(length)
        return
    for name, value in states.items():
        setattr(layer, name, value)
