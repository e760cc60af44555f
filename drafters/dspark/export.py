"""DSpark drafters on disk: the layout of DeepSpec, and that of speculators.

DeepSpec: config.json of a small Qwen3 with the keys of the block and of the heads beside it; vLLM and SGLang
read it. Its own folders also hold the target's embeddings and lm_head, which are checked and left out here:
engines share the target's. speculators: vLLM and speculators.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from certdraft.drafters.dflash.export import inner_config
from certdraft.drafters.dspark.config import DSparkConfig
from certdraft.drafters.features.layer_files import (
    SPECULATORS,
    Json,
    Weights,
    check_given,
    read_config,
    read_weights,
    sizes_from_json,
    speculators_section,
)
from certdraft.drafters.features.target_layers import check_layers, convert

if TYPE_CHECKING:
    from certdraft.drafters.dspark.model import DSparkDrafter
    from certdraft.drafters.formats.export_metadata import ExportRequest

_IDS = "aux_hidden_state_layer_ids"
_BLOCK = ("block_size", "mask_token_id")
_HEADS = ("markov_rank", "enable_confidence_head", "confidence_head_with_markov")
_TYPE, _VANILLA = "markov_head_type", "vanilla"
_LAYERS = {"num_hidden_layers", "vocab_size"}  # keys of the layers' config that are not sizes of one layer
_DEEPSPEC = {"num_target_layers", "target_layer_ids", "num_anchors", "sample_from_anchor", "draft_vocab_size",
             "dspark_bonus_anchor", _TYPE, *_BLOCK, *_HEADS}  # fmt: skip
_OTHER = {_IDS, _TYPE, *_BLOCK, *_HEADS, "sample_from_anchor", "sliding_window_non_causal"}  # of speculators


def layout(drafter: DSparkDrafter, weights: Weights, request: ExportRequest) -> tuple[Json, Weights]:
    """config.json and named tensors of the requested format."""
    config, vocab_size, num = drafter.config, drafter.vocab_size, drafter.num_target_layers
    dtype: torch.dtype = weights["fc.weight"].dtype
    layers = check_layers(config.target_layer_ids or (), num)
    own: Json = {key: getattr(config, key) for key in (*_BLOCK, *_HEADS, "sample_from_anchor")}
    own |= {_TYPE: _VANILLA}
    inner = inner_config(config, vocab_size, dtype)
    if request.format == "dspark":
        # vLLM reads either key, each with a default of its own
        bonus = {"dspark_bonus_anchor": not config.sample_from_anchor}
        ids = {"num_target_layers": num, "target_layer_ids": list(convert(layers, "tap", "dflash"))}
        return inner | own | bonus | ids | {"architectures": ["Qwen3DSparkModel"]}, weights
    return own | speculators_section("dspark", request, inner) | {
        "architectures": ["DSparkSpeculator"],
        "draft_vocab_size": vocab_size,
        _IDS: list(convert(layers, "tap", "speculators")),
        "sliding_window_non_causal": True,
    }, weights  # fmt: skip


def read_dspark(folder: str | Path) -> tuple[DSparkConfig, int | None, Weights]:
    """Read a DSpark drafter in either layout, from any trainer.

    Returns:
        The config, the target's vocabulary size where the folder names it, and the tensors under the names of
        `DSparkDrafter`.
    """
    folder = Path(folder).expanduser()
    config, file = read_config(folder, "a DSpark drafter")
    where, weights = str(file), read_weights(folder)
    if "transformer_layer_config" in config:
        inner, own = config["transformer_layer_config"], _LAYERS
        unknown = sorted(config.keys() - SPECULATORS - _OTHER)
        ids = None if config.get(_IDS) is None else convert(config[_IDS], "speculators", "tap")
    else:
        inner, own, unknown, ids = config, _LAYERS | _DEEPSPEC, [], config.get("target_layer_ids")
    _check(config, inner, unknown, where)
    sizes = sizes_from_json(inner, own, where)
    block: Json = {key: config.get(key) for key in (*_BLOCK, *_HEADS)} | {
        "num_hidden_layers": inner.get("num_hidden_layers"),
        "target_layer_ids": None if ids is None else check_layers(ids),
    }
    if not block["enable_confidence_head"]:
        block["confidence_head_with_markov"] = bool(block["confidence_head_with_markov"])
    check_given(block, where)
    found = DSparkConfig(**sizes, **block, sample_from_anchor=_from_anchor(config, where))
    return found, inner.get("vocab_size"), weights


def _check(config: Json, inner: Json, unknown: list[str], where: str) -> None:
    """Refuse what is not computed here: other heads, windows, a draft vocabulary, unknown keys."""
    kind, vocab = config.get(_TYPE), inner.get("vocab_size")
    if kind != _VANILLA:
        raise ValueError(
            f"{where} has {_TYPE} {kind!r}; certdraft computes only {_VANILLA!r}, as vLLM and SGLang do."
        )
    if unknown or config.get("draft_vocab_size", vocab) != vocab:
        raise ValueError(
            f"{where} is not a DSpark drafter that certdraft reads: unknown keys {unknown}, draft vocabulary "
            f"{config.get('draft_vocab_size')} of {vocab}."
        )
    kinds = set(inner.get("layer_types") or ()) - {"full_attention"}
    if kinds or inner.get("use_sliding_window"):
        raise ValueError(f"{where} has layers with a window, which DSpark drafters of certdraft do not have.")


def _from_anchor(config: Json, where: str) -> bool:
    """Whether the root's position drafts: said by either of two keys, true in DeepSpec, which has neither."""
    said = [config["sample_from_anchor"]] if "sample_from_anchor" in config else []
    said += [not config["dspark_bonus_anchor"]] if "dspark_bonus_anchor" in config else []
    if len(set(said)) > 1 or not all(isinstance(value, bool) for value in said):
        raise ValueError(
            f"{where}: sample_from_anchor {config.get('sample_from_anchor')!r} and dspark_bonus_anchor "
            f"{config.get('dspark_bonus_anchor')!r} must be true or false, and differ where both are given."
        )
    if not said and "transformer_layer_config" in config:
        raise ValueError(
            f"{where} lacks sample_from_anchor, which speculators takes for true and vLLM for false. Write "
            "the one it was trained with."
        )
    return said[0] if said else True
