"""Packing: every token once, rows full, documents apart; batches equal the trace they come from."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from certdraft.certificates import StrictGreedy, radius
from certdraft.data import Batch, RecordedRow, Trace, TraceError, assemble, pack
from certdraft.data.batches.packing import Packing


def positions_of(packing: Packing) -> Counter:
    return Counter((d, p) for d, start, n in packing.pieces.tolist() for p in range(start, start + n))


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 16), st.booleans())
def test_nothing_is_lost_or_doubled(lengths: list[int], seq_len: int, in_order: bool) -> None:
    packing = pack(lengths, seq_len, in_order=in_order)
    assert positions_of(packing) == Counter((d, p) for d, n in enumerate(lengths) for p in range(n))
    rows = [packing.row(index) for index in range(packing.num_rows)]
    assert all(0 < row[:, 2].sum() <= seq_len for row in rows)
    assert sum(map(len, rows)) == len(packing.pieces)
    if in_order:
        keys = [(d, start) for d, start, _ in packing.pieces.tolist()]
        assert keys == sorted(keys)


@pytest.mark.parametrize(
    ("mean", "sigma"), [(6.0, 0.9), (5.0, 0.5), (7.5, 0.8)], ids=["chat", "short", "reasoning"]
)
def test_rows_are_full_on_real_lengths(mean: float, sigma: float) -> None:
    lengths = np.random.default_rng(0).lognormal(mean, sigma, 3000).astype(int) + 2
    packing = pack(lengths, 2048)
    assert packing.efficiency >= 0.98
    assert packing.num_tokens == lengths.sum()


def test_packing_is_the_best_fit() -> None:
    packing = pack([6, 4, 3, 3, 2, 2], 10)
    assert [row[:, 2].tolist() for row in map(packing.row, range(packing.num_rows))] == [[6, 4], [3, 3, 2, 2]]


def test_batch_is_the_trace(fake_trace: tuple[Trace, list[RecordedRow]]) -> None:
    trace, rows = fake_trace
    packing = pack(trace.lengths, 24)
    batch = assemble(trace, packing, np.arange(packing.num_rows))
    assert batch.num_tokens == trace.meta.num_tokens
    assert len(batch.steps()) == trace.meta.num_counted
    for number, (document, start, length) in enumerate(packing.pieces.tolist()):
        where = batch.document_ids == number
        row, there = rows[document], slice(start, start + length)
        assert batch.position_ids[where].tolist() == list(range(length))  # so it lies in one stretch
        for read, written in (
            (batch.input_ids, row.input_ids),
            (batch.loss_mask, row.loss_mask),
            (batch.head.ids, row.top_ids),
            (batch.head.gap, row.top_gap),
            (batch.head.lse_gap, row.lse_gap),
            (batch.head.entropy, row.entropy),
        ):
            assert np.array_equal(read[where], written[there])
    padding = batch.document_ids < 0
    assert padding.any()
    assert not batch.loss_mask[padding].any()
    assert torch.allclose(batch.head[padding].p.sum(-1) + batch.head[padding].tail_mass, torch.tensor(1.0))
    assert (radius(batch.head, StrictGreedy()) >= 0).all()  # placeholders are a valid distribution too
    dtypes = [batch.input_ids.dtype, batch.position_ids.dtype, batch.head.ids.dtype, batch.head.gap.dtype]
    assert dtypes == [torch.int64, torch.int64, torch.int64, torch.float32]


def test_shorter_head(fake_trace: tuple[Trace, list[RecordedRow]]) -> None:
    trace, _ = fake_trace
    packing = pack(trace.lengths, 64)
    full, short = assemble(trace, packing, [0, 1]), assemble(trace, packing, [0, 1], num_kept=2)
    assert short.head.num_kept == 2
    assert torch.equal(short.head.gap, full.head.truncate(2).gap)
    with pytest.raises(TraceError, match="K=4 tokens, num_kept=9 needs 9"):
        assemble(trace, packing, [0], num_kept=9)


def test_rows_need_a_length() -> None:
    with pytest.raises(ValueError, match="seq_len is 0"):
        pack([1], 0)


def test_narrow_batches_are_widened_on_the_way(fake_trace: tuple[Trace, list[RecordedRow]]) -> None:
    """Half the bytes to the device; what arrives there is the same."""
    trace = fake_trace[0]
    packing = pack(trace.lengths, 64)
    rows = list(range(packing.num_rows))
    wide, narrow = (assemble(trace, packing, rows, narrow=narrow) for narrow in (False, True))
    assert wide.head is not None
    assert narrow.head is not None
    assert (narrow.head.ids.dtype, narrow.head.gap.dtype) == (torch.int32, torch.float16)
    arrived = narrow.to("cpu").head
    assert arrived is not None
    for name in ("ids", "gap", "lse_gap", "entropy"):
        one, other = getattr(arrived, name), getattr(wide.head, name)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_page_locked_tensors_are_copied_beside_the_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning passes non_blocking for plain tensors only, so a batch asks its own."""
    asked: list[bool] = []
    to = torch.Tensor.to

    def watched(self: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        asked.append(named.get("non_blocking", False))
        return to(self, *args, **named)

    ids = torch.zeros(1, 4, dtype=torch.long)
    batch = Batch(ids, ids, ids, ids.bool())
    monkeypatch.setattr(torch.Tensor, "to", watched)
    for pinned in (False, True):
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self, pinned=pinned: pinned)
        asked.clear()
        batch.to("cpu")
        assert asked == [pinned] * 4
