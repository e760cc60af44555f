"""Where a result comes from: versions, machine, command, source state, file hashes."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RECORD_FILE = "run.yaml"  # of a training run; train/record.py writes it
_PACKAGES = ("certdraft", "torch", "transformers", "numpy", "scipy")


def provenance(files: Mapping[str, str | os.PathLike[str]] | None = None) -> dict[str, str]:
    """Facts that let a reader repeat a result.

    Args:
        files: label → file or directory whose sha-256 belongs to the result.

    Returns:
        label → text, in reading order; values never depend on the numbers measured.
    """
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
        "source": _git_revision(Path(__file__).resolve().parents[2]),
        "machine": _machine(),
    }
    for label, path in (files or {}).items():
        facts[f"sha-256 of {label}"] = sha256(path)
    return facts


def read_parts(folder: Path) -> list[dict[str, Any]]:
    """The parts of a training run, one per command that worked on it, oldest first."""
    import yaml

    file = folder / RECORD_FILE
    return yaml.safe_load(file.read_text(encoding="utf-8"))["parts"] if file.is_file() else []


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file; of a directory, the digest over its sorted relative names and contents."""
    root = Path(path)
    digest = hashlib.sha256()
    for file in [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file()):
        if file != root:
            digest.update(file.relative_to(root).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _git_revision(folder: Path) -> str:
    if not (folder / ".git").exists():
        return "installed package"
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head.stdout.strip() + (" + local changes" if dirty.stdout.strip() else "")


def _machine() -> str:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, "
        f"{torch.get_num_threads()} torch threads, {device}"
    )
