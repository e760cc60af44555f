"""The state of cached tree decoding: keys, values and tree structure of one sequence.

A `TreeCache` holds the keys and values of the committed tokens, then of the nodes of the current round. A
round is any number of forward passes that append nodes (`CachedLM.extend`), ended by one `keep`, which turns
a root path into committed tokens and drops the rest.

Letters: N committed tokens, S nodes of the round, K nodes of one pass.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from certdraft.support import GrowingLayer


class TreeCache:
    """Keys and values of one sequence: `length` committed tokens, then the `num_nodes` nodes of this round.

    Made by `CachedLM.prefill`. Nodes are numbered from 0 in the order they were given since the last `keep`.

    Attributes:
        length: committed tokens.
        depths: depth of each node of the round; 0 for a child of the last committed token.
        features: [K, L, H] (prefill: [N, L, H]) aux hidden-state layers in the latest pass, or None.
    """

    def __init__(self, num_layers: int, room: int) -> None:
        self.layers = [GrowingLayer(room) for _ in range(num_layers)]
        self.past = Cache(layers=[*self.layers])
        self.length = 0
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.features: Tensor | None = None
        self._chain = True  # every node is the child of the one before it
        self._hidden = np.ones((0, 0), dtype=bool)  # [S, S] node i may not see node j

    @property
    def num_nodes(self) -> int:
        """Nodes appended since the last `keep`."""
        return len(self.parents)

    def keep(self, path: Sequence[int]) -> None:
        """Commit the nodes of a path and drop every other node of the round.

        Args:
            path: node numbers from the root down: the first has parent −1, each other one's parent is the
                number before it. Empty: drop the whole round.
        """
        path = list(path)
        for parent, node in pairwise([-1, *path]):
            if not 0 <= node < self.num_nodes or self.parents[node] != parent:
                raise ValueError(
                    f"path {path} does not lead down from the root: node {node} is not a child of {parent} "
                    f"in this round of {self.num_nodes} nodes."
                )
        stay = next((i for i, node in enumerate(path) if node != i), len(path))  # a prefix already in place
        start, moved = self.length + stay, [node - stay for node in path[stay:]]
        with torch.no_grad():
            if moved:
                index = torch.tensor(moved)
                for layer in self.layers:
                    layer.gather(start, index)
            else:
                for layer in self.layers:
                    layer.truncate(start)
        self.length += len(path)
        self.parents, self.depths, self._chain = [], [], True
        self._hidden = self._hidden[:0, :0]

    def append(self, parents: Sequence[int]) -> None:
        """Record new nodes; what each may not see follows from its parent's row."""
        old, new = self.num_nodes, self.num_nodes + len(parents)
        for node, parent in enumerate(parents, start=old):
            if not -1 <= parent < node:
                raise ValueError(
                    f"node {node} has parent {parent}; a parent is an earlier node of the round, or -1 for "
                    "the last committed token."
                )
            self._chain = self._chain and parent == node - 1
        if not self._chain:
            hidden = np.ones((new, new), dtype=bool)
            if self._hidden.shape[0] == old:
                hidden[:old, :old] = self._hidden
            else:  # the round was a chain until now
                hidden[:old, :old] = ~np.tri(old, dtype=bool)
            for node, parent in enumerate(parents, start=old):
                if parent >= 0:
                    hidden[node, :parent] = hidden[parent, :parent]
                    hidden[node, parent] = False
                hidden[node, node] = False
            self._hidden = hidden
        for parent in parents:
            self.parents.append(parent)
            self.depths.append(self.depths[parent] + 1 if parent >= 0 else 0)

    def mask(self, num_new: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Additive [1, 1, K, N + S] mask of the last K nodes; None for a chain: plain causal attention."""
        if self._chain:
            return None
        nodes = self.num_nodes
        hidden = torch.from_numpy(self._hidden[nodes - num_new :])
        mask = torch.zeros(1, 1, num_new, self.length + nodes, dtype=dtype)
        mask[0, 0, :, self.length :].masked_fill_(hidden, torch.finfo(dtype).min)
        return mask.to(device, non_blocking=True)
