"""Causal LMs loaded completely, or without the layers between embeddings and lm_head.

transformers fills a missing weight with random numbers and logs a table; here that is an error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from certdraft.support.hub import hub_answers
from certdraft.support.model_facts import text_body
from certdraft.support.pretrained import load_pretrained, load_pretrained_config, model_source, quiet


@torch.inference_mode(False)  # no changes of inference tensors are counted, so they cannot be packed
def load_causal_lm(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    attention: Literal["sdpa", "eager"] = "sdpa",
    revision: str | None = None,
) -> PreTrainedModel:
    """A causal LM with every weight of its checkpoint, in eval mode. Code shipped with it is never run.

    The weights of a GGUF checkpoint are dequantised; `weights_origin` says from what.

    Args:
        name: a folder written by `save_pretrained` or `export`, a hub id ("org/name"), a `.gguf` file, or a
            folder that holds one.
        dtype: of the parameters; None keeps the checkpoint's (fp32 for GGUF).
        attention: implementation; both follow masks and trees.
        revision: of a hub model.

    Raises:
        FileNotFoundError: no such folder, no model in it, no such model on the hub, or no hub.
        ValueError: a LoRA adapter, an architecture that needs its own code, weights that do not fit, or a
            GGUF file without the package that reads it.
    """
    source = model_source(name)
    keywords: dict[str, Any] = {"dtype": dtype or "auto"}
    if source.gguf is not None:
        keywords = {
            "dtype": dtype or torch.float32,
            "quantization_config": GgufConfig(dequantize=True),  # else the weights stay packed
        }
    model, info = load_pretrained(
        AutoModelForCausalLM,
        "causal LM",
        name,
        revision=revision,
        attn_implementation=attention,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # listed in info, and refused below in words
        **keywords,
    )
    _check_complete(source.name, info)
    quantizer = getattr(model, "hf_quantizer", None)
    if source.gguf is not None and quantizer is not None:
        quantizer.remove_quantization_config(model)  # the weights are plain now, and can be saved
    return model


def load_model_ends(name: str | Path, *, revision: str | None = None) -> PreTrainedModel:
    """A causal LM of which only embeddings, norm and lm_head have weights, in fp32; its layers are on meta.

    Of a target of 8 B parameters this reads 1.2 B. Where the tensors cannot be told from their names (GGUF,
    quantised or renamed checkpoints), the whole model is loaded.

    Args:
        name: see `load_causal_lm`.
        revision: of a hub model.

    Raises:
        FileNotFoundError: as `load_causal_lm` does.
        ValueError: as `load_causal_lm` does.
    """
    source = model_source(name)
    if source.gguf is None:
        config = load_pretrained_config(name, revision=revision)
        if getattr(config, "quantization_config", None) is None:
            model = _without_layers(source.name, config, revision, not source.local)
            if model is not None:
                return model
    return load_causal_lm(name, dtype=torch.float32, revision=revision)


def _check_complete(source: str, info: dict) -> None:
    wrong = {key: sorted(map(str, info.get(key) or ())) for key in info}
    wrong = {key: names for key, names in wrong.items() if names}
    if wrong:
        listed = "; ".join(
            f"{key.replace('_', ' ')}: {', '.join(names[:5])}"
            + (f" and {len(names) - 5} more" * (len(names) > 5))
            for key, names in wrong.items()
        )
        raise ValueError(
            f"the weights of {source} do not fit its config.json: {listed}. Random numbers would stand in "
            "for them; write the checkpoint again from the model it was trained as."
        )


def _without_layers(name: str, config: Any, revision: str | None, on_hub: bool) -> PreTrainedModel | None:
    """The model on meta with its ends read; None where the checkpoint does not hold them by their names."""
    try:
        with torch.device("meta"), quiet():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)
    except (ValueError, TypeError, AttributeError):  # `load_causal_lm` names what is wrong
        return None
    parts = [
        model.get_input_embeddings(),
        model.get_output_embeddings(),
        getattr(text_body(model), "norm", None),
    ]
    wanted = {id(weight) for part in parts if part is not None for weight in part.parameters()}
    shapes = {key: weight.shape for key, weight in model.named_parameters() if id(weight) in wanted}
    local = {"revision": revision or "main", "local_files_only": on_hub and not hub_answers()}
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **local)
    files = {SAFE_WEIGHTS_NAME}
    if index is not None:
        places = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        if shapes.keys() - places.keys():
            return None
        files = {places[key] for key in shapes}
    found: dict[str, torch.Tensor] = {}
    for file in sorted(files):
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **local)
        if path is None:
            return None
        try:
            with safe_open(path, framework="pt") as tensors:
                held = set(tensors.keys())
                found |= {key: tensors.get_tensor(key).float() for key in shapes.keys() & held}
        except SafetensorError:
            return None
    if {key: weight.shape for key, weight in found.items()} != shapes:
        return None
    model.load_state_dict(found, strict=False, assign=True)
    model.tie_weights()
    return model
