"""Recorded documents and the Arrow files that hold them: shards of a trace, and parts of unfinished shards.

Axis letters: T tokens of a document · K top-k entries · L layers whose outputs are kept · H hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import starmap
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float16, Float32, Int32, UInt16
from numpy import ndarray

from certdraft.data.trace.trace_metadata import ShardInfo
from certdraft.support import sha256_of, write_file

Finish = Literal["eos", "length", "loop", "given"]
_BATCH_VALUES = 1 << 28  # list values of one Arrow batch; offsets are int32
_EXTRA = (("index", pa.int64()), ("finish", pa.string()), ("where", pa.string()), ("notes", pa.string()))


@dataclass(frozen=True)
class Columns:
    """One document as a trace stores it."""

    input_ids: Int32[ndarray, " T"]
    loss_mask: Bool[ndarray, " T"]
    top_ids: Int32[ndarray, "T K"]
    top_gap: Float16[ndarray, "T K"]
    lse_gap: Float32[ndarray, " T"]
    entropy: Float32[ndarray, " T"]
    hidden: UInt16[ndarray, "T L H"] | None = None


@dataclass(frozen=True, kw_only=True)
class RecordedRow(Columns):
    """One document as a trace stores it, and how it ended."""

    finish: Finish
    where: str
    notes: tuple[str, ...] = field(default=(), compare=False)


def bytes_per_token(num_kept: int, feature_values: int = 0) -> float:
    """Bytes a trace needs for a token: ids, mask bit, K ids and gaps, lse_gap, entropy, L·H features."""
    return 4 + 1 / 8 + num_kept * (4 + 2) + 4 + 4 + 2 * feature_values


def write_shard(file: Path, rows: Sequence[RecordedRow], schema: pa.Schema) -> ShardInfo:
    """Write one Arrow stream file and return its counts and hash. Equal rows give equal bytes."""
    batches = (_record_batch(part, schema) for part in _batches(rows))
    write_file(file, lambda temporary: _write_stream(temporary, schema, batches))
    return ShardInfo(
        file=file.name,
        rows=len(rows),
        tokens=sum(len(row.input_ids) for row in rows),
        counted=sum(int(row.loss_mask.sum()) for row in rows),
        bytes=file.stat().st_size,
        sha256=sha256_of(file),
    )


def write_part(file: Path, rows: Mapping[int, RecordedRow], schema: pa.Schema) -> None:
    """Write rows by number of their prompt, with what a shard leaves out: how and where they ended."""
    hidden = next(iter(rows.values())).hidden
    layers = {"layers": str(0 if hidden is None else hidden.shape[1])}
    whole = pa.schema([*schema, *starmap(pa.field, _EXTRA)], layers)
    numbers = iter(rows)

    def batches() -> Iterator[pa.RecordBatch]:
        for part in _batches(list(rows.values())):
            batch = _record_batch(part, schema)
            values: dict[str, list[Any]] = {
                name: [getattr(row, name) for row in part] for name in ("finish", "where")
            }
            values |= {
                "index": [next(numbers) for _ in part],
                "notes": ["\n".join(row.notes) for row in part],
            }
            extra = [pa.array(values[name], kind) for name, kind in _EXTRA]
            yield pa.RecordBatch.from_arrays([*batch.columns, *extra], schema=whole)

    write_file(file, lambda temporary: _write_stream(temporary, whole, batches()))


def read_part(file: Path) -> dict[int, RecordedRow]:
    """Read what `write_part` wrote; nothing of a file that is not whole."""
    try:
        table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
        layers = int(table.schema.metadata[b"layers"])
        rows = [{name: table[name][i] for name in table.column_names} for i in range(table.num_rows)]
        return {int(row["index"].as_py()): _row(row, layers) for row in rows}
    except (pa.ArrowInvalid, OSError, KeyError, TypeError):
        return {}


def _write_stream(file: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    with file.open("wb") as handle, pa.ipc.new_stream(handle, schema) as stream:
        for batch in batches:
            stream.write_batch(batch)


def _row(row: dict[str, Any], layers: int) -> RecordedRow:
    arrays = {
        name: np.array(value.values.to_numpy(zero_copy_only=False))
        for name, value in row.items()
        if isinstance(value, pa.ListScalar)
    }
    length = len(arrays["input_ids"])
    for name in ("top_ids", "top_gap"):
        arrays[name] = arrays[name].reshape(length, -1)
    if layers:
        arrays["hidden"] = arrays["hidden"].reshape(length, layers, -1)
    notes = row["notes"].as_py()
    return RecordedRow(
        **arrays,
        finish=row["finish"].as_py(),
        where=row["where"].as_py(),
        notes=tuple(notes.split("\n")) if notes else (),
    )


def _batches(rows: Sequence[RecordedRow]) -> list[list[RecordedRow]]:
    parts: list[list[RecordedRow]] = []
    size = _BATCH_VALUES
    for row in rows:
        more = row.top_ids.size if row.hidden is None else max(row.top_ids.size, row.hidden.size)
        if size + more > _BATCH_VALUES:
            parts.append([])
            size = 0
        parts[-1].append(row)
        size += more
    return parts


def _record_batch(rows: list[RecordedRow], schema: pa.Schema) -> pa.RecordBatch:
    columns = []
    for column in schema:
        values = [getattr(row, column.name).reshape(-1) for row in rows]
        offsets = np.cumsum([0, *map(len, values)]).astype(np.int32)
        flat = pa.array(np.concatenate(values), type=column.type.value_type)
        columns.append(pa.ListArray.from_arrays(pa.array(offsets), flat, type=column.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)
