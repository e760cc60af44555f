"""Checkpoint files: whole after a kill at any moment, hashed, and loaded without running code from them.

`last.ckpt` is replaced by renaming, and the file it replaces stays as `last.previous.ckpt`. SHA256SUMS beside
them lists the hash of every checkpoint, in the format of `sha256sum -c`.
"""

from __future__ import annotations

import pickle
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from certdraft.support import sha256_of, write_file, write_text

LAST, PREVIOUS, SUMS_FILE = "last.ckpt", "last.previous.ckpt", "SHA256SUMS"


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning plugin that writes and reads the checkpoints of a run."""

    def __init__(self) -> None:
        self._written: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint and its hash."""
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        listed = _read_sums(file.parent)
        # A damaged `last` of an earlier process must not take the place of the one before it.
        keep = file.name == LAST and file.exists() and (file in self._written or is_whole(file))
        new: list[tuple[str, str]] = []

        def write(temporary: Path) -> None:
            _save(checkpoint, temporary)
            new.append((sha256_of(temporary), file.name))
            if keep:
                new.extend((digest, PREVIOUS) for digest, name in listed if name == LAST)
            _write_sums(
                file.parent, [*listed, *new]
            )  # old and new content are both right until it is renamed
            if keep:
                file.replace(file.with_name(PREVIOUS))

        write_file(file, write)
        self._written.add(file)
        replaced = {name for _, name in new}
        _write_sums(file.parent, [*(pair for pair in listed if pair[1] not in replaced), *new])

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint; `weights_only` is always true, so a file can never run code."""
        return read_checkpoint(path, map_location)


def read_checkpoint(path: str | Path, map_location: Any = "cpu", *, verify: bool = True) -> dict[str, Any]:
    """Content of a checkpoint file: tensors and plain values only.

    Args:
        path: the file.
        map_location: as `torch.load` takes it.
        verify: compare the file with its listed hash first; costs one read of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds more than tensors and plain values.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such checkpoint; a run keeps its own in RUN/checkpoints")
    if verify and not is_whole(file):
        raise ValueError(f"{file} is damaged{_instead(file)}")
    try:
        return torch.load(file, map_location=map_location, weights_only=True, mmap=not verify)
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{file} is damaged, or no checkpoint ({reason}){_instead(file)}") from None


def is_whole(path: str | Path) -> bool:
    """Whether a checkpoint is the one that was written; without a listed hash, whether it is complete.

    A sharded checkpoint is a folder and is not hashed.
    """
    file = Path(path)
    if file.is_dir():
        return (file / "meta.pt").is_file()
    digests = [digest for digest, name in _read_sums(file.parent) if name == file.name]
    return sha256_of(file) in digests if digests else zipfile.is_zipfile(file)


def first_whole(files: Iterable[Path]) -> Path | None:
    """The first existing checkpoint that is whole; None when none exists.

    Raises:
        ValueError: all of them are damaged.
    """
    damaged: list[Path] = []
    for file in files:
        if not file.exists():
            continue
        if is_whole(file):
            if damaged:
                print(f"{damaged[0]} is damaged: going on from {file.name}", file=sys.stderr)
            return file
        damaged.append(file)
    if damaged:
        raise ValueError(f"{damaged[0]} is damaged{_instead(damaged[0])}")
    return None


def _instead(file: Path) -> str:
    """The way out: the checkpoints beside a damaged one."""
    names = sorted(other.name for other in file.parent.glob("*.ckpt") if other != file and is_whole(other))
    if names:
        return f"; use one beside it ({', '.join(names)}), or train again"
    return "; delete it and train again, or copy it again from where it came"


def _save(checkpoint: dict[str, Any], file: Path) -> None:
    with file.open("wb") as stream:
        try:
            torch.save(checkpoint, stream)
        except RuntimeError as error:  # torch's own complaint hides why the write failed
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else error from None


def _read_sums(folder: Path) -> list[tuple[str, str]]:
    """Pairs of hash and file name; while a file is being replaced, a name has two."""
    file = folder / SUMS_FILE
    if not file.is_file():
        return []
    lines = [
        line.split(maxsplit=1) for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    return [(line[0], line[1]) for line in lines if len(line) == 2]


def _write_sums(folder: Path, pairs: Iterable[tuple[str, str]]) -> None:
    write_text(folder / SUMS_FILE, "".join(f"{digest}  {name}\n" for digest, name in dict.fromkeys(pairs)))
