"""Causal LMs loaded completely or not at all.

transformers fills a missing weight with random numbers and logs a table; here that is an error.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel

from certdraft.support.pretrained import load_pretrained, model_source


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
