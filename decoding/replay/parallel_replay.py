"""Best-first trees at every place of a recorded text, grown together: replay without the sequential loop.

Where a round will start is not known in advance, but what its tree would be is, place by place: the drafter's
context there is the text. So the trees of a stretch of places are grown at once. The stretch itself is fed as
a chain of nodes, each of which is the root of its own tree; each drafter pass then reads what all the trees
ask for. More nodes are read than in the live loop, in far fewer passes.

Letters: C places of a stretch. Source: PERFORMANCE section 5 ("batch all roots in parallel").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from certdraft.decoding.draft_session import narrow_draft
from certdraft.decoding.loop import Round, candidates_along
from certdraft.decoding.trees.builders import BestFirst, Growth, best_known
from certdraft.decoding.trees.ranking import rank_of, top_rows
from certdraft.decoding.trees.tree import Node, Row, Tree
from certdraft.drafters import Drafter

_NODES = 1024  # of one round of the drafter, at most
_LOGITS = 1 << 25  # entries of one pass's logits, at most


def walk_text(tree_at: Callable[[int], Tree], tokens: Sequence[int], prompt: int) -> list[Round]:
    """The rounds of a live decoding of a known greedy text.

    Args:
        tree_at: the tree that a round has when `tokens[:place]` are committed.
        tokens: the target's greedy continuation.
        prompt: tokens before it.
    """
    rounds: list[Round] = []
    done = 0
    while done < len(tokens):
        tree, path, accepted = tree_at(done), [0], 0
        while done + accepted < len(tokens):
            child = tree.children[path[-1]].get(tokens[done + accepted])
            if child is None:
                break
            path.append(child)
            accepted += 1
        committed = min(accepted + 1, len(tokens) - done)  # an accepted stop token is followed by nothing
        depth, expected = max(tree.depths), tree.expected_accepted
        offered = candidates_along(tree, path[:committed])
        rounds.append(
            Round(prompt - 1 + done, tree.num_nodes, depth, expected, accepted, committed, candidates=offered)
        )
        done += committed
    return rounds


def marginal_tree(root: int, rows: Sequence[Row], builder: BestFirst, depth: int) -> Tree:
    """The best-first tree over marginals that are known, at most `depth` deep."""
    if depth == 0:
        return Tree.root_only(root)
    growth = Growth(_Read("marginal"), root, builder.budget, depth, builder.temperature, list(rows))
    return growth.tree(list(islice(growth.stream(), builder.budget)))


def grow_everywhere(
    drafter: Drafter, prompt_ids: Sequence[int], tokens: Sequence[int], builder: BestFirst, limit: int
) -> list[Tree]:
    """The tree that a round would have at each place of the text, `tokens[:i]` being committed.

    Args:
        drafter: conditional, reads tokens only.
        prompt_ids: at least one token.
        tokens: the target's greedy continuation.
        builder: the trees.
        limit: `max_new_tokens` of the live loop.

    Raises:
        NonFiniteLogits: the drafter's logits are not finite.
    """
    text = [*prompt_ids[-1:], *tokens[:-1]]
    stretch = max(1, min(_NODES, _LOGITS // drafter.vocab_size) // builder.budget)
    state = drafter.start(prompt_ids[:-1])
    trees: list[Tree] = []
    for begin in range(0, len(text), stretch):
        roots = text[begin : begin + stretch]
        trees += _Stretch(drafter, state, roots, builder, limit - begin - 1).grow()
        drafter.commit(state, range(len(roots)))
    return trees


class _Stretch:
    """The trees at C places that follow each other, in one round of the drafter."""

    def __init__(
        self, drafter: Drafter, state: object, roots: Sequence[int], builder: BestFirst, room: int
    ) -> None:
        self.state, self.builder = state, builder
        self.draft, self.draft_ids = narrow_draft(drafter)
        logits = self.draft(state, roots, range(-1, len(roots) - 1))
        self.fed = len(roots)
        rows = top_rows(logits, builder.budget, builder.temperature, self.draft_ids)
        depths = [min(builder.max_depth, room - place) for place in range(len(roots))]
        self.growths = [
            Growth(_Read("conditional"), root, builder.budget, depth, builder.temperature, [row])
            if depth > 0
            else None
            for root, depth, row in zip(roots, depths, rows, strict=True)
        ]
        self.roots = roots
        self.numbers = [[place] for place in range(len(roots))]  # per place: tree's own number -> drafter's

    def grow(self) -> list[Tree]:
        """Pass by pass, until every tree is certain."""
        trees = [Tree.root_only(root) for root in self.roots]
        open_places = [place for place, growth in enumerate(self.growths) if growth is not None]
        while open_places:
            asked = []
            for place in open_places:
                growth = self.growths[place]
                assert growth is not None
                nodes, unread = best_known(growth, self.builder.budget, self.builder.frontier)
                if unread:
                    asked.append((place, growth, unread))
                else:
                    trees[place] = growth.tree(nodes)
            self._read(asked)
            open_places = [place for place, *_ in asked]
        return trees

    def _read(self, asked: Sequence[tuple[int, Growth, list[Node]]]) -> None:
        """One drafter pass for all trees that ask."""
        tokens = [node.token for _, _, nodes in asked for node in nodes]
        if not tokens:
            return
        parents = [
            self.numbers[place][parent] for place, growth, nodes in asked for parent in growth.parents(nodes)
        ]
        logits = self.draft(self.state, tokens, parents)
        rows = iter(top_rows(logits, self.builder.budget, self.builder.temperature, self.draft_ids))
        for place, growth, nodes in asked:
            growth.receive(nodes, [next(rows) for _ in nodes])
            self.numbers[place] += range(self.fed, self.fed + len(nodes))
            self.fed += len(nodes)


class _Read:
    """Stands in for a drafter whose rows are known already."""

    def __init__(self, kind: Literal["conditional", "marginal"]) -> None:
        self.kind = kind

    def __call__(self, tokens: Sequence[int], parents: Sequence[int]) -> Float[Tensor, "K V"]:
        raise AssertionError("this tree is handed its rows")


_LOGITS = 1 << 25  # entries held at a time


class OnePass:
    """A drafter's answers along a text.

    Args:
        drafter: with `hidden` and `head`, or `paths`.
        prompt_ids: at least one token.
        tokens: the text after it.
        depth: draft depth wanted, >= 1.
        features: as in `replay`.
    """

    def __init__(
        self,
        drafter: Drafter,
        prompt_ids: Sequence[int],
        tokens: Sequence[int],
        depth: int,
        features: Float[Tensor, "T L H"] | None = None,
    ) -> None:
        self.drafter, self.tokens = drafter, tokens
        self.by_depth = bool(drafter.taps) or drafter.kind == "marginal"
        device = next(drafter.parameters()).device
        ids = torch.tensor([*prompt_ids, *tokens], device=device)[None]
        place = torch.arange(ids.shape[1], device=device)[None]
        document = torch.zeros_like(ids)
        counted = (place >= len(prompt_ids) - 1) & (place < ids.shape[1] - 1)
        if not self.by_depth:
            hidden = drafter.hidden(ids[:, :-1], place[:, :-1], document[:, :-1])
            self.hidden: Float[Tensor, "T D H"] = hidden[0, len(prompt_ids) - 1 :, None]
            return
        given = None
        if features is not None:  # nothing reads the last token's, but a batch has one for every token
            last = features.new_zeros(1, *features.shape[1:])
            given = torch.cat([features[: ids.shape[1] - 1], last])[None]
        self.hidden = drafter.paths(ids, place, document, counted, given, depth, every=True).hidden

    @property
    def whole(self) -> bool:
        """Whether every place has an answer; an EAGLE head has none at the first token of a document."""
        return len(self.hidden) == len(self.tokens)

    @property
    def depth(self) -> int | None:
        """Depths answered for; None: any."""
        return self.hidden.shape[1] if self.by_depth else None

    def ranks(self) -> list[list[int]]:
        """Rank of the true token at each place and depth, [T][D]; 0 = the drafter's first choice."""
        ranks: list[list[int]] = []
        size = self.hidden.shape[1]
        wanted = torch.tensor([*self.tokens, *[0] * size], device=self.hidden.device).unfold(0, size, 1)
        for begin, logits in self._logits():
            true = wanted[begin : begin + len(logits)]
            found = rank_of(logits.flatten(0, 1), true.flatten())
            ranks += found.view(-1, size).tolist()
        return ranks

    def rows(self, width: int, temperature: float) -> list[list[Row]]:
        """The most probable tokens at each place and depth, [T][D]."""
        rows: list[list[Row]] = []
        size = self.hidden.shape[1]
        for _, logits in self._logits():
            flat = top_rows(logits.flatten(0, 1), width, temperature)
            rows += [flat[i : i + size] for i in range(0, len(flat), size)]
        return rows

    def _logits(self) -> Iterator[tuple[int, Float[Tensor, "T D V"]]]:
        size = max(1, _LOGITS // (self.drafter.vocab_size * self.hidden.shape[1]))
        for begin in range(0, len(self.hidden), size):
            yield begin, self.drafter.head(self.hidden[begin : begin + size])
