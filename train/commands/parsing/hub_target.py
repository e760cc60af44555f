"""A target that cannot be loaded because no hub answers, found before torch is imported."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from certdraft.support import hub_answers, hub_endpoint

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_NAME, _TRACE = ("data", "record", "target"), ("data", "train")


def refuse_unreachable(args: Sequence[str]) -> None:
    """Raise if `certdraft fit` would record a trace of a target that only an unreachable hub has.

    In every other case, and for settings that are not plain, nothing is decided here: the run itself says.
    """
    settings = _settings(args)
    name, trace = _value(settings, _NAME), _value(settings, _TRACE)
    if not isinstance(name, str) or not _HUB_ID.fullmatch(name) or Path(name).exists():
        return
    if isinstance(trace, str) and Path(trace).expanduser().exists():
        return
    if (_hub_cache() / f"models--{name.replace('/', '--')}").exists() or hub_answers():
        return
    raise FileNotFoundError(
        f"data.record.target {name}: not a folder here, not in the hub's cache, and {hub_endpoint()} does "
        f"not answer (or HF_HUB_OFFLINE is set). Run `hf download {name} --local-dir DIR` where there is "
        "access and give --data.record.target DIR; `certdraft fit --config demo` needs no hub."
    )


def _settings(args: Sequence[str]) -> dict[str, Any]:
    """Settings of the configs, with those that are typed above them; no groups, no class paths."""
    settings: dict[str, Any] = {}
    for flag, following in zip(args, [*args[1:], ""], strict=False):
        name, equals, attached = flag.partition("=")
        value = attached if equals else following
        if name in ("-c", "--config") and Path(value).is_file():
            try:
                found = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError):
                continue  # reported with its line by the parser
            settings = _merged(settings, found) if isinstance(found, dict) else settings
        elif name.startswith("--"):
            typed: Any = value
            for key in reversed(name[2:].split(".")):
                typed = {key: typed}
            settings = _merged(settings, typed)
    return settings


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _value(settings: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        if not isinstance(settings, dict):
            return None
        settings = settings.get(key)
    return settings


def _hub_cache() -> Path:
    """Where huggingface_hub keeps models."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser() / "hub"
