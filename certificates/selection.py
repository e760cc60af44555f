"""The k largest entries of a row: selection in O(V), with the greedy token resolved to the lowest index.

`torch.topk` on a CPU builds a heap over the whole vocabulary. Here the row is cut into blocks, the k blocks
with the largest maxima are chosen, and only their entries are ranked. Whatever lies in another block is at
most as large as k entries already chosen, so the values are exact; the cost is one pass over memory.

Axis letters: *step leading axes · V vocabulary · K entries kept.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK = 128  # entries per block: the maxima of 151,936 entries fit in the first-level cache
_WORTH_IT = 64  # below this many blocks per kept entry, plain topk is as fast


def largest(x: Float[Tensor, "*step V"], k: int) -> tuple[Float[Tensor, "*step K"], Int[Tensor, "*step K"]]:
    """The k largest entries of each row in descending order, and where they are.

    Args:
        x: any real numbers, NaN sorts first.
        k: how many, 1 to V.

    Returns:
        Values and indices. `ids[..., 0]` is the lowest index that attains the maximum; other ties come in any
        order.
    """
    vocab_size = x.shape[-1]
    if not 1 <= k <= vocab_size:
        raise ValueError(
            f"asked for the {k} largest of {vocab_size} entries; k must be between 1 and {vocab_size}"
        )
    num_blocks = vocab_size // _BLOCK
    first = x.argmax(-1, keepdim=True)
    if num_blocks < 4 * k or num_blocks < _WORTH_IT:
        values, ids = x.topk(k, dim=-1)
    else:
        values, ids = _by_blocks(x, k, num_blocks)
    # whichever tied entry came first in the ranking gives its place to the lowest index
    ids = torch.where(ids == first, ids[..., :1], ids)
    ids = torch.cat([first, ids[..., 1:]], dim=-1)
    return values, ids


def _by_blocks(x: Tensor, k: int, num_blocks: int) -> tuple[Tensor, Tensor]:
    step = x.shape[:-1]
    body = num_blocks * _BLOCK
    blocks = x[..., :body].unflatten(-1, (num_blocks, _BLOCK))
    chosen = blocks.detach().amax(-1).topk(k, dim=-1, sorted=False).indices  # [*step, K]
    index = chosen.unsqueeze(-1).expand(*step, k, _BLOCK)
    candidates = blocks.gather(-2, index).flatten(-2)  # [*step, K * _BLOCK]
    ids = (chosen.unsqueeze(-1) * _BLOCK + torch.arange(_BLOCK, device=x.device)).flatten(-2)
    if body < x.shape[-1]:
        rest = torch.arange(body, x.shape[-1], device=x.device).expand(*step, -1)
        candidates = torch.cat([candidates, x[..., body:]], dim=-1)
        ids = torch.cat([ids, rest], dim=-1)
    values, place = candidates.topk(k, dim=-1)
    return values, ids.gather(-1, place)
