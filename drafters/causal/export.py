"""The transformers format: a causal LM folder that transformers, vLLM and SGLang serve as a drafter.

config.json, generation_config.json, model.safetensors (or shards and their index), the tokenizer's files and
its chat template. LoRA is merged: no engine serves an unmerged drafter portably.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from certdraft.drafters.causal.lora import merged
from certdraft.drafters.formats.logit_checks import check_same_logits, checked_logits
from certdraft.support import facts_of, load_causal_lm, quiet

if TYPE_CHECKING:
    from peft import PeftModel

    from certdraft.drafters.causal.model import CausalDrafter
    from certdraft.drafters.formats.export_metadata import ExportRequest

_PROBE_TOKENS = 48
_MERGE_TOLERANCE = 1e-4  # of the largest logit; fp32 merges measured at 1e-7 to 1e-6


def write_transformers(drafter: CausalDrafter, folder: Path, request: ExportRequest) -> PreTrainedModel:
    """Write the folder's files and check them by loading them again; see `Drafter.write`.

    The draft length is stored for `generate`; a LoRA adapter, if requested, is written to `adapter/`.

    Raises:
        ValueError: no LoRA to write; the merged or reloaded network is not the drafter.
    """
    if request.adapter and drafter.lora is None:
        raise ValueError("adapter=True writes the LoRA adapter, but this drafter has none.")
    model = standalone(drafter, request.dtype)
    _name_special_tokens(model, request.tokenizer)
    with quiet():
        model.save_pretrained(folder)
    request.tokenizer.save_pretrained(folder)
    _update_json(folder / "config.json", _legacy_rope(model))
    _update_json(
        folder / "generation_config.json",
        {
            "_from_model_config": False,  # or transformers derives it again, without the settings below
            # what `generate(assistant_model=…)` reads only from the drafter; the defaults stop drafts early
            "num_assistant_tokens": request.draft_length,
            "num_assistant_tokens_schedule": "constant",
            "assistant_confidence_threshold": 0.0,
        },
    )
    if request.adapter:
        _write_adapter(drafter, folder / "adapter")
    check_reload(model, folder)
    return model


@torch.no_grad()
def standalone(drafter: CausalDrafter, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return a plain causal LM with the drafter's weights, LoRA merged in fp32, in eval mode.

    It is built from the config, so that it holds nothing but config and weights, as a folder does.

    Args:
        drafter: not modified.
        dtype: of the weights; None: the drafter's.

    Raises:
        ValueError: merging changed the logits by more than rounding.
    """
    network = drafter.model if drafter.lora is None else merged(cast("PeftModel", drafter.network))
    with torch.random.fork_rng(devices=[]):  # the random weights it starts with must not move training
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(drafter.model.config), attn_implementation=drafter.attention, dtype=network.dtype
        )
    model.load_state_dict(network.state_dict())
    model.generation_config = copy.deepcopy(drafter.model.generation_config)
    nn.Module.to(model, drafter.model.device).eval()
    if drafter.lora is not None and drafter.model.dtype == torch.float32:
        _check_merge(model, drafter)
    dtype = dtype or drafter.model.dtype
    for parameter in model.parameters():  # only parameters: `to` would also round the rotary frequencies
        parameter.data = parameter.data.to(dtype)
    return model


def _check_merge(model: PreTrainedModel, drafter: CausalDrafter) -> None:
    adapted = copy.deepcopy(drafter.model).eval()
    merged_logits, expected = _probe(model), _probe(adapted)
    error, scale = (merged_logits - expected).abs().max().item(), expected.abs().max().item()
    if not error <= _MERGE_TOLERANCE * max(scale, 1.0):
        raise ValueError(
            f"merging the LoRA adapter changed the logits by {error:.2g} (largest logit {scale:.2g}); its "
            "adapters are switched off, or what they add does not fit in fp32."
        )


@torch.no_grad()
def check_reload(model: PreTrainedModel, directory: Path) -> None:
    """Load a written folder and compare it with the model it was written from.

    Raises:
        ValueError: missing or unexpected weights, another dtype, or logits that are not bit for bit equal.
    """
    attention = model.config._attn_implementation
    loaded = load_causal_lm(directory, attention=attention)
    nn.Module.to(loaded, model.device)
    if loaded.dtype != model.dtype:
        raise ValueError(f"written as {model.dtype}, the drafter loads as {loaded.dtype}.")
    check_same_logits(_probe(model), _probe(loaded))


def _probe(model: PreTrainedModel) -> torch.Tensor:
    """fp32 logits [T, V] on fixed tokens, spread over the vocabulary."""
    facts = facts_of(model)
    num = min(_PROBE_TOKENS, facts.max_positions or _PROBE_TOKENS)
    ids = torch.arange(num, device=model.device) * 7919 % facts.vocab_size
    logits: torch.Tensor = model(ids[None], use_cache=False).logits[0].float()
    return checked_logits(logits)


def _name_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fill special token ids that a fresh network's configs leave open."""
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(config, name, None) is None:
                setattr(config, name, getattr(tokenizer, name, None))


def _legacy_rope(model: PreTrainedModel) -> dict[str, Any]:
    """Rotary settings under the names that readers before transformers 5 know."""
    rope = getattr(model.config, "rope_parameters", None)
    if isinstance(rope, dict) and "full_attention" in rope:  # Gemma 3: one base for each kind of layer
        names = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
        return {names[kind]: rope[kind]["rope_theta"] for kind in names.keys() & rope.keys()}
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    plain = scaling.get("rope_type", "default") == "default"
    return {"rope_theta": rope["rope_theta"]} | ({} if plain else {"rope_scaling": scaling})


def _update_json(path: Path, values: dict[str, Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_adapter(drafter: CausalDrafter, directory: Path) -> None:
    """Return the adapter, with the base named as the user named it instead of where it was loaded from."""
    network: Any = drafter.network
    network.save_pretrained(directory, save_embedding_layers=False)
    _update_json(directory / "adapter_config.json", {"base_model_name_or_path": drafter.pretrained})
    (directory / "README.md").write_text(
        f"LoRA adapter of the drafter one folder up, for the base model {drafter.pretrained}. The folder "
        "above holds the merged weights, which is what engines serve.\n",
        encoding="utf-8",
    )
