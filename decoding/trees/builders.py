"""Tree builders: from a drafter's distributions to the draft tree that one target pass will verify.

A builder is a small object with one method, `build`. It queries the drafter through `propose`, never sees its
state, and returns a `Tree`. Two kinds of drafter answer differently:

* *conditional* (autoregressive): each node it reads yields the distribution of that node's children; the mass
  of a node is its path probability, and a deeper tree costs more drafter passes;
* *marginal* (parallel): reading the root yields one distribution per draft depth, [D, V]; the mass of a node
  is the product of marginals, and the tree costs no further pass.

Letters: K nodes of one drafter pass, V vocabulary, D draft depth. Sources: DDTree arXiv 2604.12989 for the
order; the conditional version is ours; `BestFirst` has the argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Literal, Protocol

from jaxtyping import Float
from torch import Tensor

from certdraft.decoding.trees.ranking import top_rows
from certdraft.decoding.trees.tree import Node, NodeStream, Row, Tree, tree_from_nodes

Ranks = tuple[int, ...]


class Propose(Protocol):
    """The drafter's side of one round.

    The first call must be `propose([root], [-1])`; nodes are then numbered 0, 1, ... in the order they were
    given, and `parents` refers to those numbers.

    Optional: `draft_ids`, the ascending ids of the tokens that can be proposed. Nodes are then ranked among
    those only, and the logits may be of those only, [K, D]. `confidence`, the chance [K] that the token
    drafted after each node of the latest call is accepted, from drafters with a head that estimates it; None
    from others. `limit`, the draft tokens on one path at the most; None: any.
    """

    kind: Literal["conditional", "marginal"]

    def __call__(self, tokens: Sequence[int], parents: Sequence[int]) -> Float[Tensor, "K V"]:
        """fp32 logits after each node, [K, V]; from a marginal drafter one row per draft depth, [D, V]."""
        ...


class TreeBuilder(Protocol):
    """What the loop needs: a tree for this round.

    Optional: `observe(tree, committed, context)` is called after each round with the tree, the tokens it
    committed and the context length it started from.
    """

    def build(self, propose: Propose, root: int, *, max_depth: int, context: int = 0) -> Tree:
        """The draft tree hanging from `root`.

        Args:
            propose: the drafter.
            root: the last committed token.
            max_depth: draft tokens that can still be used on one path, >= 0.
            context: committed tokens before the root.
        """
        ...


class Chain(TreeBuilder):
    """The drafter's own greedy continuation: one path of `depth` draft tokens.

    Args:
        depth: draft tokens per round, >= 1.
    """

    def __init__(self, depth: int = 4) -> None:
        self.depth = positive("Chain.depth", depth)

    def __repr__(self) -> str:
        return f"chain(depth={self.depth})"

    def build(self, propose: Propose, root: int, *, max_depth: int, context: int = 0) -> Tree:
        """See `TreeBuilder.build`; one drafter pass per draft token, the last token is not read."""
        depth = min(self.depth, max_depth)
        if depth == 0:
            return Tree.root_only(root)
        tokens, logmass, total = [root], [0.0], 0.0
        draft_ids = getattr(propose, "draft_ids", None)
        rows = top_rows(propose(tokens, (-1,)), 1, draft_ids=draft_ids)
        if propose.kind == "marginal":
            rows = rows[:depth]
        else:
            for node in range(1, depth):
                rows += top_rows(propose(rows[-1].ids, (node - 1,)), 1, draft_ids=draft_ids)
        for row in rows:
            total += row.logp[0]
            tokens.append(row.ids[0])
            logmass.append(total)
        read = 1 if propose.kind == "marginal" else len(rows)
        return Tree(
            tuple(tokens),
            tuple(range(-1, len(rows))),
            tuple(logmass),
            (*range(read), *(-1 for _ in range(len(rows) + 1 - read))),
        )


class StaticTree(TreeBuilder):
    """A fixed shape: every node at draft depth d - 1 has its `widths[d - 1]` most probable children.

    Args:
        widths: children per node, depth by depth, each >= 1; `(4, 2, 1)` has 4 + 8 + 8 = 20 nodes.
    """

    def __init__(self, widths: Sequence[int] = (4, 2, 1)) -> None:
        if not widths:
            raise ValueError(
                "StaticTree.widths is empty; give the number of children at each depth, such as (4, 2, 1)"
            )
        self.widths = tuple(positive("StaticTree.widths", width) for width in widths)

    def __repr__(self) -> str:
        return f"static(widths={'x'.join(map(str, self.widths))})"

    def build(self, propose: Propose, root: int, *, max_depth: int, context: int = 0) -> Tree:
        """See `TreeBuilder.build`; one drafter pass per depth."""
        widths = self.widths[:max_depth]
        if not widths:
            return Tree.root_only(root)
        tokens, parents, logmass, drafter_ids = [root], [-1], [0.0], [0]
        marginal, draft_ids = propose.kind == "marginal", getattr(propose, "draft_ids", None)
        logits = propose([root], [-1])
        level, read = [0], 1
        for depth, width in enumerate(widths):
            if marginal:
                if depth == logits.shape[0]:
                    break
                fitting = _fits("StaticTree.widths", width, logits)
                rows = top_rows(logits[depth : depth + 1], fitting, draft_ids=draft_ids) * len(level)
            else:
                if depth:
                    logits = propose(
                        [tokens[slot] for slot in level], [drafter_ids[parents[slot]] for slot in level]
                    )
                    for slot in level:
                        drafter_ids[slot], read = read, read + 1
                rows = top_rows(logits, _fits("StaticTree.widths", width, logits), draft_ids=draft_ids)
            following = []
            for slot, row in zip(level, rows, strict=True):
                for token, logp in zip(row.ids, row.logp, strict=True):
                    following.append(len(tokens))
                    tokens.append(token)
                    parents.append(slot)
                    logmass.append(logmass[slot] + logp)
                    drafter_ids.append(-1)
            level = following
        return Tree(tuple(tokens), tuple(parents), tuple(logmass), tuple(drafter_ids))


class Growth:
    """The part of the drafter's tree of prefixes that is known so far in this round, as rows for a
    `NodeStream`.

    Args:
        propose: the drafter; it reads the root here.
        root: the last committed token.
        width: children kept per node; a tree of `width` nodes never needs more (DDTree, lemma 1).
        max_depth: prefixes longer than this do not exist, >= 1.
        temperature: of the drafter's softmax.
        rows: the drafter's distribution after the root, where it is known already.
    """

    def __init__(
        self,
        propose: Propose,
        root: int,
        width: int,
        max_depth: int,
        temperature: float,
        rows: list[Row] | None = None,
    ) -> None:
        self.root, self.width, self.temperature = root, width, temperature
        self._propose, self._draft_ids = propose, getattr(propose, "draft_ids", None)
        if rows is None:
            rows = top_rows(propose([root], [-1]), width, temperature, self._draft_ids)
        self.marginal = propose.kind == "marginal"
        self.max_depth = min(max_depth, len(rows)) if self.marginal else max_depth
        self._levels = rows
        self._rows: dict[Ranks, Row] = {(): rows[0]}
        self._numbers: dict[Ranks, int] = {(): 0}
        self.passes: list[int] = [1]  # nodes read by each drafter pass

    def stream(self) -> NodeStream:
        """A fresh stream over everything known."""
        return NodeStream(self.row)

    def row(self, ranks: Ranks) -> Row | None:
        """The distribution after a prefix, None beyond `max_depth` or where the drafter has not read yet."""
        if len(ranks) >= self.max_depth:
            return None
        return self._levels[len(ranks)] if self.marginal else self._rows.get(ranks)

    def unread(self, nodes: Sequence[Node]) -> list[Node]:
        """The nodes whose children are unknown but may exist."""
        if self.marginal:
            return []
        return [node for node in nodes if len(node.ranks) < self.max_depth and node.ranks not in self._rows]

    def read(self, nodes: Sequence[Node]) -> None:
        """One drafter pass over nodes whose parents have been read."""
        logits = self._propose([node.token for node in nodes], self.parents(nodes))
        self.receive(nodes, top_rows(logits, self.width, self.temperature, self._draft_ids))

    def parents(self, nodes: Sequence[Node]) -> list[int]:
        """Numbers of the nodes' parents among those read, the root being 0."""
        return [self._numbers[node.ranks[:-1]] for node in nodes]

    def receive(self, nodes: Sequence[Node], rows: Sequence[Row]) -> None:
        """Store the distribution after each of these nodes, numbered in this order."""
        for node, row in zip(nodes, rows, strict=True):
            self._numbers[node.ranks] = len(self._numbers)
            self._rows[node.ranks] = row
        self.passes.append(len(nodes))

    def mean_top_probability(self) -> float:
        """Mean probability of the most probable child over the nodes read so far, in (0, 1]."""
        return sum(math.exp(row.logp[0]) for row in self._rows.values()) / len(self._rows)

    def tree(self, nodes: Sequence[Node]) -> Tree:
        """The tree of the first nodes of a stream."""
        return tree_from_nodes(self.root, nodes, lambda ranks: self._numbers.get(ranks, -1))


class BestFirst(TreeBuilder):
    """The `budget` most probable prefixes under the drafter: the tree with the largest expected accepted
    length.

    Exact for both kinds of drafter, among prefixes of at most `max_depth` tokens. With a marginal drafter it
    is DDTree: one pass, then the heap. With a conditional one, each pass reads every unread node among the
    `budget - 1` best known prefixes, until there is none. Such a node's best child may be as probable as the
    node, so no exact method can leave it unread; a node outside cannot have a descendant inside, since masses
    only fall and known prefixes only get overtaken. Hence the tree is exact, and the number of passes, at
    most 1 + the depth of the tree, is the least possible. `frontier` trades passes for wasted nodes: it caps
    the nodes read per pass, best first; the tree is the same for every value.

    Args:
        budget: draft tokens to verify in one target pass, >= 1.
        max_depth: longest path, >= 1; the number of drafter passes a conditional drafter may cost.
        temperature: of the drafter's softmax, > 0.
        frontier: nodes read per drafter pass, None = all.

    Source: arXiv 2604.12989, propositions 1-3 (marginals).
    """

    def __init__(
        self, budget: int = 16, max_depth: int = 8, temperature: float = 1.0, frontier: int | None = None
    ) -> None:
        self.budget = positive("BestFirst.budget", budget)
        self.max_depth = positive("BestFirst.max_depth", max_depth)
        self.frontier = None if frontier is None else positive("BestFirst.frontier", frontier)
        self.temperature = positive_temperature("BestFirst.temperature", temperature)

    def __repr__(self) -> str:
        return f"best_first(budget={self.budget}, max_depth={self.max_depth})"

    def build(self, propose: Propose, root: int, *, max_depth: int, context: int = 0) -> Tree:
        """See `TreeBuilder.build`."""
        depth = min(self.max_depth, max_depth)
        if depth == 0:
            return Tree.root_only(root)
        growth = Growth(propose, root, self.budget, depth, self.temperature)
        nodes = grow_exactly(growth, self.budget, self.frontier)
        return growth.tree(nodes)


def grow_exactly(growth: Growth, budget: int, frontier: int | None) -> list[Node]:
    """Read until the `budget` most probable prefixes are certain; see `BestFirst`."""
    while True:
        nodes, unread = best_known(growth, budget, frontier)
        if not unread:
            return nodes
        growth.read(unread)


def best_known(growth: Growth, budget: int, frontier: int | None) -> tuple[list[Node], list[Node]]:
    """The `budget` most probable known prefixes, and those of them that must be read to be certain of it."""
    nodes = list(islice(growth.stream(), budget))
    return nodes, growth.unread(nodes[: budget - 1])[:frontier]


class CutChain(Chain):
    """The drafter's greedy continuation, cut before the first token whose confidence is below a threshold.

    The confidence is that of a trained head (`DSparkDrafter`), which estimates the acceptance rate
    Σ min(p, q) of the token's distribution; the cut is that of DeepSpec's evaluation. Rounds may go
    undrafted, and their text is the target's all the same.

    Args:
        depth: draft tokens per round at the most, >= 1.
        threshold: lowest confidence of a token that is verified, in [0, 1].

    Raises:
        ValueError: a depth below 1, a threshold outside [0, 1]; in decoding, a drafter without a confidence
            head.
    """

    def __init__(self, depth: int = 7, threshold: float = 0.5) -> None:
        super().__init__(depth)
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"CutChain.threshold is {threshold}; it is a probability, in [0, 1]")
        self.threshold = threshold

    def __repr__(self) -> str:
        return f"cut_chain(depth={self.depth}, threshold={self.threshold})"

    def build(self, propose: Propose, root: int, *, max_depth: int, context: int = 0) -> Tree:
        """See `TreeBuilder.build`; one drafter pass per draft token, and one that finds where to cut."""
        depth = min(self.depth, max_depth)
        if depth == 0:
            return Tree.root_only(root)
        tokens, logmass = [root], [0.0]
        read = 0
        draft_ids = getattr(propose, "draft_ids", None)
        for node in range(depth):
            row = top_rows(propose(tokens[-1:], (node - 1,)), 1, draft_ids=draft_ids)[0]
            read += 1
            confidence = getattr(propose, "confidence", None)
            if confidence is None:
                raise ValueError(
                    "CutChain cuts by a trained confidence head, and this drafter has none; use Chain, or "
                    "CostAware, which cuts by the drafter's probabilities."
                )
            if float(confidence[-1]) < self.threshold:
                break
            tokens.append(row.ids[0])
            logmass.append(logmass[-1] + row.logp[0])
        ids = (*range(min(read, len(tokens))), *(-1 for _ in range(len(tokens) - read)))
        return Tree(tuple(tokens), tuple(range(-1, len(tokens) - 1)), tuple(logmass), ids)


def positive(name: str, value: int) -> int:
    """Return the value; raise ValueError below 1."""
    if value < 1:
        raise ValueError(f"{name} is {value}; it counts tokens and must be at least 1")
    return int(value)


def positive_temperature(name: str, value: float) -> float:
    """Return the value; raise ValueError unless it is above 0."""
    if not value > 0:
        raise ValueError(f"{name} is {value}; a softmax needs a temperature above 0")
    return float(value)


def _fits(name: str, width: int, logits: Tensor) -> int:
    if width > logits.shape[-1]:
        raise ValueError(
            f"{name} asks for {width} children but the drafter's vocabulary has {logits.shape[-1]} tokens"
        )
    return width
