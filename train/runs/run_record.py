"""run.yaml, the record of a run for programs, and command.txt, the same for people.

A run has one part per command that worked on it. A part holds the command, its sources, the packages, the
machine and the traces (the sha-256 of each trace.json, which holds the hashes of its shards). With
config.yaml beside it that is all a run depends on.
"""

from __future__ import annotations

import contextlib
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from certdraft.evaluation import RECORD_FILE, provenance, read_parts
from certdraft.support import sha256_of, write_text

# What the numbers of a run depend on; the rest of the environment is not recorded.
_PACKAGES = (
    "certdraft", "torch", "pytorch-lightning", "transformers", "tokenizers", "datasets", "peft",
    "safetensors", "numpy", "jsonargparse", "triton",
)  # fmt: skip


def write_part(folder: Path, traces: Mapping[str, str | Path]) -> None:
    """Append this process's command to the run's record.

    Args:
        folder: the run's folder.
        traces: "train", "validation" → folder of the trace.
    """
    facts = provenance()
    part = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "source": facts["source"],
        "machine": facts["machine"],
        "python": platform.python_version(),
        "packages": installed_packages(),
        "data": {
            name: {"path": str(path), "sha256": sha256_of(Path(path) / "trace.json")}
            for name, path in traces.items()
        },
    }
    write_text(folder / RECORD_FILE, yaml.safe_dump({"parts": [*record_of(folder), part]}, sort_keys=False))
    with (folder / "command.txt").open("a", encoding="utf-8") as stream:
        stream.write("\n".join(f"{label}: {text}" for label, text in facts.items()) + "\n\n")


def record_of(folder: Path) -> list[dict[str, Any]]:
    """The parts of a run, oldest first; empty without a record.

    Raises:
        ValueError: the record is damaged.
    """
    try:
        parts = read_parts(folder)
    except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, RecursionError):
        parts = None
    if not isinstance(parts, list) or not all(_is_part(part) for part in parts):
        raise ValueError(
            f"{folder / RECORD_FILE} is damaged; move it away to go on (command.txt beside it holds the same "
            "facts), or restore it to reproduce the run"
        )
    return parts


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict) or not part.keys() >= {"source", "machine", "python", "packages", "data"}:
        return False
    packages, traces = part["packages"], part["data"]
    if not isinstance(packages, dict) or not isinstance(traces, dict):
        return False
    return all(isinstance(trace, dict) and trace.keys() >= {"path", "sha256"} for trace in traces.values())


def installed_packages() -> dict[str, str]:
    """Version of each installed package that the numbers of a run depend on."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    found["torch"] = str(torch.__version__)  # with the CUDA it was built for, which PyPI's metadata leave out
    return found
