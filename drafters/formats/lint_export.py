"""A static check of exported drafters: every rule of the formats that can be checked from files.

Engines load wrong folders silently: a layer id off by one, a missing lm_head, a flag left to its default cost
acceptance, never correctness, and go unnoticed. This reads config.json, the headers of the safetensors and
the two vocabulary tables. It builds no network; what only numbers show (permuted columns, swapped norms,
another rotary base) is left to the comparison with real engines.

The rules of each kind, in its `lint.py`, repeat the formats on purpose and share nothing with the writers.
"""

from collections.abc import Mapping
from pathlib import Path

from certdraft.drafters.formats.export_metadata import FILE
from certdraft.drafters.formats.lint_files import Config, Finding, Folder, Layout, read_folder, read_json
from certdraft.drafters.registry import drafter_kinds


def lint_export(path: str | Path, target: str | Path | Config | None = None) -> tuple[Finding, ...]:
    """List what is wrong with a folder that engines are to load as a drafter.

    Args:
        path: folder with config.json and safetensors, in any layout `export` writes, from any trainer.
        target: folder of the target, its config.json, or what is in it, for what only the pair can get wrong:
            hidden size, vocabulary, number of layers and positions.

    Returns:
        Findings, errors first; empty when nothing is wrong, or when the folder's kind has no rules.

    Raises:
        FileNotFoundError: no such folder, or no config.json or safetensors in it.
        ValueError: a file that cannot be read at all.
    """
    folder = read_folder(path)
    layout = layout_of(folder)
    found = () if layout is None else layout.rules(folder, _target_config(target))
    return tuple(sorted(found, key=lambda finding: finding.severity))


def layout_of(folder: Folder) -> Layout | None:
    """Return the layout a folder is written in: of the kind in its `drafter.json`, or else of any kind.

    Kinds registered last are tried first, because any causal LM's folder is one of a causal drafter.
    """
    kinds, own = drafter_kinds(), folder.path / FILE
    family = read_json(own).get("family") if own.is_file() else None
    if own.is_file() and not isinstance(family, str):
        raise ValueError(f"{own}: family is {family!r}; export the drafter again.")
    tried = [kinds[str(family)]] if family in kinds else [*kinds.values()][::-1]
    return next((layout for kind in tried for layout in kind.layouts if layout.matches(folder)), None)


def _target_config(target: str | Path | Config | None) -> Config | None:
    if target is None or isinstance(target, Mapping):
        return _text_part(target)
    path = Path(target).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{target}: give the target's folder, or its config.json.")
    return _text_part(read_json(file))


def _text_part(config: Config | None) -> Config | None:
    """The keys of a config, those of its text model first: multimodal ones state their sizes there."""
    return config and {**config, **(config.get("text_config") or {})}
