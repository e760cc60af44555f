"""Which classes a config or checkpoint from elsewhere may name: those of certdraft, and registered ones.

A config can name any class or function that Python can import, so building what it describes runs its
author's code. `fit` and the commands around it build what the user's own config names; `reproduce` and
`export` read run folders, which may come from anywhere, and ask here before they import or build anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from certdraft.drafters import drafter_kinds

_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_LIGHTNING = ("accelerators", "callbacks", "loggers", "plugins", "profilers", "strategies")
_ROOMS = ("certdraft.", *(f"pytorch_lightning.{room}." for room in _LIGHTNING))
_LARGEST_CONFIG = 1 << 20  # bytes


def refuse_foreign_classes(settings: Any, where: object, trust: bool = False) -> None:
    """Raise if settings name a class or function that is neither certdraft's nor registered.

    Lightning's callbacks, loggers, strategies, plugins and profilers are allowed. Only modules of these
    two packages are imported to find out.
    """
    for key, name in [] if trust else _names(settings, ""):
        if not _is_known(name):
            raise ValueError(
                f"{where}: {key} names {name}, which is neither a class of certdraft nor registered here, so "
                "building it would run code that came with the config. Read it, and add --trust_classes true "
                "if you mean to"
            )


def _names(value: Any, key: str, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Pairs (dotted key, name) of whatever the parser could import, also from files that a value names."""
    if depth > 64:
        raise ValueError(f"{key} is nested too deeply for a config")
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _names(inner, f"{key}.{name}".lstrip("."), depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _names(inner, key, depth + 1)
    elif isinstance(value, str):
        if _DOTTED.fullmatch(value):
            if _can_import(value.partition(".")[0]):
                yield key, value
        elif (content := _as_config(value)) is not None:
            yield from _names(content, key, depth + 1)


def _as_config(text: str) -> Any:
    """What the parser would read in place of a text: YAML within it, or in the file that it names."""
    try:
        if "\n" not in text and Path(text).is_file() and Path(text).stat().st_size <= _LARGEST_CONFIG:
            text = Path(text).read_text(encoding="utf-8")
        elif not text.lstrip().startswith(("{", "[")) and "class_path" not in text:
            return None
        return yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _can_import(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return True


def _is_known(name: str) -> bool:
    if name in {f"{kind.__module__}.{kind.__qualname__}" for kind in drafter_kinds().values()}:
        return True
    module, _, attribute = name.rpartition(".")
    if not f"{module}.".startswith(_ROOMS):
        return False
    try:
        found = getattr(import_module(module), attribute, None)
    except ImportError:
        return False
    return isinstance(found, type) and f"{found.__module__}.".startswith(_ROOMS)
