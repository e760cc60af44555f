"""Provenance of a result: versions, machine, command, source state, file hashes."""

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

from certdraft.support import sha256_of

RECORD_FILE = "run.yaml"  # of a training run; train/record.py writes it
_PACKAGES = ("certdraft", "torch", "transformers", "numpy", "scipy")


def provenance(files: Mapping[str, str | os.PathLike[str]] | None = None) -> dict[str, str]:
    """Return what a reader needs to repeat a result.

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
    """Return the parts of a training run, one per command that worked on it, oldest first."""
    import yaml

    file = folder / RECORD_FILE
    return yaml.safe_load(file.read_text(encoding="utf-8"))["parts"] if file.is_file() else []


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file; of a directory, the digest over its sorted relative names and their digests."""
    root = Path(path)
    if root.is_file():
        return sha256_of(root)
    files = sorted(p for p in root.rglob("*") if p.is_file())
    lines = [f"{file.relative_to(root).as_posix()} {sha256_of(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _git_revision(folder: Path) -> str:
    if not (folder / ".git").exists():
        return "installed package"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return found.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" + local changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _machine() -> str:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, "
        f"{torch.get_num_threads()} torch threads, {device}"
    )
