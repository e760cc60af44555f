"""Shared by the folders of drafters that read hidden states: layer sizes as JSON and back, tensors.

Reading fails closed. A key that changes what the network computes must have the one value that certdraft
computes; an unknown key is refused by name; so is a tensor too many or too few.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from certdraft.drafters.features.rotary import read_rope, rope_to_json
from certdraft.drafters.features.transformer_layer import LayerSizes, known

if TYPE_CHECKING:
    from certdraft.drafters.formats.export_metadata import ExportRequest

Json = dict[str, Any]
Weights = dict[str, Tensor]

_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "rms_norm_eps",
    "max_position_embeddings",
)
# Keys with one value certdraft computes.
_FIXED: Mapping[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "tie_word_embeddings": False,
}
# Keys that change nothing: what text means, how weights were drawn, who wrote the file.
_IDLE = frozenset(
    "_name_or_path attention_dropout auto_map bos_token_id dtype eos_token_id id2label initializer_range "
    "label2id max_window_layers modules_to_save pad_token_id pretraining_tp problem_type return_dict "
    "torch_dtype transformers_version use_cache model_max_length output_attentions output_hidden_states "
    "is_encoder_decoder chunk_size_feed_forward".split()
)
# Keys that are read here.
_READ = frozenset(
    "architectures model_type head_dim num_key_value_heads layer_types sliding_window use_sliding_window "
    "rope_theta rope_scaling rope_parameters".split()
)
# Keys of every speculators folder.
SPECULATORS = frozenset(
    "architectures auto_map draft_vocab_size dtype speculators_config speculators_model_type "
    "speculators_version target_hidden_size tie_word_embeddings torch_dtype transformer_layer_config "
    "transformers_version".split()
)
_SPECULATORS_VERSION = "0.9.0"  # of the library whose layout this is


def read_config(folder: Path, kind: str) -> tuple[Json, Path]:
    """config.json and its path."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no config.json there; give a folder with {kind}.")
    config: Json = json.loads(file.read_text(encoding="utf-8"))
    return config, file


def speculators_section(algorithm: str, request: ExportRequest, inner: Json) -> Json:
    """Keys of a speculators folder around the config of its layers; by these vLLM serves it by its path."""
    card = request.card
    if card is None or card.target_architecture is None:
        raise ValueError(
            "format 'speculators' names the target and its class, so that vLLM serves the folder by its path "
            "alone; give card=CardFacts(target=…, target_architecture='Qwen3ForCausalLM', …)."
        )
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": request.draft_length,
        "accept_tolerance": 0.0,
        "verifier_accept_k": 1,
    }
    return {
        "speculators_model_type": algorithm,
        "speculators_version": _SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": card.target, "architectures": [card.target_architecture]},
        },
        "transformer_layer_config": inner,
        "tie_word_embeddings": False,
        "dtype": inner["dtype"],
    }


def sizes_to_json(sizes: LayerSizes, dtype: torch.dtype) -> Json:
    """The keys of a transformers config for one kind of layer, the rotary base under old and new names."""
    name = str(dtype).removeprefix("torch.")
    rope = rope_to_json(known(sizes.rope_theta), sizes.rope_scaling)
    return {
        **{key: getattr(sizes, key) for key in (*_REQUIRED, "num_key_value_heads", "head_dim")},
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        **rope,
        "dtype": name,
        "torch_dtype": name,
    }


def check_given(settings: Json, where: str) -> None:
    """Raise a ValueError that names the settings a config does not give."""
    missing = sorted(key for key, value in settings.items() if value is None)
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; each engine would take another default.")


def sizes_from_json(config: Json, own: Iterable[str], where: str) -> Json:
    """Arguments of `LayerSizes`, from a config with nothing that certdraft does not compute.

    `own` are keys that the format itself reads.
    """
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise ValueError(f"{where} has {key} {config[key]!r}; only {value!r} is supported.")
    missing = [key for key in _REQUIRED if not config.get(key)]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; engines would guess, certdraft does not.")
    read = {*_REQUIRED, *_FIXED, *_IDLE, *_READ, *own}
    unknown = sorted(config.keys() - read)
    if unknown:
        raise ValueError(
            f"{where} has keys that certdraft does not know: {', '.join(unknown)}. They may change what the "
            "network computes; remove them once you know that they do not."
        )
    heads = config["num_attention_heads"]
    theta, scaling = read_rope(config, where)
    return {
        **{key: config[key] for key in _REQUIRED},
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "rope_theta": theta,
        "rope_scaling": scaling,
    }


def write_folder(directory: Path, config: Json, weights: Weights) -> None:
    """config.json and model.safetensors."""
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")
    stored = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})


def read_weights(folder: Path) -> Weights:
    """Every tensor of a folder, from safetensors, their shards, or a pickle that holds only tensors."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()][:1]
    if not names:
        raise FileNotFoundError(f"{folder}: no model.safetensors or pytorch_model.bin there.")
    weights: Weights = {}
    for name in names:
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{file}: the index lists it, but it is not there.")
        try:
            weights |= (
                load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
            )
        except Exception as error:  # safetensors, zipfile and pickle each have their own
            raise ValueError(f"{file} cannot be read ({error}); copy or write it again.") from error
    return weights


def check_names(weights: Weights, expected: Mapping[str, Tensor], where: str) -> None:
    """Compare names and shapes with those of a network."""
    missing = sorted(expected.keys() - weights.keys())
    unknown = sorted(weights.keys() - expected.keys())
    both = weights.keys() & expected.keys()
    shaped = [
        f"{name} {list(weights[name].shape)} for {list(expected[name].shape)}"
        for name in sorted(both)
        if weights[name].shape != expected[name].shape
    ]
    problems = {"missing": missing, "unknown": unknown, "of another shape": shaped}
    listed = [f"{what}: {', '.join(names[:6])}" for what, names in problems.items() if names]
    if listed:
        raise ValueError(f"the tensors of {where} do not fit its config: {'; '.join(listed)}.")
