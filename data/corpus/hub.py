"""Rows of a hub dataset. Whether the hub answers is asked once, instead of a minute of retries per file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from certdraft.support import HUB_TIMEOUT_S, hub_answers, hub_endpoint


def hub_rows(name: str, config: str | None, split: str, streaming: bool = False) -> Iterator[tuple[str, Any]]:
    """(where, record) of every row.

    Args:
        name: of the dataset.
        config: its configuration, when it has several.
        split: of the dataset.
        streaming: fetch rows as they are read.

    Raises:
        FileNotFoundError: the hub cannot be reached and holds no cached copy, or has no such dataset.
    """
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    if not offline and not hub_answers():
        raise FileNotFoundError(
            _unreachable(name, f"no answer from {hub_endpoint()} within {HUB_TIMEOUT_S:.0f} s")
        )

    from datasets import load_dataset

    try:
        dataset = load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # datasets raises a dozen unrelated types here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise FileNotFoundError(
            _unreachable(name, f"HF_HUB_OFFLINE is set; {reason}" if offline else reason)
        ) from error
    yield from ((f"{name} row {index}", record) for index, record in enumerate(dataset))


def _unreachable(name: str, reason: str) -> str:
    return (
        f"corpus {name!r} is no local file or folder, and it cannot be read from the hub: {reason}. Download "
        f"it on a machine with access (`hf download --repo-type dataset {name} --local-dir DIR`) and give "
        "DIR, or a jsonl, parquet or text file, as the corpus source. A gated dataset needs the HF_TOKEN "
        "environment variable."
    )
