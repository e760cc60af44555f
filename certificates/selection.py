"""The k largest entries of a row by selection, not sorting: one pass over memory whatever k is.

`torch.topk` ranks the whole vocabulary. Here the row is dealt into columns of 32 entries, the k columns with
the largest maxima are chosen, and only their entries are ranked: whatever lies in another column is at most
as large as k entries already chosen, so the values are exact.

Axis letters: *step leading axes · V vocabulary · K entries kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_DEPTH = 32  # entries per column: 2 to 64 take the time of one pass, this one ranks the least afterwards
# Work space of a pass over rows: on a CPU larger blocks spend their time in page faults.
_CACHE_ENTRIES = 1 << 18
_DEVICE_ENTRIES = 1 << 27


def largest(x: Float[Tensor, "*step V"], k: int) -> tuple[Float[Tensor, "*step K"], Int[Tensor, "*step K"]]:
    """The k largest entries of each row in descending order, and where they are.

    Args:
        x: any real numbers; NaN counts as the largest.
        k: how many, 1 to V.

    Returns:
        Values and indices. `ids[..., 0]` is the lowest index that attains the maximum; other ties come in any
        order.

    Raises:
        ValueError: k outside 1..V.
    """
    vocab_size = x.shape[-1]
    if not 1 <= k <= vocab_size:
        raise ValueError(f"asked for the {k} largest of {vocab_size} entries; k must be 1 to {vocab_size}")
    num_columns = vocab_size // _DEPTH
    if num_columns < 4 * k or num_columns < _DEPTH:
        values, ids = x.topk(k, dim=-1)
        first = x.argmax(-1, keepdim=True)
    else:
        values, ids, first = _by_columns(x, k, num_columns)
    # whichever of the tied maxima was ranked first changes places with the lowest index
    ids = torch.where(ids == first, ids[..., :1], ids)
    return values, torch.cat([first, ids[..., 1:]], dim=-1)


def _by_columns(x: Tensor, k: int, num_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, ids and the lowest index of the maximum."""
    body = num_columns * _DEPTH
    table = x[..., :body].unflatten(-1, (_DEPTH, num_columns))
    best = table.detach().amax(-2)  # [*step, columns]
    chosen = best.topk(k, dim=-1, sorted=False).indices.unsqueeze(-2)  # [*step, 1, K]
    row = torch.arange(_DEPTH, device=x.device).unsqueeze(-1) * num_columns
    candidates = table.gather(-1, chosen.expand(*chosen.shape[:-2], _DEPTH, k)).flatten(-2)
    ids = (chosen + row).flatten(-2)  # [*step, 32 K]
    if body < x.shape[-1]:
        rest = torch.arange(body, x.shape[-1], device=x.device).expand(*ids.shape[:-1], -1)
        candidates = torch.cat([candidates, x[..., body:]], dim=-1)
        ids = torch.cat([ids, rest], dim=-1)
    values, place = candidates.topk(k, dim=-1)
    top = values[..., :1]
    first = torch.where(candidates == top, ids, x.shape[-1] - 1).amin(-1, keepdim=True)
    # with more tied columns than were chosen, the lowest index may lie in one that was not
    crowded = (best == top).sum(-1, keepdim=True) > k
    if torch.compiler.is_compiling() or bool(crowded.any()):
        first = torch.where(crowded, x.argmax(-1, keepdim=True), first)
    return values, ids.gather(-1, place), first


def over_rows(
    function: Callable[..., tuple[Tensor, ...]], *tensors: Float[Tensor, "*step V"]
) -> tuple[Tensor, ...]:
    """Apply a row-wise function block by block, so that its work space stays in the cache.

    Args:
        function: takes blocks [n, V], returns tensors with n first.
        tensors: inputs with the same leading axes.

    Returns:
        The results with the leading axes restored.
    """
    step, width = tensors[0].shape[:-1], tensors[0].shape[-1]
    flat = [x.reshape(-1, x.shape[-1]) for x in tensors]
    entries = _CACHE_ENTRIES if flat[0].device.type == "cpu" else _DEVICE_ENTRIES
    rows = max(1, entries // max(1, width))
    if torch.compiler.is_compiling() or len(flat[0]) <= rows:
        parts = [function(*flat)]
    else:
        parts = [function(*block) for block in zip(*(x.split(rows) for x in flat), strict=True)]
    return tuple(
        torch.cat(column).reshape((*step, *column[0].shape[1:])) for column in zip(*parts, strict=True)
    )


def on_rows(
    function: Callable[..., Tensor], rows: Bool[Tensor, "*step"], p: Float[Tensor, "*step V"], *args: Tensor
) -> Float[Tensor, " N"]:
    """Apply a row-wise function to the chosen rows only, block by block.

    Args:
        function: takes [n, V] and blocks [n] of the other arguments, returns [n].
        rows: which rows.
        p: the rows.
        args: further arguments, [*step].

    Returns:
        One value a chosen row, in order.
    """
    chosen = rows.reshape(-1).nonzero().squeeze(-1)
    flat = [x.reshape(-1) for x in args]
    matrix = p.reshape(-1, p.shape[-1])
    size = max(1, (_CACHE_ENTRIES if p.device.type == "cpu" else _DEVICE_ENTRIES) // p.shape[-1])
    if size == 1:  # long rows need not be copied together
        parts = [slice(row, row + 1) for row in chosen.tolist()]
    else:
        parts = list(chosen.split(size))
    return torch.cat([function(matrix[part], *(x[part] for x in flat)) for part in parts])
