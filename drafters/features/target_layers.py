"""Aux hidden-state layers: which target layers a drafter reads, and their numbers in every format.

Inside certdraft layer l is the 0-based decoder layer whose output is read, before the final norm;
transformers calls that tensor `hidden_states[l + 1]`, because its entry 0 is the embeddings. On disk two
numberings are in use, and one format carries both side by side. A number read in the wrong one shifts the
features by a layer: everything still loads, the text is still right, and only the acceptance length shows it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

Numbering = Literal["tap", "hidden_states", "sglang", "dflash", "speculators", "openvino", "tensorrt_llm"]

# Number on disk minus the 0-based layer ("tap").
OFFSETS: dict[Numbering, int] = {
    "tap": 0,
    "hidden_states": 1,  # EAGLE-3's top-level key: vLLM, llama.cpp, speculators
    "sglang": 0,  # EAGLE-3's nested key: SGLang adds 1 itself
    "dflash": 0,  # `target_layer_ids` of DFlash, in every engine
    "speculators": 1,  # `aux_hidden_state_layer_ids` of its DFlash, top-level key of its EAGLE-3
    "openvino": 0,  # `hidden_layers_list`
    "tensorrt_llm": 0,  # `eagle3_layers_to_capture`
}


def convert(ids: Sequence[int], source: Numbering, to: Numbering) -> tuple[int, ...]:
    """Convert layer ids from one numbering to another.

    Raises:
        ValueError: an id below every layer: `hidden_states` 0 are the embeddings.

    Examples:
        >>> convert((1, 4, 9), "tap", "hidden_states")
        (2, 5, 10)
        >>> convert((2, 5, 10), "hidden_states", "sglang")
        (1, 4, 9)
    """
    layers = [number - OFFSETS[source] for number in ids]
    if any(layer < 0 for layer in layers):
        raise ValueError(
            f"layer ids {list(ids)} ({source} numbering) reach below the first layer, whose output is "
            f"{OFFSETS[source]}; a drafter reads outputs of layers, not the embeddings."
        )
    return tuple(layer + OFFSETS[to] for layer in layers)


def check_layers(layers: Sequence[int], num_target_layers: int | None = None) -> tuple[int, ...]:
    """Return layers that every engine reads as the same layers in the same order.

    Args:
        layers: 0-based.
        num_target_layers: of the target; None leaves the upper bound to the reader.

    Raises:
        ValueError: none, a repeated one, not ascending (vLLM sorts and merges ids, so the columns of `fc`
            would belong to other layers), or the last layer (transformers' last hidden state has passed the
            final norm, llama.cpp aborts).

    Examples:
        >>> check_layers([1, 3, 4], num_target_layers=8)
        (1, 3, 4)
    """
    layers = tuple(int(layer) for layer in layers)
    if not layers or layers[0] < 0 or list(layers) != sorted(set(layers)):
        raise ValueError(
            f"target layers {list(layers)}: name at least one, each once, in ascending order from 0: engines "
            "sort them, and each has its own columns of fc."
        )
    if num_target_layers is not None and layers[-1] > (last := max(num_target_layers - 2, 0)):
        raise ValueError(
            f"target layers {list(layers)}: this target has layers 0 to {num_target_layers - 1}, of which 0 "
            f"to {last} can be read: engines hand out the last one's output only after the final norm. "
            "Choose others, or leave target_layer_ids out."
        )
    return layers


def eagle_layers(num_target_layers: int) -> tuple[int, ...]:
    """Return a low, a middle and a high layer, as EAGLE-3 takes them.

    Examples:
        >>> eagle_layers(36)
        (1, 17, 32)
    """
    n = num_target_layers
    return _clamped((1, n // 2 - 1, n - 4), n)


def block_layers(num_target_layers: int, num_layers: int) -> tuple[int, ...]:
    """Return as many layers as the drafter has, evenly from the second to the third last, as DFlash does.

    Examples:
        >>> block_layers(36, 5)
        (1, 9, 17, 25, 33)
    """
    n = num_target_layers
    if num_layers == 1:
        return _clamped((n // 2,), n)
    return _clamped([round(1 + i * (n - 4) / (num_layers - 1)) for i in range(num_layers)], n)


def _clamped(layers: Sequence[int], num_target_layers: int) -> tuple[int, ...]:
    """Default layers, ascending, clamped to those that can be read and each only once."""
    last = max(num_target_layers - 2, 0)
    kept = tuple(sorted({min(max(layer, 0), last) for layer in layers}))
    if kept != tuple(layers):
        warnings.warn(
            f"a target of {num_target_layers} layers is too small for the usual feature layers "
            f"{tuple(layers)}; reading {kept} instead.",
            RuntimeWarning,
            stacklevel=4,
        )
    return kept
