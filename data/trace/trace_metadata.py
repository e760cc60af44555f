"""What `trace.json` says once every shard is written."""

from __future__ import annotations

import sys
from typing import Any

from certdraft.data.corpus.accounting import Accounting
from certdraft.data.record.recording import Recording, feature_size, library_versions
from certdraft.data.trace.arrow_trace import SCHEMA_VERSION, TraceMeta
from certdraft.data.trace.shards import Ledger, RecordingError


def trace_meta(
    ledger: Ledger,
    recording: Recording,
    settings: dict[str, Any],
    corpus: Accounting,
    *,
    vocab_size: int,
    dtype: str,
    versions: dict[str, str],
    has_entropy: bool = True,
) -> TraceMeta:
    """The metadata of a recording whose shards are all there, after printing where the prompts went.

    Args:
        ledger: of the recording.
        recording: what was asked for.
        settings: everything that decides the trace's content.
        corpus: where the corpus' rows went.
        vocab_size: V of the target's logits.
        dtype: of the target's weights.
        versions: of what ran the target, besides this process' libraries.
        has_entropy: whether the entropies are known.

    Raises:
        RecordingError: a shard is missing, or no prompt gave anything to learn.
    """
    shards = ledger.shards()
    recorded = Accounting("prompts")
    for shard in shards:
        recorded.add(Accounting.from_dict(shard.accounting))
    print(recorded, file=sys.stderr)
    if not recorded.used:
        raise RecordingError(f"{ledger.folder}: no prompt gave a usable continuation.\n{recorded}")
    return TraceMeta(
        schema=SCHEMA_VERSION,
        target=recording.target,
        target_revision=settings["target_revision"],
        tokenizer_fingerprint=settings["tokenizer_fingerprint"],
        vocab_size=vocab_size,
        num_kept=recording.num_kept,
        dtype=dtype,
        settings=settings,
        shards=shards,
        accounting={"corpus": corpus.to_dict(), "recording": recorded.to_dict()},
        versions=library_versions() | versions,
        feature_layers=recording.feature_layers,
        feature_size=feature_size(recording),
        has_entropy=has_entropy,
    )
