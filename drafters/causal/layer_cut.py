"""A causal LM cut from a larger one: some of its layers, its embeddings, final norm and lm_head."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from certdraft.drafters.lm.cached_lm import split_causal_lm
from certdraft.support import facts_of, text_config


@dataclass(frozen=True)
class TargetLayers:
    """The layers of the target that a drafter starts from.

    Args:
        layers: 0-based layers, ascending, or how many: evenly spaced, first and last included.
    """

    layers: int | list[int]

    def chosen(self, num_layers: int) -> list[int]:
        """The layers, for a target of `num_layers`.

        Raises:
            ValueError: layers that the target does not have, or not in ascending order.

        Examples:
            >>> TargetLayers(4).chosen(30)
            [0, 10, 19, 29]
        """
        if isinstance(self.layers, int):
            if not 1 <= self.layers <= num_layers:
                raise ValueError(
                    f"from_target.layers is {self.layers}; the target has {num_layers} layers, so give 1 to "
                    f"{num_layers}."
                )
            step = (num_layers - 1) / max(self.layers - 1, 1)
            return [round(step * place) for place in range(self.layers)]
        layers = list(self.layers)
        if not layers or layers != sorted({*layers}) or not 0 <= layers[0] <= layers[-1] < num_layers:
            raise ValueError(
                f"from_target.layers is {layers}; give layers from 0 to {num_layers - 1}, ascending, each at "
                "most once."
            )
        return layers


@torch.no_grad()
def cut_from(
    target: PreTrainedModel,
    layers: TargetLayers,
    *,
    dtype: torch.dtype | None = None,
    attention: Literal["sdpa", "eager"] = "sdpa",
) -> PreTrainedModel:
    """A new causal LM with copies of some layers of `target`, in train mode.

    `dtype` None keeps the target's.
    """
    body, head = split_causal_lm(target)
    facts = facts_of(target)
    facts.check_attention()
    kept = layers.chosen(facts.num_layers)
    config = cut_config(target.config, layers)
    model: Any = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=dtype or target.dtype
    )
    weights = {}
    for name, value in body.state_dict().items():
        parts = name.split(".")
        if parts[0] == "layers":
            if int(parts[1]) not in kept:
                continue
            parts[1] = str(kept.index(int(parts[1])))
        weights[".".join(parts)] = value
    try:
        model.base_model.load_state_dict(weights)
        model.get_output_embeddings().load_state_dict(head.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"layers {kept} of {facts.name} do not fit a smaller model of its class: its layers differ by "
            "their number. Choose layers of the same kinds in the same places, or a fresh config."
        ) from error
    model.generation_config = copy.deepcopy(target.generation_config)
    return model


def cut_config(config: PretrainedConfig, layers: TargetLayers) -> PretrainedConfig:
    """The config of a model with only these layers of the one that `config` describes."""
    num_layers = facts_of(config).num_layers
    kept = layers.chosen(num_layers)
    cut = copy.deepcopy(text_config(config))
    for key, value in cut.to_dict().items():
        if key == "mlp_only_layers":
            setattr(cut, key, [kept.index(layer) for layer in value or () if layer in kept])
        elif isinstance(value, list) and len(value) == num_layers:  # one entry per layer
            setattr(cut, key, [value[layer] for layer in kept])
    cut.num_hidden_layers = len(kept)
    if hasattr(cut, "quantization_config"):  # of the file that the target was dequantised from
        del cut.quantization_config
    return cut
