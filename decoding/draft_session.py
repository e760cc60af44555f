"""The drafter's side of a text: its cache, what it has not read yet, and which of its nodes were committed.

A drafter lags behind the committed text: the last accepted token of a round is often a leaf it never read,
and it reads nothing in a round without a draft. The session remembers those *pending* tokens and puts them in
front of the root in the next draft pass, so builders always see a round that starts at the root.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from certdraft.decoding.cost.cost_model import Clock
from certdraft.decoding.trees.tree import Tree
from certdraft.drafters import Drafter
from certdraft.support import pack_linears


def narrow_draft(
    drafter: Drafter,
) -> tuple[Callable[[Any, Sequence[int], Sequence[int]], Tensor], Int[Tensor, " D"] | None]:
    """`draft_narrow` and `draft_ids` of a drafter; of an object without them, `draft` and None."""
    return getattr(drafter, "draft_narrow", drafter.draft), getattr(drafter, "draft_ids", None)


class DraftSession:
    """One drafter on one text; callable as the builders' `Propose`.

    Args:
        drafter: the drafter.
        ids: the prompt without its last token.
        clock: charged for every drafter pass.
        features: tapped target layers at `ids`, for drafters that read them.
        whole: return logits over the whole vocabulary where there is a draft vocabulary too.
    """

    def __init__(
        self,
        drafter: Drafter,
        ids: Sequence[int],
        clock: Clock,
        features: Float[Tensor, "N L H"] | None = None,
        whole: bool = False,
    ) -> None:
        self.drafter, self.clock = drafter, clock
        narrow, self.draft_ids = narrow_draft(drafter)
        self._draft = drafter.draft if whole else narrow
        if isinstance(drafter, nn.Module):
            pack_linears(drafter)
        self.kind: Literal["conditional", "marginal"] = drafter.kind
        self.confidence: Float[Tensor, " K"] | None = None
        self.limit: int | None = getattr(drafter, "max_draft_length", None)
        self.draft_s = self.host_s = 0.0
        self._state = drafter.start(ids) if features is None else drafter.start(ids, features)
        self._pending: list[int] = []
        self._offset: int | None = None  # pending tokens read in this round; None: nothing read yet
        self._context = len(ids)

    def begin(self) -> None:
        """Open a round."""
        self.draft_s = self.host_s = 0.0

    def __call__(self, tokens: Sequence[int], parents: Sequence[int]) -> Float[Tensor, "K V"]:
        """One drafter pass; see `Propose`."""
        first = self._offset is None
        if self._offset is None:
            self._offset = len(self._pending)
        offset = self._offset
        if offset:
            shifted = [parent + offset for parent in parents]  # a parent of -1 becomes the last pending token
            if first:
                tokens = [*self._pending, *tokens]
                shifted = [*range(-1, offset - 1), *shifted]
            parents = shifted
        self.host_s += self.clock.lap("host")
        logits: Tensor = self._draft(self._state, tokens, parents)
        self.draft_s += self.clock.lap("open" if first else "draft", len(tokens), self._context)
        unread = offset if first and self.kind == "conditional" else 0
        confidence = getattr(self._state, "confidence", None)
        self.confidence = None if confidence is None else confidence[unread:]
        return logits[unread:]

    def longest(self, max_depth: int) -> int:
        """Draft tokens on one path at the most: `max_depth`, or fewer where the drafter has no more."""
        return max_depth if self.limit is None else min(max_depth, self.limit)

    def abandon(self) -> None:
        """Drop everything the drafter read in this round."""
        if self._offset is not None:
            self.drafter.commit(self._state, [])
            self._offset = None

    def commit(self, tree: Tree, path: Sequence[int], features: Float[Tensor, "N L H"] | None = None) -> None:
        """Close a round: the slots of `path` are committed text; `features` are the tapped layers there."""
        read = 0
        given = () if features is None else (features,)
        if self._offset is not None:
            while read < len(path) and tree.drafter_ids[path[read]] >= 0:
                read += 1
            offset, self._offset = self._offset, None
            nodes = [tree.drafter_ids[slot] + offset for slot in path[:read]]
            self.drafter.commit(self._state, [*range(offset), *nodes], *given)
            self._pending.clear()
        elif given:
            self.drafter.commit(self._state, [], *given)
        self._pending += (tree.tokens[slot] for slot in path[read:])
        self._context += len(path)
