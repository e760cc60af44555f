"""The drafter seen through the target's head: K picked logits and one logit for everything else.

Every loss that needs only the target's head is a function of these K + 1 numbers a step, so the one pass over
the vocabulary lives here, forward and backward. The softmax of the K + 1 coarse logits is exactly the
drafter's distribution with the other V − K tokens lumped into one bucket. The rest is a masked log-sum-exp,
never a difference of two large ones: `lse(all) − lse(picked)` has no correct digit left once the drafter is
confident.

`split_` and `join_` work in place on a buffer of logits; `coarsen` wraps them for autograd and `Chunked`
calls them on its own buffer. A fused kernel has these two functions to replace and nothing else.

Axes: N steps · V vocabulary · K head entries · C = K + 1 coarse classes (K when the head is the vocabulary).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

# Stands in for log 0: far below any logit, and 0 · NEVER is still 0.
NEVER = -1e30
# Logit of a token that a drafter cannot propose: e^ABSENT is 0, and a target mass of e^-60 times it still is.
ABSENT = -1e4
_TILE = 1 << 17  # entries


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision losses compute in: fp32, or float64 for float64 input."""
    return torch.promote_types(dtype, torch.float32)


def tile_rows(x: Float[Tensor, "N V"]) -> int:
    """How many rows a CPU keeps in its cache from one operation to the next; all of them on a GPU."""
    return max(1, _TILE // x.shape[-1]) if x.device.type == "cpu" else max(1, len(x))


def split_(
    buffer: Float[Tensor, "N V"], ids: Int[Tensor, "N K"]
) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N 1"]]:
    """Coarse logits of the head `ids`; overwrites the logits with what `join_` needs.

    Args:
        buffer: drafter logits, fp32 or float64; afterwards e^{z_j − top} outside the head and 0 inside.
        ids: distinct token ids of each step.

    Returns:
        The coarse logits (columns as `ids`, then the rest) and the sum of the overwritten buffer.
    """
    picked = buffer.gather(-1, ids)
    buffer.scatter_(-1, ids, -torch.inf)
    top = buffer.amax(-1, keepdim=True).clamp_(min=NEVER)
    total = buffer.sub_(top).exp_().sum(-1, keepdim=True).clamp_(min=torch.finfo(buffer.dtype).tiny)
    if ids.shape[-1] == buffer.shape[-1]:
        return picked, total
    return torch.cat([picked, top + total.log()], -1), total


def join_(
    buffer: Float[Tensor, "N V"],
    total: Float[Tensor, "N 1"],
    ids: Int[Tensor, "N K"],
    grad: Float[Tensor, "N C"],
) -> Float[Tensor, "N V"]:
    """Turn the buffer left by `split_` into the gradient with respect to the logits, in place."""
    num_kept = ids.shape[-1]
    if num_kept < buffer.shape[-1]:
        buffer.mul_(grad[:, num_kept:] / total)
    return buffer.scatter_(-1, ids, grad[:, :num_kept])


class _Coarsen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        buffer = logits.to(work_dtype(logits.dtype), copy=True)
        coarse, total = split_(buffer, ids)
        ctx.save_for_backward(buffer, total, ids)
        ctx.dtype = logits.dtype
        return coarse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        buffer, total, ids = ctx.saved_tensors
        return join_(buffer.clone(), total, ids, grad).to(ctx.dtype), None


def coarsen(logits: Float[Tensor, "N V"], ids: Int[Tensor, "N K"]) -> Float[Tensor, "N C"]:
    """The drafter's logits on the head, and the log-sum-exp of all its other logits as the last column.

    Args:
        logits: drafter logits of any floating dtype; the result is at least fp32.
        ids: distinct token ids of each step, the target's K most probable.

    Returns:
        Coarse logits; their softmax is the drafter's distribution over (head, everything else). When the head
        is the whole vocabulary there is no last column.

    Examples:
        >>> z = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
        >>> coarse = coarsen(z, torch.tensor([[1, 0]]))
        >>> coarse.shape, torch.allclose(coarse.softmax(-1)[0, -1], z.softmax(-1)[0, 2:].sum())
        (torch.Size([1, 3]), True)
    """
    return _Coarsen.apply(logits, ids)


def lump(values: Float[Tensor, "N C"], keep: int) -> Float[Tensor, "N D"]:
    """Coarser still: the first `keep` columns, and the log-sum-exp of the others as the last."""
    if keep >= values.shape[-1]:
        return values
    return torch.cat([values[:, :keep], values[:, keep:].logsumexp(-1, keepdim=True)], -1)
