"""A causal LM that reads chains of several texts in one pass, with one cache for all of them.

Texts advance by different numbers of tokens, so the cache of a batch has gaps: a pass writes the same slots
in every row, and a mask says which of them hold text of the row. Padding and rejected draft tokens stay
there, hidden, until they outnumber the longest text. Hence the memory: in every row about twice the slots of
the longest text at most, in buffers that may be twice as large again.

Letters: R rows, Q tokens of one pass, W cache slots, N tokens read in one pass by all rows, H hidden, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from certdraft.drafters import CachedLM, TreeCache

_SLACK = 64  # hidden slots that are not worth a compaction


class BatchedLM:
    """A causal LM reading chains of several texts in one pass, each text with its own length.

    Args:
        lm: the model.
        ids: tokens of each row to start with, possibly none.

    Raises:
        ValueError: the model is in training mode.
    """

    def __init__(self, lm: CachedLM, ids: Sequence[Sequence[int]]) -> None:
        if lm.model.training:
            raise ValueError(f"{type(lm.model).__name__} is in training mode; call .eval() before decoding.")
        self.lm, self.cache = lm, TreeCache(lm.num_layers, max(map(len, ids)) + 256)
        self.visible = np.zeros((len(ids), 0), dtype=bool)  # [R, W] slots that hold text of the row
        self._round: list[list[int]] = [[] for _ in ids]  # slots each row read since the last `keep`
        self._dirty = False  # some slot holds NaN
        if any(ids):
            self._forward(ids)
        self.keep([len(row) for row in ids])

    def extend(self, tokens: Sequence[Sequence[int]], *, last: bool = False) -> Float[Tensor, "N V"]:
        """Each row reads a continuation of what it has read; one pass.

        Args:
            tokens: of each row, possibly none, but some in at least one row.
            last: logits after the last token of each row that reads any, not after all tokens.

        Returns:
            fp32 next-token logits, row after row.
        """
        hidden = self._forward(tokens)
        steps = [range(len(row) - 1 if last and row else 0, len(row)) for row in tokens]
        at = torch.tensor([(row, step) for row, those in enumerate(steps) for step in those])
        return self.lm.project(hidden[tuple(at.T.to(hidden.device))])

    def keep(self, counts: Sequence[int]) -> None:
        """Ends a round: the first tokens each row read in it are committed, the others forgotten."""
        for visible, slots, count in zip(self.visible, self._round, counts, strict=True):
            visible[slots[count:]] = False
            slots.clear()
        self._scrub()

    def select(self, rows: Sequence[int]) -> None:
        """Drops the other rows, between rounds; closes the gaps when that pays."""
        visible = self.visible[list(rows)]
        width = int(visible.sum(1).max())
        if len(rows) == len(self.visible) and visible.shape[1] <= 2 * width + _SLACK:
            return
        slots = np.argsort(~visible, axis=1, kind="stable")[:, :width]  # text first, in its order
        if visible.shape[1]:
            for layer in self.cache.layers:
                layer.rearrange(torch.tensor(rows), torch.from_numpy(slots))
        self.visible, self._round = np.take_along_axis(visible, slots, 1), [[] for _ in rows]

    def _forward(self, tokens: Sequence[Sequence[int]]) -> Float[Tensor, "R Q H"]:
        sizes, old = np.array([len(row) for row in tokens])[:, None], self.visible.shape[1]
        num, width = len(sizes), int(sizes.max())
        steps = np.arange(width)
        ids = np.zeros((num, width), dtype=np.int64)
        for row, (own, slots) in enumerate(zip(tokens, self._round, strict=True)):
            ids[row] = [*own, *[own[-1] if own else 0] * (width - len(own))]  # no token of another row
            slots += range(old, old + len(own))
        # padding repeats a position, so that none is beyond the model's context, and sees itself: a softmax
        # over nothing would be NaN
        positions = self.visible.sum(1)[:, None] + np.minimum(steps, np.maximum(sizes - 1, 0))
        hidden_slots = np.ones((num, width, old + width), dtype=bool)
        hidden_slots[:, :, :old] = ~self.visible[:, None]
        hidden_slots[:, :, old:] = ~np.tri(width, dtype=bool)
        self.visible = np.concatenate([self.visible, steps < sizes], axis=1)
        mask = torch.zeros(num, 1, width, old + width, dtype=self.lm.dtype)  # float: eager misreads booleans
        mask.masked_fill_(torch.from_numpy(hidden_slots)[:, None], torch.finfo(mask.dtype).min)
        hidden: Tensor = self.lm.body(
            input_ids=torch.from_numpy(ids).to(self.lm.device),
            position_ids=torch.from_numpy(positions).to(self.lm.device),
            attention_mask=mask.to(self.lm.device),
            past_key_values=self.cache.past,
            use_cache=True,
        ).last_hidden_state
        self._dirty = self._dirty or not bool(hidden.isfinite().all())
        self._scrub()
        return hidden

    def _scrub(self) -> None:
        """Zeroes hidden slots once one may hold NaN: a weight of 0 does not silence it."""
        if self._dirty:
            for layer in self.cache.layers:
                layer.erase(torch.from_numpy(~self.visible))
