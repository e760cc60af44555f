"""Documents to rows of fixed length, nothing lost, nothing twice; rows to batches, from the memory map.

Documents in one row are told apart by `document_ids` and by positions that restart at 0: a drafter attends
within equal ids only. A document longer than a row is split into pieces without overlap, each attending to
itself only.

Axis letters: R rows · T = seq_len tokens a row · K top-k entries · L recorded layers · H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64, UInt16
from numpy import ndarray

from certdraft.certificates import Head
from certdraft.data.batches.batch import Batch, widened
from certdraft.data.trace.arrow_trace import Trace


@dataclass(frozen=True)
class Packing:
    """The pieces of documents that each row holds.

    Args:
        seq_len: tokens a row.
        pieces: (document, first token, tokens) of each piece, numbered row by row.
        row_starts: row r holds pieces row_starts[r] to row_starts[r + 1].
        left_out: number of pieces that are in no row.
    """

    seq_len: int
    pieces: Int64[ndarray, "pieces 3"]
    row_starts: Int64[ndarray, " rows+1"]
    left_out: int = 0

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.pieces[:, 2].sum())

    @property
    def efficiency(self) -> float:
        """Share of the tokens in all rows that is not padding, in [0, 1]."""
        return self.num_tokens / max(1, self.num_rows * self.seq_len)

    def row(self, index: int) -> Int64[ndarray, "pieces 3"]:
        return self.pieces[self.row_starts[index] : self.row_starts[index + 1]]


def pack(
    lengths: Sequence[int] | Int64[ndarray, " documents"],
    seq_len: int,
    *,
    in_order: bool = False,
    keep: Callable[[int, int, int], bool] | None = None,
) -> Packing:
    """Pack documents into rows of `seq_len` tokens.

    Pieces go, longest first, into the fullest row they still fit (best-fit decreasing): within a fraction of
    a percent of full rows on real lengths. With `in_order` documents keep their order and a row ends when the
    next piece does not fit.

    Args:
        lengths: tokens of each document; empty documents are left out.
        seq_len: tokens a row.
        in_order: keep the order of documents.
        keep: whether to keep a piece: its document, first token and tokens; all of them without it.

    Raises:
        ValueError: seq_len below 1.

    Examples:
        >>> packing = pack([3, 5, 9], seq_len=8)
        >>> [packing.row(r).tolist() for r in range(packing.num_rows)]
        [[[2, 0, 8]], [[1, 0, 5], [0, 0, 3]], [[2, 8, 1]]]
    """
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}; give at least 1")
    pieces = [
        (document, start, min(seq_len, int(length) - start))
        for document, length in enumerate(lengths)
        for start in range(0, int(length), seq_len)
    ]
    kept = [piece for piece in pieces if keep is None or keep(*piece)]
    rows = _next_fit(kept, seq_len) if in_order else _best_fit_decreasing(kept, seq_len)
    flat = np.asarray([piece for row in rows for piece in row], np.int64).reshape(-1, 3)
    return Packing(seq_len, flat, np.cumsum([0, *map(len, rows)]), len(pieces) - len(kept))


def _next_fit(pieces: Iterable[tuple[int, int, int]], seq_len: int) -> list[list[tuple[int, int, int]]]:
    rows: list[list[tuple[int, int, int]]] = []
    room = 0
    for piece in pieces:
        if piece[2] > room:
            rows.append([])
            room = seq_len
        rows[-1].append(piece)
        room -= piece[2]
    return rows


def _best_fit_decreasing(
    pieces: Sequence[tuple[int, int, int]], seq_len: int
) -> list[list[tuple[int, int, int]]]:
    rows: list[list[tuple[int, int, int]]] = []
    by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]
    rooms = 0  # bit r is set while some row has r tokens of room: the tightest fit is the lowest set bit
    for piece in sorted(pieces, key=lambda piece: -piece[2]):
        fitting = rooms >> piece[2]
        if fitting:
            room = piece[2] + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(piece)
        left = room - piece[2]
        if left:
            by_room[left].append(row)
            rooms |= 1 << left
    return rows


def assemble(
    trace: Trace,
    packing: Packing,
    rows: Sequence[int] | ndarray,
    num_kept: int | None = None,
    feature_layers: Sequence[int] | None = None,
    *,
    narrow: bool = False,
    streamed: Mapping[int, UInt16[ndarray, "tokens L H"]] | None = None,
) -> Batch:
    """The given rows of a packing as a batch, copied once, from the memory map into its tensors.

    Args:
        trace: what `packing.pieces` point into.
        packing: rows of pieces.
        rows: indices of rows, R of them.
        num_kept: keep only this many top-k entries.
        feature_layers: features of these layers, in this order; of all that the trace holds when not given.
        narrow: keep the trace's types in the top-k entries (int32, float16), which `Batch.to` widens on the
            device: half the bytes on the way there.
        streamed: features of the rows' documents by number, in the order of `feature_layers`, as bits of
            bf16; they stand in for the trace's.

    Raises:
        TraceError: more top-k entries, or other layers, wanted than the trace holds.
    """
    k = trace.meta.num_kept if num_kept is None else num_kept
    trace.check_num_kept(k, f"num_kept={k}")
    width = (0, 0)  # L, H
    if streamed is not None:
        width = next(iter(streamed.values())).shape[1:]
    else:
        layers = trace.meta.feature_layers if feature_layers is None else tuple(feature_layers)
        trace.check_features(layers, f"feature_layers={list(layers)}")
        at = [trace.meta.feature_layers.index(layer) for layer in layers]
        width = (len(at), trace.meta.feature_size)
    shape = (len(rows), packing.seq_len)
    vocab_size = trace.meta.vocab_size
    input_ids = np.zeros(shape, np.int64)
    position_ids = np.zeros(shape, np.int64)
    document_ids = np.full(shape, -1, np.int64)
    loss_mask = np.zeros(shape, np.bool_)
    ids = np.empty((*shape, k), np.int32)
    gap = np.empty((*shape, k), np.float16)
    lse_gap = np.empty(shape, np.float32)
    entropy = np.empty(shape, np.float32)
    features = np.zeros((*shape, *width), np.uint16) if width[0] else None
    for row, index in enumerate(rows):
        end = 0
        for offset, (document, start, length) in enumerate(packing.row(index).tolist()):
            columns = trace.columns(document)
            here, there = slice(end, end + length), slice(start, start + length)
            input_ids[row, here] = columns.input_ids[there]
            position_ids[row, here] = np.arange(length)
            document_ids[row, here] = packing.row_starts[index] + offset
            loss_mask[row, here] = columns.loss_mask[there]
            ids[row, here] = columns.top_ids[there, :k]
            gap[row, here] = columns.top_gap[there, :k]
            lse_gap[row, here] = columns.lse_gap[there]
            entropy[row, here] = columns.entropy[there]
            if features is not None and streamed is not None:
                features[row, here] = streamed[document][there]
            elif features is not None and columns.hidden is not None:
                wanted = columns.hidden[there]
                features[row, here] = wanted if feature_layers is None else wanted[:, at]
            end += length
        # padding: a valid distribution that no loss mask selects
        position_ids[row, end:] = np.arange(packing.seq_len - end)
        ids[row, end:] = np.arange(k)
        gap[row, end:] = 0.0
        lse_gap[row, end:] = entropy[row, end:] = math.log(vocab_size)
    known = torch.from_numpy(entropy) if trace.meta.has_entropy else None
    head = Head(torch.from_numpy(ids), torch.from_numpy(gap), torch.from_numpy(lse_gap), vocab_size, known)
    head = head if narrow else widened(head)
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(position_ids),
        torch.from_numpy(document_ids),
        torch.from_numpy(loss_mask),
        head,
        None if features is None else torch.from_numpy(features).view(torch.bfloat16),
    )
