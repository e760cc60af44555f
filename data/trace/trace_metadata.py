"""`trace.json`: what was recorded, from what, and the hash of every shard."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
TRACE_FILE = "trace.json"


class TraceError(ValueError):
    """A trace that cannot be trusted; the message names the file and what to do."""


@dataclass(frozen=True)
class ShardInfo:
    """One file of a trace. `counted` is the number of positions that its loss mask selects."""

    file: str
    rows: int
    tokens: int
    counted: int
    bytes: int
    sha256: str
    accounting: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TraceMeta:
    """The content of `trace.json`.

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
        weights_origin: what the target's weights were made from, such as "dequantised from Q4_K GGUF"; None
            where they were stored as they are used, or lay on a server.
        has_entropy: whether the entropies are known; a server returns K tokens only, and they are NaN.
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
    weights_origin: str | None = None

    @property
    def num_rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def num_counted(self) -> int:
        """Positions that are in the loss mask."""
        return sum(shard.counted for shard in self.shards)

    def to_dict(self) -> dict[str, Any]:
        totals = {"rows": self.num_rows, "tokens": self.num_tokens, "counted": self.num_counted}
        return asdict(self) | {"totals": totals}

    @classmethod
    def read(cls, file: Path) -> TraceMeta:
        """Read `trace.json`."""
        restore = "restore it from a copy or record again"
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise TraceError(f"{file} is not valid JSON ({error}); {restore}") from error
        version = data.get("schema") if isinstance(data, dict) else None
        if version is None:
            raise TraceError(
                f"{file} names no schema version, so this is not a certdraft trace; record one first"
            )
        if version != SCHEMA_VERSION:
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            remedy = "upgrade certdraft" if newer else "record again"
            raise TraceError(
                f"{file}: schema version {version!r}, this certdraft reads {SCHEMA_VERSION}; {remedy}"
            )
        missing = sorted({f.name for f in fields(cls) if f.default is MISSING} - set(data))
        if missing:
            raise TraceError(f"{file} lacks {', '.join(missing)}; {restore}")
        try:
            values = {f.name: data[f.name] for f in fields(cls) if f.name in data}
            values["shards"] = tuple(ShardInfo(**shard) for shard in data["shards"])
            values["feature_layers"] = tuple(data.get("feature_layers", ()))
            meta = cls(**values)
            problem = _problem(meta)
        except TypeError as error:
            raise TraceError(f"{file} holds values of another type ({error}); {restore}") from error
        if problem:
            raise TraceError(f"{file}: {problem}; {restore}")
        return meta


def _problem(meta: TraceMeta) -> str | None:
    """What is wrong with the values, or None."""
    counts = [("vocab_size", meta.vocab_size, 1), ("num_kept", meta.num_kept, 1)]
    for shard in meta.shards:  # a shard may be empty: nothing in it was worth learning
        counts += [
            (f"{name} of {shard.file}", getattr(shard, name), 0) for name in ("rows", "tokens", "bytes")
        ]
    for name, value, least in counts:
        if not isinstance(value, int) or value < least:
            return f"{name} is {value!r}, expected an integer of at least {least}"
    for name in ("settings", "accounting", "versions"):
        if not isinstance(getattr(meta, name), dict):
            return f"{name} is {getattr(meta, name)!r}, expected an object"
    if not all(isinstance(layer, int) for layer in (*meta.feature_layers, meta.feature_size)):
        return "feature_layers and feature_size must be integers"
    if not isinstance(meta.weights_origin, str | None):
        return f"weights_origin is {meta.weights_origin!r}, expected a text or null"
    files = [shard.file for shard in meta.shards]
    if not files:
        return "it lists no shards, so the trace holds nothing"
    wrong = [f for f in files if not isinstance(f, str) or f != Path(f).name or f[:1] in ("", ".")]
    if wrong:
        return f"shard {wrong[0]!r} is not a plain file name in the trace's folder"
    if len(set(files)) < len(files):
        return "it lists one shard twice"
    return None
