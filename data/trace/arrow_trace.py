"""The trace: what a target predicted along its own greedy text. Opening checks it; reading copies nothing.

A trace is a folder of Arrow stream files, one row a document, with `trace.json` beside them;
`datasets.load_from_disk` reads it too. Lists of one row lie one after another, so row i is a slice of a
memory map.

Axis letters: T tokens of a document · K top-k entries · L recorded layers · H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import BFloat16, Bool, Int, Int64, UInt16
from numpy import ndarray
from torch import Tensor

from certdraft.certificates import Head
from certdraft.data.trace.recorded_row import Columns
from certdraft.data.trace.trace_metadata import SCHEMA_VERSION, TRACE_FILE, ShardInfo, TraceError, TraceMeta
from certdraft.support import sha256_of

Verify = Literal["sizes", "full"]
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("top_ids", pa.list_(pa.int32())),
        ("top_gap", pa.list_(pa.float16())),
        ("lse_gap", pa.list_(pa.float32())),
        ("entropy", pa.list_(pa.float32())),
    ]
)
FEATURES = pa.field("hidden", pa.list_(pa.uint16()))  # the bits of bf16 numbers, a type that Arrow lacks
_MASS_SLACK = 2e-2  # gaps are stored in fp16
_CHECKED_TOKENS = 1 << 16  # at once


@dataclass(frozen=True)
class TraceRow:
    """One document. Position t of `head` is the target's distribution of token t + 1; `features` are of t."""

    input_ids: Int[Tensor, " T"]
    loss_mask: Bool[Tensor, " T"]
    head: Head
    features: BFloat16[Tensor, "T L H"] | None = None


class Trace:
    """An opened trace: `len(trace)` documents, `trace.row(i)`, `trace.columns(i)`. Use `open_trace`."""

    def __init__(self, path: Path, meta: TraceMeta, verify: Verify = "sizes") -> None:
        self.path, self.meta = path, meta
        self._chunks: list[_Chunk] = []
        for shard in meta.shards:
            self._chunks.extend(_map_shard(path / shard.file, shard, meta, verify))
        self._first_rows = np.cumsum([0, *(len(chunk) for chunk in self._chunks)])
        self.lengths: Int64[ndarray, " rows"] = _joined([np.diff(chunk.starts) for chunk in self._chunks])

    def __len__(self) -> int:
        return self.meta.num_rows

    def __iter__(self) -> Iterator[TraceRow]:
        return (self.row(index) for index in range(len(self)))

    @property
    def counted(self) -> Int64[ndarray, " rows"]:
        """Positions of each document that are in its loss mask."""
        return _joined([chunk.counted() for chunk in self._chunks])

    def columns(self, index: int) -> Columns:
        """Read-only views of one document in the memory map; only `loss_mask`, stored as bits, is a copy."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a trace with {len(self)} rows")
        chunk = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        return self._chunks[chunk].columns(index - int(self._first_rows[chunk]))

    def row(self, index: int) -> TraceRow:
        """One document as tensors, heads in fp32."""
        columns = self.columns(index)
        head = Head(
            ids=torch.from_numpy(columns.top_ids.astype(np.int64)),
            gap=torch.from_numpy(columns.top_gap.astype(np.float32)),
            lse_gap=torch.from_numpy(columns.lse_gap.copy()),
            vocab_size=self.meta.vocab_size,
            entropy=torch.from_numpy(columns.entropy.copy()) if self.meta.has_entropy else None,
        )
        ids = torch.from_numpy(columns.input_ids.astype(np.int64))
        features = None if columns.hidden is None else as_bfloat16(columns.hidden)
        return TraceRow(ids, torch.from_numpy(columns.loss_mask.copy()), head, features)

    def check_tokenizer(self, fingerprint: str, whose: str = "the drafter's") -> None:
        """Raise if the trace was recorded with another tokenizer."""
        recorded = self.meta.tokenizer_fingerprint
        if fingerprint != recorded:
            raise TraceError(
                f"{self.path / TRACE_FILE}: tokenizer {recorded[:12]} (of {self.meta.target}) differs from "
                f"{whose} {fingerprint[:12]}; token ids would mean different text. Use a drafter with the "
                "target's tokenizer, or record a trace of the target that the drafter belongs to."
            )

    def check_num_kept(self, needed: int, why: str) -> None:
        """Raise if fewer top-k entries are stored than `why` needs."""
        if needed > self.meta.num_kept:
            raise TraceError(
                f"{self.path / TRACE_FILE}: the head keeps K={self.meta.num_kept} tokens, {why} needs "
                f"{needed}; record again with num_kept={needed} or more"
            )

    def check_features(self, layers: Sequence[int], why: str) -> None:
        """Raise if the outputs of these target layers are not stored."""
        meta = self.meta
        if set(layers) <= set(meta.feature_layers):
            return
        stored = list(meta.feature_layers)
        there = f"features of layers {stored} only" if stored else "no features"
        raise TraceError(
            f"{self.path / TRACE_FILE}: a trace with {there}, {why} needs those of layers {list(layers)}; "
            f"record again with feature_layers={list(layers)}, or run the target in the training step "
            "(model.target)"
        )


def open_trace(path: str | Path, verify: Verify = "sizes") -> Trace:
    """Open a trace and check it.

    Args:
        path: the folder.
        verify: "sizes" compares file sizes, row and token counts, and looks at one document a shard (instant,
            finds missing and cut files); "full" also hashes every byte and checks every value (a few seconds
            per GB, finds flipped bits and forged values).

    Raises:
        FileNotFoundError: no such folder, or a shard is missing.
        TraceError: not a trace, an unfinished one, another schema, or a damaged shard; names the file and
            what to do.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"trace {folder}: no such folder; record one with `certdraft trace`")
    file = folder / TRACE_FILE
    if not file.exists():
        if (folder / ".recording").is_dir():
            raise TraceError(
                f"trace {folder} is unfinished; run its `certdraft trace` command again to resume it, or "
                f"close it with `certdraft trace --finish true --out_dir {folder}`"
            )
        raise TraceError(
            f"{folder} holds no {TRACE_FILE}, so it is not a trace; record one with `certdraft trace`"
        )
    meta = TraceMeta.read(file)
    for shard in meta.shards:
        problem = shard_problem(folder / shard.file, shard, verify)
        if problem is not None:
            kind = FileNotFoundError if problem == "is missing" else TraceError
            raise kind(
                f"{folder / shard.file} {problem}; run the trace's `certdraft trace` command again (it "
                "records only the damaged shards again), or restore the file from a copy"
            )
    return Trace(folder, meta, verify)


def shard_problem(file: Path, shard: ShardInfo, verify: Verify) -> str | None:
    """What is wrong with a shard, as the end of a sentence, or None."""
    if not file.is_file():
        return "is missing"
    size = file.stat().st_size
    if size != shard.bytes:
        return f"has {size:,} bytes instead of {shard.bytes:,} (cut short or overwritten)"
    if verify == "full" and sha256_of(file) != shard.sha256:
        return "does not match its sha256 (bytes changed after writing)"
    return None


def trace_schema(with_features: bool) -> pa.Schema:
    """The columns of a shard."""
    return SCHEMA.append(FEATURES) if with_features else SCHEMA


def as_bfloat16(bits: UInt16[ndarray, "*shape"]) -> BFloat16[Tensor, "*shape"]:
    """The numbers whose bits a trace stores, copied."""
    return torch.from_numpy(bits.copy()).view(torch.bfloat16)


class _Chunk:
    """One record batch: flat values of each column, and where each row starts, in tokens."""

    def __init__(self, batch: pa.RecordBatch, meta: TraceMeta, where: Path) -> None:
        self.meta = meta
        self._features = (len(meta.feature_layers), meta.feature_size)
        self._values: dict[str, ndarray] = {}
        self.starts: Int64[ndarray, " rows+1"] = np.zeros(1, np.int64)
        widths = {"top_ids": meta.num_kept, "top_gap": meta.num_kept, "hidden": math.prod(self._features)}
        for name in batch.schema.names:
            column = batch.column(name)
            starts, width = np.asarray(column.offsets).astype(np.int64), widths.get(name, 1)
            if name == "input_ids":
                self.starts = starts
                if starts[0] or (np.diff(starts) < 0).any():
                    raise TraceError(
                        f"{where}: the rows of column {name} do not follow each other; record again"
                    )
            if not np.array_equal(starts, self.starts * width) or starts[-1] > len(column.values):
                raise TraceError(f"{where}: column {name} does not have {width} values a token; record again")
            # `values`, not `flatten()`: the offsets index the whole child array
            if name == "loss_mask":
                buffer = column.values.buffers()[1]
                self._bits = np.frombuffer(buffer, np.uint8) if len(column.values) else np.zeros(0, np.uint8)
            else:
                self._values[name] = column.values.to_numpy(zero_copy_only=True)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def columns(self, row: int) -> Columns:
        return self._between(int(self.starts[row]), int(self.starts[row + 1]))

    def counted(self) -> Int64[ndarray, " rows"]:
        """Positions of each row that are in its loss mask."""
        bits = np.unpackbits(self._bits, bitorder="little")[: self.starts[-1]]
        return np.diff(np.concatenate([[0], bits.cumsum(dtype=np.int64)])[self.starts])

    def check_values(self, where: Path, verify: Verify) -> None:
        """Raise if a stored value is not what a target could have predicted; of one row only for "sizes"."""
        stop = int(self.starts[-1] if verify == "full" else self.starts[min(1, len(self))])
        for start in range(0, stop, _CHECKED_TOKENS):
            part = self._between(start, min(start + _CHECKED_TOKENS, stop))
            for problem, wrong in _value_problems(part, self.meta, verify):
                if wrong.any():
                    token = start + int(wrong.argmax())
                    row = int(np.searchsorted(self.starts, token, side="right")) - 1
                    raise TraceError(
                        f"{where}: row {row}, position {token - int(self.starts[row])}: {problem}; the "
                        "values were changed after the recording, or another program recorded them; record "
                        "again"
                    )

    def _between(self, start: int, stop: int) -> Columns:
        """Views of a range of tokens."""
        k, values = self.meta.num_kept, self._values
        bits = np.unpackbits(self._bits[start // 8 : (stop + 7) // 8], bitorder="little")
        width = math.prod(self._features)
        hidden = values["hidden"][start * width : stop * width] if width else None
        return Columns(
            input_ids=values["input_ids"][start:stop],
            loss_mask=bits[start % 8 : start % 8 + stop - start].view(np.bool_),
            top_ids=values["top_ids"][start * k : stop * k].reshape(-1, k),
            top_gap=values["top_gap"][start * k : stop * k].reshape(-1, k),
            lse_gap=values["lse_gap"][start:stop],
            entropy=values["entropy"][start:stop],
            hidden=None if hidden is None else hidden.reshape(-1, *self._features),
        )


def _value_problems(columns: Columns, meta: TraceMeta, verify: Verify) -> Iterator[tuple[str, ndarray]]:
    """Pairs of a sentence and the positions [T] that it is true of."""
    ids, gap, lse_gap, vocab_size = columns.top_ids, columns.top_gap, columns.lse_gap, meta.vocab_size
    outside = f"lies outside the vocabulary of {vocab_size}"
    yield f"a token of input_ids {outside}", (columns.input_ids < 0) | (columns.input_ids >= vocab_size)
    yield f"a token of top_ids {outside}", ((ids < 0) | (ids >= vocab_size)).any(1)
    # comparisons are false for NaN; +inf is a gap beyond fp16
    yield "top_gap does not ascend from 0", ~((gap[:, 0] == 0) & (gap[:, 1:] >= gap[:, :-1]).all(1))
    yield "lse_gap is negative or not finite", ~((lse_gap > -_MASS_SLACK) & (lse_gap < np.inf))
    if meta.has_entropy:
        yield "entropy is negative or not finite", ~((columns.entropy > -0.1) & (columns.entropy < np.inf))
    if verify == "full":
        yield "top_ids names a token twice", (np.diff(np.sort(ids, axis=1), axis=1) == 0).any(1)
        mass = np.exp(-gap.astype(np.float32) - lse_gap[:, None]).sum(1)
        yield "the probabilities sum to more than 1", mass > 1 + _MASS_SLACK
        if columns.hidden is not None:
            yield "hidden holds NaN or inf", ((columns.hidden & 0x7F80) == 0x7F80).any(axis=(1, 2))


def _map_shard(file: Path, shard: ShardInfo, meta: TraceMeta, verify: Verify) -> list[_Chunk]:
    try:
        batches = list(pa.ipc.open_stream(pa.memory_map(str(file))))
    except (pa.ArrowInvalid, OSError) as error:
        raise TraceError(
            f"{file} is not an Arrow stream ({error}); restore it from a copy or record again"
        ) from error
    schema = trace_schema(bool(meta.feature_layers))
    for batch in batches:
        if batch.schema.names != schema.names or batch.schema.types != schema.types:
            raise TraceError(f"{file}: columns {batch.schema.names} are not those of schema {SCHEMA_VERSION}")
    chunks = [_Chunk(batch, meta, file) for batch in batches]
    rows, tokens = sum(map(len, chunks)), sum(int(chunk.starts[-1]) for chunk in chunks)
    if (rows, tokens) != (shard.rows, shard.tokens):
        raise TraceError(
            f"{file} holds {rows} rows and {tokens} tokens, {TRACE_FILE} says {shard.rows} and "
            f"{shard.tokens}; the two do not belong together. Restore both from one copy, or record again."
        )
    for chunk in chunks if verify == "full" else chunks[:1]:
        chunk.check_values(file, verify)
    return chunks


def _joined(parts: list[ndarray]) -> Int64[ndarray, " n"]:
    return np.concatenate([np.zeros(0, np.int64), *parts])
