"""The k largest entries of a row by selection, not sorting: one pass over memory whatever k is.

`torch.topk` ranks the whole vocabulary. Here the row is dealt into short columns, the k columns with the
largest maxima are chosen (again by dealing, as long as there are many), and only their entries are ranked:
any entry of another column is at most as large as k entries already chosen, so the values are exact.

Axis letters: *step leading axes · V vocabulary · K entries kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_LONG = 1 << 15  # entries of a row from which the first deal takes deeper columns
_DEPTHS = (8, 32)  # entries per column of a short and of a long row
_MIN_COLUMNS = 128  # with fewer, plain topk is as fast
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
    values, ids = select(x, k if k != 1 else min(2, vocab_size))
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # argmax is slow on a CPU, and only needed where the maximum is not unique
        tied = values[..., 0] == values[..., min(1, vocab_size - 1)]
        first = ids[..., :1].masked_scatter(tied.unsqueeze(-1), x[tied].argmax(-1))
    else:  # elsewhere the host would wait to learn how many rows are tied
        first = x.argmax(-1, keepdim=True)
    # whichever of the tied maxima was ranked first changes places with the lowest index
    ids = torch.where(ids == first, ids[..., :1], ids)
    return values[..., :k], torch.cat([first, ids[..., 1:k]], dim=-1)


def select(x: Float[Tensor, "*step V"], k: int) -> tuple[Float[Tensor, "*step K"], Int[Tensor, "*step K"]]:
    """The same with ties in any order, also at the top.

    Args:
        x: any real numbers; NaN counts as the largest.
        k: how many, 1 to V.

    Raises:
        ValueError: k outside 1..V.
    """
    vocab_size = x.shape[-1]
    if not 1 <= k <= vocab_size:
        raise ValueError(f"asked for the {k} largest of {vocab_size} entries; k must be 1 to {vocab_size}")
    depth = _DEPTHS[vocab_size >= _LONG]
    num_columns = vocab_size // depth
    if num_columns < max(4 * k, _MIN_COLUMNS):
        values, ids = x.topk(k, dim=-1)
        return values, ids
    body = num_columns * depth
    table = x[..., :body].unflatten(-1, (depth, num_columns))
    chosen = select(table.detach().amax(-2), k)[1].unsqueeze(-2)  # [*step, 1, K]
    candidates = table.gather(-1, chosen.expand(*chosen.shape[:-2], depth, k)).flatten(-2)
    if body < vocab_size:
        candidates = torch.cat([candidates, x[..., body:]], dim=-1)
    values, place = candidates.topk(k, dim=-1)
    ids = chosen.squeeze(-2).gather(-1, place % k) + place // k * num_columns
    return values, torch.where(place < depth * k, ids, place - depth * k + body)


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
