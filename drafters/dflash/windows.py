"""What a block's positions see in each layer of a DFlash drafter: windows, and order inside the block.

A query at position q of a layer with a window of W sees keys at positions above q − W, its own included, as
in z-lab's own code and in the engines: later positions of a block see less of the far context. Inside the
block a layer reads in both directions, or only earlier positions; layers with a window do the latter unless
a config says otherwise. transformers' own class sees one key more (|q − k| ≤ W), and speculators trains with
windows that start W before the anchor, for every position of the block.

Letters: R rows, A anchors, Q positions of a block, T context tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from certdraft.drafters.features.visible_spans import VisibleSpans

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class View:
    """What one layer lets a position see.

    Attributes:
        window: positions back that a query sees, its own included; None: all.
        causal: inside the block a position sees only earlier ones and itself.
    """

    window: int | None
    causal: bool

    def own(self, size: int, device: torch.device) -> Bool[Tensor, "Q Q"] | None:
        """Positions of the block that each one sees; None: all of them."""
        if not self.causal and (self.window is None or self.window >= size):
            return None
        place = torch.arange(size, device=device)
        back = place[:, None] - place
        seen = back >= 0 if self.causal else torch.ones_like(back, dtype=torch.bool)
        return seen if self.window is None else seen & (back.abs() < self.window)

    def spans(self, starts: Int[Tensor, "R A"], anchors: Int[Tensor, "R A"], size: int) -> VisibleSpans:
        """What the positions of blocks at these anchors see, given where the anchors' documents start."""
        first = starts[..., None]
        if self.window is not None:
            place = anchors[..., None] + torch.arange(size, device=anchors.device)
            first = torch.maximum(first, place + 1 - self.window)
        return VisibleSpans(first, anchors, self.own(size, anchors.device))

    def cached(
        self, length: int, size: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[int, Float[Tensor, "1 1 Q T"] | None]:
        """First of `length` cached tokens that the next block sees, and its additive mask from there on."""
        start = 0 if self.window is None else max(0, length + 1 - self.window)
        own = self.own(size, device)
        if own is None and (self.window is None or length + size <= self.window):
            return start, None
        query = torch.arange(length, length + size, device=device)
        context = torch.ones(size, length - start, dtype=torch.bool, device=device)
        if self.window is not None:
            context = query[:, None] - torch.arange(start, length, device=device) < self.window
        seen = torch.cat(
            [context, torch.ones_like(context[:, :1]).expand(-1, size) if own is None else own], 1
        )
        mask = torch.zeros(seen.shape, dtype=dtype, device=device)
        return start, mask.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]


def views(
    num_layers: int, layer_types: tuple[str, ...] | None, window: int | None, causal: bool | None
) -> tuple[View, ...]:
    """What each layer sees, from the fields of `BlockConfig`.

    Raises:
        ValueError: another number of kinds than layers, an unknown kind, a window without layers that have it
            or the reverse.
    """
    kinds = layer_types or (FULL,) * num_layers
    slides = SLIDING in kinds
    if len(kinds) != num_layers or set(kinds) - {FULL, SLIDING} or slides != (window is not None):
        raise ValueError(
            f"layer_types {list(kinds)} and sliding_window {window} do not fit a drafter of {num_layers} "
            f"layers: name {FULL} or {SLIDING} for each, and a window where one slides, not otherwise."
        )
    if window is not None and window < 1:
        raise ValueError(f"sliding_window is {window}; it counts positions and must be at least 1.")
    return tuple(
        View(window if kind == SLIDING else None, kind == SLIDING if causal is None else causal)
        for kind in kinds
    )


def read_windows(config: Mapping[str, Any], section: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return `layer_types`, `sliding_window` and `causal` of `BlockConfig` as engines read them.

    Args:
        config: keys of a Qwen3 config.
        section: `dflash_config`, whose `use_swa` gives every layer a window unless `layer_types` names some,
            whose `swa_window_size` is that window, and whose `causal` holds for all layers.
        where: for messages.

    Raises:
        ValueError: windows that readers would take for others, or that are not computed.
    """
    num = config.get("num_hidden_layers") or 0
    stated = config.get("layer_types")
    kinds = tuple(stated) if stated else (FULL,) * num
    sizes = [s for s in (section.get("swa_window_size"), config.get("sliding_window")) if s is not None]
    if len(set(map(repr, sizes))) > 1:
        raise ValueError(f"{where}: swa_window_size {sizes[0]!r} and sliding_window {sizes[1]!r} differ.")
    window = next(iter(sizes), None)
    if stated is None and config.get("use_sliding_window") and config.get("sliding_window"):
        raise ValueError(
            f"{where} has use_sliding_window but no layer_types; name {FULL} or {SLIDING} for each layer."
        )
    forced = bool(section.get("use_swa")) and SLIDING not in kinds
    kinds = (SLIDING,) * len(kinds) if forced else kinds
    given = [value for value in (config.get("is_causal"), section.get("causal")) if value is not None]
    if not all(isinstance(value, bool) for value in given) or given.count(True) not in (0, len(given)):
        raise ValueError(
            f"{where}: is_causal and dflash_config.causal must be one true or false, where given."
        )
    causal = any(given) if given else None
    if SLIDING not in kinds:
        window = None
    elif config.get("use_sliding_window") is False and not section.get("use_swa"):
        raise ValueError(
            f"{where} has {SLIDING} layers and use_sliding_window false, with which transformers drops their "
            "window. Write true if they have one, else full_attention."
        )
    elif type(window) is not int:
        raise ValueError(f"{where} has {SLIDING} layers and sliding_window {window!r}; must be a number.")
    views(num, kinds, window, causal)
    return {
        "layer_types": kinds if window is not None else None,
        "sliding_window": window,
        "causal": None if causal is False and window is None else causal,
    }
