"""Drafter folders written by hand, as the engines' sources read them; nothing here comes from the package."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

V, DV, H, F, N, K, D = 96, 40, 32, 48, 4, 2, 8
TAPS, LAYERS = (1, 3, 4), 6
TARGET = {"vocab_size": V, "hidden_size": H, "num_hidden_layers": LAYERS}
SIZES: dict[str, Any] = {
    "hidden_size": H,
    "intermediate_size": F,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": D,
    "vocab_size": V,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "rope_theta": 5000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "tie_word_embeddings": False,
    "dtype": "float32",
}


def proposal(algorithm: str, num_tokens: int) -> dict[str, Any]:
    """The section that speculators' folders are served by."""
    return {
        "algorithm": algorithm,
        "default_proposal_method": "greedy",
        "proposal_methods": [
            {
                "proposal_type": "greedy",
                "speculative_tokens": num_tokens,
                "accept_tolerance": 0.0,
                "verifier_accept_k": 1,
            }
        ],
        "verifier": {"name_or_path": "target", "architectures": ["Qwen3ForCausalLM"]},
    }


def layer(prefix: str, inputs: int, norms: bool) -> dict[str, tuple[int, ...]]:
    """Tensors of one decoder layer."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.input_layernorm.weight": (H,),
        f"{prefix}.post_attention_layernorm.weight": (H,),
        f"{prefix}.self_attn.q_proj.weight": (N * D, inputs),
        f"{prefix}.self_attn.k_proj.weight": (K * D, inputs),
        f"{prefix}.self_attn.v_proj.weight": (K * D, inputs),
        f"{prefix}.self_attn.o_proj.weight": (H, N * D),
        f"{prefix}.mlp.gate_proj.weight": (F, H),
        f"{prefix}.mlp.up_proj.weight": (F, H),
        f"{prefix}.mlp.down_proj.weight": (H, F),
    }
    for name in ("q_norm", "k_norm") if norms else ():
        shapes[f"{prefix}.self_attn.{name}.weight"] = (D,)
    return shapes


def tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random weights; norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    return {name: value + 1 if value.ndim == 1 else value for name, value in drawn.items()}


def tables(seed: int = 0, size: int = DV) -> dict[str, Tensor]:
    """A draft vocabulary as offsets and as marks."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(V, generator=generator)[:size].sort().values
    marks = torch.zeros(V, dtype=torch.bool)
    marks[ids] = True
    return {"d2t": ids - torch.arange(size), "t2d": marks}


def eagle3(seed: int = 0, speculators: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of an EAGLE-3 head."""
    prefix = "layers.0" if speculators else "midlayer"
    shapes = {
        "fc.weight": (H, len(TAPS) * H),
        f"{prefix}.hidden_norm.weight": (H,),
        **layer(prefix, 2 * H, norms=False),
        "norm.weight": (H,),
        "lm_head.weight": (DV, H),
    }
    weights = tensors(shapes, seed) | tables(seed)
    inner = {"model_type": "llama", "num_hidden_layers": 1} | SIZES
    hidden_states = [tap + 1 for tap in TAPS]
    if not speculators:
        return inner | {
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": DV,
            "norm_before_residual": False,
            "eagle_aux_hidden_state_layer_ids": hidden_states,
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(TAPS), "use_aux_hidden_state": True},
        }, weights
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "speculators_config": proposal("eagle3", 4),
        "transformer_layer_config": inner,
        "draft_vocab_size": DV,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "embed_requires_grad": False,
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": hidden_states,
        "tie_word_embeddings": False,
    }, weights


def dflash(
    layout: str = "dflash", seed: int = 0, num_layers: int = 2
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a DFlash drafter: "dflash", "speculators" or "transformers"."""
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (H, len(TAPS) * H), "hidden_norm.weight": (H,)}
    for number in range(num_layers):
        shapes |= layer(f"layers.{number}", H, norms=True)
    weights = tensors(shapes | {"norm.weight": (H,)}, seed)
    inner = SIZES | {
        "model_type": "qwen3",
        "num_hidden_layers": num_layers,
        "layer_types": ["full_attention"] * num_layers,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    if layout == "dflash":
        return inner | {
            "architectures": ["DFlashDraftModel"],
            "block_size": 6,
            "num_target_layers": LAYERS,
            "dflash_config": {"mask_token_id": V - 1, "target_layer_ids": list(TAPS)},
        }, weights
    if layout == "speculators":
        return {
            "architectures": ["DFlashSpeculator"],
            "speculators_model_type": "dflash",
            "speculators_version": "0.9.0",
            "speculators_config": proposal("dflash", 5),
            "transformer_layer_config": inner,
            "draft_vocab_size": V,
            "block_size": 6,
            "aux_hidden_state_layer_ids": [tap + 1 for tap in TAPS],
            "mask_token_id": V - 1,
            "sample_from_anchor": False,
            "sliding_window_non_causal": True,
            "tie_word_embeddings": False,
        }, weights
    names = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    config = {
        key: value for key, value in inner.items() if key not in ("sliding_window", "use_sliding_window")
    }
    return config | {
        "architectures": ["MuseGlimmerAssistantModel"],
        "model_type": "muse_glimmer_assistant",
        "block_size": 6,
        "mask_token_id": V - 1,
        "target_layer_ids": list(TAPS),
    }, {names.get(name, name): value for name, value in weights.items()}


def dspark(layout: str = "dspark", seed: int = 0) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a DSpark drafter: as "deepspec" writes it, as certdraft does ("dspark"), or in
    the layout of "speculators"."""
    config, weights = dflash("speculators" if layout == "speculators" else "dflash", seed)
    heads = {"markov_head.markov_w1.weight": (V, 5), "markov_head.markov_w2.weight": (V, 5),
             "confidence_head.proj.weight": (1, H + 5), "confidence_head.proj.bias": (1,)}  # fmt: skip
    weights |= tensors(heads, seed + 1)
    config |= {"markov_rank": 5, "markov_head_type": "vanilla", "enable_confidence_head": True,
               "confidence_head_with_markov": True, "sample_from_anchor": True}  # fmt: skip
    if layout == "speculators":
        own = {"architectures": ["DSparkSpeculator"], "speculators_model_type": "dspark"}
        return config | own | {"speculators_config": proposal("dspark", 6)}, weights
    own = config.pop("dflash_config") | {"architectures": ["Qwen3DSparkModel"]}
    if layout == "deepspec":
        del config["sample_from_anchor"]
        weights |= tensors({"embed_tokens.weight": (V, H), "lm_head.weight": (V, H)}, seed + 2)
        return config | own | {"num_anchors": 512}, weights
    return config | own | {"dspark_bonus_anchor": False}, weights


def write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    """A folder with both."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder
