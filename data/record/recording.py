"""Settings and prompts of a recording, checked before anything is written, and the metadata it ends with."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Int64
from numpy import ndarray

import certdraft
from certdraft.data.corpus.accounting import Accounting
from certdraft.data.corpus.chat import Prompts, PromptSet, build_prompts
from certdraft.data.corpus.corpora import Corpus, CorpusError
from certdraft.data.corpus.rows import read_rows
from certdraft.data.record.generation import TargetError
from certdraft.data.record.learned_positions import Generation
from certdraft.data.targets import (
    EMBEDDED,
    embedded_target_path,
    target_config,
    target_weights_origin,
    tokenizer_fingerprint,
)
from certdraft.data.trace.recorded_row import RecordedRow, bytes_per_token
from certdraft.data.trace.shards import NOT_RECORDED, Ledger, RecordingError, begun_meta
from certdraft.data.trace.trace_metadata import SCHEMA_VERSION, TRACE_FILE, ShardInfo, TraceMeta
from certdraft.support import Progress, facts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Recording:
    """Everything that decides the content of a trace; the arguments of `record_trace`.

    Args:
        target: "embedded", a local folder, or a hub name.
        corpus: which rows to read.
        prompts: how rows become token ids.
        generation: how the target continues prompts, and which token positions are learned.
        tokenizer: where the tokenizer is, when not beside the target.
        revision: hub revision of the target.
        dtype: dtype of the target's weights; logits are fp32 whatever it is.
        num_kept: K, top-k logits kept per token position.
        batch_size: prompts continued side by side.
        shard_rows: prompts per shard; a killed recording loses at most the shard in progress.
        feature_layers: 0-based target layers whose outputs are kept in bf16, for drafters that read them
            (`Drafter.taps`); each costs 2 H bytes a token, so lower `shard_rows`: a shard is held in memory.
    """

    target: str = EMBEDDED
    corpus: Corpus = Corpus()
    prompts: Prompts = Prompts()
    generation: Generation = Generation()
    tokenizer: str | None = None
    revision: str | None = None
    dtype: DType = "float32"
    num_kept: int = 32
    batch_size: int = 32
    shard_rows: int = 256
    feature_layers: tuple[int, ...] = ()

    def settings(self) -> dict[str, Any]:
        """As `trace.json` stores it."""
        return json.loads(json.dumps(asdict(self)))


def with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Recorded settings with defaults for those that are newer than the recording."""
    filled = Recording().settings() | settings
    for name, default in Recording().settings().items():
        if isinstance(default, dict) and isinstance(settings.get(name), dict):
            filled[name] = default | settings[name]
    return filled


def read_prompts(
    recording: Recording, tokenizer: PreTrainedTokenizerBase, show_progress: bool = True
) -> tuple[PromptSet, Accounting]:
    """All prompts of a recording, and the accounting of the corpus' rows.

    Raises:
        CorpusError: malformed rows, or no prompt left; the accounting is part of the message.
    """
    accounting = Accounting("rows")
    rows = read_rows(recording.corpus, accounting)
    teacher_forced = recording.generation.teacher_forced
    with Progress("reading", None, "prompts", enabled=show_progress) as progress:
        made = build_prompts(
            rows, tokenizer, recording.prompts, accounting,
            teacher_forced=teacher_forced, bad_rows=recording.corpus.bad_rows,
        )  # fmt: skip
        prompts = PromptSet(progress.track(made))
    accounting = accounting.summed()
    if not len(prompts):
        raise CorpusError(f"corpus {recording.corpus}: no row can be used.\n{accounting}")
    return prompts, accounting


def target_revision(target: str, revision: str | None) -> str:
    """Identifies a target's weights: the hub commit, or for a folder a hash of its config and weight files.

    Of each weight file only size and both ends (1 MiB) are hashed: a retrained model differs there, and a
    target of 16 GB is not read twice.
    """
    path = embedded_target_path() if target == EMBEDDED else Path(target).expanduser()
    if not path.exists():
        return getattr(target_config(target, revision=revision), "_commit_hash", None) or str(revision)
    patterns = ("config.json", "*.safetensors", "*.bin", "*.gguf")
    files = [path] if path.is_file() else [file for pattern in patterns for file in path.glob(pattern)]
    digest = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(1 << 20))
            handle.seek(max(0, size - (1 << 20)))
            digest.update(handle.read())
    return digest.hexdigest()[:16]


def recorded_settings(
    recording: Recording, prompts: PromptSet, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Everything that decides the content of a trace, as compared when a recording goes on."""
    return recording.settings() | {
        "num_prompts": len(prompts),
        "prompts_sha256": prompts.sha256(),
        "target_revision": target_revision(recording.target, recording.revision),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
    }


def feature_size(recording: Recording) -> int:
    """H of the target whose features are kept, from its config; 0 when none are.

    Raises:
        ValueError: a layer that the target does not have, or documents too long for one shard row.
    """
    layers = recording.feature_layers
    if not layers:
        return 0
    facts = facts_of(target_config(recording.target, revision=recording.revision))
    if len(set(layers)) < len(layers) or not all(0 <= layer < facts.num_layers for layer in layers):
        raise ValueError(
            f"feature_layers={list(layers)}: {recording.target} has layers 0 to "
            f"{facts.num_layers - 1}; name each at most once"
        )
    size = facts.hidden_size
    longest = recording.generation.max_length
    if longest * len(layers) * size >= 1 << 31:
        raise ValueError(
            f"{longest} tokens of {len(layers)} × {size} features do not fit into one row of a trace; lower "
            "generation.max_length"
        )
    return size


def open_ledger(
    folder: Path, settings: dict[str, Any], *, lock: bool = True, closing: bool = False
) -> Ledger:
    """The ledger of a recording with the settings of `recorded_settings`; the caller releases it."""
    return Ledger(
        folder, settings, -(-settings["num_prompts"] // settings["shard_rows"]), lock=lock,
        with_features=bool(settings.get("feature_layers")), complete=with_defaults, closing=closing,
    )  # fmt: skip


def shard_prompts(shard: int, shard_rows: int, num_prompts: int) -> Int64[ndarray, " n"]:
    """Indices of the prompts of a shard: consecutive, in corpus order."""
    return np.arange(shard * shard_rows, min((shard + 1) * shard_rows, num_prompts))


def account(rows: list[RecordedRow]) -> tuple[list[RecordedRow], Accounting]:
    """Rows with something to learn, and the accounting of all."""
    accounting, used = Accounting("prompts"), []
    for row in rows:
        accounting.read += 1
        if not row.loss_mask.any():
            reason = "loops from the start" if row.finish == "loop" else "nothing to learn"
            accounting.skip(reason, row.where)
            continue
        accounting.used += 1
        used.append(row)
        if row.finish == "loop":
            last_learned = int(row.loss_mask.nonzero()[0][-1]) + 1
            accounting.note("degenerate loop cut or masked", f"{row.where}, from token {last_learned + 1}")
        for note in row.notes:
            accounting.note(note, row.where)
    return used, accounting


def check_settings(recording: Recording) -> None:
    """Raise a ValueError for settings that contradict each other."""
    for name in ("num_kept", "batch_size", "shard_rows"):
        if getattr(recording, name) < 1:
            raise ValueError(f"{name} is {getattr(recording, name)}; give at least 1")
    generation, longest = recording.generation, recording.prompts.max_prompt_tokens
    room = generation.max_length - (0 if generation.teacher_forced else 1)
    if longest > room:
        raise ValueError(
            f"prompts.max_prompt_tokens={longest} leaves no room for a continuation in "
            f"generation.max_length={generation.max_length}; lower the first or raise the second"
        )
    feature_size(recording)


def check_fit(prompts: PromptSet, recording: Recording, vocab_size: int, config: Any) -> None:
    """Raise if prompts or settings do not fit the target.

    Args:
        prompts: all of them.
        recording: the settings.
        vocab_size: V of the target's embeddings.
        config: of the target.

    Raises:
        TargetError: with both numbers.
    """
    limit = facts_of(config).max_positions
    if prompts.max_id >= vocab_size:
        raise TargetError(
            f"the tokenizer gives id {prompts.max_id}, but {recording.target} has {vocab_size} embeddings; "
            "tokenizer and target do not belong together"
        )
    if recording.num_kept > vocab_size:
        raise TargetError(f"num_kept={recording.num_kept} exceeds the vocabulary of {vocab_size}; keep fewer")
    longest = int(prompts.lengths.max()) + recording.generation.max_new_tokens
    longest = min(longest, recording.generation.max_length)
    if limit is not None and longest > limit:
        raise TargetError(
            f"documents may reach {longest} tokens, but {recording.target} has {limit} positions; "
            f"set generation.max_length={limit} or shorten prompts and continuations"
        )


def check_disk(folder: Path, ledger: Ledger, prompts: PromptSet, recording: Recording) -> None:
    """Print the largest size to expect, and raise a RecordingError if the disk could not hold it."""
    waiting = [s for s in range(ledger.num_shards) if not ledger.is_done(s)]
    rows = [shard_prompts(s, recording.shard_rows, len(prompts)) for s in waiting]
    lengths = prompts.lengths[np.concatenate(rows)] if rows else np.zeros(0, np.int64)
    generation = recording.generation
    tokens = int(np.minimum(lengths + generation.max_new_tokens, generation.max_length).sum())
    each = bytes_per_token(recording.num_kept, len(recording.feature_layers) * feature_size(recording))
    needed = int(tokens * each)
    free = shutil.disk_usage(folder).free
    done = ledger.num_shards - len(waiting)
    resumed = f", {done} of {ledger.num_shards} shards are written already" if done else ""
    estimate = (
        f"{len(lengths):,} prompts, at most {tokens:,} tokens of {each:.0f} bytes: up to {_size(needed)}; "
        f"{_size(free)} free{resumed}"
    )
    print(estimate, file=sys.stderr)
    if needed > free:
        raise RecordingError(
            f"{folder}: the disk may not hold this trace ({estimate}). Choose another folder, or lower "
            f"{'feature_layers, ' if recording.feature_layers else ''}num_kept, generation.max_new_tokens or "
            "corpus.max_rows."
        )


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def library_versions() -> dict[str, str]:
    """Versions of the libraries whose arithmetic a trace depends on."""
    import transformers

    return {
        "certdraft": certdraft.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def meta_without_shards(
    recording: Recording,
    settings: dict[str, Any],
    corpus: Accounting,
    *,
    vocab_size: int,
    dtype: str,
    versions: dict[str, str],
    has_entropy: bool = True,
) -> TraceMeta:
    """What is known of a trace before anything of it is recorded."""
    return TraceMeta(
        schema=SCHEMA_VERSION,
        target=recording.target,
        target_revision=settings["target_revision"],
        tokenizer_fingerprint=settings["tokenizer_fingerprint"],
        vocab_size=vocab_size,
        num_kept=recording.num_kept,
        dtype=dtype,
        settings=settings,
        shards=(),
        accounting={"corpus": corpus.to_dict()},
        versions=library_versions() | versions,
        feature_layers=recording.feature_layers,
        feature_size=feature_size(recording),
        has_entropy=has_entropy,
        weights_origin=None if dtype == "server" else target_weights_origin(recording.target),
    )


def finish_trace(
    ledger: Ledger, begun: TraceMeta, shards: Iterable[ShardInfo], lacking: Accounting | None = None
) -> TraceMeta:
    """Make the recording a trace; prints the accounting of its prompts.

    Args:
        ledger: of the recording.
        begun: `meta_without_shards`.
        shards: of the trace, in order.
        lacking: of prompts that are in none of them.

    Raises:
        RecordingError: no prompt gave anything to learn.
    """
    shards, recorded = tuple(shards), Accounting("prompts")
    for shard in shards:
        recorded.add(Accounting.from_dict(shard.accounting))
    recorded.add(lacking or Accounting("prompts"))
    print(recorded, file=sys.stderr)
    if not recorded.used:
        raise RecordingError(f"{ledger.folder}: no prompt gave a usable continuation.\n{recorded}")
    accounting = begun.accounting | {"recording": recorded.to_dict()}
    ledger.finish(replace(begun, shards=shards, accounting=accounting))
    return TraceMeta.read(ledger.folder / TRACE_FILE)


def close_recording(folder: Path) -> TraceMeta:
    """Make an unfinished recording a trace of what it holds; prompts without a document are counted.

    The command that began the recording can still go on: it then records what is lacking.

    Raises:
        RecordingError: no such recording, another process is at it, or it holds nothing to learn.
    """
    begun = begun_meta(folder)
    settings = begun.settings
    size, total = settings["shard_rows"], settings["num_prompts"]
    ledger = open_ledger(folder, settings, closing=True)
    try:
        lacking = Accounting("prompts")
        for shard in (s for s in range(ledger.num_shards) if not ledger.is_done(s)):
            rows, prompts = ledger.kept(shard), shard_prompts(shard, size, total).tolist()
            used, accounting = account([row for _, row in sorted(rows.items())])
            missing = [prompt for prompt in prompts if prompt not in rows]
            accounting.read += len(missing)
            if missing:
                accounting.skip(NOT_RECORDED, f"prompt {missing[0] + 1} of {total}", len(missing))
            if used:
                ledger.commit(shard, used, accounting)
            else:
                lacking.add(accounting)
        done = [shard for shard in range(ledger.num_shards) if ledger.is_done(shard)]
        return finish_trace(ledger, begun, ledger.shards(done), lacking)
    finally:
        ledger.release()
