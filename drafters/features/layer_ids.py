"""Which target layers a drafter reads, in the numbering of every reader.

Inside certdraft a *tap* l is the 0-based decoder layer whose output is read; transformers calls that tensor
`hidden_states[l + 1]`, because its entry 0 is the embeddings. On disk two numberings are in use, and one
format carries both side by side. A number read in the wrong one shifts the features by a layer: everything
still loads, the text is still right, and only the acceptance length tells.
"""

from collections.abc import Sequence
from typing import Literal

Numbering = Literal["tap", "hidden_states", "sglang", "dflash", "speculators", "openvino", "tensorrt_llm"]

# Number on disk minus tap.
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
    """Layer ids of one numbering in another.

    Args:
        ids: in the numbering `source`.
        source: where they come from.
        to: where they go.

    Raises:
        ValueError: an id below every layer: `hidden_states` 0 are the embeddings, no layer's output.

    Examples:
        >>> convert((1, 4, 9), "tap", "hidden_states")
        (2, 5, 10)
        >>> convert((2, 5, 10), "hidden_states", "sglang")
        (1, 4, 9)
    """
    taps = [number - OFFSETS[source] for number in ids]
    if any(tap < 0 for tap in taps):
        raise ValueError(
            f"layer ids {list(ids)} ({source} numbering) reach below the first layer, whose output is "
            f"{OFFSETS[source]}; a drafter reads outputs of layers, not the embeddings."
        )
    return tuple(tap + OFFSETS[to] for tap in taps)


def check_taps(taps: Sequence[int], num_target_layers: int | None = None) -> tuple[int, ...]:
    """Taps that every engine reads as the same layers in the same order.

    Args:
        taps: 0-based layers.
        num_target_layers: of the target; None leaves the upper bound to the reader.

    Raises:
        ValueError: none, a repeated one, not ascending (vLLM sorts and merges ids, so the columns of `fc`
            would belong to other layers), or the last layer (transformers' last hidden state has passed the
            final norm, llama.cpp aborts).

    Examples:
        >>> check_taps([1, 3, 4], num_target_layers=8)
        (1, 3, 4)
    """
    taps = tuple(taps)
    if not taps or taps[0] < 0 or any(a >= b for a, b in zip(taps, taps[1:], strict=False)):
        raise ValueError(
            f"taps {list(taps)} must be different layers in ascending order: engines sort them, and each has "
            "its own columns of fc."
        )
    if num_target_layers is not None and taps[-1] > num_target_layers - 2:
        raise ValueError(
            f"taps {list(taps)} of a target with {num_target_layers} layers: the last one that every engine "
            f"hands out before the final norm is {num_target_layers - 2}."
        )
    return taps
