"""DFlash block drafters on disk: z-lab's layout, that of speculators, and transformers' own.

z-lab: config.json of a small Qwen3 with `dflash_config`; vLLM, SGLang, TensorRT-LLM, llama.cpp and OpenVINO
read it. speculators: vLLM and speculators. transformers' own class is MuseGlimmerAssistantModel, the same
network with two tensors renamed, for `generate(assistant_model=…, speculation_type="dflash")`.

None of them holds embeddings or a head: those are the target's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from certdraft.drafters.dflash.config import BlockConfig
from certdraft.drafters.dflash.windows import FULL, read_windows
from certdraft.drafters.features.layer_files import (
    SPECULATORS,
    Json,
    Weights,
    check_given,
    read_config,
    read_weights,
    sizes_from_json,
    sizes_to_json,
    speculators_section,
)
from certdraft.drafters.features.target_layers import check_layers, convert

if TYPE_CHECKING:
    from certdraft.drafters.dflash.model import BlockDrafter
    from certdraft.drafters.formats.export_metadata import ExportRequest

_NATIVE = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
_IDS = "aux_hidden_state_layer_ids"
_OWN = {"block_size", "num_target_layers", "dflash_config", "vocab_size", "num_hidden_layers", "is_causal"}
_SECTION = {"mask_token_id", "target_layer_ids", "block_size", "use_swa", "swa_window_size", "causal"}
_OFF = {"attention_sink_bias"}  # keys that may say no
_BLOCK = {"block_size", "mask_token_id", "sample_from_anchor", "sliding_window_non_causal"}


def layout(drafter: BlockDrafter, weights: Weights, request: ExportRequest) -> tuple[Json, Weights]:
    """config.json and named tensors of the requested format.

    Raises:
        ValueError: target layers that engines would read as others, or no card for speculators.
    """
    config, vocab_size, num = drafter.config, drafter.vocab_size, drafter.num_target_layers
    dtype = weights["fc.weight"].dtype
    layers = check_layers(config.target_layer_ids or (), num)
    ids = list(convert(layers, "tap", "dflash"))
    block: Json = {"block_size": config.block_size, "mask_token_id": config.mask_token_id}
    if request.format == "dflash":
        # is_causal is read by z-lab's own code, dflash_config.causal by engines
        order = {} if config.causal is None else {"causal": config.causal}
        section = {"mask_token_id": config.mask_token_id, "target_layer_ids": ids} | order
        return inner_config(config, vocab_size, dtype) | {
            "architectures": ["DFlashDraftModel"],
            "block_size": config.block_size,
            "num_target_layers": num,
            "dflash_config": section,
        } | {f"is_{key}": value for key, value in order.items()}, weights
    if request.format == "speculators":
        return {
            "architectures": ["DFlashSpeculator"],
            **speculators_section("dflash", request, inner_config(config, vocab_size, dtype)),
            **block,
            "draft_vocab_size": vocab_size,
            _IDS: list(convert(layers, "tap", "speculators")),
            "sample_from_anchor": False,
            # false makes vLLM 0.32 draw every layer causally, so it is written only where that is meant
            "sliding_window_non_causal": not _all_causal(config),
        }, weights
    if any(view.causal for view in config.views()):
        raise ValueError(
            "transformers' own DFlash class reads blocks in both directions, and some layers of this drafter "
            "do not (causal, or a sliding window without causal: false). Export it as dflash."
        )
    window = {} if config.sliding_window is None else {"sliding_window": config.sliding_window - 1}
    return sizes_to_json(config, dtype) | block | window | {
        "architectures": ["MuseGlimmerAssistantModel"],
        "model_type": "muse_glimmer_assistant",
        "num_hidden_layers": config.num_hidden_layers,
        "layer_types": _layer_types(config),
        "target_layer_ids": ids,
    }, {_NATIVE.get(name, name): value for name, value in weights.items()}


def inner_config(config: BlockConfig, vocab_size: int, dtype: torch.dtype) -> Json:
    """The keys of a transformers Qwen3 config for the layers of a block drafter."""
    return sizes_to_json(config, dtype) | {
        "model_type": "qwen3",
        "num_hidden_layers": config.num_hidden_layers,
        "layer_types": _layer_types(config),
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
        "vocab_size": vocab_size,
    }


def _layer_types(config: BlockConfig) -> list[str]:
    return list(config.layer_types or (FULL,) * config.num_hidden_layers)


def _all_causal(config: BlockConfig) -> bool:
    """Whether every layer reads blocks in order, which speculators can say only of layers with a window.

    Raises:
        ValueError: an order inside the block that speculators' config cannot state.
    """
    directions = {view.causal for view in config.views()}
    if directions == {False}:
        return False
    if any(view.causal and view.window is None for view in config.views()) or len(directions) > 1:
        raise ValueError(
            "the layout of speculators cannot say for every reader that some layers of this drafter read "
            "blocks in order and others in both directions, or that full attention reads in order: vLLM "
            "takes its one flag for all layers, speculators for those with a window. Export it as dflash."
        )
    return True


def read_dflash(folder: str | Path) -> tuple[BlockConfig, int | None, Weights]:
    """Read a block drafter in any of the three layouts, from any trainer.

    Returns:
        The config, the target's vocabulary size where the folder names it, and the tensors under the names of
        `BlockDrafter`.
    """
    folder = Path(folder).expanduser()
    config, file = read_config(folder, "a DFlash drafter")
    if (folder / "mask_embedding.pt").is_file():
        raise ValueError(f"{folder} has its own mask embedding, which certdraft does not compute.")
    weights = read_weights(folder)
    if config.get("model_type") == "muse_glimmer_assistant":
        names = {new: old for old, new in _NATIVE.items()}
        weights = {names.get(name, name): value for name, value in weights.items()}
        own = {"block_size", "mask_token_id", "target_layer_ids", "num_hidden_layers", "vocab_size"}
        inner = config
        settings: Json = {key: config.get(key) for key in own - {"vocab_size"}}
        windows = _transformers_windows(config, str(file))
    elif "transformer_layer_config" in config:
        inner, own = config["transformer_layer_config"], _OWN
        settings = _from_speculators(config, str(file))
        windows = read_windows(inner, _speculators_order(config, str(file)), str(file))
    else:
        inner, own = config, _OWN
        settings = _from_zlab(config, str(file))
        windows = read_windows(config, config.get("dflash_config") or {}, str(file))
    sizes = sizes_from_json(inner, own, str(file))
    check_given(settings, str(file))
    block = BlockConfig(
        **sizes,
        num_hidden_layers=inner["num_hidden_layers"],
        block_size=settings["block_size"],
        mask_token_id=settings["mask_token_id"],
        target_layer_ids=check_layers(settings["target_layer_ids"]),
        **windows,
    )
    return block, inner.get("vocab_size"), weights


def _from_zlab(config: Json, where: str) -> Json:
    section: Json = config.get("dflash_config") or {}
    unknown = sorted(key for key in section.keys() - _SECTION if key not in _OFF or section[key])
    if unknown:
        raise ValueError(
            f"{where}: dflash_config has keys that certdraft does not know: {', '.join(unknown)}."
        )
    sizes = {size for size in (config.get("block_size"), section.get("block_size")) if size is not None}
    if len(sizes) > 1:
        raise ValueError(f"{where} names two block sizes, {sorted(sizes)}.")
    return {
        "block_size": sizes.pop() if sizes else None,
        "mask_token_id": section.get("mask_token_id"),
        "target_layer_ids": section.get("target_layer_ids"),
        "num_hidden_layers": config.get("num_hidden_layers"),
    }


def _transformers_windows(config: Json, where: str) -> Json:
    """Windows of transformers' own class, which sees a key more and reads blocks in both directions."""
    kinds, window = config.get("layer_types"), config.get("sliding_window")
    if not kinds:
        raise ValueError(f"{where} lacks layer_types; transformers would give every layer a window.")
    wider = window + 1 if type(window) is int else window
    return read_windows({**config, "sliding_window": wider}, {"causal": False}, where)


def _speculators_order(config: Json, where: str) -> Json:
    """What its flag says of the order inside a block, as a `dflash_config`."""
    flag = config.get("sliding_window_non_causal")
    if flag is None and "sliding_attention" in (config["transformer_layer_config"].get("layer_types") or ()):
        raise ValueError(
            f"{where} has sliding_attention layers and lacks sliding_window_non_causal, which speculators "
            "takes for false and vLLM for true. Write the one it was trained with."
        )
    return {} if flag is not True else {"causal": False}


def _from_speculators(config: Json, where: str) -> Json:
    unknown = sorted(config.keys() - SPECULATORS - _BLOCK - {_IDS})
    vocab = config["transformer_layer_config"].get("vocab_size")
    if unknown or config.get("sample_from_anchor") or config.get("draft_vocab_size", vocab) != vocab:
        raise ValueError(
            f"{where} is not a DFlash drafter of speculators that certdraft reads: unknown keys {unknown}, "
            f"sample_from_anchor {config.get('sample_from_anchor')}, draft vocabulary "
            f"{config.get('draft_vocab_size')} of {vocab}."
        )
    ids = config.get(_IDS)
    return {
        "block_size": config.get("block_size"),
        "mask_token_id": config.get("mask_token_id"),
        "target_layer_ids": None if ids is None else convert(ids, "speculators", "tap"),
        "num_hidden_layers": config["transformer_layer_config"].get("num_hidden_layers"),
    }
