"""Facts of a causal LM that its config states, read in this one place.

Sizes of multimodal models are in their text config. What a config does not state, the probe of
`certdraft.drafters.CachedLM` finds by numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@dataclass(frozen=True)
class ModelFacts:
    """A causal LM as far as training and decoding ask.

    Attributes:
        name: class of the model, or of its config.
        num_layers: decoder layers.
        hidden_size: H.
        vocab_size: V by the config.
        max_positions: `max_position_embeddings`; None where there is no limit.
        layer_types: kind of attention of each layer, such as "full_attention".
        window: previous tokens that the narrowest layer attends to, the token itself included; None where
            all layers attend to all of them.
        logit_changes: config keys by which logits differ from lm_head(hidden): soft-capping, scaling.
    """

    name: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    layer_types: tuple[str, ...]
    window: int | None
    logit_changes: tuple[str, ...]

    @property
    def context_limit(self) -> int | None:
        """Longest text that tree decoding and packed rows can hold; None where there is no limit."""
        return min((n for n in (self.max_positions, self.window) if n), default=None)

    @property
    def recurrent(self) -> bool:
        """Whether layers hold a state in place of previous tokens: what they read cannot be taken back."""
        return "linear_attention" in self.layer_types

    def check_attention(self) -> None:
        """Raise if a layer holds a state instead of tokens, which packed rows and trees would mix."""
        if self.recurrent:
            raise ValueError(
                f"{self.name} has linear_attention layers, which read tokens in order: as a target it is "
                "recorded, decodes chains, and trains EAGLE-3 and DFlash drafters; token trees and causal "
                "drafters need attention to the previous tokens in each layer."
            )

    def check_window(self, num_tokens: int) -> None:
        """Raise if a text outgrows an attention window: masks of trees and packed rows know no windows."""
        if self.window is not None and num_tokens > self.window:
            raise ValueError(
                f"{self.name} has layers that attend to the last {self.window} tokens only, and a text has "
                f"{num_tokens}: token trees and packed rows are not supported beyond such a window. Use "
                f"texts of at most {self.window} tokens, or a model with full attention in every layer."
            )


def text_config(config: Any) -> Any:
    """The config that holds the sizes of the text model: the config itself unless it is multimodal."""
    return config.get_text_config(decoder=True) if isinstance(config, PreTrainedConfig) else config


def facts_of(model: PreTrainedModel | PreTrainedConfig) -> ModelFacts:
    """Read the facts of a model, or of a config."""
    outer: Any = model.config if isinstance(model, nn.Module) else model
    config = text_config(outer)
    types = tuple(getattr(config, "layer_types", None) or ())
    sliding = getattr(config, "sliding_window", None)
    if not types:
        slides = sliding is not None and getattr(config, "use_sliding_window", True)
        types = ("sliding_attention" if slides else "full_attention",) * config.num_hidden_layers
    windows = {
        "sliding_attention": sliding,
        "chunked_attention": getattr(config, "attention_chunk_size", None),
    }
    # Qwen's sliding_window counts the token itself, as do those of Mistral and Gemma
    found = [size for kind in set(types) if (size := windows.get(kind))]
    changes = [
        key
        for key in _LOGIT_CHANGES
        for part in (config, outer)
        if getattr(part, key, None) not in (None, 1.0)
    ]
    return ModelFacts(
        name=type(model).__name__,
        num_layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
        vocab_size=int(config.vocab_size),
        max_positions=_limit(config),
        layer_types=types,
        window=min(found, default=None),
        logit_changes=tuple(dict.fromkeys(changes)),
    )


def text_body(model: PreTrainedModel) -> nn.Module:
    """The text model without its lm_head: tokens to hidden states after the final norm."""
    multimodal = text_config(model.config) is not model.config
    body: nn.Module = model.get_decoder() if multimodal else model.base_model
    return body


def has_head_bias(model: PreTrainedModel) -> bool:
    """Whether the lm_head adds a bias that is not zero, which losses that read only the weight would miss."""
    bias = getattr(model.get_output_embeddings(), "bias", None)
    return bias is not None and bias.device.type != "meta" and bool(bias.any())


def context_limit(model: object) -> int | None:
    """Longest text a model is used for, by its positions and attention window; None without a limit."""
    config = getattr(model, "config", None)
    if isinstance(config, PreTrainedConfig) and hasattr(text_config(config), "num_hidden_layers"):
        return facts_of(config).context_limit
    return _limit(config)


def _limit(config: object) -> int | None:
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit else None
