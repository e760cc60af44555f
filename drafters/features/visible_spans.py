"""What a query of packed rows sees: one run of the context, and one of the keys of its own group.

A document is a run of tokens of its row, so "the earlier tokens of its document" are two numbers a query. No
mask of T x T entries is needed: scores are hidden by comparing positions, and the block mask that CUDA takes
is made block by block.

Letters: R rows, T context tokens, A groups, Q queries of a group, M keys of a group's own, B blocks of 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask

_BLOCK = 128  # of queries and of keys: what flex_attention's kernels expect

Span = tuple[
    Int[Tensor, "R N"], Int[Tensor, "R N"]
]  # first key that each of N queries sees, one past the last


@dataclass(frozen=True, eq=False)
class VisibleSpans:
    """What groups of queries see; made once a batch, for all layers and draft steps.

    Args:
        start: first token of the context that each query of a group sees, ascending; where the last axis is
            1, that of all of them.
        stop: one past the last token of the context that a group sees; not above `start`: nothing.
        own: which of its group's own keys a query sees, a run of at least one; None: all.
    """

    start: Int[Tensor, "R A Q"]
    stop: Int[Tensor, "R A"]
    own: Bool[Tensor, "Q M"] | None = None
    _masks: dict[tuple[int, int, int], BlockMask] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_groups(self) -> int:
        """A."""
        return self.stop.shape[1]

    def hidden(self, groups: slice, context: slice) -> Bool[Tensor, "R a Q t"]:
        """Which of some tokens of the context the queries of some groups do not see."""
        place = torch.arange(context.start, context.stop, device=self.stop.device)
        return (place < self.start[:, groups, :, None]) | (place >= self.stop[:, groups, None, None])

    def block_mask(self, num_queries: int, num_context: int, num_own: int) -> BlockMask:
        """Block mask of [R, 1, A·Q, T + A·M]: queries group after group, keys those of the context, then own.

        Made once, so that layers, and steps recomputed in the backward pass, share it.
        """
        sizes = num_queries, num_context, num_own
        if sizes not in self._masks:
            shape = *self.stop.shape, num_queries
            spans = [(self.start.expand(shape).flatten(1), self.stop[..., None].expand(shape).flatten(1))]
            if num_own:
                spans.append(self._own_span(*sizes))
            self._masks[sizes] = span_block_mask(spans, num_context + self.num_groups * num_own)
        return self._masks[sizes]

    def _own_span(self, num_queries: int, num_context: int, num_own: int) -> Span:
        rows, groups = self.stop.shape
        device = self.stop.device
        first = torch.zeros(num_queries, dtype=torch.long, device=device)
        count = torch.full_like(first, num_own)
        if self.own is not None:
            first, count = self.own.byte().argmax(-1), self.own.sum(-1)
        start = num_context + num_own * torch.arange(groups, device=device)[:, None] + first  # [A, Q]
        start, stop = (x.flatten().expand(rows, -1) for x in (start, start + count))
        return start, stop


def document_starts(document_ids: Int[Tensor, "R T"]) -> Int[Tensor, "R T"]:
    """First token of each token's document, or of its run of padding.

    Examples:
        >>> document_starts(torch.tensor([[7, 7, 8, 8, -1]])).tolist()
        [[0, 0, 2, 2, 4]]
    """
    fresh = functional.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    return index.where(fresh, 0).cummax(-1).values


def document_block_mask(document_ids: Int[Tensor, "R T"]) -> BlockMask:
    """Causal attention within documents of packed rows: block mask of [R, 1, T, T].

    Padding (−1) sees earlier padding and itself, so no softmax is empty.
    """
    num = document_ids.shape[1]
    stop = torch.arange(1, num + 1, device=document_ids.device).expand_as(document_ids)
    return span_block_mask([(document_starts(document_ids), stop)], num)


def span_block_mask(spans: Sequence[Span], num_keys: int) -> BlockMask:
    """Block mask [R, 1, N, keys] of queries that see one run of keys, or either of two.

    Every block in which a query sees a key is listed, and of those between runs of neighbouring queries some
    in which none does. Holds [R, B, B] numbers at once, never queries x keys.
    """
    some = full = torch.zeros((), dtype=torch.bool, device=spans[0][0].device)
    for span in spans:
        touched, covered = _blocks(span, num_keys)
        some, full = some | touched, full | covered
    (start, stop), (own_start, own_stop) = (
        tuple(x.int().contiguous() for x in span) for span in (spans[0], spans[-1])
    )

    # Positions are read from tensors, because a number in here would be compiled in, one kernel for each.
    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= start[row, query]) & (key < stop[row, query])

    def sees_either(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        shared = (key >= start[row, query]) & (key < stop[row, query])
        return shared | (key >= own_start[row, query]) & (key < own_stop[row, query])

    return BlockMask.from_kv_blocks(
        *_listed(some & ~full),
        *_listed(full),
        BLOCK_SIZE=_BLOCK,
        mask_mod=sees if len(spans) == 1 else sees_either,
        seq_lengths=(start.shape[1], num_keys),
    )


def _blocks(span: Span, num_keys: int) -> tuple[Bool[Tensor, "R B B"], Bool[Tensor, "R B B"]]:
    """Blocks that the runs of a block of queries reach into, and those that all its queries see whole."""
    start, stop = span
    empty, short = start >= stop, -start.shape[1] % _BLOCK
    start, stop = (
        functional.pad(x.masked_fill(empty, none), (0, short), value=none).unflatten(1, (-1, 1, _BLOCK))
        for x, none in ((start, num_keys), (stop, 0))
    )
    begin = torch.arange(0, num_keys, _BLOCK, device=start.device)
    end = begin + _BLOCK
    touched = (start.amin(-1) < end) & (stop.amax(-1) > begin)
    covered = (start.amax(-1) <= begin) & (stop.amin(-1) >= end)
    return touched, covered


def _listed(blocks: Bool[Tensor, "R B B"]) -> tuple[Int[Tensor, "R 1 B"], Int[Tensor, "R 1 B B"]]:
    """How many blocks of keys a block of queries has, and their numbers, those first."""
    order = blocks.byte().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]
