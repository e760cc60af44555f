"""Recordings with a tiny target: settings, and what a folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from certdraft.data import Corpus, Generation, Prompts, TraceMeta, record_trace

SETTINGS: dict[str, Any] = {
    "prompts": Prompts(max_prompt_tokens=100), "num_kept": 8, "batch_size": 3, "shard_rows": 4
}  # fmt: skip


def generation(**changes: Any) -> Generation:
    return Generation(**({"max_new_tokens": 6, "max_length": 200} | changes))


def record(out_dir: Path, target: str, chats: str, **changes: Any) -> TraceMeta:
    settings = {"corpus": Corpus(chats, split="all"), "generation": generation()} | SETTINGS | changes
    return record_trace(str(out_dir), target, accelerator="cpu", **settings)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
