"""EAGLE-3 heads on disk: the flat layout that most engines read, and that of speculators.

Flat: config.json of a one-layer Llama with two keys for the aux hidden-state layers (one per numbering, see
`target_layers`), tensors under the names of the EAGLE repository. vLLM, SGLang, TensorRT-LLM, llama.cpp and
OpenVINO read it. speculators: the same config one level down, `layers.0.` for `midlayer.`; read by vLLM,
speculators and llama.cpp, and served by its path.

Everything optional is written out, because defaults differ between readers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from certdraft.drafters.eagle3.config import EagleConfig
from certdraft.drafters.eagle3.draft_vocab import from_tables, to_tables
from certdraft.drafters.features.layer_files import (
    SPECULATORS,
    Json,
    Weights,
    read_config,
    read_weights,
    sizes_from_json,
    sizes_to_json,
    speculators_section,
)
from certdraft.drafters.features.target_layers import check_layers, convert

if TYPE_CHECKING:
    from certdraft.drafters.eagle3.model import EagleDrafter
    from certdraft.drafters.formats.export_metadata import ExportRequest

_IDS = "eagle_aux_hidden_state_layer_ids"
_FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
# Keys that ModelOpt adds to eagle_config, with the one value that is computed.
_FIXED = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
    "parallel_draft_step": 1,
}
_OWN = {
    _IDS,
    "eagle_config",
    "vocab_size",
    "draft_vocab_size",
    "num_hidden_layers",
    "target_hidden_size",
    *_FLAGS,
}


def layout(drafter: EagleDrafter, weights: Weights, request: ExportRequest) -> tuple[Json, Weights]:
    """config.json and named tensors of the requested format."""
    config, dtype = drafter.config, weights["fc.weight"].dtype
    layers = check_layers(config.target_layer_ids or (), drafter.num_target_layers)
    inner = _inner(config, drafter.vocab_size, dtype)
    ids = list(convert(layers, "tap", "hidden_states"))
    flags = {key: getattr(config, key) for key in _FLAGS}
    if request.format == "eagle3":
        return inner | {
            "architectures": ["Eagle3Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLMEagle3"],
            "draft_vocab_size": config.draft_vocab_size,
            **flags,
            _IDS: ids,
            "eagle_config": {_IDS: list(convert(layers, "tap", "sglang")), "use_aux_hidden_state": True},
        }, weights
    return {
        "architectures": ["Eagle3Speculator"],
        **speculators_section("eagle3", request, inner),
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": None,
        _IDS: ids,
        "embed_requires_grad": False,
        **flags,
    }, {_renamed(name, "midlayer.", "layers.0."): value for name, value in weights.items()}


def _inner(config: EagleConfig, vocab_size: int, dtype: torch.dtype) -> Json:
    return sizes_to_json(config, dtype) | {
        "model_type": "qwen3" if config.qk_norm else "llama",
        "num_hidden_layers": 1,
        "vocab_size": vocab_size,
    }


def read_eagle3(folder: str | Path) -> tuple[EagleConfig, int, Weights]:
    """Read a head in either layout, from any trainer.

    Returns:
        The config (`target_layer_ids` None where the folder leaves them to the reader), the target's
        vocabulary size, and the tensors under the names of `EagleDrafter`, `embed_tokens.weight` among them
        if stored.
    """
    folder = Path(folder).expanduser()
    config, file = read_config(folder, "an EAGLE-3 head")
    inner, where = config, str(file)
    if "transformer_layer_config" in config:
        _check_speculators(config, where)
        extra = {
            key: config[key] for key in (_IDS, "draft_vocab_size", "target_hidden_size") if key in config
        }
        inner, where = {**config["transformer_layer_config"], **extra}, f"{file} (transformer_layer_config)"
    if inner.get("model_type", "llama") not in ("llama", "qwen3") or inner.get("num_hidden_layers", 1) != 1:
        raise ValueError(
            f"{where}: {inner.get('num_hidden_layers')} layers of model_type {inner.get('model_type')!r} are "
            "not an EAGLE-3 head that certdraft supports; those have one layer, of llama or qwen3."
        )
    _check_windows(inner, where)
    sizes = sizes_from_json(inner, _OWN, where)
    if inner.get("target_hidden_size") not in (None, sizes["hidden_size"]):
        raise ValueError(
            f"{where}: the head's hidden size {sizes['hidden_size']} is not the target's "
            f"{inner['target_hidden_size']}; certdraft's heads read the target's embeddings."
        )
    weights = {_renamed(n, "layers.0.", "midlayer."): value for n, value in read_weights(folder).items()}
    size, vocab = inner.get("draft_vocab_size"), inner.get("vocab_size")
    if not vocab:
        raise ValueError(f"{where} lacks vocab_size.")
    head = EagleConfig(
        **sizes,
        target_layer_ids=_layers(config, where),
        draft_vocab_size=size or vocab,
        qk_norm=any("q_norm" in name for name in weights),
        **_flags(config, where),
    )
    if (head.draft_vocab_size or 0) < vocab and "d2t" not in weights:
        raise ValueError(f"{folder} has a draft vocabulary of {size} tokens, but no d2t that lists them.")
    if "d2t" in weights:  # published heads may lack t2d, which follows from it
        ids = from_tables(weights["d2t"], weights.get("t2d"), int(vocab))
        weights |= dict(zip(("d2t", "t2d"), to_tables(ids, int(vocab)), strict=True))
    return head, int(vocab), weights


def _layers(config: Json, where: str) -> tuple[int, ...] | None:
    """Aux hidden-state layers by whichever key names them; both keys must mean the same."""
    nested: Json = config.get("eagle_config") or {}
    found = []
    if config.get(_IDS):
        found.append(convert(config[_IDS], "hidden_states", "tap"))
    if nested.get(_IDS):
        found.append(convert(nested[_IDS], "sglang", "tap"))
    if len(set(found)) > 1:
        raise ValueError(
            f"{where}: the two lists of {_IDS} name different layers, {config[_IDS]} and, one less for the "
            f"same layer, {nested[_IDS]}. Engines will disagree; find out which is right and fix the other."
        )
    return check_layers(found[0]) if found else None


def _flags(config: Json, where: str) -> Json:
    """The norms a head adds, by its own keys or those of its eagle_config, as vLLM reads them.

    Raises:
        ValueError: a flag that is neither true nor false, or stated twice, differently.
    """
    nested: Json = config.get("eagle_config") or {}
    odd = [key for key in nested if key not in (_IDS, *_FLAGS) and _FIXED.get(key, _IDS) != nested[key]]
    if odd:
        said = ", ".join(f"{key} {nested[key]!r}" for key in sorted(odd))
        raise ValueError(f"{where}: eagle_config says {said}, which certdraft does not compute.")
    found = {}
    for key in _FLAGS:
        values = [section[key] for section in (config, nested) if section.get(key) is not None]
        if not all(isinstance(value, bool) for value in values) or values.count(True) not in (0, len(values)):
            raise ValueError(f"{where}: {key} is {' and '.join(map(str, values))}; must be true or false.")
        found[key] = any(values)
    return found


def _check_windows(config: Json, where: str) -> None:
    windowed = "sliding_attention" in (config.get("layer_types") or ())
    if windowed or (config.get("sliding_window") and config.get("use_sliding_window", True)):
        raise ValueError(
            f"{where} has a sliding-window layer (layer_types {config.get('layer_types')}, sliding_window "
            f"{config.get('sliding_window')}); only DFlash drafters may have windows, not EAGLE-3 heads."
        )


def _check_speculators(config: Json, where: str) -> None:
    inner: Any = config["transformer_layer_config"]
    unknown = sorted(config.keys() - SPECULATORS - {*_FLAGS, _IDS, "embed_requires_grad"})
    if unknown or config.get("speculators_model_type") != "eagle3" or not isinstance(inner, dict):
        raise ValueError(
            f"{where} is not an EAGLE-3 head of speculators that certdraft supports: speculators_model_type "
            f"{config.get('speculators_model_type')!r}, unknown keys {unknown}."
        )
    if "norm_before_residual" not in config:
        raise ValueError(
            f"{where} lacks norm_before_residual, which vLLM takes for true and speculators for false."
        )


def _renamed(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name
