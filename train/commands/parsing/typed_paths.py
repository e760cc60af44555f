"""Arguments as typed, made explicit: paths without their option, configs by name, and `latest` for a run."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from certdraft.train.runs.config_files import LATEST, find_config, newest_run, shipped

_LATEST = re.compile(rf"(?<![\w./-]){LATEST}(?![\w./-])")  # by itself, or in a list
_INLINE = re.compile(r"[{:\n]|^(?:-|null)?$")  # settings written out, standard input or none: not a name


def explicit(
    args: Sequence[str], main: str | None = None, configs: Collection[str] = (), runs: Collection[str] = ()
) -> list[str]:
    """Arguments with every path under its option and every name replaced by its path.

    Args:
        args: as typed, without the command.
        main: option of the words directly after the command; behind it "*" if it takes a list, "@" if it
            names paths: each is then named by its folder, with as much of its parents as tells them apart.
        configs: options that take a config, besides --config.
        runs: options that take a run folder, or a list of them.

    Raises:
        FileNotFoundError: no such config, or no run that could be the latest.

    Examples:
        >>> explicit(["drafter", "--target", "t"], "path")
        ['--path', 'drafter', '--target', 't']
        >>> explicit(["a", "b"], "runs*")
        ['--runs', '["a", "b"]']
        >>> explicit(["a/drafter", "b/drafter", "small"], "drafters@")
        ['--drafters', '{"a/drafter": "a/drafter", "b/drafter": "b/drafter", "small": "small"}']
    """
    words = list(takewhile(lambda word: not word.startswith("-"), args)) if main else []
    if main and main.endswith("*") and words:
        args = [f"--{main[:-1]}", json.dumps(words), *args[len(words) :]]
    elif main and main.endswith("@") and words:
        args = [f"--{main[:-1]}", json.dumps(_named(words)), *args[len(words) :]]
    elif words:
        args = [f"--{main}", *args]
    return list(_resolved(args, {"config", *configs}, runs))


def _named(paths: Sequence[str]) -> dict[str, str]:
    """Each path under the shortest of its endings that no other one has."""
    found = {}
    for path in paths:
        parts, *others = (Path(os.path.abspath(p)).parts for p in (path, *(o for o in paths if o != path)))
        size = next(
            (n for n in range(1, len(parts)) if all(o[-n:] != parts[-n:] for o in others)), len(parts)
        )
        found["/".join(parts[-size:])] = path
    return found


def _resolved(args: Sequence[str], configs: Collection[str], runs: Collection[str]) -> Iterator[str]:
    option = ""
    for arg in args:
        if arg.startswith("--"):
            option, equals, value = arg[2:].partition("=")
            yield f"--{option}={_path(option, value, configs, runs)}" if equals else arg
            option = "" if equals else option
        else:
            yield _path(option, arg, configs, runs) if option else arg
            option = ""


def _path(option: str, value: str, configs: Collection[str], runs: Collection[str]) -> str:
    if option in configs:
        return value if _INLINE.search(value) else str(find_config(value))
    if option in runs and _LATEST.search(value) and not Path(LATEST).exists():
        found = newest_run()
        print(f"{LATEST}: {found}", file=sys.stderr)
        return _LATEST.sub(lambda _: str(found), value)
    group = "." in option and value.endswith(".yaml")  # --model.loss, but no file that is to be written
    if group and not _INLINE.search(value) and not Path(value).is_file():
        return str(shipped(value) or value)
    return value
