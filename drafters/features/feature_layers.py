"""Which target layers a drafter reads. Layer l is the l-th decoder layer, 0-based: its output, before the
final norm, which transformers calls `hidden_states[l + 1]`. Formats that count otherwise are converted where
they are read and written, never here.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence


def eagle_layers(num_target_layers: int) -> tuple[int, ...]:
    """A low, a middle and a high layer, as EAGLE-3 takes them.

    Examples:
        >>> eagle_layers(36)
        (1, 17, 32)
    """
    n = num_target_layers
    return fitted((1, n // 2 - 1, n - 4), n)


def block_layers(num_target_layers: int, num_layers: int) -> tuple[int, ...]:
    """As many layers as the drafter has, evenly from the second to the third last, as DFlash takes them.

    Examples:
        >>> block_layers(36, 5)
        (1, 9, 17, 25, 33)
    """
    n = num_target_layers
    if num_layers == 1:
        return fitted((n // 2,), n)
    return fitted([round(1 + i * (n - 4) / (num_layers - 1)) for i in range(num_layers)], n)


def fitted(layers: Sequence[int], num_target_layers: int) -> tuple[int, ...]:
    """Default layers, ascending, clamped to those a target has and each only once.

    The last layer is left out where there is another: readers of hidden states get it after the final norm.

    Warns:
        RuntimeWarning: the target is too small for the default.
    """
    last = max(num_target_layers - 2, 0)
    kept = tuple(sorted({min(max(layer, 0), last) for layer in layers}))
    if kept != tuple(layers):
        warnings.warn(
            f"a target of {num_target_layers} layers is too small for the usual feature layers "
            f"{tuple(layers)}; reading {kept} instead.",
            RuntimeWarning,
            stacklevel=3,
        )
    return kept


def checked(layers: Sequence[int], num_target_layers: int) -> tuple[int, ...]:
    """Layers that were asked for by number.

    Raises:
        ValueError: none, not ascending, or not among the layers a drafter may read.
    """
    wanted, last = tuple(int(layer) for layer in layers), max(num_target_layers - 2, 0)
    if not wanted or list(wanted) != sorted(set(wanted)):
        raise ValueError(
            f"target layers {wanted}: name at least one, ascending, each once; engines sort them."
        )
    if not 0 <= wanted[0] <= wanted[-1] <= last:
        raise ValueError(
            f"target layers {wanted}: this target has layers 0 to {num_target_layers - 1}, of which 0 to "
            f"{last} can be read (the last one's output is only known after the final norm). Choose "
            "others, or leave target_layer_ids out."
        )
    return wanted
