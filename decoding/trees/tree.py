"""Draft trees, and the lazy stream of their nodes in order of probability.

A round starts from the *root*: the last committed token, which no model has read yet. A draft tree hangs from
it; node 0 is the root, nodes 1..n are the n draft tokens, and a parent always comes before its children.
Everything here is plain Python on small integers: a tree has tens of nodes, and the loop reads them one by
one.

Letters: S = 1 + n tree slots. Masses are path probabilities under the drafter, `logmass` their natural
logarithm. Source: DDTree, arXiv 2604.12989, section 3 and proposition 3.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor


@dataclass(frozen=True, eq=True)
class Tree:
    """A draft tree: parallel tuples over its S = 1 + n slots, the root first.

    Attributes:
        tokens: token ids; `tokens[0]` is the root.
        parents: slot of the parent; -1 for the root, always smaller than the slot itself.
        logmass: log of the drafter's path probability, nats, 0 for the root, never above the parent's.
        drafter_ids: the node's index in the drafter's own round, -1 when the drafter has not read that node
            (leaves of an autoregressive draft, every node of a parallel one).
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    logmass: tuple[float, ...]
    drafter_ids: tuple[int, ...]

    @classmethod
    def root_only(cls, root: int) -> Tree:
        """The tree of a plain decoding step."""
        return cls((root,), (-1,), (0.0,), (-1,))

    @classmethod
    def from_parents(cls, tokens: Sequence[int], parents: Sequence[int]) -> Tree:
        """A checked tree with uniform masses that no drafter has read; for tests, profiles and fixed
        topologies.
        """
        tree = cls(tuple(tokens), tuple(parents), (0.0,) * len(tokens), (-1,) * len(tokens))
        tree.check()
        return tree

    @property
    def num_nodes(self) -> int:
        """Draft tokens in the tree; the root is not counted."""
        return len(self.tokens) - 1

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Distance from the root, per slot."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def children(self) -> tuple[dict[int, int], ...]:
        """Per slot: token -> slot of the child that carries it."""
        children: tuple[dict[int, int], ...] = tuple({} for _ in self.tokens)
        for slot in range(1, len(self.tokens)):
            children[self.parents[slot]][self.tokens[slot]] = slot
        return children

    @property
    def is_chain(self) -> bool:
        """True when every slot's parent is the slot before it."""
        return all(parent == slot - 1 for slot, parent in enumerate(self.parents))

    @property
    def expected_accepted(self) -> float:
        """Expected accepted draft tokens if the target were the drafter: the sum of the masses (prop. 1)."""
        return math.fsum(math.exp(w) for w in self.logmass[1:])

    def path_to(self, slot: int) -> list[int]:
        """Slots from the root to `slot`, both included."""
        path = []
        while slot >= 0:
            path.append(slot)
            slot = self.parents[slot]
        return path[::-1]

    def visible(self) -> Bool[Tensor, "S S"]:
        """Ancestor mask: `visible[i, j]` is true when slot j is slot i or one of its ancestors."""
        size = len(self.tokens)
        mask = torch.zeros(size, size, dtype=torch.bool).numpy()
        for slot, parent in enumerate(self.parents):
            if parent >= 0:
                mask[slot] = mask[parent]
            mask[slot, slot] = True
        return torch.from_numpy(mask)

    def check(self) -> None:
        """Raise ValueError when the tuples do not describe a tree."""
        sizes = {len(self.tokens), len(self.parents), len(self.logmass), len(self.drafter_ids)}
        if len(sizes) != 1 or not self.tokens:
            raise ValueError(
                f"draft tree: fields of different lengths {sorted(sizes)}; one entry per slot is needed"
            )
        if self.parents[0] != -1:
            raise ValueError(f"draft tree: slot 0 is the root, its parent must be -1, not {self.parents[0]}")
        seen: set[tuple[int, int]] = set()
        for slot in range(1, len(self.tokens)):
            edge = (self.parents[slot], self.tokens[slot])
            if not 0 <= edge[0] < slot:
                raise ValueError(
                    f"draft tree: slot {slot} has parent {edge[0]}; parents come before children"
                )
            if edge in seen:
                raise ValueError(
                    f"draft tree: slot {edge[0]} has two children with token {edge[1]}; merge them"
                )
            seen.add(edge)


class Row(NamedTuple):
    """The most probable tokens of a distribution: log-probabilities (<= 0), descending, and their ids."""

    logp: list[float]
    ids: list[int]


class Node(NamedTuple):
    """A popped node: `parent` is its parent's slot (0 = root), `ranks` the path of ranks from the root."""

    logmass: float
    ranks: tuple[int, ...]
    token: int
    parent: int

    @property
    def depth(self) -> int:
        return len(self.ranks)


class NodeStream:
    """Lazy iterator over the prefixes a drafter can propose, most probable first.

    The k-th item becomes slot k of the tree. Order: non-increasing mass, ties by the path of ranks, so that
    any two runs agree and the trees of two budgets are nested. n items cost at most 2n heap pushes.

    Args:
        rows: the distribution after a path of ranks (`()` is the root); None when nothing follows or nothing
            is known. For a parallel drafter it depends on `len(ranks)` only.

    Source: arXiv 2604.12989, algorithm 1 (heap) and proposition 3 (order).
    """

    def __init__(self, rows: Callable[[tuple[int, ...]], Row | None]) -> None:
        self._rows = rows
        # (-logmass, ranks, parent, log mass of the parent, row of the siblings)
        self._heap: list[tuple[float, tuple[int, ...], int, float, Row]] = []
        self._count = 0
        self._push_first((), 0, 0.0)

    def __iter__(self) -> NodeStream:
        return self

    def __next__(self) -> Node:
        heap = self._heap
        if not heap:
            raise StopIteration
        negative, ranks, parent, base, row = heap[0]
        rank = ranks[-1] + 1
        # base + logp, never a difference of sums: rounding is monotone, so the order cannot break
        if rank < len(row.ids) and row.logp[rank] > -math.inf:
            heapq.heapreplace(heap, (-(base + row.logp[rank]), (*ranks[:-1], rank), parent, base, row))
        else:
            heapq.heappop(heap)
        self._count += 1
        self._push_first(ranks, self._count, -negative)
        return Node(-negative, ranks, row.ids[rank - 1], parent)

    def _push_first(self, ranks: tuple[int, ...], slot: int, logmass: float) -> None:
        """The most probable child of a slot, if it has any."""
        row = self._rows(ranks)
        if row is not None and row.logp[0] > -math.inf:
            heapq.heappush(self._heap, (-(logmass + row.logp[0]), (*ranks, 0), slot, logmass, row))


def tree_from_nodes(root: int, nodes: Sequence[Node], drafter_ids: Callable[[tuple[int, ...]], int]) -> Tree:
    """The tree of the first nodes of a stream; `drafter_ids`: path of ranks -> drafter's node, or -1."""
    return Tree(
        (root, *(node.token for node in nodes)),
        (-1, *(node.parent for node in nodes)),
        (0.0, *(node.logmass for node in nodes)),
        (drafter_ids(()), *(drafter_ids(node.ranks) for node in nodes)),
    )
