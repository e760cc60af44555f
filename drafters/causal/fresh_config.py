"""The transformers config of a fresh causal drafter, from the keys of its YAML."""

from __future__ import annotations

import difflib
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from certdraft.drafters.formats.lint_files import SIZES

_SIZES = SIZES[:6]  # without vocabulary and positions, which have good defaults


def fresh_config(keys: dict[str, Any], vocab_size: int) -> PreTrainedConfig:
    """Return the transformers config of a fresh network, a Qwen3 one unless `keys` have a `model_type`."""
    keys = {"vocab_size": vocab_size} | keys
    model_type: str = keys.pop("model_type", "qwen3")
    try:
        known = {*AutoConfig.for_model(model_type).to_dict(), "rope_theta"}
    except ValueError as error:
        raise ValueError(f"drafter config: transformers has no model_type {model_type!r}.") from error
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(
                f"drafter config: {model_type} has no key {key!r}"
                + (f"; did you mean {near[0]!r}?" if near else ".")
            )
    missing = [key for key in _SIZES if key in known and keys.get(key) is None]
    if missing:
        raise ValueError(
            f"drafter config: {', '.join(missing)} missing; the defaults describe a large model."
        )
    return AutoConfig.for_model(model_type, **keys)
