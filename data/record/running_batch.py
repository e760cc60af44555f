"""Continuous batching: sequences that have ended leave the batch, and others take their places.

Newcomers are read in a pass of their own, padded on the left. Then their keys and values become rows of the
batch's cache, in which every sequence ends at the last column; columns that no row needs are dropped. So each
sequence attends to its own tokens at their own positions, as it would alone.

Axis letters: R rows of the cache · W its columns · L live sequences · N newcomers · P tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from certdraft.support import GrowingLayer, growing_cache

_FULL = 0.75  # share of live rows from which on others are carried along: changing the rows copies the cache


class RunningBatch:
    """Live sequences that a model reads side by side, in the order in which they joined.

    Args:
        forward: a causal transformer, with or without its head.
        config: of the transformer.
        device: of the transformer.
        size: most sequences.
        room: tokens to reserve for each; 0 keeps no cache, for sequences that are only read.

    Attributes:
        rows: where the live sequences are in the output of `step`, [L].
    """

    rows: Int[Tensor, " L"]

    def __init__(
        self,
        forward: Callable[..., Any],
        config: PretrainedConfig,
        device: torch.device,
        size: int,
        room: int,
    ) -> None:
        self._forward, self._config, self._device, self._room = forward, config, device, room
        self._size, self._cache = size, growing_cache(config, room)
        self._mask = torch.zeros(0, 0, dtype=torch.bool, device=device)  # [R, W], false where nothing is read
        self.rows = torch.zeros(0, dtype=torch.long, device=device)
        # layers of linear attention hold more than keys and values; their rows are replaced all at once
        self._changes = all(
            type(layer) in (GrowingLayer, DynamicSlidingWindowLayer) for layer in self._cache.layers
        )

    @property
    def free(self) -> int:
        """Sequences that should join now; 0 while too few places are free to be worth it."""
        live = len(self.rows)
        return self._size - live if live == 0 or (self._changes and live <= _FULL * self._size) else 0

    def join(self, sequences: Sequence[Int[ndarray, " P"]]) -> Any:
        """Read at most `free` sequences.

        Returns:
            The model's output for them, [N, P, …]. Each sequence ends at the last position.
        """
        lengths = np.array([len(ids) for ids in sequences])
        read = np.arange(lengths.max()) >= lengths.max() - lengths[:, None]  # [N, P]
        ids = np.zeros(read.shape, np.int64)
        ids[read] = np.concatenate(sequences)
        mask, cache = torch.from_numpy(read).to(self._device), growing_cache(self._config, self._room)
        output = self._forward(
            input_ids=torch.from_numpy(ids).to(self._device),
            attention_mask=None if read.all() else mask.long(),  # None is the cheaper causal one
            position_ids=torch.from_numpy((read.cumsum(1) - 1).clip(0)).to(self._device),
            past_key_values=cache if self._room else None,
            use_cache=self._room > 0,
        )
        if len(self.rows):
            masks = [self._mask[self.rows], mask]
            width = max(int(part.sum(1).max()) for part in masks)
            mask = torch.cat([_aligned(part, width, dim=1) for part in masks])
            cache = self._joined(self._cache, cache, width)
        self._cache, self._mask = cache, mask
        self.rows = torch.arange(len(mask), device=self._device)
        return output

    def keep(self, stay: Sequence[int]) -> None:
        """Let all but these of the live sequences leave."""
        self.rows = self.rows[torch.tensor(stay, dtype=torch.long, device=self._device)]

    def step(self, tokens: Int[Tensor, " L"]) -> Any:
        """Append a token to each live sequence.

        Returns:
            The model's output, [R, 1, …], of which `rows` are the live sequences.
        """
        if self._changes and len(self.rows) <= _FULL * len(self._mask):
            self._cache.batch_select_indices(self.rows)
            self._mask = self._mask[self.rows]
            self.rows = torch.arange(len(self._mask), device=self._device)
        ids = tokens.new_zeros(len(self._mask), 1)
        ids[self.rows, 0] = tokens
        positions = self._mask.sum(1, keepdim=True)
        self._mask = F.pad(self._mask, (0, 1))
        self._mask[self.rows, -1] = True
        return self._forward(
            input_ids=ids,
            attention_mask=self._mask.long(),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )

    def _joined(self, cache: DynamicCache, newcomers: DynamicCache, width: int) -> DynamicCache:
        """A cache of the last `width` tokens of the live sequences and of the newcomers."""
        joined = growing_cache(self._config, self._room)
        caches: Any = (joined.layers, cache.layers, newcomers.layers)
        for number, (layer, old, new) in enumerate(zip(*caches, strict=True)):
            if old.is_initialized:  # layers that use the states of another hold none
                keys, values = (
                    torch.cat([_aligned(mine[self.rows], width, dim=2), _aligned(other, width, dim=2)])
                    for mine, other in ((old.keys, new.keys), (old.values, new.values))
                )
                layer.update(keys, values)
            cache.layers[number] = newcomers.layers[number] = layer  # frees the old states, layer by layer
        return joined


def _aligned(states: Tensor, width: int, dim: int) -> Tensor:
    """The last `width` entries along a dimension, after zeros where there are fewer."""
    return F.pad(states, (*(0, 0) * (states.ndim - 1 - dim), width - states.shape[dim], 0))
