"""Replay from one teacher-forced pass: what a drafter says at every depth of the rounds at every place.

A round at place i of a recorded text has read the text up to there. What the drafter then says at depth d
matters only if the draft was right until d, so it can be asked with the true tokens in between: one pass over
the text answers for all places and depths. Drafters whose distributions depend on the text alone have one
depth, and depth d at place i is depth 0 at place i + d. Drafters that go on from their own output, and
marginal ones, answer depth by depth (`Drafter.paths`).

Letters: T tokens of the text, one place each, D draft depth, H hidden, L tapped layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from certdraft.decoding.trees.ranking import rank_of, top_rows
from certdraft.decoding.trees.tree import Row
from certdraft.drafters import Drafter

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
        """Rank of the true token at each place and depth, [T][D]; 0 = the drafter's first choice.

        Raises:
            NonFiniteLogits: the drafter's logits are not finite.
        """
        ranks: list[list[int]] = []
        size = self.hidden.shape[1]
        wanted = torch.tensor([*self.tokens, *[0] * size], device=self.hidden.device).unfold(0, size, 1)
        for begin, logits in self._logits():
            true = wanted[begin : begin + len(logits)]
            found = rank_of(logits.flatten(0, 1), true.flatten())
            ranks += found.view(-1, size).tolist()
        return ranks

    def rows(self, width: int, temperature: float) -> list[list[Row]]:
        """The most probable tokens at each place and depth, [T][D].

        Raises:
            NonFiniteLogits: the drafter's logits are not finite.
        """
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
