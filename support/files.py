"""Files and folders that appear whole or not at all: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any


def write_file(file: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file in the same folder, then sync it and rename it to `file`.

    A kill at any moment leaves either the old content or the new one. The temporary file of a process that
    was killed before is removed.

    Raises:
        OSError: the file cannot be written; the old content is intact, and the temporary file is gone.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    for stale in _left_behind(file, "tmp"):
        stale.unlink(missing_ok=True)
    try:
        write(temporary)
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(file)
        sync_folder(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8", newline="")

    write_file(file, write)


def write_json(file: Path, content: Any) -> None:
    """Write JSON with sorted keys, whole or not at all."""
    write_text(file, json.dumps(content, indent=1, sort_keys=True) + "\n")


@contextmanager
def appearing_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends without an error.

    On an error the temporary folder is removed, and a folder that was to be replaced is still there.
    What an earlier, killed process left behind under such temporary names is removed first.

    Raises:
        FileExistsError: `path` exists, and is no folder to overwrite.
    """
    if path.exists() and not (overwrite and path.is_dir()):
        raise FileExistsError(f"{path} exists already")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.replaced")
    _remove_stale(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        open_to_readers(temporary)
        sync_tree(temporary)
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
        sync_folder(path.parent)
    finally:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def open_to_readers(folder: Path) -> None:
    """Give files the read permissions of their folder; safetensors lets only their owner read them."""
    readable = folder.stat().st_mode & 0o444
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(stat.S_IMODE(file.stat().st_mode) | readable)


def sync_folder(folder: Path) -> None:
    """Force the entries of a folder to the disk, so that a rename in it survives a power cut."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force a folder and everything below it to the disk."""
    for entry in [*folder.rglob("*"), folder]:
        if entry.is_dir():
            sync_folder(entry)
        else:
            with entry.open("rb") as handle:
                os.fsync(handle.fileno())


def sha256_of(file: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, hex."""
    with Path(file).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _remove_stale(path: Path) -> None:
    """Remove what dead processes left; put a folder back whose replacement never appeared."""
    for ending in ("replaced", "partial"):
        for stale in _left_behind(path, ending):
            if ending == "replaced" and not path.exists():
                stale.rename(path)
            else:
                shutil.rmtree(stale, ignore_errors=True)


def _left_behind(path: Path, ending: str) -> list[Path]:
    """Temporary names of `path` that processes had which are dead now."""
    found = [
        (stale, stale.name.split(".")[-2]) for stale in path.parent.glob(f".{escape(path.name)}.*.{ending}")
    ]
    return [stale for stale, pid in found if pid.isdigit() and not _alive(int(pid))]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
