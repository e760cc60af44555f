"""Configs that ship with the package: found by name, listed, copied; and the newest run as `latest`.

Nothing here imports torch: the command line resolves names before the command is known.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[2] / "configs"
LATEST = "latest"
_UP = re.compile(r"^(?:\.{1,2}/|configs/)+")


def config_names() -> list[str]:
    """Names of all configs that ship, as `--config` takes them: the path in configs/ without .yaml.

    Examples:
        >>> {"demo", "loss/ce-kl"} <= set(config_names())
        True
    """
    return sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))


def shipped(name: str) -> Path | None:
    """The config of that name that ships, or None; `configs/`, `../` and the ending .yaml may stand in it.

    Examples:
        >>> shipped("../loss/ce-kl.yaml") == shipped("loss/ce-kl") == CONFIGS / "loss/ce-kl.yaml"
        True
        >>> shipped("nothing") is None
        True
    """
    short = _UP.sub("", name).removesuffix(".yaml")
    return CONFIGS / f"{short}.yaml" if short in config_names() else None


def find_config(name: str) -> Path:
    """The file that a user means: a path, or the name of a config that ships."""
    path = Path(name).expanduser()
    if path.exists() and not path.is_dir():  # a pipe, as in --config <(…), is no regular file
        return path
    if found := shipped(name):
        return found
    short, names = _UP.sub("", name).removesuffix(".yaml"), config_names()
    near = get_close_matches(short, names, n=1, cutoff=0.6)
    near = near or [full for full in names if full.rpartition("/")[2] == short.rpartition("/")[2]][:1]
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise FileNotFoundError(
        f"no config {name}: neither a file nor a config that ships{hint} `certdraft configs` lists those"
    )


def fill_in_groups(settings: Any, exists: Callable[[str], bool]) -> Any:
    """Replace the names of group files that are not there by the files of those names that ship.

    Args:
        settings: of a config, as read from YAML.
        exists: whether a path leads somewhere from the config's own folder.
    """
    if isinstance(settings, dict):
        return {key: fill_in_groups(value, exists) for key, value in settings.items()}
    if isinstance(settings, list):
        return [fill_in_groups(value, exists) for value in settings]
    if isinstance(settings, str) and settings.endswith(".yaml") and not exists(settings):
        return str(shipped(settings) or settings)
    return settings


def newest_run() -> Path:
    """The run below runs/ that was started last, of those that trained; of all where none did."""
    depths = ("*/*", "*/*/*")  # a sweep's and the demo's runs lie one deeper
    found = [file for depth in depths for file in Path("runs").glob(f"{depth}/config.yaml")]
    found = [file for file in found if (file.parent / "run.yaml").is_file()]
    if not found:
        raise FileNotFoundError(f"{LATEST}: no run under runs/; train first, or give a run's folder")
    found = [file for file in found if _trained(file.parent)] or found  # a refused one leaves a folder too
    return max(found, key=lambda file: (file.stat().st_mtime, file)).parent


def _trained(run: Path) -> bool:
    return (run / "metrics.csv").is_file() or any(run.glob("checkpoints/*.ckpt"))


def configs(containing: str = "") -> None:
    """List the configs that ship, with what each is for.

    Args:
        containing: only those with this in their name, as in `recipes/qwen3-8b`.
    """
    names = [name for name in config_names() if containing in name]
    if not names:
        raise ValueError(f"no config has {containing!r} in its name; `certdraft configs` lists all")
    width = max(map(len, names))
    for name in names:
        first = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:<{width}}  {first.lstrip('# ')}")


def init(name: str, out: str = "configs") -> None:
    """Copy a config that ships, with the group files it refers to, to change it.

    Args:
        name: of the config, as `certdraft configs` lists it.
        out: folder that the files are written to, in the same sub-folders.
    """
    source = shipped(name) or find_config(name).resolve()
    if not source.is_relative_to(CONFIGS):
        raise FileNotFoundError(f"init: {name} does not ship; `certdraft configs` lists what does")
    texts = {Path(out) / file.relative_to(CONFIGS): file.read_bytes() for file in _with_groups(source)}
    if taken := [str(to) for to, text in texts.items() if to.exists() and to.read_bytes() != text]:
        raise FileExistsError(f"{', '.join(taken)}: in use by other content; give another --out")
    for to, text in texts.items():
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(text)
        print(to)
    print(f"use it with --config {Path(out) / source.relative_to(CONFIGS)}", file=sys.stderr)


def _with_groups(file: Path) -> list[Path]:
    """A config that ships and every one it refers to, directly or not."""
    import yaml

    found, left = [file], [file]
    while left:
        settings = yaml.safe_load(left.pop().read_text(encoding="utf-8"))
        new = {path for text in _strings(settings) if text.endswith(".yaml") and (path := shipped(text))}
        left += sorted(new - set(found))
        found += sorted(new - set(found))
    return found


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
    elif isinstance(value, str):
        yield value
