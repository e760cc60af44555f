"""A key-value cache that appends in place: a token costs one write, not a copy of all tokens before it."""

from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer


def growing_cache(config: PretrainedConfig, room: int) -> DynamicCache:
    """A cache for a model of this config; layers with full attention append in place.

    Sliding-window and linear-attention layers stay as transformers makes them.

    Args:
        config: of the model.
        room: tokens to reserve; beyond them a buffer doubles.
    """
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer in a buffer that doubles, so appending a token does not copy the past."""

    _keys: Tensor  # [batch, heads, capacity, head size], of which `length` tokens are in use
    _values: Tensor

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room  # tokens to reserve at the first write
        self.length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append the states of new tokens and return those of all tokens, as views of the buffer."""
        start, end = self.length, self.length + key_states.shape[-2]
        if not self.is_initialized or end > self._keys.shape[-2]:
            self._grow(key_states, value_states, end)
        self._keys[:, :, start:end] = key_states
        self._values[:, :, start:end] = value_states
        keys, values = self._keys[:, :, :end], self._values[:, :, :end]
        self.length, self.keys, self.values = end, keys, values
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch."""
        self._keys, self._values = self._keys[indices], self._values[indices]
        self.truncate(self.length)

    def truncate(self, length: int) -> None:
        """Forget everything from index `length` on."""
        self.length = length
        if self.is_initialized:
            self.keys, self.values = self._keys[:, :, :length], self._values[:, :, :length]

    def gather(self, start: int, index: Tensor) -> None:
        """Keep the tokens before `start`, then those at `start + index` (ascending), in that order."""
        end = start + len(index)
        index = index.to(self.device)
        self._keys[:, :, start:end] = self._keys[:, :, start:].index_select(2, index)
        self._values[:, :, start:end] = self._values[:, :, start:].index_select(2, index)
        self.truncate(end)

    def rearrange(self, rows: Tensor, slots: Tensor) -> None:
        """Keep these sequences [R] of a batch, and of each the tokens at `slots` [R, W], in that order."""
        rows, slots = rows.to(self.device), slots.to(self.device)[:, None, :, None]
        self._keys, self._values = (
            states.index_select(0, rows).gather(2, slots.expand(-1, states.shape[1], -1, states.shape[3]))
            for states in (self._keys, self._values)
        )
        self.truncate(slots.shape[2])

    def erase(self, hidden: Tensor) -> None:
        """Zero the tokens of a batch where `hidden` [R, W] is true."""
        for states in (self._keys, self._values):
            states[:, :, : self.length].masked_fill_(hidden.to(self.device)[:, None, :, None], 0)

    def _grow(self, key_states: Tensor, value_states: Tensor, needed: int) -> None:
        capacity = max(self.room, 2 * needed if self.is_initialized else needed)
        old = (self._keys, self._values) if self.is_initialized else None
        self._keys, self._values = (
            states.new_empty((*states.shape[:2], capacity, states.shape[3]))
            for states in (key_states, value_states)
        )
        if old is not None:
            for new, filled in zip((self._keys, self._values), old, strict=True):
                new[:, :, : self.length] = filled[:, :, : self.length]
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
