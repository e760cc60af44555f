"""Rows of a shard that is not whole yet, one file a batch: what a kill leaves of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from certdraft.data.trace.recorded_row import RecordedRow

_EXTRA = (("index", pa.int64()), ("finish", pa.string()), ("where", pa.string()), ("notes", pa.string()))


def write_part(file: Path, rows: Mapping[int, RecordedRow], batch: pa.RecordBatch) -> None:
    """Writes rows with what a shard leaves out: their number, and how and where they ended.

    Args:
        file: to write.
        rows: by number of their prompt.
        batch: the same rows as columns of a shard.
    """
    values = {
        "index": list(rows),
        "finish": [row.finish for row in rows.values()],
        "where": [row.where for row in rows.values()],
        "notes": ["\n".join(row.notes) for row in rows.values()],
    }
    for name, kind in _EXTRA:
        batch = batch.append_column(name, pa.array(values[name], kind))
    hidden = next(iter(rows.values())).hidden
    facts = {"layers": str(0 if hidden is None else hidden.shape[1])}
    batch = batch.replace_schema_metadata(facts)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)


def read_part(file: Path) -> dict[int, RecordedRow]:
    """The rows of `write_part`; none of a file that is not whole."""
    try:
        table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
        layers = int(table.schema.metadata[b"layers"])
        return {int(row["index"].as_py()): _row(row, layers) for row in _rows(table)}
    except (pa.ArrowInvalid, OSError, KeyError, TypeError):
        return {}


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    return [{name: table[name][i] for name in table.column_names} for i in range(table.num_rows)]


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
