"""The trace: what a target said along its own greedy text. Opening checks it; reading copies nothing.

A trace is a folder of Arrow stream files, one row a document, with `trace.json` beside them;
`datasets.load_from_disk` reads it too. Lists of one row lie one after another, so row i is a slice of a
memory map.

Axis letters: T tokens of a document · K head entries · L recorded layers · H hidden.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import BFloat16, Bool, Float16, Float32, Int, Int32, Int64, UInt16
from numpy import ndarray
from torch import Tensor

from certdraft.certificates import Head

SCHEMA_VERSION = 1
TRACE_FILE = "trace.json"
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


class TraceError(ValueError):
    """A trace that cannot be trusted; the message names the file and the remedy."""


@dataclass(frozen=True)
class ShardInfo:
    """One file of a trace. `counted` is the number of steps its loss mask selects."""

    file: str
    rows: int
    tokens: int
    counted: int
    bytes: int
    sha256: str
    accounting: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TraceMeta:
    """`trace.json`: what was recorded, from what, and the hash of every shard.

    Args:
        schema: version of the columns; this code reads version 1.
        target: name of the target as given when recording.
        target_revision: hub commit, or a hash of a local folder's config and weights.
        tokenizer_fingerprint: `tokenizer_fingerprint` of the target's tokenizer.
        vocab_size: V of the target's logits, padding rows included.
        num_kept: K.
        dtype: dtype of the target's weights while recording; logits are always fp32.
        settings: corpus, prompt and generation settings, as recorded.
        shards: files in order.
        accounting: rows read, used and skipped, by reason.
        versions: of the libraries that recorded it.
        feature_layers: 0-based layers of the target whose outputs are kept, before any final norm; L of them.
        feature_size: H of those outputs; 0 without them.
        has_entropy: whether the entropies are known; a server tells K tokens only, and they are NaN.
    """

    schema: int
    target: str
    target_revision: str
    tokenizer_fingerprint: str
    vocab_size: int
    num_kept: int
    dtype: str
    settings: dict[str, Any]
    shards: tuple[ShardInfo, ...]
    accounting: dict[str, Any]
    versions: dict[str, str]
    feature_layers: tuple[int, ...] = ()
    feature_size: int = 0
    has_entropy: bool = True

    @property
    def num_rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def num_counted(self) -> int:
        """Steps that are to be learned."""
        return sum(shard.counted for shard in self.shards)

    def to_json(self) -> str:
        totals = {"rows": self.num_rows, "tokens": self.num_tokens, "counted": self.num_counted}
        return json.dumps(asdict(self) | {"totals": totals}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: Path) -> TraceMeta:
        """Parses `trace.json`.

        Raises:
            TraceError: not JSON, of an unknown schema version, or with keys missing.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise TraceError(
                f"{where} is not valid JSON ({error}); restore it from a copy or record again"
            ) from error
        version = data.get("schema") if isinstance(data, dict) else None
        if version is None:
            raise TraceError(
                f"{where} names no schema version, so this is no certdraft trace; record one first"
            )
        if version != SCHEMA_VERSION:
            remedy = (
                "upgrade certdraft"
                if isinstance(version, int) and version > SCHEMA_VERSION
                else "record again"
            )
            raise TraceError(
                f"{where}: schema version {version!r}, this certdraft reads {SCHEMA_VERSION}; {remedy}"
            )
        missing = sorted({f.name for f in fields(cls) if f.default is MISSING} - set(data))
        if missing:
            raise TraceError(f"{where} lacks {', '.join(missing)}; restore it from a copy or record again")
        values = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        values["shards"] = tuple(ShardInfo(**shard) for shard in data["shards"])
        values["feature_layers"] = tuple(data.get("feature_layers", ()))
        return cls(**values)


@dataclass(frozen=True)
class Columns:
    """One document as read-only views into the memory map; `loss_mask`, stored as bits, alone is a copy."""

    input_ids: Int32[ndarray, " T"]
    loss_mask: Bool[ndarray, " T"]
    top_ids: Int32[ndarray, "T K"]
    top_gap: Float16[ndarray, "T K"]
    lse_gap: Float32[ndarray, " T"]
    entropy: Float32[ndarray, " T"]
    hidden: UInt16[ndarray, "T L H"] | None = None


@dataclass(frozen=True)
class TraceRow:
    """One document. Step t of `head` is the target's distribution of token t + 1; `features` belong to t."""

    input_ids: Int[Tensor, " T"]
    loss_mask: Bool[Tensor, " T"]
    head: Head
    features: BFloat16[Tensor, "T L H"] | None = None


class Trace:
    """An opened trace: `len(trace)` documents, `trace.row(i)`, `trace.columns(i)`. Use `open_trace`."""

    def __init__(self, path: Path, meta: TraceMeta) -> None:
        self.path, self.meta = path, meta
        self._chunks: list[_Chunk] = []
        for shard in meta.shards:
            self._chunks.extend(_map_shard(path / shard.file, shard, meta))
        self._first_rows = np.cumsum([0, *(len(chunk) for chunk in self._chunks)])

    def __len__(self) -> int:
        return self.meta.num_rows

    def __iter__(self) -> Iterator[TraceRow]:
        return (self.row(index) for index in range(len(self)))

    @property
    def lengths(self) -> Int64[ndarray, " rows"]:
        """Tokens of each document."""
        parts = [np.diff(chunk.starts) for chunk in self._chunks]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def columns(self, index: int) -> Columns:
        """Views of one document; nothing is copied but the loss mask.

        Raises:
            IndexError: no such row.
        """
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
        """Refuses another tokenizer than the one the trace was recorded with.

        Raises:
            TraceError: shows both fingerprints.
        """
        mine = self.meta.tokenizer_fingerprint
        if fingerprint != mine:
            raise TraceError(
                f"{self.path / TRACE_FILE}: tokenizer {mine[:12]} (of {self.meta.target}) differs from "
                f"{whose} {fingerprint[:12]}; token ids would mean different text. Use a drafter with the "
                "target's tokenizer, or record a trace of the target that the drafter belongs to."
            )

    def check_num_kept(self, needed: int, why: str) -> None:
        """Refuses a head too short for `why`.

        Raises:
            TraceError: names both numbers.
        """
        if needed > self.meta.num_kept:
            raise TraceError(
                f"{self.path / TRACE_FILE}: the head keeps K={self.meta.num_kept} tokens, {why} needs "
                f"{needed}; record again with num_kept={needed} or more"
            )

    def check_features(self, layers: Sequence[int], why: str) -> None:
        """Refuses a trace without the outputs of these target layers.

        Args:
            layers: 0-based layers that are read.
            why: who reads them.

        Raises:
            TraceError: names the layers that are there and those that are needed.
        """
        meta = self.meta
        if set(layers) <= set(meta.feature_layers):
            return
        mine = list(meta.feature_layers)
        there = f"features of layers {mine} only" if mine else "no features"
        raise TraceError(
            f"{self.path / TRACE_FILE}: a trace with {there}, {why} needs those of layers {list(layers)}; "
            f"record again with feature_layers={list(layers)}, or run the target in the training step "
            "(model.target)"
        )


def open_trace(path: str | Path, verify: Literal["sizes", "full"] = "sizes") -> Trace:
    """Opens a trace and checks it.

    Args:
        path: the folder.
        verify: "sizes" compares file sizes, row and token counts (instant, finds missing and cut files);
            "full" also hashes every byte (about a second per GB, finds flipped ones).

    Raises:
        FileNotFoundError: no such folder, or a shard is missing.
        TraceError: no trace, an unfinished one, another schema, or a damaged shard; names the file and the
            remedy.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"trace {folder}: no such folder; record one with `certdraft trace`")
    file = folder / TRACE_FILE
    if not file.exists():
        if (folder / ".recording").is_dir():
            raise TraceError(
                f"trace {folder} is unfinished; run its `certdraft trace` command again to resume it"
            )
        raise TraceError(
            f"{folder} holds no {TRACE_FILE}, so it is no trace; record one with `certdraft trace`"
        )
    meta = TraceMeta.from_json(file.read_text(encoding="utf-8"), file)
    for shard in meta.shards:
        problem = shard_problem(folder / shard.file, shard, verify)
        if problem is not None:
            kind = FileNotFoundError if problem == "is missing" else TraceError
            raise kind(
                f"{folder / shard.file} {problem}; run the trace's `certdraft trace` command again (it "
                "records only the damaged shards anew), or restore the file from a copy"
            )
    return Trace(folder, meta)


def shard_problem(file: Path, shard: ShardInfo, verify: Literal["sizes", "full"]) -> str | None:
    """What is wrong with a shard, as the end of a sentence, or None."""
    if not file.is_file():
        return "is missing"
    size = file.stat().st_size
    if size != shard.bytes:
        return f"has {size:,} bytes instead of {shard.bytes:,} (cut short or overwritten)"
    if verify == "full" and file_sha256(file) != shard.sha256:
        return "does not match its sha256 (bytes changed after writing)"
    return None


def file_sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def trace_schema(with_features: bool) -> pa.Schema:
    """The columns of a shard."""
    return SCHEMA.append(FEATURES) if with_features else SCHEMA


def as_bfloat16(bits: UInt16[ndarray, "*shape"]) -> BFloat16[Tensor, "*shape"]:
    """The numbers whose bits a trace stores, copied."""
    return torch.from_numpy(bits.copy()).view(torch.bfloat16)


class _Chunk:
    """One record batch: flat values of each column, and where each row starts, in tokens."""

    def __init__(self, batch: pa.RecordBatch, meta: TraceMeta, where: Path) -> None:
        self._num_kept = meta.num_kept
        self._features = (len(meta.feature_layers), meta.feature_size)
        self._values: dict[str, ndarray] = {}
        self.starts: Int64[ndarray, " rows+1"] = np.zeros(1, np.int64)
        widths = {"top_ids": meta.num_kept, "top_gap": meta.num_kept, "hidden": math.prod(self._features)}
        for name in batch.schema.names:
            column = batch.column(name)
            starts = np.asarray(column.offsets)
            width = widths.get(name, 1)
            if name == "input_ids":
                self.starts = starts
            elif not np.array_equal(starts, self.starts.astype(np.int64) * width):
                raise TraceError(f"{where}: column {name} does not have {width} values a token; record again")
            # `values`, not `flatten()`: the offsets index the whole child array
            if name == "loss_mask":
                self._bits = np.frombuffer(column.values.buffers()[1], np.uint8)
            else:
                self._values[name] = column.values.to_numpy(zero_copy_only=True)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def columns(self, row: int) -> Columns:
        start, stop = int(self.starts[row]), int(self.starts[row + 1])
        k, values = self._num_kept, self._values
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


def _map_shard(file: Path, shard: ShardInfo, meta: TraceMeta) -> list[_Chunk]:
    try:
        batches = list(pa.ipc.open_stream(pa.memory_map(str(file))))
    except (pa.ArrowInvalid, OSError) as error:
        raise TraceError(
            f"{file} is no Arrow stream ({error}); restore it from a copy or record again"
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
    return chunks
