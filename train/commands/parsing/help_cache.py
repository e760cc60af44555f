"""Help texts kept between calls: showing one takes milliseconds, making one imports torch."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import certdraft

_DEPENDENCIES = ("jsonargparse", "pytorch-lightning", "torch", "transformers")  # whose options the texts show


def show_help(name: str, make: Callable[[], Any]) -> None:
    """Print the help of a command, made by `make` unless the same sources made it before."""
    file = _folder() / f"{_key(name)}.txt"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        print(file.read_text(encoding="utf-8"), end="")
        return
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            make()
        except SystemExit as stop:
            if stop.code:
                raise
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(text.getvalue(), encoding="utf-8")
        temporary.replace(file)
    print(text.getvalue(), end="")


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "certdraft" / "help"


def _key(name: str) -> str:
    """A hash that changes with the command, the width of the terminal, and any source the text comes from."""
    root = Path(certdraft.__file__).parent
    sources = [file for init in root.glob("*/__init__.py") for file in init.parent.rglob("*.py")]
    facts = [name, sys.version, str(root), str(shutil.get_terminal_size().columns)]
    facts += [version(package) for package in _DEPENDENCIES]
    facts += sorted(f"{file}{file.stat().st_mtime_ns}" for file in sources)
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]
