"""Attention of many short groups of queries to a context they share and to keys of their own, for training.

torch's attention has no room for the latter. As there (FlashAttention, arXiv 2205.14135), the scores of a
batch are never there at once: the forward pass walks blocks of groups and keeps the output and the log-sum-
exp of each query, the backward pass makes the scores again. Context that no group of a block can see is
skipped, which is half of it where groups stand in the order of the text.

Letters: R rows, N key-value heads, F query heads of each, A groups, Q queries of a group, T context tokens,
M keys of a group's own, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from certdraft.drafters.features.flex import grouped_flex_attention, takes_block_masks
from certdraft.drafters.features.visible_spans import VisibleSpans

# Scores held at once: small enough for a CPU's cache, large enough to fill a device.
_CPU_SCORES = 1 << 19
_DEVICE_SCORES = 1 << 26

Span = tuple[slice, slice]  # of groups, and of the context that one of them sees


@torch.compiler.disable  # type: ignore[untyped-decorator]
def grouped_attention(
    queries: Float[Tensor, "R heads A Q D"],
    context: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor] | None,
    visible: VisibleSpans,
    caller: str = "",
) -> Float[Tensor, "R heads A Q D"]:
    """Each group of queries attends to the context that is visible to it and to keys of its own.

    Costs at most A·Q·(T + M) scores, because groups do not see each other. Softmax in fp32, or in fp64 for
    fp64 queries. Without own keys this is torch's attention.

    Args:
        queries: of A groups.
        context: keys and values [R, N, T, D] that all groups share.
        own: keys and values [R, N, A, M, D] that only one group sees; None: none.
        visible: which of the keys a query sees; at least one.
        caller: the kind of network that asks; each compiles its own kernels, where there are any.
    """
    if takes_block_masks(queries.device):
        return grouped_flex_attention(queries, context, own, visible, caller)
    num_rows, num_heads, num_groups, num_queries, size = queries.shape
    num_kv, num_context = context[0].shape[1:3]
    if own is None:
        seen = ~visible.hidden(slice(None), slice(0, num_context))
        mask = seen.expand(-1, -1, num_queries, -1).flatten(1, 2)[:, None]
        mixed = functional.scaled_dot_product_attention(
            queries.flatten(2, 3), *context, attn_mask=mask, enable_gqa=True
        )
        return mixed.unflatten(2, (num_groups, num_queries))
    device = queries.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else queries.dtype
    q, *rest = (part.to(dtype) for part in (queries * size**-0.5, *context, *own))
    folded = q.unflatten(1, (num_kv, -1))
    scores = _CPU_SCORES if device == "cpu" else _DEVICE_SCORES
    step = max(1, scores // (num_rows * num_heads * num_queries * num_context))
    with torch.autocast(device, enabled=False):
        out: Tensor = _Grouped.apply(folded, *rest, visible, list(_spans(visible, num_context, step)))
    return out.flatten(1, 2)


def _spans(visible: VisibleSpans, num_context: int, step: int) -> Iterator[Span]:
    empty = visible.start[..., 0] >= visible.stop  # the first query of a group sees the most of the context
    starts = visible.start[..., 0].masked_fill(empty, num_context).amin(0).tolist()
    stops = visible.stop.masked_fill(empty, 0).amax(0).tolist()
    for first in range(0, len(stops), step):
        last = min(first + step, len(stops))
        stop = max(stops[first:last])
        yield slice(first, last), slice(min(stop, *starts[first:last]), stop)


class _Grouped(torch.autograd.Function):
    """Context and own keys apart, because they are laid out apart; one softmax over both."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Float[Tensor, "R N F A Q D"],
        keys: Float[Tensor, "R N T D"],
        values: Float[Tensor, "R N T D"],
        own_keys: Float[Tensor, "R N A M D"],
        own_values: Float[Tensor, "R N A M D"],
        visible: VisibleSpans,
        spans: list[Span],
    ) -> Float[Tensor, "R N F A Q D"]:
        wide = torch.promote_types(q.dtype, torch.float32)
        out, lse = torch.empty_like(q), q.new_empty((*q.shape[:-1], 1), dtype=wide)
        for groups, seen in spans:
            part = q[:, :, :, groups]
            scores = _scores(part, keys[:, :, seen], visible.hidden(groups, seen))
            own_scores = _own_scores(part, own_keys[:, :, groups], visible.own)
            top = own_scores.amax(-1, keepdim=True)
            if scores.shape[-1]:
                top = torch.maximum(top, scores.amax(-1, keepdim=True))
            scores.sub_(top).exp_()
            own_scores.sub_(top).exp_()
            total = scores.sum(-1, keepdim=True) + own_scores.sum(-1, keepdim=True)
            mixed = _shared(scores.to(q.dtype), values[:, :, seen]).to(wide)
            mixed += _own(own_scores.to(q.dtype), own_values[:, :, groups])
            out[:, :, :, groups] = mixed / total
            lse[:, :, :, groups] = top + total.log()
        ctx.save_for_backward(q, keys, values, own_keys, own_values, out, lse)
        ctx.visible, ctx.spans = visible, spans
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, keys, values, own_keys, own_values, out, lse = ctx.saved_tensors
        visible: VisibleSpans = ctx.visible
        (grad,) = grads
        dq, d_own_keys, d_own_values = (torch.empty_like(x) for x in (q, own_keys, own_values))
        d_keys, d_values = (torch.zeros_like(x, dtype=lse.dtype) for x in (keys, values))
        dot = (grad * out).sum(-1, keepdim=True, dtype=lse.dtype)
        for groups, seen in ctx.spans:
            part, grad_part = q[:, :, :, groups], grad[:, :, :, groups]
            lse_part, dot_part = lse[:, :, :, groups], dot[:, :, :, groups]

            scores = _scores(part, keys[:, :, seen], visible.hidden(groups, seen))
            weights = scores.sub_(lse_part).exp_()
            d_scores = _shared(grad_part, values[:, :, seen].transpose(-1, -2)).to(lse.dtype)
            d_scores = d_scores.sub_(dot_part).mul_(weights).to(q.dtype)
            d_values[:, :, seen] += _gathered(weights.to(q.dtype), grad_part)
            d_keys[:, :, seen] += _gathered(d_scores, part)
            d_part = _shared(d_scores, keys[:, :, seen])

            k, v = own_keys[:, :, groups], own_values[:, :, groups]
            weights = _own_scores(part, k, visible.own).sub_(lse_part).exp_()
            d_scores = _own(grad_part, v.transpose(-1, -2)).to(lse.dtype)
            d_scores = d_scores.sub_(dot_part).mul_(weights).to(q.dtype)
            d_own_values[:, :, groups] = (weights.to(q.dtype).transpose(-1, -2) @ grad_part).sum(2)
            d_own_keys[:, :, groups] = (d_scores.transpose(-1, -2) @ part).sum(2)
            dq[:, :, :, groups] = d_part + _own(d_scores, k)
        return dq, d_keys.to(keys.dtype), d_values.to(keys.dtype), d_own_keys, d_own_values, None, None


def _scores(
    q: Float[Tensor, "R N F a Q D"], keys: Float[Tensor, "R N t D"], hidden: Bool[Tensor, "R a Q t"]
) -> Float[Tensor, "R N F a Q t"]:
    scores = _shared(q, keys.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32))
    return scores.masked_fill_(hidden[:, None, None], -torch.inf)


def _own_scores(
    q: Float[Tensor, "R N F a Q D"], keys: Float[Tensor, "R N a M D"], visible: Bool[Tensor, "Q M"] | None
) -> Float[Tensor, "R N F a Q M"]:
    scores = _own(q, keys.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32))
    return scores if visible is None else scores.masked_fill_(~visible, -torch.inf)


def _shared(x: Float[Tensor, "R N F a Q I"], y: Float[Tensor, "R N I J"]) -> Float[Tensor, "R N F a Q J"]:
    """x @ y, y the same for all groups: one large product a head."""
    return (x.flatten(2, 4) @ y).unflatten(2, x.shape[2:5])


def _gathered(x: Float[Tensor, "R N F a Q I"], y: Float[Tensor, "R N F a Q J"]) -> Float[Tensor, "R N I J"]:
    """xᵀ @ y over all groups."""
    return x.flatten(2, 4).transpose(-1, -2) @ y.flatten(2, 4)


def _own(x: Float[Tensor, "R N F a Q I"], y: Float[Tensor, "R N a I J"]) -> Float[Tensor, "R N F a Q J"]:
    """x @ y group by group, y the same for the heads that share it."""
    return x @ y[:, :, None]
