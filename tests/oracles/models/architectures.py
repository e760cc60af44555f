"""Small random models of many architectures: those served, and those refused with the reason."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

V = 96
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA = {"sliding_window": 16, "final_logit_softcapping": None}


def made(name: str, **changes: Any) -> PreTrainedModel:
    """A random model of a class of transformers, weights large enough that a wrong mask shows."""
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{name}Config")
    if name == "Gemma3":
        vision = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        config = config_class(
            text_config=SIZES | changes, vision_config=vision | {"image_size": 28, "patch_size": 14}
        )
        model = transformers.Gemma3ForConditionalGeneration(config)
    else:
        names = {"Gemma3Text": "Gemma3", "Qwen3_5Text": "Qwen3_5"}
        model = getattr(transformers, f"{names.get(name, name)}ForCausalLM")(config_class(**SIZES | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25) if parameter.ndim > 1 else None
    head: Any = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    return model.eval()


EQUAL = {
    "llama": ("Llama", {}),
    "llama 3 rope": ("Llama", {"rope_parameters": LLAMA_3_ROPE}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "phi with a bias": ("Phi", {"num_key_value_heads": 4}),
    "qwen3 moe": ("Qwen3Moe", EXPERTS),
    "wide window": ("Mistral", {"sliding_window": 100}),
    "gemma 3 text": ("Gemma3Text", GEMMA | {"sliding_window": 100}),
    "gemma 3 multimodal": ("Gemma3", GEMMA | {"sliding_window": 100}),
}
REFUSED = {
    "mistral": ("Mistral", {"sliding_window": 16}, "MistralForCausalLM has layers .* last 16 tokens only"),
    "gemma 3 text": ("Gemma3Text", GEMMA, "Gemma3ForCausalLM has layers .* last 16 tokens only"),
    "soft-capped": (
        "Gemma3",
        GEMMA | {"final_logit_softcapping": 30.0},
        r"Gemma3\w+ changes its logits .*\(final_logit_softcapping",
    ),
    "granite": ("Granite", {"logits_scaling": 8.0}, r"GraniteForCausalLM .*\(logits_scaling"),
}
