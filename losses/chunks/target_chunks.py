"""The target of a chunked evaluation, chunk by chunk.

An online target's logits exist for one chunk at a time, in one buffer that all chunks share; its head is cut
from them without sorting. Axes: C steps of a chunk · V vocabulary · K head entries.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from certdraft.certificates import Head, largest
from certdraft.losses.chunks.fp32_matmul import product, product_dtype
from certdraft.losses.coarse_logits import NEVER, tile_rows, work_dtype
from certdraft.losses.target import OnlineTarget, TargetBatch


class TargetRows:
    """What a loss may ask of the target at the steps of the current chunk.

    Args:
        target: the whole target.
        size: most steps of a chunk.
    """

    def __init__(self, target: TargetBatch | OnlineTarget, size: int) -> None:
        self.target = target
        self._rows = slice(0, 0)
        self._fresh = False  # the buffer holds the logits of these rows
        self._head: Head | None = None
        self._buffer = torch.empty(0)
        if isinstance(target, OnlineTarget):
            dtype = product_dtype(target.hidden, target.weight)
            self._weight = target.weight.to(dtype).t()
            self._buffer = target.hidden.new_empty(size, target.vocab_size, dtype=work_dtype(dtype))

    def move_to(self, rows: slice) -> None:
        """Goes on to these steps."""
        self._rows, self._fresh, self._head = rows, False, None

    def logits(self) -> Float[Tensor, "C V"]:
        """The target's logits, up to a constant; the caller may overwrite them (`used`)."""
        if isinstance(self.target, TargetBatch):
            assert self.target.logp is not None
            return self.target.logp[self._rows].clamp(min=NEVER)
        if not self._fresh:
            hidden = self.target.hidden[self._rows].to(self._weight.dtype)
            product(hidden, self._weight, out=self._buffer[: len(hidden)])
            self._fresh = True
        return self._buffer[: self._rows.stop - self._rows.start]

    def used(self) -> None:
        """The caller has overwritten `logits`."""
        self._fresh = False

    def batch(self, full: bool) -> TargetBatch:
        """The steps as a TargetBatch, with the full distribution if it is wanted and there is one."""
        target = self.target
        if isinstance(target, TargetBatch):
            return target[self._rows]
        if self._head is None:
            self._head = self._cut(target.k)
        logp = self.logits().log_softmax(-1) if full and target.full else None
        next_ids = None if target.next_ids is None else target.next_ids[self._rows]
        return TargetBatch(self._head, logp, next_ids)

    def _cut(self, k: int) -> Head:
        """The head of the current logits, as `Head.from_logits` makes it, but for the entropy."""
        logits = self.logits()
        top, ids = largest(logits, min(k, logits.shape[-1]))
        lse_gap = logits.new_empty(len(logits))
        size = tile_rows(logits)
        for start in range(0, len(logits), size):
            rows = slice(start, start + size)
            others = (logits[rows] - top[rows, :1]).exp_()
            # the greedy token is left out of the sum, so that a confident step keeps its small tail
            lse_gap[rows] = others.scatter_(-1, ids[rows, :1], 0.0).sum(-1).log1p()
        if lse_gap.device.type == "cpu" and not bool(lse_gap.isfinite().all()):
            row = self._rows.start + int((~lse_gap.isfinite()).nonzero()[0])
            raise ValueError(f"the target's logits hold NaN or infinity at step {row} of the batch")
        return Head(ids, top[:, :1] - top, lse_gap, logits.shape[-1])
